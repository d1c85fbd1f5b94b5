"""Words from foreign files reach the terminal as words: no escape sequence, direction mark or markup in them acts."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from small_policy import foreign, unseal

from reachrl.cli.display import Display
from reachrl.cli.terminal import Terminal, print_table, printable

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
            display.log(NASTY)
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


# --- narrow terminals -------------------------------------------------------------------------------


def words(shown: str) -> set[str]:
    return set(re.sub("[━┃┡╇┩┏┳┓│├┼┤└┴┘─]", " ", shown).split())


@pytest.mark.parametrize(
    "command",
    [
        ("list",),
        ("plan", "metaworld_quickstart"),
        ("config", "paper", "--explain"),
    ],
    ids=lambda command: command[0],
)
def test_a_narrow_terminal_cuts_no_figure(command_line, command):
    """Each is printed as words that another width prints, whole: none is split or missing."""
    _, wide, _ = command_line(*command, columns=300)
    assert len(words(wide)) > 50
    for columns in (80, 60):
        _, narrow, _ = command_line(*command, columns=columns)
        # Heads are left out where there is no table; times are measured anew by each plan.
        lost = {word for word in words(wide) - words(narrow) if not re.match(r"[\d(.]+", word)}
        assert lost <= {"key", "preset", "suite", "task"} and "…" not in narrow


def test_results_on_narrow_terminals(monkeypatch, capsys, tmp_path):
    from reachrl.cli.results import show_best_of, show_robustness

    rate = {"k": 1035, "n": 1200, "rate": 0.8625, "wilson95": [0.8418, 0.8808]}
    test = {"improved": 137, "worsened": 107, "p_value": 0.0642}
    best = {
        "mode": "temperature 1.2", "rank": "critic", "oracle_look_ahead": True, "caveats": ["one seed"],
        "rows": [{"best_of": n, "outcomes": rate, "against_one": test, "ms_per_decision": 1234.5} for n in (1, 16)],
    }  # fmt: skip
    axis = {"rates": {"before": rate, "after": rate}, "paired_test": test, "against_plain": {"after": test}}
    robust = {
        "policies": {"before": "", "after": ""}, "suite": "metaworld", "mode": "greedy", "caveats": [],
        "plain": axis, "perturbed": axis, "axes": [{"axis": "camera distance", **axis}],
    }  # fmt: skip
    shown = {}
    for columns in (300, 80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_best_of(best, tmp_path)
        show_robustness(robust, tmp_path)
        shown[columns] = capsys.readouterr().out
    assert "1035/1200  86 % [84, 88]" in shown[300] and "+137 -107, p = 0.064" in shown[300]
    for columns in (80, 60):
        assert words(shown[300]) == words(shown[columns]) and "…" not in shown[columns]
        for figure, times in (("1035/1200  86 % [84, 88]", 8), ("+137 -107, p = 0.064", 6), ("1234.5", 2)):
            assert shown[columns].count(figure) == times


def test_a_table_takes_the_width_that_its_words_leave():
    console = Terminal(file=io.StringIO(), width=40)
    table = Table(box=None, pad_edge=False)
    for column in ("key", "value", "why"):
        table.add_column(column)
    table.add_row("averyveryverylongkey", "0.0002", "it learns in larger steps", style="bold")
    print_table(console, table)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert shown == [
        ["key", "value", "why"], ["averyveryverylongkey", "0.0002", "it", "learns"], ["in", "larger"], ["steps"]
    ]  # fmt: skip
    console = Terminal(file=io.StringIO(), width=32)
    print_table(console, table)
    assert console.file.getvalue() == ("averyveryverylongkey\n  value  0.0002\n  why    it learns in larger steps\n")


def test_lines_of_a_live_terminal_break_between_words_and_those_of_a_file_nowhere():
    line, path = "train 12/24  success 47/101  kl 0.0123  report at", "/tmp/" + 60 * "x" + "/report.html"
    for live, shown in (
        (True, f"train 12/24  success 47/101  kl \n0.0123  report at\n{path}\n"),
        (False, f"{line} {path}\n"),
    ):
        console = Terminal(file=io.StringIO(), width=32, force_terminal=live, color_system=None, legacy_windows=False)
        Display(console).log(f"{line} {path}")
        assert [each.rstrip() for each in console.file.getvalue().splitlines()] == [
            each.rstrip() for each in shown.splitlines()
        ]


COMMANDS = (
    *("", "quickstart", "demos", "sft", "reward", "reward fit", "reward segments", "reward inspect", "train", "eval"),
    *("robust", "report", "export", "list", "config", "plan", "model", "model info", "model verify", "version"),
)


@pytest.mark.parametrize("columns", [60, 80])
def test_help_is_whole_on_narrow_terminals(command_line, columns):
    """Of 60 columns rich leaves 19 for an option's name; two have more."""
    cut = set()
    for command in COMMANDS:
        code, out, _ = command_line(*command.split(), "--help", columns=columns)
        assert code == 0 and max(map(len, out.splitlines())) <= columns
        cut |= {line.split()[1] for line in out.splitlines() if "…" in line}
        assert "[[" not in out
    assert cut <= ({"--install-completi…", "--decisions-per-se…"} if columns == 60 else set())
