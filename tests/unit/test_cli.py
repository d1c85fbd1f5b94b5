"""The command line: what is shown, what is asked of the pipeline, how errors and interruptions end."""

import errno
import io
import json
import logging
import os
import re
import shlex
import sys
import tomllib
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from reachrl import errors
from reachrl.cli import app as cli
from reachrl.cli.display import Display, format_duration
from reachrl.cli.terminal import Terminal
from reachrl.config.libero_tasks import SUITES
from reachrl.config.loading import config_dict, list_presets, load_config
from reachrl.config.metaworld_tasks import INSTRUCTIONS


@pytest.fixture
def reachrl(command_line):
    """Run `reachrl ...` on a wide terminal; returns exit code, stdout, stderr."""
    return partial(command_line, columns=200)


@pytest.fixture
def stages_run(monkeypatch):
    """Records what is asked of the pipeline instead of running it."""
    import reachrl.pipeline

    calls = []

    def run_stage(name, config, run_dir, display):
        calls.append((name, config, run_dir))
        if name == "eval":
            (run_dir / "eval").mkdir(parents=True)
            for when, k in (("before", 3), ("after", 9)):
                record = {"k": k, "n": 10, "rate": k / 10, "wilson95": [0.101, 0.899]}
                record["per_task"] = {"red-square": dict(record)}
                (run_dir / "eval" / f"{when}.json").write_text(json.dumps({"greedy": record}))
            stages = {"eval": {"info": {"caveats": ["pictures are not the benchmark's"]}}}
            (run_dir / "stages.json").write_text(json.dumps(stages))

    monkeypatch.setattr(reachrl.pipeline, "run_stage", run_stage)
    return calls


# --- errors -----------------------------------------------------------------------------------------


def test_a_mistake_is_told_on_stderr_with_its_exit_code_and_no_traceback(reachrl):
    code, out, err = reachrl("config", "toyy")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown preset 'toyy'") and "did you mean 'toy'" in err
    assert "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "override", ["env.num_env=3", "algorithm.lr=fast", "nonsense", "env.tasks=door-clos", "env.kind=x"]
)
def test_a_wrong_override_fails_before_anything_runs(reachrl, stages_run, tmp_path, override):
    code, _, err = reachrl("train", "metaworld_quickstart", override, "--run", str(tmp_path / "run"))
    assert code == 2 and override.partition("=")[0].split(".")[-1] in err
    assert stages_run == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.MissingExtra, 3),
        (errors.ExtensionError, 4),
        (errors.WorkerError, 5),
        (errors.CheckpointError, 6),
        (errors.DivergedError, 7),
        (errors.StorageError, 8),
    ],
)
def test_each_error_has_its_exit_code_and_its_words_arrive_unchanged(reachrl, monkeypatch, error, code):
    words = "env 3 [red] died at step 7; see /nowhere/log [/red]"  # what rich would take for markup

    def fail(*_):
        raise error(words)

    monkeypatch.setattr("reachrl.pipeline.run_stage", fail)
    assert reachrl("train", "toy") == (code, "", f"error: {words}\n")


@pytest.mark.parametrize(
    ("code", "words"),
    [("Sim = missing", "NameError: name 'missing'"), ("class Sim(", "SyntaxError"), ("x = 1", "AttributeError")],
)
def test_a_plug_in_that_cannot_be_imported_is_an_error_and_no_traceback(reachrl, monkeypatch, tmp_path, code, words):
    (tmp_path / "broken_sim.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_sim", raising=False)
    status, _, err = reachrl("config", "toy", "env.kind=broken_sim:Sim")
    assert status == errors.ExtensionError.exit_code and "Traceback" not in err
    assert words in err and "python -c 'from broken_sim import Sim'" in err


@pytest.mark.parametrize(("kind", "missing"), [("no_lab.sim:Sim", "no_lab"), ("lab.valve:Sim", "lab.valve")])
def test_a_module_that_is_not_there_is_looked_for_somewhere(reachrl, monkeypatch, tmp_path, kind, missing):
    """The package itself, as where the command runs in another folder, or a file of it; neither can be installed."""
    (tmp_path / "lab").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lab", raising=False)
    status, _, err = reachrl("config", "toy", f"env.kind={kind}")
    assert status == errors.ExtensionError.exit_code
    assert f"there is no module '{missing}', neither here ({tmp_path}) nor on PYTHONPATH" in err


def test_a_plug_in_that_needs_a_package_says_which(reachrl, monkeypatch, tmp_path):
    (tmp_path / "needy_sim.py").write_text("import no_such_physics")
    monkeypatch.syspath_prepend(tmp_path)
    status, _, err = reachrl("config", "toy", "env.kind=needy_sim:Sim")
    assert status == errors.MissingExtra.exit_code and "needs the package 'no_such_physics': install it" in err


def test_a_run_that_is_not_there_is_named(reachrl, tmp_path):
    status, _, err = reachrl("report", "--run", str(tmp_path / "doors"))
    assert status == 2 and f"{tmp_path / 'doors'} has no config.json" in err


def test_a_plug_in_may_say_itself_what_is_missing(reachrl, monkeypatch, tmp_path):
    (tmp_path / "poor_sim.py").write_text("from reachrl.errors import MissingExtra\nraise MissingExtra('get it')")
    monkeypatch.syspath_prepend(tmp_path)
    assert reachrl("config", "toy", "env.kind=poor_sim:Sim") == (3, "", "error: get it\n")


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr("reachrl.pipeline.run_stage", fail)
    monkeypatch.setattr(sys, "argv", ["reachrl", "train", "toy"])
    with pytest.raises(ZeroDivisionError, match="our bug"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 2, r"ulimit -n.*env\.num_envs"),
        (OSError(errno.ENFILE, "Too many open files in system"), 2, r"ulimit -n.*env\.num_envs"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 2, r"ulimit -u.*env\.num_envs"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, r"ulimit -v.*env\.num_envs"),
        (
            ImportError("libtorch.so: cannot open shared object file: Too many open files"),
            2,
            r"ulimit -n.*env\.num_envs",
        ),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 8, "set TMPDIR"),
        (RuntimeError("can't start new thread"), 2, r"ulimit -u.*env\.num_envs"),
        (PermissionError(errno.EACCES, "Permission denied", "/closed/x"), 8, "/closed/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", b"/cd/\xe9"), 8, r"'/cd/\\udce9': Read-only file system"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 8, "out: File exists"),
        (UnicodeEncodeError("utf-8", "r\udce9sultats", 1, 2, "surrogates not allowed"), 2, r"'r\\udce9sultats'.*UTF-8"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_told_with_what_to_do(reachrl, monkeypatch, error, code, words):
    def fail(*_):
        raise error

    monkeypatch.setattr("reachrl.pipeline.run_stage", fail)
    status, out, err = reachrl("train", "toy")
    assert (status, out) == (code, "") and re.search(words, err) and err.count("\n") == 1 and "Traceback" not in err


def test_a_deleted_working_directory_is_told(reachrl, monkeypatch, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    code, _, err = reachrl("config", "toy")
    assert code == 2 and "working directory was deleted" in err and "Traceback" not in err


def test_a_working_directory_deleted_meanwhile_is_told(reachrl, monkeypatch, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("reachrl.pipeline.run_stage", lambda *_: folder.rmdir() or Path("metrics.jsonl").read_bytes())
    code, _, err = reachrl("train", "toy")
    assert code == 8 and "working directory was deleted" in err and "Traceback" not in err


def test_an_argument_that_is_no_utf8_is_told_without_printing_it_raw(reachrl):
    code, _, err = reachrl("train", "toy", "--run", os.fsdecode(b"r\xe9sultats"))
    assert code == 2 and r"'r\udce9sultats' has bytes that are no UTF-8" in err


def test_what_the_terminal_cannot_encode_is_printed_as_an_escape(monkeypatch):
    """LC_ALL=C with PYTHONUTF8=0: standard output and error are ASCII."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", narrow)
    monkeypatch.setattr(sys, "argv", ["reachrl", "config", "toy", "env.kind=d\u00e9mo"])
    with pytest.raises(SystemExit):
        cli.main()
    narrow.flush()
    assert b"d\\xe9mo" in narrow.buffer.getvalue()


def test_ctrl_c_says_how_to_resume(reachrl, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("reachrl.pipeline.run_stage", interrupt)
    arguments = ["train", "toy", "seed=2", "--run", "runs/with space"]
    code, _, err = reachrl(*arguments)
    assert code == 130 and "Traceback" not in err and "runs/with space" in err
    assert shlex.split(err.strip().splitlines()[-1]) == ["reachrl", *arguments]


def test_usage_errors_exit_with_2(reachrl):
    assert reachrl("train")[0] == 2
    assert reachrl("nonsense")[0] == 2


# --- stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (["demos"], "demos"),
        (["sft"], "sft"),
        (["reward", "fit"], "reward"),
        (["train"], "train"),
        (["eval"], "eval"),
        (["report"], "report"),
    ],
)
def test_a_stage_command_runs_its_stage(reachrl, stages_run, tmp_path, command, stage):
    code, _, err = reachrl(*command, "toy", "seed=7", "algorithm.lr=1e-3", "--run", str(tmp_path / "run"))
    assert (code, err) == (0, "")
    [(name, config, run_dir)] = stages_run
    assert (name, run_dir) == (stage, tmp_path / "run")
    assert (config.seed, config.algorithm.lr, config.env.kind) == (7, 1e-3, "reach_toy")


@pytest.mark.parametrize("words", [("list", "foo"), ("robust", "toy", "--suite", "foo")])
def test_a_wrong_choice_is_named_without_the_libraries_words(reachrl, words):
    code, _, err = reachrl(*words)
    assert code == 2 and "'foo' is not one of '" in err and "Value error" not in err


def test_options_may_stand_anywhere_and_the_run_folder_has_a_default(reachrl, stages_run):
    assert reachrl("train", "--quiet", "toy", "seed=7")[0] == 0
    [(_, config, run_dir)] = stages_run
    assert (config.seed, run_dir) == (7, Path("runs/toy"))


def test_quickstart_runs_every_stage_in_order_and_ends_with_the_result(reachrl, stages_run, tmp_path):
    code, out, err = reachrl("quickstart", "toy", "--run", str(tmp_path / "run"), "--quiet")
    assert (code, err) == (0, "")
    assert [name for name, _, _ in stages_run] == ["demos", "sft", "reward", "train", "eval", "report"]
    assert "3/10  30 % [10, 90]" in out and "9/10  90 % [10, 90]" in out and "red-square" in out
    assert "Note: pictures are not the benchmark's" in out
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'run' / 'report.html'}"


def test_help_lists_the_commands_in_the_order_of_the_story(reachrl):
    _, out, _ = reachrl("--help")
    places = [out.index(f"│ {name} ") for name in ("quickstart", "demos", "sft", "reward", "train", "eval", "report")]
    assert places == sorted(places)


# --- looking around ---------------------------------------------------------------------------------


def test_list_shows_every_preset_task_and_kind(reachrl):
    _, out, _ = reachrl("list")
    for preset, description in list_presets().items():
        assert preset in out and description in out
    for task, instruction in INSTRUCTIONS.items():
        assert any(line.split(None, 1) == [task, instruction] for line in map(str.strip, out.splitlines()))
    kinds = [tuple(line.split()[:2]) for line in out.splitlines()]
    assert ("curriculum.kind", "success_rate") in kinds and ("reward_model.kind", "vlm") in kinds
    assert "reachrl.envs.metaworld:MetaworldEnv" in out
    assert "instruction" not in reachrl("list", "kinds")[1]


def test_list_names_a_suite_once(reachrl):
    words = reachrl("list", "tasks")[1].split()
    assert {suite: words.count(suite) for suite in SUITES} == dict.fromkeys(SUITES, 1)


@pytest.mark.parametrize("preset", sorted(list_presets()))
def test_the_printed_configuration_is_a_preset_of_the_same_run(reachrl, tmp_path, preset):
    for options in ([], ["--docs"]):
        _, out, _ = reachrl("config", preset, "seed=5", *options)
        assert tomllib.loads(out)["seed"] == 5
        (tmp_path / "copy.toml").write_text(out)
        assert load_config(str(tmp_path / "copy.toml")) == load_config(preset, ["seed=5"])


def test_config_as_json_is_what_a_run_folder_keeps(reachrl):
    _, out, _ = reachrl("config", "robust", "--json")
    assert json.loads(out) == config_dict(load_config("robust"))


def test_config_docs_print_the_help_above_the_key(reachrl):
    lines = reachrl("config", "toy", "--docs")[1].splitlines()
    assert lines[lines.index("gamma = 0.97") - 1].startswith("# Discount per control step")
    # A section that gives an inherited option another default keeps the help.
    assert lines[lines.index("max_steps = 15") - 1].startswith("# Control steps")


def test_explain_lists_each_deviation_once_with_its_reason(reachrl):
    def flat(data, prefix=""):
        for key, value in data.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    paper, robust = (dict(flat(json.loads(reachrl("config", name, "--json")[1]))) for name in ("paper", "robust"))
    differing = {key for key in robust if paper.get(key) != robust[key]} - {"description"}
    _, out, _ = reachrl("config", "paper", "--explain")
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if "│" in line]
    assert differing <= {row[0] for row in rows}
    first = next(row for row in rows if row[0] == "algorithm.gamma")
    assert first[1:3] == ["0.99", str(robust["algorithm.gamma"])] and first[3]
    assert rows == [
        [cell.strip() for cell in line.strip("│┃").split("│")]
        for line in reachrl("config", "robust", "--explain")[1].splitlines()
        if "│" in line
    ]


# --- progress ---------------------------------------------------------------------------------------


class Clock:
    """Time that moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(**options) -> tuple[Display, StringIO, Clock]:
    file, clock = StringIO(), Clock()
    return Display(Console(file=file, width=100), interval_s=5.0, clock=clock, **options), file, clock


def test_a_log_file_gets_a_line_every_few_seconds_and_the_last_one():
    display, file, clock = plain()
    with display.stage("sft", 4, "warm start") as progress:
        for seconds, loss in ((1, 2.0), (69, 1.0), (70, 0.5), (71, 0.25)):
            clock.now = seconds
            progress.advance(1, train_loss=loss, note=None, success="1/2")
    assert file.getvalue().splitlines() == [
        "sft: warm start",
        "sft 2/4  train_loss 1  success 1/2  1m09s, 1m09s left",
        "sft 4/4  train_loss 0.25  success 1/2  1m11s",
        "sft: finished in 1m11s",
    ]


def test_a_failed_stage_is_not_called_finished():
    display, file, _ = plain()
    with pytest.raises(ValueError), display.stage("train", 4):
        raise ValueError
    assert "finished" not in file.getvalue()


def test_a_resumed_stage_counts_on_from_what_was_done():
    display, file, clock = plain()
    with display.stage("train", 10, "PPO", completed=6) as progress:
        clock.now = 10.0
        progress.advance(1)
    assert file.getvalue().splitlines()[:2] == ["train: PPO (6/10 done)", "train 7/10  10s, 30s left"]


def test_quiet_leaves_warnings_only():
    display, file, _ = plain(quiet=True)
    with display.logging(), display.stage("sft", 4) as progress:
        progress.advance(4)
        display.log("hidden")
        logging.getLogger("reachrl.demos").info("hidden")
        logging.getLogger("reachrl.demos").warning("worth [seeing]")
    assert file.getvalue() == "warning: worth [seeing]\n"


def test_log_records_go_through_the_display_only_while_it_is_in_charge(caplog):
    display, file, _ = plain()
    with display.logging():
        logging.getLogger("reachrl.x").info("inside")
    logging.getLogger("reachrl.x").warning("outside")
    assert file.getvalue() == "inside\n"


def test_a_terminal_of_100_columns_shows_the_bar_with_its_figures():
    file = StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None, legacy_windows=False)
    display = Display(console)
    with display.stage("train", 30, "PPO") as progress:
        progress.advance(12, success="47/101", kl=0.0123, ev=0.456)
        with display.stage("eval", 160, "held-out starts") as inner:
            inner.advance(80)
            display.log("a line that stays")
    frame = file.getvalue().replace("\r", "\n")
    last = [line for line in frame.splitlines() if "train: PPO" in line][-1]
    for shown in ("12/30", "success 47/101", "kl 0.0123", "ev 0.456"):
        assert shown in last
    visible = [line.split("\x1b[2K")[-1].split("\x1b[1A")[-1] for line in frame.splitlines()]
    assert max(len(line) for line in visible if "\x1b" not in line) <= 100
    assert "a line that stays" in frame


def test_a_terminal_of_60_columns_shows_whole_figures_or_none():
    file = StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system=None, legacy_windows=False)
    with Display(console).stage("train", 30, "online RL") as progress:
        progress.advance(12, success="47/101", success_uniform="46%", kl=0.0123, ev=0.456)
    shown = re.split(r"[\r\n]", re.sub(r"\x1b\[[\d?;]*[a-zA-Z]", "", file.getvalue()))
    last = [line for line in shown if "12/30" in line][-1]
    assert max(map(len, shown)) <= 60 and "…" not in last
    assert re.match(r"train +12/30 success 47/101 +\d:\d\d:\d\d +", last), last


def test_a_result_on_60_columns_keeps_every_figure_whole(command_line, stages_run, tmp_path):
    for columns in (60, 40):
        _, out, _ = command_line("quickstart", "toy", "--run", str(tmp_path / "run"), "--quiet", columns=columns)
        assert out.count("3/10  30 % [10, 90]") == out.count("9/10  90 % [10, 90]") == 2
        (tmp_path / "run" / "eval").rename(tmp_path / f"eval{columns}")


def test_a_terminal_gets_long_lists_in_pages(monkeypatch, reachrl):
    pages = []
    monkeypatch.setattr("rich.pager.SystemPager.show", lambda self, content: pages.append(content))
    for height, paged in ((40, True), (4000, False)):
        terminal = partial(Terminal, force_terminal=True, color_system=None, height=height)
        monkeypatch.setattr("reachrl.cli.list.Terminal", terminal)
        _, out, _ = reachrl("list")
        assert (len(pages) == 1) == paged
        assert all(task in (pages.pop() if pages else out) for task in ("window-open",))


def test_options_that_another_kind_resets_are_named(reachrl):
    _, _, err = reachrl("config", "toy", "algorithm.kind=grpo", "algorithm.group_size=4", "algorithm.target_kl=0.1")
    [note] = err.splitlines()
    toy, own = load_config("toy").algorithm, load_config("toy", ["algorithm.kind=grpo", "algorithm.group_size=4"])
    assert note.startswith("note: algorithm.kind=grpo begins with its own defaults, not with what toy sets: ")
    assert f"algorithm.lr {toy.lr} -> {own.algorithm.lr}" in note
    assert "group_size" not in note and "target_kl" not in note  # typed
    assert reachrl("config", "toy", "algorithm.kind=ppo", "algorithm.lr=1e-5")[2] == ""


def test_options_of_the_base_that_a_file_resets_are_named(reachrl, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "toy"\n[env]\nkind = "metaworld"\nmax_steps = 9\n')
    envs = load_config("toy").env.num_envs, load_config("metaworld_quickstart").env.model_fields["num_envs"].default
    named = f"env.kind=metaworld begins with its own defaults, not with what toy sets: env.num_envs {envs[0]} -> "
    _, _, err = reachrl("config", file)
    assert err == f"note: {named}{envs[1]}\n"
    file.write_text('base = "toy"\n[env]\nkind = "metaworld"\nnum_envs = 3\n')
    assert reachrl("config", file)[2] == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")])
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text
