"""Extending, branching and measuring unfinished runs, as they are typed."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import play, tiny_config, train_lines
from typer.testing import CliRunner

from reachrl.cli.app import app
from reachrl.cli.eval import chosen_checkpoint
from reachrl.errors import ConfigError
from reachrl.pipeline.branch import branch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 44 iterations that was interrupted after the fourth, with checkpoints of 2 and 4."""
    run = tmp_path_factory.mktemp("source") / "run"
    play(tiny_config("num_iterations=4"), run, "sft", "train")
    config = tiny_config("num_iterations=44").model_dump(mode="json")
    (run / "config.json").write_text(json.dumps(config))
    stages = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({"sft": stages["sft"]}))
    shutil.rmtree(run / "policy")
    return run


def typed(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_branch_trains_on_from_the_warm_start_or_a_checkpoint(source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    typed("train", "--from", source / "checkpoints" / "step_000002", "--run", new, "--until", "3", "algorithm.lr=1e-6")
    assert train_lines(new)[:2] == train_lines(source)[:2]
    assert [line["lr"] for line in train_lines(new)] == [train_lines(source)[0]["lr"], 2e-4, 1e-6]
    origin = json.loads((new / "provenance.json").read_text())["from"]
    assert (origin["run"], origin["checkpoint"], origin["iteration"]) == (str(source), "step_000002", 2)
    assert origin["changes"] == {"num_iterations": [44, 3], "algorithm.lr": [2e-4, 1e-6]}
    assert (source / "checkpoints" / "step_000002").is_dir() and len(train_lines(source)) == 4
    from_the_start = tmp_path / "again"
    typed("train", "--from", source, "--run", from_the_start, "--until", "1")
    assert train_lines(from_the_start) == train_lines(source)[:1]
    typed("train", "--from", source, "--run", from_the_start, "--until", "1")  # the same command resumes
    typed("report", "--run", from_the_start)
    assert "Branched from" in (from_the_start / "report.html").read_text()


def test_a_branch_takes_over_only_what_stays_right(source: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ConfigError, match="seed: 1 in the run, 2 asked for"):
        branch(source, tiny_config("seed=2"), tmp_path / "a")
    with pytest.raises(ConfigError, match="exists and is no branch"):
        branch(source, tiny_config(), taken)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="reward.kind: .*it decided what stage 'train' made"):
        branch(source / "checkpoints" / "step_000002", tiny_config("reward.kind=oracle"), tmp_path / "a")
    branch(source, tiny_config("reward.kind=oracle"), tmp_path / "oracle")  # nothing was trained there yet
    for wrong in (tmp_path, source / "checkpoints" / "step_000009"):
        with pytest.raises(ConfigError, match="--from"):
            branch(wrong, tiny_config(), tmp_path / "b")


def test_checkpoints_are_chosen_by_word_or_number(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    assert chosen_checkpoint(run, "latest").name == "step_000004"
    assert chosen_checkpoint(run, "2").name == "step_000002"
    for wrong in ("3", "x", "-1", "9" * 5000, "²"):
        with pytest.raises(ConfigError, match="expected latest, best or an iteration; .* 2, 4"):
            chosen_checkpoint(run, wrong)
    with pytest.raises(ConfigError, match="no checkpoint was judged"):
        chosen_checkpoint(run, "best")
    with open(run / "metrics.jsonl", "a") as file:
        for iteration, rate in ((0, 0.9), (2, 0.5), (4, 0.25)):
            file.write(
                json.dumps({"kind": "validation", "iteration": iteration, "mode": "sampled", "rate": rate}) + "\n"
            )
    assert chosen_checkpoint(run, "best").name == "step_000002"


def test_an_unfinished_run_is_measured_and_reported(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    assert "step_000004: 4 of 44 iterations" in typed("eval", "--run", run, "--checkpoint", "latest", "env.num_envs=1")
    result = json.loads((run / "reach_toy-heldout-step_000004" / "result.json").read_text())
    assert result["modes"]["sampled"]["n"] == 3
    assert "4 of 44 iterations" in typed("report", "--run", run)
    assert "Training has done 4 of 44 iterations." in (run / "report.html").read_text()


def test_a_trained_run_that_was_not_evaluated_says_that(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    typed("train", "--run", run, "--until", "5")
    said = " ".join(typed("report", "--run", run).split())
    assert "all 5 iterations are trained, not yet evaluated: `reachrl eval --run" in said and "5 of 5" not in said


def test_a_branch_from_nowhere_names_the_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--from .*nope: there is no run at .*nope") as told:
        typed("train", "--from", tmp_path / "nope", "--run", tmp_path / "new")
    assert "new" not in str(told.value)
