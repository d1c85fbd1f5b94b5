"""`reachrl robust`: counts and paired tests, resuming, what it refuses, the page and the report's card."""

import json
import re

import pytest
from toy_policy import toy_config, toy_policy

from reachrl.cli.display import Display
from reachrl.config.loading import config_dict
from reachrl.errors import ConfigError
from reachrl.functional.stats import wilson
from reachrl.pipeline import robust as measuring
from reachrl.pipeline.conditions import own_conditions
from reachrl.pipeline.robust import Robustness, figures, measure_robustness
from reachrl.report.report import write_report
from reachrl.report.robust_page import verdict_of
from reachrl.run.atomic import write_json_atomic
from reachrl.types import Start

AXES = "noise=40,delay,language=2"


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two saved policies."""
    folder = tmp_path_factory.mktemp("policies")
    for name, seed in (("before", 0), ("after", 1)):
        toy_policy(toy_config(), seed).save_pretrained(folder / name)
    return {name: folder / name for name in ("before", "after")}


def asked(policies, out, axes=AXES, episodes=2, *changes):
    config = toy_config("env.max_steps=4", *changes)
    conditions = own_conditions(config.env, axes, episodes, 0)
    return Robustness(config=config, policies=policies, conditions=conditions, out=out)


class Killed(BaseException):
    """As Ctrl-C: nothing that follows may depend on it."""


class Counting(Display):
    """Ends the process, as it were, after so many episodes."""

    def __init__(self, most):
        super().__init__(quiet=True)
        self.left = most

    def show(self, *_):
        self.left -= 1
        if self.left < 0:
            raise Killed


def test_a_measurement_that_was_killed_goes_on_and_ends_alike(policies, tmp_path):
    whole = measure_robustness(asked(policies, tmp_path / "whole"), Display(quiet=True))
    again = tmp_path / "again"
    with pytest.raises(Killed):
        measure_robustness(asked(policies, again), Counting(20))
    kept = (again / "episodes.jsonl").read_text()
    # A line that was cut off by the kill is no episode.
    (again / "episodes.jsonl").write_text(kept + kept.splitlines()[0][:40])
    resumed = measure_robustness(asked(policies, again, AXES, 2, "env.num_envs=3"), Display(quiet=True))
    different = {"provenance", "config"}
    assert {k: v for k, v in resumed.items() if k not in different} == {
        k: v for k, v in whole.items() if k not in different
    }
    played = [json.loads(line) for line in (again / "episodes.jsonl").read_text().splitlines()]
    # 3 tasks, 2 starts: plain, noise=40, delay=2, delay=4, language=2; by both policies.
    assert len(played) == len({(e["policy"], e["variant"], e["task"], e["start"]) for e in played}) == 2 * 5 * 6
    assert [(axis["axis"], [level["label"] for level in axis["levels"]]) for axis in whole["axes"]] == [
        ("noise", ["40 grey levels of 255, standard deviation"]),
        ("delay", ["2 control steps", "4 control steps"]),
        ("language", ["2 of 3 kinds of rewording"]),
    ]
    assert whole["plain"]["rates"]["after"]["n"] == 6 and whole["perturbed"]["rates"]["before"]["n"] == 24
    assert {said["said"] for said in whole["instructions"]} == {
        f"transfer to the {colour} square" for colour in ("red", "green", "blue")
    }
    page = (again / "robust.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # noise beside the unperturbed frame; the others look alike
    assert "transfer to the red square" in page and "http" not in page.replace("http://www.w3.org", "")
    # More axes later: only theirs are played.
    more = measure_robustness(asked(policies, again, "noise"), Display(quiet=True))
    assert more["axes"][0]["levels"][2] == whole["axes"][0]["levels"][0]
    assert len((again / "episodes.jsonl").read_text().splitlines()) == 60 + 2 * 2 * 6


def test_another_policy_or_seed_does_not_go_on_there(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_play", lambda *_: None)
    monkeypatch.setattr(measuring, "summary", lambda *_: {})
    monkeypatch.setattr(measuring, "write_robust_page", lambda *_: None)
    measure_robustness(asked(policies, tmp_path / "out"), Display(quiet=True))
    measure_robustness(asked(policies, tmp_path / "out", AXES, 5), Display(quiet=True))
    for other in (
        asked({**policies, "after": policies["before"]}, tmp_path / "out"),
        asked(policies, tmp_path / "out", AXES, 2, "eval.seed=1"),
        asked(policies, tmp_path / "out", AXES, 2, "eval.temperatures=0"),
    ):
        with pytest.raises(ConfigError, match="holds episodes of another evaluation"):
            measure_robustness(other, Display(quiet=True))


def test_counts_and_paired_tests_are_those_of_the_episodes():
    plain = [Start("t", "eval", index) for index in range(8)]
    dark = [Start("t", "eval", index, "light=1") for index in range(8)]
    wins = {"before": ([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]),
            "after": ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0])}  # fmt: skip
    outcomes = {
        (name, start): {"success": bool(won)}
        for name, rows in wins.items()
        for starts, row in zip((plain, dark), rows, strict=True)
        for start, won in zip(starts, row, strict=True)
    }
    found = figures(["before", "after"], dark, outcomes)
    assert found["rates"]["before"] == {"k": 1, "n": 8, "rate": 0.125, "wilson95": list(wilson(1, 8))}
    assert found["rates"]["after"]["k"] == 6
    # Exact McNemar by hand: 6 against 1 of 7: 2 (1 + 7) / 2^7; 0 against 3 of 3: 2 / 2^3; 1 against 1.
    assert found["paired_test"] == {"improved": 6, "worsened": 1, "p_value": 0.125}
    assert found["against_plain"]["before"] == {"improved": 0, "worsened": 3, "p_value": 0.25}
    assert found["against_plain"]["after"] == {"improved": 1, "worsened": 1, "p_value": 1.0}


def result_of(improved, worsened, p_value):
    def measured(k, n):
        rates = {name: {"k": k, "n": n, "rate": k / n, "wilson95": list(wilson(k, n))} for name in ("before", "after")}
        test = {"improved": improved, "worsened": worsened, "p_value": p_value}
        return {"rates": rates, "paired_test": test, "against_plain": {"before": test, "after": test}}

    return {
        "suite": "reach_toy",
        "mode": "sampled",
        "policies": {"before": "runs/x/sft/policy", "after": "runs/x/policy"},
        "plain": measured(9, 10),
        "perturbed": measured(3, 10),
        "axes": [{"axis": "noise", "what": "-", "levels": [], **measured(3, 10)}],
    }


def test_a_fall_is_told_only_where_it_was_shown():
    assert verdict_of(result_of(0, 6, 0.03)) == [
        "90.0 % unperturbed (9 of 10), 30.0 % over all perturbations (3 of 10).",
        "Success falls under: noise.",
        "From before to after: +0.0 points unperturbed, +0.0 points perturbed.",
    ]
    assert verdict_of(result_of(0, 4, 0.125))[1] == verdict_of(result_of(6, 0, 0.03))[1]
    assert verdict_of(result_of(0, 4, 0.125))[1] == "Under no axis was a fall shown."


def test_the_report_shows_the_card_once_it_was_measured(tmp_path):
    run = tmp_path / "run"
    write_json_atomic(run / "config.json", config_dict(toy_config()))
    card = re.compile(r'<section id="robustness".*?</section>', re.DOTALL)
    assert "<code>reachrl robust</code>" in card.findall(write_report(run).read_text())[0]
    write_json_atomic(run / "robust" / "robust.json", result_of(0, 6, 0.03))
    found = card.findall(write_report(run).read_text())[0]
    assert "Success falls under: noise." in found and "<svg" in found and 'href="robust/robust.html"' in found


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ("glare", "--axes: reach_toy has no axis 'glare'; it has language, noise, delay"),
        ("noises", "did you mean 'noise'"),
        ("delay=3", "--axes delay=3: out of range; delay has the levels 2, 4 (control steps)"),
        ("delay=", "out of range"),
        (",", "names none"),
    ],
)
def test_axes_that_are_not_there_are_refused_in_one_line(axes, told):
    with pytest.raises(ConfigError) as error:
        own_conditions(toy_config().env, axes, 1, 0)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_command_says_what_is_missing(policies, tmp_path, command_line):
    code, _, told = command_line("robust", tmp_path / "nothing")
    assert code == 2 and "which configuration?" in told
    code, _, told = command_line("robust", tmp_path, "--preset", "toy")
    assert code == 2 and "there is no policy (after)" in told
    code, _, told = command_line("robust", policies["after"], "--preset", "toy", "--axes", "camera", "--episodes", "1")
    assert code == 2 and "reach_toy has no axis 'camera'" in told
    code, _, told = command_line("robust", policies["after"], "--preset", "toy", "--episodes", "99")
    assert code == 2 and "--episodes 99: there are env.num_eval_starts=" in told


def test_the_command_measures_a_policy_alone(policies, tmp_path, command_line):
    code, said, _ = command_line(
        "robust", policies["after"], "--preset", "toy", "--axes", "noise=40", "--episodes", "1",
        "--out", tmp_path / "out", "env.num_envs=1", "env.max_steps=2",
        columns=200,
    )  # fmt: skip
    assert code == 0 and "all perturbations" in said and "robust.html" in said
    assert json.loads((tmp_path / "out" / "robust.json").read_text())["perturbed"]["rates"].keys() == {"after"}
