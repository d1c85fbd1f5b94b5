"""Names that a user or a data set chose, as names of files."""

import hashlib
import re

MAX_BYTES = 140
"""Longest name returned, in bytes. File systems take 255: a prefix and what marks temporary copies fit too."""

_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]*")
_OTHER = re.compile(r"[^A-Za-z0-9._-]+")
_READABLE = 100  # characters kept of a name that is not plain


def file_name(name: str, suffix: str = "") -> str:
    """Return the name of the file that belongs to `name`: injective, bounded, without a path.

    A plain name (lower-case letters, digits, `.`, `_`, `-`, not too long) is kept. Any other keeps what is readable
    of it, followed by `~` and 96 bits of its SHA-256, so that two names never share a file, on file systems that
    ignore case or normalise Unicode either.

    Args:
        name: anything, such as a task's name or a sentence.
        suffix: appended, such as `.mp4`; at most 16 bytes.
    """
    if _PLAIN.fullmatch(name) and len(name) + len(suffix) <= MAX_BYTES:
        return name + suffix
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    readable = _OTHER.sub("_", name)[:_READABLE].lstrip(".")
    return f"{readable}~{digest}{suffix}"
