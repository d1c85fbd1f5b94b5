"""Files of a run that were damaged: each reader names the file and what to do; no traceback, no silent default."""

import json
from pathlib import Path

import pytest
from test_run_report import make_run

from reachrl.cli.results import show_evaluations
from reachrl.config.loading import load_config
from reachrl.errors import StorageError
from reachrl.pipeline.evaluation import summary
from reachrl.report.report import render_report
from reachrl.run.directory import Run
from reachrl.run.metrics import read_metrics
from reachrl.run.records import EvalStage, RewardQuality, read_record
from reachrl.run.stages import StageRecords

DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: b"",
    "no text": lambda _: b"\xff\xfe\x00",
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "word": lambda _: b'"word"',
    "deep": lambda _: b"[" * 100_000,
    "numbers for objects": lambda text: json.dumps(dict.fromkeys(json.loads(text), 3)).encode(),
    "objects for numbers": lambda text: json.dumps(_wrong(json.loads(text))).encode(),
}


def _wrong(content):
    """Every number becomes a word."""
    if isinstance(content, dict):
        return {key: _wrong(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_wrong(value) for value in content]
    return "word" if isinstance(content, int | float) else content


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", iterations=3)


FILES = ["summary.json", "provenance.json", "stages.json", "conversation.json", "eval/before.json", "eval/after.json"]


# Of the numbers in provenance.json the report reads none that it computes with.
PAIRS = [(file, damage) for file in FILES for damage in DAMAGE if (file, damage[:7]) != ("provenance.json", "objects")]


@pytest.mark.parametrize(("file", "damage"), PAIRS)
def test_the_report_names_what_is_damaged(whole, file, damage):
    path = whole / file
    content = path.read_bytes()
    path.write_bytes(DAMAGE[damage](content))
    try:
        with pytest.raises(StorageError, match=rf"{file} is (damaged: |not JSON).*; delete it and run its stage again"):
            render_report(whole)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"3",
        b"{}",
        b'{"kind": 3}',
        b'{"kind": "train"}',
        b'{"kind": "train", "iteration": "x"}',
        b'{"kind": "train", "iteration": 1, "loss/policy": {}}',
        b'{"kind": "eval", "iteration": 1, "k": null, "n": 3}',
        b'{"kind": "eval", "iteration": 1, "k": 4, "n": 3}',
        b'{"kind": "train", "iteration": 1, "success_n": 2}',
        b'{"kind": "train", "iteration": 1, "success_uniform": 0.5}',
        b'{"kind": "train", "iteration": 1, "success_uniform": "x", '
        b'"success_uniform_weight": 1, "success_uniform_n": 1}',
        b'{"kind": "train", "iteration": 1, "success_uniform": 0.5, '
        b'"success_uniform_weight": 1, "success_uniform_n": 0}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=range(15),
)
def test_metrics_name_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "sft", "step": 1}\n' + line + b'\n{"kind": "sft", "step": 2}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(path)


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_stages_of_a_run_that_goes_on(whole, tmp_path, damage):
    path = tmp_path / "stages.json"
    path.write_bytes(DAMAGE[damage]((whole / "stages.json").read_bytes()))
    with pytest.raises(StorageError, match=r"stages\.json is (damaged: |not JSON).*resume from their own files"):
        StageRecords(path).done("train")


@pytest.mark.parametrize("content", [{}, {"heldout": 3}, {"fingerprint": "x", "heldout": {"calibration_error": 0.1}}])
def test_quality_of_a_reward_model(tmp_path, content):
    (tmp_path / "quality.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"quality\.json is damaged: .*Field required; fit again"):
        read_record(tmp_path / "quality.json", RewardQuality, remedy="fit again")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "is damaged: no rate of greedy episodes"),
        ({"greedy": {"k": 3, "n": 2, "rate": 1.5}}, "is damaged: greedy: Value error, 3 of 2 episodes"),
        ({"greedy": {"k": 1, "n": 1, "rate": 1.0, "episodes": []}}, "does not belong to before.json: a paired test"),
    ],
)
def test_an_evaluation_that_lacks_what_the_summary_compares(tmp_path, content, problem):
    run = Run.open(tmp_path / "run", {}, tensorboard=False)
    played = {"k": 1, "n": 1, "rate": 1.0, "episodes": [{"task": "red-square", "start": 0, "success": True}]}
    run.eval.mkdir(exist_ok=True)
    (run.eval / "before.json").write_text(json.dumps({"greedy": played}))
    (run.eval / "after.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=rf"after\.json {problem}.*evaluate again"):
        summary(load_config("toy", ["eval.temperatures=0"]), run)


def test_results_on_the_terminal(whole, tmp_path):
    with pytest.raises(StorageError, match=r"before\.json is missing; delete it and evaluate again"):
        show_evaluations(tmp_path)
    (tmp_path / "stages.json").write_text('{"eval": {"info": {}}}')
    with pytest.raises(StorageError, match=r"stages\.json is damaged: eval\.info\.caveats: Field required"):
        read_record(tmp_path / "stages.json", EvalStage, remedy="")
