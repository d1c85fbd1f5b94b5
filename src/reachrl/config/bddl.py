"""Files of LIBERO's tasks as data: the sentence in a definition, and whether files are those that were released."""

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from reachrl.errors import ConfigError

_LANGUAGE = re.compile(r"\(:language\s+([^()]*)\)", re.IGNORECASE)


@cache
def sentence_of(path: Path, remedy: str) -> str:
    """What a task's file says is to be done, in lower case.

    Args:
        path: of the file.
        remedy: command that installs it again.

    Raises:
        ConfigError: the file is missing or has no sentence.
    """
    try:
        found = _LANGUAGE.search(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); run  {remedy}") from error
    if found is None:
        raise ConfigError(f"{path} was edited: it has no (:language ...); run  {remedy}")
    return " ".join(found[1].lower().split())


def digest_of(files: Iterable[Path], remedy: str) -> str:
    """SHA-256 of the files' contents, one after the other, in hexadecimal.

    Args:
        files: in order.
        remedy: command that installs them again.

    Raises:
        ConfigError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error}); run  {remedy}") from error
    return digest.hexdigest()
