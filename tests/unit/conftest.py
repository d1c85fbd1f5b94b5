"""What several unit tests use."""

import sys

import pytest

from reachrl.cli import app as cli


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
