"""Several temperatures in one evaluation: names, the same starts and noise, paired comparisons, records and report."""

import json

import numpy as np
import pytest
import torch
from test_oft_policy import made, seen
from tiny_run import play, tiny_config
from toy_policy import toy_config, toy_policy

from reachrl.config.evaluation import EvalSection, mode_name, mode_temperature
from reachrl.config.loading import load_config
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError
from reachrl.evaluation import against_headline, evaluate, heldout_starts, outcomes_record
from reachrl.policies.decoding.decode import choose
from reachrl.streams import Stream, generator
from reachrl.testing.policies import given_noise
from reachrl.types import Start


@pytest.mark.parametrize(
    ("temperature", "name"),
    [(0, "greedy"), (0.0, "greedy"), (1, "sampled"), (0.6, "sampled@0.6"), (2.0, "sampled@2.0"), ("mean", "mean")],
)
def test_a_temperature_has_one_name(temperature, name):
    assert mode_name(temperature) == name and mode_temperature(name) == temperature


@pytest.mark.parametrize("name", ["", "argmax", "sampled@1", "sampled@0.60", "sampled@x", "sampled@nan"])
def test_other_names_are_no_temperatures(name):
    with pytest.raises(ValueError):
        mode_temperature(name)


def test_the_first_temperature_is_the_headline_and_earlier_keys_mean_what_they_meant():
    assert load_config("toy").eval.modes == ("sampled", "greedy")
    assert load_config("toy", ["eval.temperatures=[0, 0.6, 1]"]).eval.modes == ("greedy", "sampled@0.6", "sampled")
    assert load_config("toy", ["eval.temperatures=0.6"]).eval.temperatures == (0.6,)
    for said in ('[1, 0, "mean"]', "1,0,mean"):
        assert load_config("toy", [f"eval.temperatures={said}"]).eval.modes == ("sampled", "greedy", "mean")
    assert load_config("toy", ["eval.temperatures=mean"]).eval.temperatures == ("mean",)
    for wrong in ("-1", "median", "inf", "1,median"):
        with pytest.raises(
            ConfigError, match=f"'?{wrong.split(',')[-1]}'?: expected 0 .greedy., a number above it, or"
        ):
            load_config("toy", [f"eval.temperatures={wrong}"])
    assert load_config("toy", ["eval.modes=greedy"]).eval.temperatures == (0.0,)
    assert load_config("toy", ["eval.temperature=0.5"]).eval.temperatures == (0.5, 0.0)
    for wrong in (["eval.modes=greedy", "eval.temperatures=1"], ["eval.modes=best"], ["eval.temperatures=-1"]):
        with pytest.raises(ConfigError, match="eval"):
            load_config("toy", wrong)


def test_actions_are_drawn_at_the_named_temperature_with_the_same_noise():
    """The first token is argmax(logits / T + noise), with noise addressed by seed, task, start and step alone."""
    config = toy_config()
    policy, options = toy_policy(config, seed=4), EvalSection(num_starts=2, seed=9)
    starts = heldout_starts(config.env, options)
    drawn, logits = {}, {}
    with VectorEnv(config.env, len(starts)) as envs:
        for mode in ("greedy", "sampled@0.6", "sampled"):
            result = evaluate(policy, envs, starts, mode=mode, config=options, record=lambda _: True)
            drawn[mode] = {e.start: e.turns[0].token_ids[0] for e in result.episodes}
        inputs = policy.encode(envs.reset(starts, starts))
    # The sampler's distribution of the first token, from the log-probs of every choice.
    shape = (len(starts), policy.num_action_tokens, policy.num_choices)
    lowest = int(
        policy.act(inputs, noise=given_noise(torch.zeros(shape).index_fill(2, torch.tensor(0), 1e6))).token_ids[0, 0]
    )
    for choice in range(policy.num_choices):
        ids = torch.full(shape[:2], lowest + choice)
        with torch.no_grad():
            scores = policy.evaluate(inputs, ids).logprobs[:, 0]
        for start, score in zip(starts, scores.tolist(), strict=True):
            logits.setdefault(start, []).append(score)
    for start in starts:
        noise = generator(9, Stream.EVALUATION_NOISE, start.task, start.index, 0).gumbel(
            size=(policy.num_action_tokens, policy.num_choices)
        )[0]
        for mode, temperature in (("sampled@0.6", 0.6), ("sampled", 1.0)):
            expected = int(np.argmax(np.array(logits[start]) / temperature + noise))
            assert drawn[mode][start] - lowest == expected
        assert drawn["greedy"][start] - lowest == int(np.argmax(logits[start]))


def test_temperatures_are_compared_on_the_same_starts():
    def record(successes):
        counts = {"num_decisions": 1, "num_malformed": 0}
        return outcomes_record(
            [{"task": "t", "start": i, "success": bool(s)} | counts for i, s in enumerate(successes)]
        )

    records = {"greedy": record([0, 0, 0, 1, 1, 0]), "sampled@0.6": record([1, 1, 1, 1, 0, 0])}
    # Three more, one fewer: two-sided exact binomial 2 * (1 + 4) / 16.
    assert against_headline(records) == {"sampled@0.6": {"improved": 3, "worsened": 1, "p_value": 0.625}}
    assert against_headline({"greedy": records["greedy"]}) == {}


def test_a_run_reports_every_temperature(tmp_path):
    config, run = (
        tiny_config('eval.temperatures=[0, 0.6, 1, "mean"]', "eval.num_starts=2", "num_iterations=1"),
        tmp_path / "run",
    )
    play(config, run)
    before, after = (json.loads((run / "eval" / f"{when}.json").read_text()) for when in ("before", "after"))
    summary = json.loads((run / "summary.json").read_text())
    assert list(before) == list(after) == ["greedy", "sampled@0.6", "sampled", "mean"] and summary["mode"] == "greedy"
    rows = {row["mode"]: row for row in summary["temperatures"]}
    for mode, row in rows.items():
        assert row["temperature"] == mode_temperature(mode)
        won = {(e["task"], e["start"]): e["success"] for e in after[mode]["episodes"]}
        first = {(e["task"], e["start"]): e["success"] for e in after["greedy"]["episodes"]}
        assert won.keys() == {(task, index) for task in config.env.tasks for index in range(2)}
        if mode != "greedy":
            assert row["against_headline"]["improved"] == sum(won[key] and not first[key] for key in won)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    played = [(r["iteration"], r["mode"], r["temperature"], r["n"]) for r in logged if r["kind"] == "eval"]
    assert played == [(i, mode, mode_temperature(mode), 6) for i in (0, 1) for mode in before]
    assert "held out, sampled@0.6" in (run / "report.html").read_text()
    assert Start("red-square", "eval", 0) in heldout_starts(config.env, config.eval)


def test_the_mean_is_the_bin_nearest_to_the_mean_of_all():
    weights = torch.tensor([[0.5, 0.0, 0.0, 0.25, 0.25], [0.1, 0.0, 0.0, 0.0, 0.9], [0.2, 0.2, 0.2, 0.2, 0.2]])
    noise = torch.tensor([[0.0, 1e3, 0.0, 0.0, 0.0]]).expand(3, 5)
    assert choose(weights.log(), None, mean=True).flatten().tolist() == [2, 4, 2]  # of 1.75, 3.6 and 2
    assert choose(weights.log(), None, mean=False).flatten().tolist()[:2] == [0, 4]
    assert choose(weights.clamp(min=1e-9).log(), noise, mean=False).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["openvla", "openvla_oft"])
def test_each_token_is_the_mean_of_its_distribution_given_those_before(kind):
    """Of all tokens in one pass with the answer given, as the loss computes it."""
    if kind == "openvla":
        config = toy_config()
        policy = toy_policy(config, seed=4)
        with VectorEnv(config.env, 2) as envs:
            starts = heldout_starts(config.env, config.eval)[:2]
            inputs = policy.encode(envs.reset(starts, starts))
    else:
        policy = made()
        inputs = policy.encode(seen())
    assert policy.has_mean
    chosen = policy.act(inputs, mean=True)
    with torch.no_grad():
        probabilities = policy.action_logits(inputs, chosen.token_ids)[0].double().softmax(-1)
    means = probabilities @ torch.arange(policy.num_choices, dtype=torch.float64)
    assert ((policy.choices(chosen.token_ids) - means).abs() < 0.501).all()
    assert not chosen.token_ids.equal(policy.act(inputs).token_ids)


def test_one_observation_is_answered_by_the_mean_and_tokens_that_are_no_bins_have_none(monkeypatch):
    config = toy_config()
    policy = toy_policy(config, seed=4)
    with VectorEnv(config.env, 1) as envs:
        start = heldout_starts(config.env, config.eval)[:1]
        observation = envs.reset(start, start)
    answered = policy.predict(images=observation.frames[0], instruction=observation.instructions[0], temperature="mean")
    sample = policy.act(policy.encode(observation), mean=True)
    np.testing.assert_array_equal(answered, policy.actions(sample)[0])
    everything = made(dialect="official")  # chooses from the whole vocabulary
    with pytest.raises(ConfigError, match="no mean; use 0"):
        shown = seen()
        assert shown.state is not None
        images = {name: frames[0] for name, frames in shown.images.items()}
        everything.predict(images=images, instruction="reach", state=shown.state[0], temperature="mean")
    monkeypatch.setattr(type(policy), "has_mean", False)
    with VectorEnv(config.env, 1) as envs, pytest.raises(ConfigError, match="no mean; use 0"):
        evaluate(policy, envs, start, mode="mean", config=config.eval)
