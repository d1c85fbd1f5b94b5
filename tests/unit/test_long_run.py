"""A run of 20,000 iterations opens, resumes and reports in seconds, on a page of bounded size."""

import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from reachrl.report.diagnosis import Explainer
from reachrl.report.plots import learning_curve, panel
from reachrl.report.report import write_report
from reachrl.report.series import thinned
from reachrl.run.directory import Run
from reachrl.run.metrics import read_metrics, records_by_kind

RECORDS = 20_000
# As many numbers as the toy's records have, under names of theirs.
NUMBERS = [
    *("malformed_rate", "episode_length", "truncated", "progress/end", "gripper/early", "reward/task"),
    *("reward/process", "loss/policy", "entropy", "kl", "clip_frac", "grad_norm", "changed_weights", "loss/value"),
    *(
        "value_grad_norm",
        "lr",
        "explained_variance",
        "engine_kl",
        "actions/at_bounds",
        "actions/size",
        "success_uniform",
    ),
    *("audit/return_correlation", "audit/score_correlation", "audit/failure_score", "audit/success_score", "lag"),
    *(
        f"{name}/{colour}-square"
        for name in ("curriculum", "curriculum_success")
        for colour in ("red", "green", "blue")
    ),
    *(f"reward_model/{name}" for name in ("version", "auc", "rank_correlation", "false_positive_rate")),
    *(f"seconds/{name}" for name in ("sync", "evaluate", "rollout", "score", "reward", "update", "watch")),
]


def successes(iteration: int) -> int:
    return iteration * 7 % 30


def records() -> list[str]:
    """Lines of a metrics file: each iteration 30 episodes, every hundredth a point on validation starts."""
    numbers = ", ".join(f'"{name}": 0.{place:02d}%04d731' for place, name in enumerate(NUMBERS))
    lines = []
    for iteration in range(RECORDS):
        counts = f'"env_steps": {960 * iteration + 960}, "success_k": {successes(iteration)}, "success_n": 30'
        weighed = '"success_uniform_weight": 30.5, "success_uniform_n": 29.5'
        drawn = numbers.replace("%04d", f"{iteration % 9973:04d}")
        lines.append(f'{{"kind": "train", "iteration": {iteration}, {counts}, {weighed}, {drawn}}}')
        if iteration % 100 == 0:
            point = {"kind": "validation", "iteration": iteration, "mode": "sampled", "k": iteration // 700, "n": 30}
            lines.append(json.dumps(point))
    return lines


@pytest.fixture(scope="module")
def metrics() -> str:
    return "\n".join(records()) + "\n"


def test_a_long_run_opens_resumes_and_reports_in_seconds(metrics, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run.open(folder, {}, tensorboard=False).close()
    (folder / "metrics.jsonl").write_text(metrics)
    began = time.process_time()
    with Run.open(folder, {}, tensorboard=False) as run:
        dropped = run.metrics.truncate_after(("train", "validation"), "iteration", RECORDS - 151)
        known = records_by_kind(run.metrics.path)
        Explainer(known["train"], after=10, demos=None, max_steps=15)
        page = write_report(folder).read_text()
    assert time.process_time() - began < 10  # 3 s, on a machine that is left alone
    assert dropped == 150 + 1
    assert [record["iteration"] for record in known["train"]] == list(range(RECORDS - 150))
    assert read_metrics(folder / "metrics.jsonl", "validation") == known["validation"]
    assert len(page) < 2_000_000
    notes = re.findall(r"<title>iterations (\d+) to (\d+): (\d+) of (\d+) training episodes</title>", page)
    curve = [[int(number) for number in note] for note in dict.fromkeys(notes)]
    assert len(curve) <= 600 and (curve[0][0], curve[-1][1]) == (0, RECORDS - 151)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(curve))
    for first, last, k, n in curve:
        assert (k, n) == (sum(map(successes, range(first, last + 1))), 30 * (last + 1 - first))


def test_a_line_of_many_points_is_drawn_by_the_means_of_neighbours() -> None:
    points = [(float(i), None if 1200 <= i < 1210 else math.sin(i)) for i in range(6000)]
    drawn = thinned(points)
    assert len(drawn) == 600
    assert drawn[3] == (34.5, pytest.approx(sum(math.sin(i) for i in range(30, 40)) / 10))
    assert drawn[120] == (1200.0, None)  # a gap stays one
    assert thinned(points[:600]) == points[:600]  # what a screen can show is drawn as it is
    assert panel([("x", "c-after", drawn)], x_label="iteration").count("M") == 2


def test_a_short_run_shows_each_iteration() -> None:
    train = [{"kind": "train", "iteration": i, "success_k": i, "success_n": 30} for i in range(20)]
    picture, window = learning_curve(train, [])
    assert window == 2 and [f"iteration {i}: {i} of 30 training episodes" in picture for i in range(20)] == [True] * 20
