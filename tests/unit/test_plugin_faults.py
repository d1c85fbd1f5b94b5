"""What a plug-in gets wrong ends in an error that says what to do, also where Python skips assertions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reachrl.backends.base import Pending
from reachrl.backends.learner import LocalLearner
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ExtensionError
from reachrl.loop import train
from reachrl.rewards.base import check_finite
from reachrl.rewards.task import TaskReward
from reachrl.run.directory import Run
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.testing.rewards import make_rollout
from reachrl.types import Observation, Rewards


class GreedyPolicy(TablePolicy):
    """Takes its likeliest token, whatever the noise."""

    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        return super().act(inputs, temperature=temperature, with_values=with_values)


class DropoutPolicy(TablePolicy):
    """Scores by chance."""

    def evaluate(self, inputs, token_ids, token_mask, *, temperature=1.0):
        out = super().evaluate(inputs, token_ids, token_mask, temperature=temperature)
        return replace(out, logprobs=out.logprobs + 0.1 * torch.randn_like(out.logprobs))


class ForeignConfig(PPOConfig):
    """Options derived from PPO's, of an algorithm that is not."""

    kind: str = f"{__name__}:ForeignAlgorithm"  # pyright: ignore


class ForeignAlgorithm:
    """Has no optimiser."""

    Config = ForeignConfig

    def __init__(self, config, policy, *, seed):
        self.config = config


def rollout_of(policy):
    rollout = make_rollout(image_size=8)
    ids = np.zeros((*rollout.valid.shape, policy.num_action_tokens), np.int64)

    def dark(images):  # contexts 0 and 1
        return {camera: frames // 128 for camera, frames in images.items()}

    seen = {name: getattr(rollout, name) for name in ("last_observation", "final_observation")}
    frames = {name: replace(each, images=dark(each.images)) for name, each in seen.items()}
    frames["images"] = dark(rollout.images)
    tokens = {"token_ids": ids, "token_mask": ids == 0, "behaviour_logprobs": ids.astype(np.float32)}
    return replace(rollout, **tokens, **frames)


def test_a_policy_that_ignores_the_noise():
    policy = GreedyPolicy(TablePolicyConfig())
    inputs = policy.encode(Observation(images={"camera": np.zeros((3, 1, 1, 3), np.uint8)}, instructions=("",) * 3))
    with pytest.raises(ExtensionError, match=r"GreedyPolicy\.act did not take the tokens .*argmax\(logits"):
        policy.acting_logprobs(inputs, torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.ones(3, 2, dtype=torch.bool))


def test_a_policy_that_scores_by_chance():
    torch.manual_seed(0)
    policy = DropoutPolicy(TablePolicyConfig())
    learner, rollout = LocalLearner(policy, PPOConfig(warmup_iterations=0), seed=0, temperature=1.0), rollout_of(policy)
    scored = learner.score(rollout).result()
    with pytest.raises(ExtensionError, match=r"ratio of 1\.\d+ or its inverse.*DropoutPolicy.*dropout"):
        learner.update(rollout, TaskReward()(rollout), scored, iteration=0)


def test_an_algorithm_that_keeps_no_contract():
    with pytest.raises(ExtensionError, match=r"ForeignAlgorithm: .* subclass of reachrl\.algorithms\.base\.Algorithm"):
        LocalLearner(TablePolicy(TablePolicyConfig()), ForeignConfig(), seed=0, temperature=1.0)


@pytest.mark.parametrize("version", [1, -1])
def test_a_backend_that_collects_with_other_weights(tmp_path, version):
    rollout = replace(rollout_of(TablePolicy(TablePolicyConfig())), policy_version=version)
    actors = SimpleNamespace(load_weights=lambda weights: 0, collect=lambda draw, steps: Pending.done(rollout))
    learner = SimpleNamespace(version=0, config=PPOConfig(), export_weights=lambda: None)
    workers = SimpleNamespace(actors=actors, learner=learner, evaluator=None)
    with (
        Run.open(tmp_path, {}, tensorboard=False) as run,
        pytest.raises(
            ExtensionError, match=f"backend.kind=local gave a rollout of weights that are {-version} updates"
        ),
    ):
        train(TrainConfig(), workers, TaskReward(), SimpleNamespace(draw=None), run)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_reward_that_is_no_number(number):
    """In the advantages it would be that of every step, and the advice would be a lower learning rate."""
    rollout = rollout_of(TablePolicy(TablePolicyConfig()))
    total = np.zeros(rollout.valid.shape, np.float32)
    total[2, 1] = number
    asked = rollout.instructions[2][1]
    with pytest.raises(ExtensionError, match=rf"Odd: the reward is {number} in step 2 .*environment 1 \('{asked}'\)"):
        check_finite(Rewards(total=total), rollout, "Odd")
