"""Containers run as any user: without a home, a name, or a place for caches that can be written."""

import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from reachrl import home
from reachrl.home import cache_folder, home_variables

VARIABLES = (
    "HOME",
    "USER",
    "LOGNAME",
    "LNAME",
    "USERNAME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "TRITON_HOME",
    *home._CACHES,
)


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without an entry in the password file, and without variables that name a home or the user."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(home.tempfile, "tempdir", str(tmp_path))
    home.private_folder.cache_clear()
    yield monkeypatch
    home.private_folder.cache_clear()


def test_an_ordinary_user_lacks_nothing(nobody, tmp_path):
    nobody.undo()
    nobody.setenv("HOME", str(tmp_path))
    assert home_variables() == {}


def test_a_user_without_home_and_name_gets_both(nobody, tmp_path):
    with pytest.raises(RuntimeError):
        Path.home()
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    for name, value in home_variables().items():
        nobody.setenv(name, value)
    assert Path.home() == tmp_path / f"reachrl-{os.getuid()}" and getpass.getuser() == f"uid{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert home_variables() == {}  # and lacks nothing any more


@pytest.mark.parametrize("empty", [False, True])
def test_a_home_that_cannot_be_written_stays_and_only_caches_move(nobody, tmp_path, empty):
    """Models and data that were put there must be found; an empty variable counts as unset."""
    nobody.setattr(home.os, "access", lambda path, mode: not str(path).startswith("/proc"))
    nobody.setenv("HOME", "/proc/1")
    nobody.setenv("NUMBA_CACHE_DIR", "" if empty else "/mine")
    found = home_variables()
    private = str(tmp_path / f"reachrl-{os.getuid()}")
    assert "HOME" not in found and found["MPLCONFIGDIR"].startswith(private)
    assert found.get("NUMBA_CACHE_DIR", "kept").startswith(private if empty else "kept")
    assert cache_folder().is_relative_to(private)


def test_a_home_in_the_password_file_that_is_not_there_is_no_place_for_caches(nobody, tmp_path):
    nobody.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_dir="/proc/none"))
    nobody.setattr(home.os, "access", lambda path, mode: not str(path).startswith("/proc"))
    found = home_variables()
    assert found["HOME"] == "/proc/none" and found["NUMBA_CACHE_DIR"].startswith(str(tmp_path))


def test_one_closed_folder_of_a_home_moves_its_cache_alone(nobody, tmp_path):
    (tmp_path / "user" / ".cache").mkdir(parents=True)  # made by another user, as images do
    nobody.setattr(home.os, "access", lambda path, mode: not str(path).endswith(".cache"))
    nobody.setenv("HOME", str(tmp_path / "user"))
    assert home_variables().keys() == {"USER", "NUMBA_CACHE_DIR"}


def test_caches_lie_where_the_user_keeps_caches(nobody, tmp_path):
    nobody.setenv("HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / ".cache" / "reachrl"
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "reachrl"
    nobody.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "user" / ".cache" / "reachrl"


def test_a_folder_that_others_could_have_filled_is_not_used(nobody, tmp_path):
    planted = tmp_path / f"reachrl-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    assert home.private_folder() != planted and home.private_folder().parent == tmp_path


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's place (needs root)")
def test_a_user_id_that_nobody_has_finds_a_place():
    """The real thing: no variable, no entry in the password file."""
    code = (
        "import getpass, os, sys; from reachrl.home import cache_folder, home_variables\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "os.environ.update(home_variables())\n"
        "cache_folder().mkdir(parents=True); (cache_folder() / 'x').touch()\n"
        "print(getpass.getuser(), cache_folder())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with tempfile.TemporaryDirectory() as place:  # pytest's own lies where others may not look
        Path(place).chmod(0o1777)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"TMPDIR": place},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == f"uid54321 {place}/reachrl-54321/.cache/reachrl\n", done.stderr
