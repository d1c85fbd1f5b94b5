"""What several unit tests use."""

import sys
from pathlib import Path

import pytest

from reachrl.cli import app as cli


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved small policy."""
    from small_policy import save_base

    folder = tmp_path_factory.mktemp("base") / "policy"
    save_base(folder)
    return folder


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run `reachrl ...` in this process on a terminal of some width; returns exit code, stdout, stderr."""

    def run(*arguments: object, columns: int = 100) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reachrl", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
