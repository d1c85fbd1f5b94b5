"""Every registered kind resolves, names its own section and keeps its contract; the kit finds broken promises."""

import numpy as np
import pytest
import torch

from reachrl.config.env import EnvSection
from reachrl.config.loading import load_config
from reachrl.errors import ExtensionError
from reachrl.policies.base import ActionSample, Evaluation
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.registry import BUILTINS, resolve, section_class
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.testing.conformance_policy import check_policy
from reachrl.testing.conformance_reward_model import check_reward_model
from reachrl.testing.policies import TableInputs, TablePolicy, TablePolicyConfig
from reachrl.types import Observation

TEXTS = ["open the drawer", "press the button on top of the box"]
KINDS = [(group, kind) for group, kinds in BUILTINS.items() if group != "policy_folders" for kind in kinds]


@pytest.mark.parametrize(("group", "kind"), KINDS)
def test_a_kind_and_its_section_belong_together(group, kind):
    section = section_class(group, kind)
    assert resolve(group, kind).Config is section
    assert section().kind == kind
    if group == "envs":
        assert issubclass(section, EnvSection)


def frames(size: int) -> Observation:
    images = np.random.default_rng(0).integers(0, 255, (3, size, size, 3), dtype=np.uint8)
    return Observation(
        images={"camera": images}, instructions=("open the drawer", "reach", "press the button on top of the box")
    )


def toy(**changes: object) -> OpenVLAPolicy:
    torch.manual_seed(1)
    config = load_config("toy").policy
    assert isinstance(config, section_class("policies", "openvla"))
    policy = OpenVLAPolicy(config.model_copy(update=changes)).eval()
    with torch.no_grad():
        for parameter in policy.value_head.parameters():
            parameter.normal_()
    return policy


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_openvla_keeps_the_contract(critic):
    check_policy(toy(critic=critic), frames(24))


def test_the_table_policy_keeps_the_contract():
    policy = TablePolicy(TablePolicyConfig(num_contexts=256))
    torch.nn.init.normal_(policy.logits)
    check_policy(policy, frames(8))


def small_reward_model(kind=SmallRewardModel):
    torch.manual_seed(0)
    return kind(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=TEXTS, num_frames=2).eval()


def test_the_small_reward_model_keeps_the_contract(tmp_path):
    check_reward_model(small_reward_model(), TEXTS, tmp_path / "model")


class BatchNormed(SmallRewardModel):
    def logits(self, clips, instructions):
        logits = super().logits(clips, instructions)
        return logits - logits.mean()


class Unshifted(SmallRewardModel):
    def shift_logits(self, by):
        pass


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (BatchNormed, "does not depend on the others"),
        (Unshifted, "shift_logits adds"),
        (type("Nameless", (SmallRewardModel,), {}), "names the kind of its class"),
    ],
)
def test_a_broken_promise_of_a_reward_model_is_named(broken, message, tmp_path):
    with pytest.raises(ExtensionError, match=message):
        check_reward_model(small_reward_model(broken), TEXTS, tmp_path / "model")


class OtherTemperature(TablePolicy):
    def evaluate(self, inputs, token_ids, token_mask, *, temperature: float = 1.0) -> Evaluation:
        return super().evaluate(inputs, token_ids)


class RowsInteract(TablePolicy):
    def act(self, inputs, *, temperature: float = 1.0, noise=None, with_values=True) -> ActionSample:
        sample = super().act(inputs, temperature=temperature, noise=noise)
        ids = sample.token_ids if len(sample.values) > 1 else sample.token_ids * 0
        return ActionSample.full(ids, sample.logprobs, sample.values)


class Shuffled(TableInputs):
    @classmethod
    def concat(cls, parts):
        return super().concat(parts[::-1])


class JoinsInAnotherOrder(TablePolicy):
    def encode(self, observation):
        return Shuffled(pixels=super().encode(observation).pixels)


class CachesAnotherContext(TablePolicy):
    def cache(self, inputs):
        return TableInputs(features=super().cache(inputs).features + 1)


class ForgetsItsCritic(TablePolicy):
    def parameter_groups(self):
        return super().parameter_groups() | {"value": []}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (OtherTemperature, "not those evaluate"),
        (RowsInteract, "rows must not interact"),
        (JoinsInAnotherOrder, "rows of encode taken with `rows` and joined with `concat`"),
        (CachesAnotherContext, "log-probs from cached rows"),
        (ForgetsItsCritic, "exactly once"),
    ],
)
def test_a_broken_promise_is_named(broken, message):
    policy = broken(TablePolicyConfig(num_contexts=256))
    torch.nn.init.normal_(policy.logits)
    with pytest.raises(ExtensionError, match=message):
        check_policy(policy, frames(8))
