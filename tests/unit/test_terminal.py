"""Words from foreign files reach the terminal as words: no escape sequence, direction mark or markup in them acts."""

import io
import json
import logging
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from small_policy import foreign, unseal

from reachrl.cli.display import Display
from reachrl.cli.terminal import Terminal, printable

NASTY = "a\x1b]0;owned\x07\x1b[2Jb\u202egnp\u2066\x9b1m\r\x08[/red][bold]\udcff\u2028c"
SHOWN = r"a\x1b]0;owned\x07\x1b[2Jb\u202egnp\u2066\x9b1m\r\x08[/red][bold]\udcff\u2028c"
# Rich drops bells, backspaces and carriage returns by itself.
BARE = SHOWN.replace(r"\x07", "").replace(r"\r\x08", "")


def assert_tame(text: str) -> None:
    assert not set(text) & {"\x1b", "\x07", "\x08", "\r", "\x9b", "\u202e", "\u2066", "\u2028", "\udcff"}, ascii(text)


def test_what_could_steer_is_written_out_and_the_rest_left_alone():
    assert printable(NASTY) == SHOWN
    for plain in ("k/n  95 % [12, 88]\n\tübung → 你好 مرحبا", "95\u00a0%", ""):
        assert printable(plain) == plain


@pytest.mark.parametrize("colour", [False, True])
def test_texts_titles_cells_and_columns(colour):
    console = Terminal(
        file=io.StringIO(), width=300, force_terminal=colour, color_system="standard" if colour else None
    )
    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(Text(NASTY, "bold"))
    table.add_row(NASTY)
    for what in (NASTY, Text(NASTY), table, Text.assemble(("x", "red"), NASTY)):
        console.print(what)
    written = console.file.getvalue()
    if colour:  # the console's own sequences are colours and nothing else
        import re

        written = re.sub(r"\x1b\[[\d;]*m", "", written)
    assert_tame(written)
    assert "\\x1b]0;owned" in written and written.count("[/red][bold]") >= 7


def test_errors_bars_messages_and_log_records(capsys):
    from reachrl.cli.app import show_error
    from reachrl.errors import CheckpointError

    show_error(CheckpointError(NASTY))
    assert capsys.readouterr().err == f"error: {BARE}\n"
    for live in (False, True):
        console = Terminal(file=io.StringIO(), width=200, force_terminal=live, color_system=None)
        display = Display(console, interval_s=0)
        with display.logging(), display.stage(NASTY, 2, NASTY) as stage:
            stage.advance(1, task=NASTY)
            stage.log(NASTY)
            logging.getLogger("reachrl.x").warning("%s", NASTY)
        assert "\x1b]0" not in console.file.getvalue() and "\u202e" not in console.file.getvalue()
        assert f"warning: {BARE}" in console.file.getvalue()


def test_a_checkpoints_names(base: Path, tmp_path: Path, command_line, capsys):
    folder = foreign(base, tmp_path / "foreign", base_model_name_or_path=NASTY.replace("\udcff", ""), r=2)
    code, out, err = command_line("model", "info", folder, columns=300)
    assert_tame(out + err)
    assert code == 0 and r"a\x1b]0;owned\x07\x1b[2Jb\u202egnp" in out
    stats = {"q01": [0.0], "q99": [1.0], "mask": [True]}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps({"model_type": NASTY.replace("\udcff", "")}))
    (tmp_path / "bad" / "dataset_statistics.json").write_text(json.dumps({"x": {"action": stats}}))
    code, out, err = command_line("model", "info", tmp_path / "bad")
    assert code == 6 and "Traceback" not in err
    assert_tame(out + err)


def test_warnings_of_commands_without_progress(command_line, monkeypatch):
    def warn(*_):
        logging.getLogger("reachrl.policies").warning("%s was trained otherwise", NASTY)
        raise SystemExit(0)

    monkeypatch.setattr("reachrl.config.loading.list_presets", warn)
    for name in ("reachrl", None):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    _, _, err = command_line("list", "presets")
    assert err == f"warning: {SHOWN} was trained otherwise\n"


def test_unsealed_folders_are_still_shown(base: Path, command_line):
    assert command_line("model", "info", unseal(base))[0] == 0
