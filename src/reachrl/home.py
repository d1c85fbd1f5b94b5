"""A user without a home, a name or a place for caches, as containers run: what libraries need to go on regardless."""

import os
import pwd
import stat
import tempfile
from functools import cache
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where `getpass.getuser` looks before the password file
# Libraries that end a process when they find no place for what is merely a cache. Where models and data are kept is
# not among them: a home that cannot be written may still hold those.
_CACHES = {  # by the variable that names the place: the variable and the folder of the home that decide else
    "NUMBA_CACHE_DIR": ("XDG_CACHE_HOME", ".cache"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", ".config"),
    "TRITON_CACHE_DIR": ("TRITON_HOME", ".triton"),
}


def home_variables() -> dict[str, str]:
    """The environment variables that this process and its children lack to do without a home of their own.

    Empty for an ordinary user. An empty variable counts as unset.
    """
    entry = _password_entry()
    found: dict[str, str] = {}
    if entry is None and not any(os.environ.get(name) for name in _NAMES):
        found["USER"] = f"uid{os.getuid()}"
    home = os.environ.get("HOME") or (entry.pw_dir if entry is not None else "")
    if not os.path.isabs(home):
        home = str(private_folder())
    if home != os.environ.get("HOME"):
        found["HOME"] = home
    for name, (base, below) in _CACHES.items():
        if not os.environ.get(name) and not _writable(Path(os.environ.get(base) or Path(home) / below)):
            found[name] = str(private_folder() / name.lower())
    return found


def cache_folder() -> Path:
    """Where this package keeps what it can make again: below the user's caches, or apart where those are closed."""
    named = os.environ.get("XDG_CACHE_HOME") or ""
    home = home_variables().get("HOME") or os.environ.get("HOME") or ""
    base = Path(named) if os.path.isabs(named) else Path(home) / ".cache"
    return (base if _writable(base) else private_folder()) / "reachrl"


@cache
def private_folder() -> Path:
    """A folder for temporary files that no other user can write, the same for all processes of one user."""
    folder = Path(tempfile.gettempdir()) / f"reachrl-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass  # somebody else's file bears the name: one of our own, then
    return Path(tempfile.mkdtemp(prefix="reachrl-"))


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it does not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _password_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None
