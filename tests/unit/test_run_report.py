"""The report shows the numbers on disk, needs no network, and survives missing parts."""

import base64
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from reachrl.errors import StorageError
from reachrl.functional.stats import wilson
from reachrl.report import plots, sections
from reachrl.report.overlay import draw_overlay
from reachrl.report.report import write_report
from reachrl.report.series import block_means, moving_success, moving_uniform_success, time_axes
from reachrl.report.svg import Chart, span, ticks
from reachrl.report.verdict import advice, verdict
from reachrl.report.video import write_video
from reachrl.run.atomic import write_json_atomic

TASKS = ("reach-v3", "button-press-v3", "drawer-open-v3", "door-open-v3", "window-close-v3", "faucet-open-v3")


def evaluation(rng: np.random.Generator, rate: float) -> dict:
    per_task = {}
    for i, task in enumerate(TASKS):
        k = int(rng.binomial(20, np.clip(rate + 0.1 * (i - 2.5), 0.02, 0.98)))
        per_task[task] = {"k": k, "n": 20, "rate": k / 20, "wilson95": list(wilson(k, 20))}
    k, n = sum(r["k"] for r in per_task.values()), 20 * len(TASKS)
    return {"k": k, "n": n, "rate": k / n, "wilson95": list(wilson(k, n)), "per_task": per_task, "episodes": []}


def train_record(i: int, rng: np.random.Generator) -> dict:
    rate = 0.4 + 0.35 * (1 - math.exp(-i / 15))
    record = {
        "kind": "train", "iteration": i, "env_steps": 1536 * i, "success_k": int(rng.binomial(60, rate)),
        "success_n": 60, "episode_length": 22 - 6 * rate + rng.normal() * 0.4, "reward/task": 0.03 * rate,
        "reward/process": 0.01 + 0.004 * rng.normal(), "loss/policy": -0.01 + 0.004 * rng.normal(),
        "loss/value": 0.4 * math.exp(-i / 10) + 0.05, "entropy": 9 * math.exp(-i / 90), "approx_kl": 0.008,
        "clip_frac": 0.12 + 0.02 * rng.normal(), "grad_norm": 1.2, "engine_kl": 1e-7,
        "explained_variance": None if i < 3 else 0.7 * (1 - math.exp(-i / 8)), "seconds/rollout": 4.1,
        "seconds/score": 0.9, "seconds/update": 3.2, "seconds/reward": 0.4,
    }  # fmt: skip
    weights = rng.dirichlet(np.full(len(TASKS), 8.0))
    for j, task in enumerate(TASKS):
        record[f"curriculum/{task}"] = float(weights[j])
        record[f"curriculum_success/{task}"] = float(np.clip(rate + 0.1 * (j - 2.5), 0, 1))
    return record


def conversation(rng: np.random.Generator) -> dict:
    turns = []
    for step in range(9):
        buffer = io.BytesIO()
        pixels = np.full((96, 96, 3), (90, 110, 130), np.uint8)
        pixels[40:56, 10 + 8 * step : 26 + 8 * step] = (220, 120, 40)
        Image.fromarray(pixels).save(buffer, "PNG")
        turns.append({
            "step": step, "image_png_base64": base64.b64encode(buffer.getvalue()).decode(),
            "prompt": "In: What action should the robot take to open the drawer?\nOut:",
            "action_tokens": [31000 + int(x) for x in rng.integers(0, 256, 4)],
            "actions": rng.uniform(-1, 1, (1, 4)).tolist(), "logprob": -4.5 + rng.normal(), "value": step / 10,
            "rewards": {"task": float(step == 8), "process": 0.1 * float(rng.uniform())},
        })  # fmt: skip
    start = {"task": "drawer-open-v3", "split": "eval", "index": 3}
    return {**start, "instruction": "open the drawer", "start": 3, "success": True, "turns": turns}


def make_run(path: Path, *, iterations: int = 40) -> Path:
    """Write a run folder as the stages would, from made-up numbers."""
    rng = np.random.default_rng(0)
    before = {"greedy": evaluation(rng, 0.42), "sampled": evaluation(rng, 0.38)}
    after = {"greedy": evaluation(rng, 0.71), "sampled": evaluation(rng, 0.66)}
    write_json_atomic(path / "eval" / "before.json", before)
    write_json_atomic(path / "eval" / "after.json", after)
    records = [{"kind": "sft", "step": s, "train_loss": 5 * math.exp(-s / 300) + 1} for s in range(0, 1000, 20)]
    records += [{"kind": "sft", "step": s, "heldout_loss": 5 * math.exp(-s / 300) + 1.2} for s in range(0, 1000, 100)]
    records += [
        {"kind": "reward_model", "step": s, "train_loss": 0.4, "heldout_loss": 0.5 + 1 / (s + 9)} for s in range(50)
    ]
    for i in range(1, iterations + 1):
        records.append(train_record(i, rng))
        if i % 10 == 0 and i < iterations:
            for mode in ("greedy", "sampled"):
                records.append({"kind": "eval", "iteration": i, "mode": mode, **evaluation(rng, 0.4 + i / 120)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    p = [0.05 + 0.1 * i for i in range(10)]
    brief = {f"success_{when}{suffix}": {**{k: e[mode][k] for k in ("k", "n", "rate", "wilson95")}}
             for when, e in (("before", before), ("after", after))
             for mode, suffix in (("greedy", ""), ("sampled", "_sampled"))}  # fmt: skip
    summary = {
        **brief,
        "paired_test": {"improved": 44, "worsened": 9, "p_value": 1.2e-6},
        "protocol_hash": "4f2a9c1b7d3e8a60",
        "seed": 7,
        "wall_s": {"demos": 61.0, "sft": 240.5, "reward fit": 75.2, "train": 612.0, "eval": 88.0, "total": 1076.7},
        "peak_rss_bytes": 3_650_722_201,
        "num_env_steps": 61_440,
        "config_hash": "c0ffee",
        "reward_model": {
            "auc": 0.871, "rank_correlation": 0.643, "accuracy": 0.802, "ece": 0.041,
            "calibration": [{"p": x, "observed": min(1, x * 0.9 + 0.03), "n": 30 + 400 * abs(i - 5)}
                            for i, x in enumerate(p)],
        },
    }  # fmt: skip
    write_json_atomic(path / "summary.json", summary)
    stages = {s: {"done": True, "wall_s": w, "peak_rss_bytes": 3 * 2**30, "attempts": 1, "info": {}}
              for s, w in summary["wall_s"].items() if s != "total"}  # fmt: skip
    write_json_atomic(path / "stages.json", stages)
    write_json_atomic(
        path / "config.json", {"seed": 7, "algorithm": {"lr": 1e-5, "note": "<script>"}, "tasks": list(TASKS)}
    )
    facts = {"commit": "0123456789abcdef0123", "dirty": True, "command": ["reachrl", "quickstart", "a b=1"], "seed": 7}
    facts |= {"python": "3.12", "cpu": "a cpu", "packages": {"torch": "2.13"}, "started": "2026-01-02T03:04:05+00:00"}
    write_json_atomic(path / "provenance.json", facts)
    write_json_atomic(path / "conversation.json", conversation(rng))
    for task in TASKS[:2]:
        for when, success in (("before", False), ("after", True)):
            frames = np.full((12, 96, 96, 3), (90, 110, 130), np.uint8)
            for t in range(12):
                frames[t, 40:56, 5 + 6 * t : 21 + 6 * t] = (220, 120, 40)
            values, process = np.linspace(0.1, 0.9, 12).tolist(), rng.uniform(0, 0.2, 11).tolist()
            drawn = draw_overlay(frames, instruction=f"do {task}", values=values, process=process, success=success)
            write_video(path / "videos" / f"{when}_{task}.mp4", drawn)
    return path


class Page(HTMLParser):
    """Collects what a browser would fetch, the visible words, and whether tags close."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        self.fetched += [
            v for k, v in attrs if k in ("src", "poster", "data", "srcset") or (k == "href" and tag != "a")
        ]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def test_the_report_holds_the_numbers_and_nothing_from_outside(full_run: Path) -> None:
    html = write_report(full_run).read_text()
    page = Page(html)
    assert len(html) < 15_000_000
    assert page.fetched and all(source.startswith("data:") for source in page.fetched)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    summary = json.loads((full_run / "summary.json").read_text())
    for key in ("success_before", "success_after", "success_before_sampled", "success_after_sampled"):
        record = summary[key]
        assert f"{record['k']}/{record['n']} = {100 * record['rate']:.1f} %" in page.text
        low, high = binomtest(record["k"], record["n"]).proportion_ci(method="wilson")
        assert f"{100 * low:.1f} % – {100 * high:.1f} %" in page.text
    for when, iteration in (("before", 0), ("after", 40)):  # the ends of the learning curve
        record = summary[f"success_{when}"]
        assert f"iteration {iteration}, greedy: {record['k']} of {record['n']}" in page.text
    gain = 100 * (summary["success_after"]["rate"] - summary["success_before"]["rate"])
    for words in (
        f"{gain:+.1f} points", "44 improved, 9 worsened, p = 1.2e-06", "17 min 57 s", "3.40 GiB", "61,440", "0.871",
        "0.643", "4f2a9c1b7d3e", "git checkout 0123456789abcdef0123", "reachrl quickstart 'a b=1'", "local changes",
        "open the drawer", *TASKS,
    ):  # fmt: skip
        assert words in page.text, words
    assert "not run" not in page.text
    assert html.count("<video") == 4 and "&lt;script&gt;" not in page.text.replace("\\u003cscript\\u003e", "")
    for turn in json.loads((full_run / "conversation.json").read_text())["turns"]:
        assert f"{turn['value']:+.2f}" in page.text and all(str(token) in page.text for token in turn["action_tokens"])


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("summary.json", None),
        ("eval", None),
        ("videos", "Videos – not run"),
        ("conversation.json", "Conversation – not run"),
        ("metrics.jsonl", "Training – not run"),
        ("config.json", "Configuration – not run"),
        ("provenance.json", "Provenance – not run"),
        ("stages.json", None),
    ],
)
def test_one_missing_part(full_run: Path, tmp_path: Path, absent: str, says: str | None) -> None:
    path = tmp_path / "run"
    shutil.copytree(full_run, path, ignore=shutil.ignore_patterns("report.html"))
    gone = path / absent
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    text = Page(write_report(path).read_text()).text
    assert says is None or says in text


def test_an_empty_run_and_one_with_only_an_evaluation(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path).read_text()).text
    assert text.count("– not run") >= 10
    write_json_atomic(tmp_path / "eval" / "before.json", {"greedy": {"k": 1, "n": 4, "per_task": {}}})
    text = Page(write_report(tmp_path).read_text()).text
    assert "1/4 = 25.0 %" in text and "Only the evaluation before" in text


def test_films_of_alarms_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 3, "audit/alarm": 1}\n')
    noise = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "alarm_iteration0003_1.mp4", noise)
    size = write_video(tmp_path / "videos" / "alarm_iteration0003_2.mp4", noise[:1, :16, :16]).stat().st_size
    monkeypatch.setattr(sections, "MAX_VIDEO_BYTES", 4 * size)
    html = write_report(tmp_path).read_text()
    assert html.count("<video") == 1 and "<figcaption>alarm_iteration0003_2.mp4</figcaption>" in html
    assert "see the folder videos/: alarm_iteration0003_1.mp4." in Page(html).text


def test_the_headline_follows_the_mode_the_summary_names(tmp_path: Path) -> None:
    figures = {f"success_{when}": {"k": k, "n": 10} for when, k in (("before", 3), ("after", 6))}
    figures |= {f"success_{when}_greedy": {"k": k, "n": 10} for when, k in (("before", 1), ("after", 9))}
    write_json_atomic(tmp_path / "summary.json", {**figures, "mode": "sampled"})
    text = Page(write_report(tmp_path).read_text()).text
    assert "+30.0 points" in text and "sampled decoding, on start states" in text
    assert "9/10 = 90.0 %" in text


def test_repeated_steps_and_evaluations_count_once_and_long_curves_are_averaged(tmp_path: Path) -> None:
    assert block_means({2: 5.0, 0: 1.0, 1: 3.0, 3: None, 4: 7.0}, most=2) == [(0.5, 2.0), (3.0, 6.0)]
    lines = [{"kind": "eval", "iteration": 5, "mode": "greedy", "k": k, "n": 10} for k in (2, 7)]
    lines += [{"kind": "train", "iteration": i, "success_k": 1, "success_n": 2} for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json_atomic(tmp_path / "eval" / "after.json", {"greedy": {"k": 7, "n": 10, "per_task": {}}})
    text = Page(write_report(tmp_path).read_text()).text
    assert text.count("greedy: 7 of 10") == 2 and "greedy: 2 of 10" not in text  # wide, narrow


def test_no_folder_and_damaged_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(StorageError, match=r"summary\.json"):
        write_report(tmp_path)


def test_moving_success_pools_by_hand() -> None:
    train = [
        {"iteration": i, "success_k": k, "success_n": n} for i, (k, n) in enumerate([(0, 0), (1, 4), (3, 4), (4, 4)])
    ]
    pooled = moving_success(train, 2)
    assert [(i, rate) for i, rate, _, _ in pooled] == [(1, 0.25), (2, 0.5), (3, 0.875)]
    assert pooled[1][2:] == pytest.approx(binomtest(4, 8).proportion_ci(method="wilson"))


def test_weighed_success_is_pooled_as_one_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    outcomes, weights = rng.random((3, 40)) < 0.6, rng.uniform(0.5, 3, (3, 40))
    train = [{"iteration": 0, "success_uniform": None, "success_uniform_weight": None, "success_uniform_n": None}]
    for i, (hits, each) in enumerate(zip(outcomes, weights, strict=True), 1):
        train.append(
            {
                "iteration": i, "success_uniform": np.average(hits, weights=each),
                "success_uniform_weight": each.sum(), "success_uniform_n": each.sum() ** 2 / (each**2).sum(),
            }
        )  # fmt: skip
    pooled = moving_uniform_success(train, 2)
    assert [i for i, *_ in pooled] == [1, 2, 3]
    rate = np.average(outcomes[1:], weights=weights[1:])
    n = weights[1:].sum() ** 2 / (weights[1:] ** 2).sum()
    assert pooled[2][1] == pytest.approx(rate)
    z = 1.959963984540054  # Wilson's interval, written out
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert pooled[2][2:] == pytest.approx((centre - half, centre + half))


def test_both_curves_and_validation_points_are_drawn_and_named(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "iteration": i, "success_k": 1, "success_n": 2, "success_uniform": 0.75,
         "success_uniform_weight": 2.0, "success_uniform_n": 1.5}
        for i in range(4)
    ]  # fmt: skip
    lines += [{"kind": "validation", "iteration": i, "mode": "sampled", "k": i, "n": 10} for i in (0, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write_report(tmp_path).read_text()).text
    assert "success_uniform: the same, weighed to a uniform draw" in text
    assert "validation starts, sampled: 2 of 10" in text
    without = [{key: value for key, value in line.items() if "uniform" not in key} for line in lines[:4]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    text = Page(write_report(tmp_path).read_text()).text
    assert "success_uniform" not in text and "Chances of the draws are not known here" in text


def test_the_learning_curve_draws_points_where_the_numbers_are() -> None:
    evals = [{"iteration": 10, "mode": "greedy", "k": 3, "n": 4}]
    root = ET.fromstring(plots.learning_curve([], evals)[0])
    circle = next(e for e in root.iter("circle"))
    plot = Chart((-0.12, 10.2), (0, 1), width=960, height=360, margin=(22, 16, 42, 48))
    assert float(circle.get("cy", 0)) == pytest.approx(22 + (360 - 42 - 22) * 0.25, abs=0.01)
    assert float(circle.get("cx", 0)) == pytest.approx(plot.x(10 - 0.04), abs=0.01)


def test_a_learning_curve_can_be_read_against_steps_and_hours() -> None:
    train = [
        {"iteration": i, "env_steps": 500 * (i + 1), "success_k": 1, "success_n": 2}
        | {"seconds/rollout": 2700.0, "seconds/update": 900.0}
        for i in range(4)
    ]
    iterations, steps, hours = time_axes(train)
    assert [axis.label for axis in (iterations, steps, hours)] == [
        "training iteration", "environment steps", "hours of training",
    ]  # fmt: skip
    # Before training nothing is spent; an evaluation after 4 iterations stands at the end of the last.
    assert [[axis.at(i) for i in (0, 1, 3, 4)] for axis in (iterations, steps, hours)] == [
        [0, 1, 3, 4], [0, 1000, 2000, 2000], pytest.approx([0, 2, 4, 4]),
    ]  # fmt: skip
    evals = [{"iteration": 4, "mode": "greedy", "k": 3, "n": 4}]
    [svg] = ET.fromstring(plots.learning_curve(train, evals, axis=steps)[0])
    plot = Chart((-0.012 * 2000, 2000 * 1.02), (0, 1), width=960, height=360, margin=(22, 16, 42, 48))
    [held_out] = [e for e in svg.iter("circle") if e.get("class") == "dot c-after"]
    assert float(held_out.get("cx", 0)) == pytest.approx(plot.x(2000 - 0.004 * 2000), abs=0.01)
    assert time_axes([{"iteration": 0}]) == [iterations]  # nothing else is known


RATES = ({"k": 40, "n": 100, "rate": 0.4}, {"k": 60, "n": 100, "rate": 0.6})


@pytest.mark.parametrize(
    ("improved", "worsened", "p", "css", "begins"),
    [
        (25, 5, 0.0003, "good", "Better: held-out success went from 40.0 % to 60.0 %"),
        (5, 25, 0.0003, "bad", "Worse: "),
        (12, 8, 0.5, "neutral", "No evidence of a change: "),
        (12, 8, 0.05, "neutral", "No evidence"),
    ],
)
def test_the_first_sentence_is_a_verdict(improved, worsened, p, css, begins) -> None:
    before, after = RATES if improved > worsened else RATES[::-1]
    test = {"improved": improved, "worsened": worsened, "p_value": p}
    said = verdict(before, after, test, seed=7)
    assert said is not None and said["css"] == css and said["text"].startswith(begins)
    assert f"same 100 starts, p = {p:.2g}; one seed: 7)" in said["text"]


def test_a_run_without_a_success_is_told_what_to_do(tmp_path: Path) -> None:
    none, some = {"k": 0, "n": 30}, {"k": 1, "n": 30}
    said = advice(none, none)
    assert said is not None and "sft.epochs" in said and "demos.episodes_per_task" in said
    assert advice(none, some) is advice(some, none) is advice(None, none) is advice(none, None) is None
    wilson95, run = [0.0, 0.114], tmp_path / "run"
    record = {"k": 0, "n": 30, "rate": 0.0, "wilson95": wilson95, "per_task": {"push": {"k": 0, "n": 30}}}
    for when in ("before", "after"):
        write_json_atomic(run / "eval" / f"{when}.json", {"sampled": record})
    write_json_atomic(run / "summary.json", {"mode": "sampled"})
    assert "there was next to nothing to reinforce" in Page(write_report(run).read_text()).text


def test_the_parts_of_a_plug_ins_reward_are_curves(full_run: Path, tmp_path: Path) -> None:
    """And where no process reward is paid, nothing says that one is shown or used."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "and the process reward" in Page(write_report(run).read_text()).text
    for line in lines:
        line["reward/lying"] = line.pop("reward/process", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write_report(run).read_text()).text
    assert text.count("lying reward a step") == 1 and text.count("task reward a step") == 1
    assert "process reward a step" not in text and "and the process reward" not in text
    assert "The reward of this run does not use this model." in text


def test_a_telephone_shows_the_main_pictures_whole() -> None:
    """316 pixels are what a page of 400 leaves; no word of these pictures lies outside."""
    rates = {name: {"k": 40, "n": 40, "wilson95": [0.9, 1.0]} for name in ("a-task-of-22-character", "b")}
    rows = [(name, record, "c-after") for name, record in (("before, sampled", rates["b"]), ("after", rates["b"]))]
    pictures = (
        plots.success_interval_chart(rows, narrow=True),
        plots.task_chart(rates, rates, narrow=True),
        plots.learning_curve([], [{"iteration": 16, "k": 1, "n": 2}], narrow=True)[0],
        plots.heat_map({name: [(0, 0.5), (1, 1.0)] for name in rates}, top=1, form="share", narrow=True),
    )
    widths = {"start": (0, 1), "middle": (0.5, 0.5), "end": (1, 0)}
    for picture in pictures:
        [svg] = ET.fromstring(picture)
        assert float(re.search(r"min-width:(\d+)px", svg.get("style", ""))[1]) <= 316  # pyright: ignore[reportOptionalSubscript]
        for text in svg.iter("text"):
            left, right = widths[text.get("text-anchor", "start")]
            size, x = 6.6 * len(text.text or ""), float(text.get("x", ""))
            assert x - left * size >= 0 and x + right * size <= 316, text.text


def test_a_verdict_needs_both_evaluations_and_a_test() -> None:
    assert verdict(None, RATES[0], None, seed=1) is None
    untested = verdict(*RATES, None, seed=None)
    assert untested is not None and untested["css"] == "neutral" and untested["text"].startswith("Not tested: ")


def test_pictures_never_shrink_their_words_below_11_pixels() -> None:
    page = Path(plots.__file__).parent / "templates" / "report.css"
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:\d+ )?([\d.]+)px", page.read_text())]
    assert min(sizes) >= 11
    [svg] = ET.fromstring(plots.learning_curve([], [{"iteration": 1, "k": 1, "n": 2}])[0])
    least = float(re.search(r"min-width:(\d+)px", svg.get("style", ""))[1])  # pyright: ignore[reportOptionalSubscript]
    assert 12 * least / float(svg.get("viewBox", "").split()[2]) >= 11


def test_a_picture_stands_alone_as_a_file() -> None:
    chart = Chart((0, 1), (0, 1), width=200, height=100, x_label="x", y_label="y", title="a < b")
    root = ET.fromstring(chart.document())
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["aria-label"] == "a < b"
    assert [child.tag.rpartition("}")[2] for child in root][:2] == ["rect", "style"]
    assert ET.fromstring(chart.render()).tag == "div"


def test_the_headline_names_the_source_that_trained(tmp_path: Path) -> None:
    trained = {"commit": "aaaaaaaaaaaa", "dirty": False, "started": "2026-01-01T01:00:00+00:00", "command": ["reachrl"]}
    facts = {
        "commit": "bbbbbbbbbbbb",
        "dirty": True,
        "started": "2026-02-02T02:00:00+00:00",
        "stages": {"train": trained},
    }
    write_json_atomic(tmp_path / "provenance.json", facts)
    chips = re.search(r'class="chips">(.*?)</p>', write_report(tmp_path).read_text(), re.DOTALL)
    assert chips is not None and "aaaaaaaaaa" in chips[1] and "2026-01-01" in chips[1]
    assert "bbbb" not in chips[1] and "local changes" not in chips[1]


@pytest.mark.parametrize("iterations", [1, 7, 44, 49, 100, 120])
def test_a_heat_map_has_a_cell_for_every_iteration(iterations: int) -> None:
    points = [(float(i), i / iterations) for i in range(iterations)]
    svg = plots.heat_map({"a": points}, top=1.0, form="plain")
    assert [int(number) for number in re.findall(r"a, iteration (\d+):", svg)] == list(range(iterations))


def test_ticks_and_spans() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.0101, 0.0099, 4) == pytest.approx([-0.01, -0.005, 0, 0.005])
    assert span([None, 2.0, 2.0]) == (1.0, 3.0)
    assert span([]) == (0.0, 1.0)
    low, high = span([0.0, 1.0], include=(0.0,))
    assert low == 0.0 and high > 1.0


def test_a_line_breaks_where_a_number_is_undefined() -> None:
    chart = Chart((0, 3), (0, 1))
    chart.line([(0, 0.1), (1, None), (2, 0.3), (3, 0.4)], "c-after")
    path = next(e for e in ET.fromstring(chart.render()).iter("path"))
    assert path.get("d", "").count("M") == 2 and path.get("d", "").count("L") == 1
