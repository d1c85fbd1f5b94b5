"""Two decoders, one policy: vLLM's own OpenVLA against ours, with vision towers of the released size.

Runs where REACHRL_VLLM_PYTHON names the interpreter of an environment with vLLM and timm; takes some minutes and 8 GB.
"""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reachrl.backends.base import SharedWeights
from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors
from reachrl.backends.weights import actor_gap
from reachrl.config.loading import load_config
from reachrl.config.policy import LanguageModelConfig, OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.envs.vector import VectorEnv
from reachrl.errors import WorkerError
from reachrl.policies.base import ActionSample
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.types import Observation, Start

PYTHON = os.environ.get("REACHRL_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="REACHRL_VLLM_PYTHON names no interpreter with vLLM")
figures = logging.getLogger("figures")  # shown by --log-cli-level=INFO
CLOSE = 1e-4  # nats
INSTRUCTIONS = ("pick up the red block", "push the green button into the wall slowly")


def configuration(**changes: object) -> OpenVLAConfig:
    """The released towers in front of a small Llama."""
    llama = LanguageModelConfig(hidden_size=256, intermediate_size=512, num_layers=2)
    small = {"language_model": llama, "tokenizer": "built_in", "num_action_tokens": 7, "value_hidden_size": 8}
    engine = {"python": PYTHON, "max_batch": 8, "eager": True}
    return OpenVLAConfig.openvla_7b(**{**small, "dtype": "float32", "decoder": "vllm", "vllm": engine, **changes})


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenVLAPolicy]:
    """Adapters that do something, on weights that are far from indifferent between actions."""
    torch.manual_seed(0)
    base = OpenVLAPolicy(configuration())
    with torch.no_grad():
        for name, p in base.language_model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=0.2 if "lm_head" in name else 0.5 if "embed" in name else 0.1)
        base.value_head.fc2.weight.normal_()
        for name, p in base.vision_backbone.named_parameters():
            if name.endswith("scale_factor"):
                p.fill_(0.5)
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    del base
    lora = {"rank": 4, "parts": ("language_model", "projector", "vision")}
    policy = OpenVLAPolicy(configuration(checkpoint=folder, lora=lora, critic="adapter"))
    adapt(policy, "")
    yield policy
    policy.close()


@torch.no_grad()
def adapt(policy: OpenVLAPolicy, prefix: str, seed: int = 1) -> None:
    """New outer matrices in the actor's adapters under `prefix`."""
    torch.manual_seed(seed)
    for name, p in policy.named_parameters():
        if name.startswith(prefix) and ".lora_B.default" in name:
            p.copy_(torch.randn_like(p) * 0.03)


@pytest.fixture(scope="module")
def inputs(policy: OpenVLAPolicy) -> OpenVLAInputs:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (2, 7, 7, 3), dtype=np.uint8)
    return policy.encode(Observation(images=rough.repeat(32, 1).repeat(32, 2), instructions=INSTRUCTIONS))


def noise(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gumbel(size=(rows, 7, 256)).astype(np.float32))


_SEEN: dict[tuple[int, ...], torch.Tensor] = {}


def seen(policy: OpenVLAPolicy, inputs: OpenVLAInputs) -> OpenVLAInputs:
    """The same rows for our own decoder, whose towers need not look twice."""
    assert inputs.pixel_values is not None
    key = (id(inputs.pixel_values), *(p._version for p in policy.vision_backbone.parameters()))
    if key not in _SEEN:
        with torch.no_grad():
            _SEEN[key] = policy.vision_features(inputs.pixel_values)
    return replace(inputs, pixel_values=None, vision_features=_SEEN[key])


@contextmanager
def own_decoder(policy: OpenVLAPolicy) -> Iterator[None]:
    engine, policy._vllm = policy._vllm, None
    try:
        yield
    finally:
        policy._vllm = engine


def check_agreement(policy: OpenVLAPolicy, inputs: OpenVLAInputs, temperature: float) -> ActionSample:
    """Greedy tokens are equal, and log-probs on both paths those of teacher forcing."""
    theirs = policy.act(inputs, temperature=temperature, with_values=False)
    with own_decoder(policy):
        ours = policy.act(seen(policy, inputs), temperature=temperature, with_values=False)
    gap = (theirs.logprobs - ours.logprobs).abs().max().item()
    figures.info(f"greedy at {temperature}: {gap:.1e} nats, least log-prob {theirs.logprobs.min():.2f}")
    assert theirs.values is None
    assert torch.equal(theirs.action_ids, ours.action_ids)
    assert gap < CLOSE
    return theirs


def scored(policy: OpenVLAPolicy, inputs: OpenVLAInputs, sample: ActionSample, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return policy.evaluate(seen(policy, inputs), sample.action_ids, temperature=temperature).logprobs


def sent(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Parts of the policy that were sent to the engine, batch by batch."""
    found = [re.search(r"new weights of (.*): [0-9.]+ GB", record.getMessage()) for record in caplog.records]
    return [match[1] for match in found if match]


def test_it_starts_and_takes_all_weights_once(policy, inputs, caplog):
    caplog.set_level(logging.INFO)
    began = time.perf_counter()
    policy.act(inputs, with_values=False)
    figures.info(f"first batch, with the engine's start: {time.perf_counter() - began:.1f} s")
    assert sent(caplog) == ["vision_backbone, projector, language_model"]
    caplog.clear()
    began = time.perf_counter()
    policy.act(inputs, with_values=False)
    first = time.perf_counter() - began
    with own_decoder(policy):
        policy.act(inputs, with_values=False)
        began = time.perf_counter()
        policy.act(inputs, with_values=False)
    figures.info(f"{len(INSTRUCTIONS)} rows: vLLM {first:.2f} s, own decoder {time.perf_counter() - began:.2f} s")
    assert sent(caplog) == []


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_greedy_tokens_and_log_probs_are_the_own_decoders(policy, inputs, temperature):
    sample = check_agreement(policy, inputs, temperature)
    assert len({tuple(row) for row in sample.action_ids.tolist()}) == 2, "frames make a difference"
    assert sample.logprobs.min() > -np.log(256) + 0.5, "the policy prefers some actions"


@pytest.mark.parametrize("temperature", [1.0, 1.7, 0.6])
def test_samples_are_scored_as_the_learner_scores_them(policy, inputs, temperature):
    sample = policy.act(inputs, temperature=temperature, gumbel=noise(0), with_values=False)
    gap = (sample.logprobs - scored(policy, inputs, sample, temperature)).abs().max().item()
    figures.info(f"sampled at {temperature}: {gap:.1e} nats")
    assert gap < CLOSE
    greedy = policy.act(inputs, with_values=False).action_ids
    assert not torch.equal(sample.action_ids, greedy)


def test_given_tokens_are_scored_on_the_engines_path(policy, inputs):
    ids = torch.arange(14).view(2, 7) * 18 + policy.first_action_id
    theirs = policy.acting_logprobs(inputs, ids, temperature=1.3)
    with torch.no_grad():
        ours = policy.evaluate(seen(policy, inputs), ids, temperature=1.3).logprobs
    with own_decoder(policy):
        forced = policy.acting_logprobs(seen(policy, inputs), ids, temperature=1.3)
    assert (theirs - ours).abs().max() < CLOSE
    assert (forced - ours).abs().max() < CLOSE


def test_samples_repeat_and_do_not_depend_on_their_batch(policy, inputs):
    gumbel = noise(1)
    first = policy.act(inputs, gumbel=gumbel, with_values=False)
    again = policy.act(inputs, gumbel=gumbel, with_values=False)
    other = policy.act(inputs, gumbel=noise(2), with_values=False)
    order = torch.tensor([1])
    part = policy.act(inputs.rows(order), gumbel=gumbel[order], with_values=False)
    assert torch.equal(first.action_ids, again.action_ids)
    assert torch.equal(first.action_ids[order], part.action_ids)
    assert (first.logprobs[order] - part.logprobs).abs().max() < CLOSE
    assert not torch.equal(first.action_ids, other.action_ids)


def test_samples_follow_the_distribution(policy, inputs):
    """Where the tokens fall in their distributions' quantiles: chi-square of eight bins, seven degrees of freedom."""
    alike, temperature = torch.zeros(24, dtype=torch.int64), 1.7
    ids = policy.act(inputs.rows(alike), gumbel=noise(3, 24), with_values=False, temperature=temperature).action_ids
    with torch.no_grad():
        logits, _ = policy.action_logits(seen(policy, inputs).rows(alike), ids, temperature=temperature)
    choices = (ids - policy.first_action_id).unsqueeze(-1)
    upper = logits.softmax(-1).cumsum(-1).gather(-1, choices)
    width = logits.softmax(-1).gather(-1, choices)
    place = upper - width * torch.from_numpy(np.random.default_rng(4).random(upper.shape)).float()
    counts = torch.bincount((place.flatten() * 8).long().clamp(0, 7), minlength=8)
    statistic = ((counts - counts.sum() / 8) ** 2 / (counts.sum() / 8)).sum().item()
    figures.info(f"{counts.sum()} tokens, chi-square {statistic:.1f}")
    assert statistic < 24.3  # p = 0.001


@pytest.mark.parametrize("part", ["vision_backbone", "projector", "language_model"])
def test_changed_adapters_change_both_decoders_and_nothing_else_is_sent(policy, inputs, caplog, part):
    caplog.set_level(logging.INFO)
    before = check_agreement(policy, inputs, 1.0)
    caplog.clear()
    adapt(policy, part, seed=7)
    after = check_agreement(policy, inputs, 1.0)
    assert sent(caplog) == [part]
    change = (before.logprobs - after.logprobs).abs().max().item()
    figures.info(f"{part}: log-probs moved by {change:.3f}")
    assert change > 100 * CLOSE


def test_changed_whole_weights_are_followed_and_a_trained_critic_is_not(policy, inputs, caplog):
    caplog.set_level(logging.INFO)
    before = check_agreement(policy, inputs, 1.0)
    caplog.clear()
    with torch.no_grad():
        policy.value_head.fc1.weight.mul_(1.1)
        for name, p in policy.named_parameters():
            if ".lora_B.critic" in name:
                p.add_(0.01)
    policy.act(inputs, with_values=False)
    assert sent(caplog) == []
    with torch.no_grad():
        policy.language_model.lm_head.weight.mul_(1.3)
    after = check_agreement(policy, inputs, 1.0)
    assert sent(caplog) == ["language_model"]
    assert not torch.equal(before.action_ids, after.action_ids) or (before.logprobs - after.logprobs).abs().max() > 0.1


def test_the_learners_probe_finds_no_gap(policy, inputs):
    learner = LocalLearner(policy, PPOConfig(), seed=3, temperature=1.2)
    packed = learner.pack_weights(image_size=224)
    gap = actor_gap(policy, packed, seed=3, image_size=224, temperature=1.2)
    figures.info(f"probe: {gap:.1e} nats")
    assert gap < CLOSE


def test_a_rollout_is_scored_as_it_was_acted(policy, monkeypatch):
    """The loop's own path: collector and learner around the engine, with the toy environment's frames resized."""
    env = load_config("toy", ["env.num_envs=2"]).env
    monkeypatch.setattr(policy, "decode_actions", lambda ids: OpenVLAPolicy.decode_actions(policy, ids)[:, :4])
    learner = LocalLearner(policy, PPOConfig(), seed=0, temperature=1.4)
    with VectorEnv(env, 2) as envs:
        actors = LocalActors(policy, [envs], seed=0, temperature=1.4)
        actors.load_weights(SharedWeights(version=0, policy=policy))
        rollout = actors.collect(lambda number: Start(env.tasks[0], "train", number), 2).result()
    gap = np.abs(rollout.behaviour_logprobs - learner.score(rollout).result().old_logprobs).max()
    figures.info(f"rollout: {gap:.1e} nats")
    assert gap < CLOSE


def test_values_are_the_policys_own(policy, inputs):
    rows = inputs.rows(torch.tensor([1]))
    with torch.no_grad():
        assert torch.equal(policy.act(rows).values, policy.values(rows))


def test_an_engine_that_was_killed_is_told_and_replaced(policy, inputs):
    rows = inputs.rows(torch.tensor([0]))
    pid = policy._vllm.pid
    os.kill(pid, 9)
    with pytest.raises(WorkerError, match="SIGKILL"):
        policy.act(rows, with_values=False)
    check_agreement(policy, rows, 1.0)
    assert policy._vllm.pid not in (None, pid)
    policy.close()
    assert not Path(f"/proc/{pid}").exists()
