"""File names and code (as text) of a hub repository, beyond the files that are downloaded."""

import json
import logging
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from reachrl.errors import StorageError
from reachrl.home import cache_folder
from reachrl.run.atomic import write_json_atomic

logger = logging.getLogger(__name__)

_SNAPSHOTS = "snapshots"  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
_MODELS = "models--"
_MOST_FILES, _LARGEST_CODE = 20, 1 << 20  # files of code that are looked into, and bytes of each
_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Published:
    """Listing of a repository; empty if a folder is not a snapshot of one."""

    names: tuple[str, ...] = ()  # of all files, with their folders
    code: dict[str, str] = field(default_factory=dict)  # text of the files of Python: read, never run


@cache
def published(folder: Path) -> Published:
    """Return the listing of the repository that `folder` is a snapshot of, at the same commit.

    The listing is cached for use without a network. If it is neither reachable nor cached, a warning is logged.
    """
    if folder.parent.name != _SNAPSHOTS or not folder.parent.parent.name.startswith(_MODELS):
        return Published()
    repository = folder.parent.parent.name.removeprefix(_MODELS).replace("--", "/")
    kept = cache_folder() / "hub" / f"{folder.parent.parent.name}@{folder.name}.json"
    try:
        stored = json.loads(kept.read_text(encoding="utf-8"))
        return Published(names=tuple(stored["names"]), code=dict(stored["code"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never asked, or damaged: it is asked for now
    try:
        found = _ask(repository, folder.name)
    except Exception as error:  # the transport's errors have no common base
        logger.warning(
            "%s: the list of files of %s cannot be read (%s): signs of another function of the same weights are looked "
            "for among the downloaded files alone", folder, repository, error,
        )  # fmt: skip
        return Published()
    try:
        write_json_atomic(kept, asdict(found))
    except (OSError, StorageError) as error:
        logger.warning("%s cannot be written (%s): the hub is asked again next time", kept, error)
    return found


def _ask(repository: str, commit: str) -> Published:
    from huggingface_hub import HfApi, hf_hub_download

    siblings = HfApi().model_info(repository, revision=commit, timeout=_TIMEOUT, files_metadata=True).siblings or []
    code = {}
    with TemporaryDirectory() as aside:  # not the hub's cache: what is there is what may be loaded
        for each in siblings:
            if each.rfilename.endswith(".py") and (each.size or 0) <= _LARGEST_CODE and len(code) < _MOST_FILES:
                place = hf_hub_download(repository, each.rfilename, revision=commit, local_dir=aside)
                code[each.rfilename] = Path(place).read_text(encoding="utf-8", errors="replace")
    return Published(names=tuple(each.rfilename for each in siblings), code=code)
