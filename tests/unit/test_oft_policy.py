"""OpenVLA-OFT in small: the contract, critics, adapters, storage, and inputs that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reachrl.config.loading import load_config
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.functional.ppo import policy_loss
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy
from reachrl.testing.conformance_policy import check_policy
from reachrl.types import Observation

VIT = {"kind": "vit", "width": 16, "depth": 3, "num_heads": 2, "mlp_width": 24, "patch_size": 8}
TEXTS = ("open the drawer", "reach", "press the button on top of the box")


def micro(**changes: object) -> OpenVLAOFTConfig:
    sizes: dict[str, object] = {
        "image_size": 16,
        "towers": (VIT,),
        "image_mean": ((0.5, 0.5, 0.5),),
        "image_std": ((0.5, 0.5, 0.5),),
        "language_model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2},
        "value_hidden_size": 8,
        "chunk_size": 3,
        "num_cameras": 2,
        "state_size": 5,
    }
    return OpenVLAOFTConfig.model_validate({**sizes, **changes})


def made(**changes: object) -> OpenVLAOFTPolicy:
    torch.manual_seed(1)
    policy = OpenVLAOFTPolicy(micro(**changes))
    with torch.no_grad():
        for parameter in policy.value_head.parameters():
            parameter.normal_()
    if policy.config.state_size is not None and policy.config.checkpoint is None:
        policy.set_state_stats(np.full(5, -0.5), np.full(5, 1.5), np.ones(5, bool))
    return policy


def seen(cameras: int = 2, state: int | None = 5) -> Observation:
    rng = np.random.default_rng(0)
    frames = {f"eye{i}": rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8) for i in range(cameras)}
    numbers = None if state is None else rng.normal(size=(3, state)).astype(np.float32)
    return Observation(images=frames, instructions=TEXTS, state=numbers)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("dialect", ["official", "simplevla_rl", "rlinf"])
def test_it_keeps_the_contract(critic, dialect):
    check_policy(made(critic=critic, dialect=dialect), seen())


def test_a_policy_without_state_and_with_one_camera_keeps_the_contract():
    check_policy(made(num_cameras=1, state_size=None), seen(1, None))


def test_every_part_of_what_is_seen_counts():
    policy, observation = made(), seen()
    whole = policy.act(policy.encode(observation)).logprobs

    def without(name: str) -> torch.Tensor:
        images = {
            camera: np.zeros_like(each) if camera == name else each for camera, each in observation.images.items()
        }
        state = np.zeros_like(observation.state) if name == "state" else observation.state
        return policy.act(policy.encode(Observation(images=images, instructions=TEXTS, state=state))).logprobs

    for name in ("eye0", "eye1", "state"):
        assert (without(name) - whole).abs().max() > 1e-4, name


def test_the_copy_for_acting_gives_the_same_tokens():
    policy = made(rollout_copy=True)
    inputs = policy.encode(seen())
    acted = policy.act(inputs)
    scored = policy.evaluate(inputs, acted.token_ids, acted.token_mask)
    assert (acted.logprobs - scored.logprobs).abs().max() < 1e-5
    with torch.no_grad():
        policy.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # the copy follows
    again = policy.act(inputs)
    scored = policy.evaluate(inputs, again.token_ids, again.token_mask)
    assert (again.logprobs - scored.logprobs).abs().max() < 1e-5
    assert (again.logprobs - acted.logprobs).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        policy = made(gradient_checkpointing=recompute)
        ids = policy.encode_actions(np.zeros((3, 3, 4)))[0]
        policy.evaluate(policy.encode(seen()), ids).logprobs.sum().backward()
        gradients.append(policy.language_model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_the_state_trains_with_the_trunk_and_values_of_a_separate_critic_do_not_reach_it():
    policy = made(critic="separate")
    projector = policy.proprio_projector
    ids = policy.encode_actions(np.zeros((3, 3, 4)))[0]
    policy.evaluate(policy.encode(seen()), ids).values.sum().backward()
    assert projector.fc1.weight.grad is None
    policy.evaluate(policy.encode(seen()), ids).logprobs.sum().backward()
    assert projector.fc1.weight.grad.abs().max() > 0
    assert any(parameter is projector.fc1.weight for parameter in policy.parameter_groups()["trunk"])


def test_actions_are_rows_of_tokens_in_order():
    policy = made()
    policy.set_action_stats(np.full(4, -2.0), np.full(4, 2.0), np.ones(4, bool))
    actions = np.random.default_rng(0).uniform(-2, 2, (3, 3, 4)).astype(np.float32)
    ids, mask = policy.encode_actions(actions)
    assert ids.shape == (3, 12) and mask.all()
    decoded = policy.decode_actions(ids, mask)
    assert np.abs(decoded - actions).max() < 4 / 255
    only_second = policy.encode_actions(actions * (np.arange(3) == 1)[None, :, None])[0]
    assert torch.equal(only_second[:, 4:8], ids[:, 4:8])
    assert policy.token_actions().tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_ratio_of_one_action_covers_its_own_tokens():
    policy = made()
    old = torch.zeros(1, 12)
    new = old.clone()
    new[0, 4:8] = 0.1  # the second action is e^0.4 times likelier: the others are not
    mask = torch.ones(1, 12, dtype=torch.bool)
    loss, stats = policy_loss(
        new,
        old,
        torch.ones(1),
        mask,
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        ratio_level="action",
        token_actions=policy.token_actions(),
    )
    assert loss.mean().item() == pytest.approx(-(1 + 1.2 + 1) / 3)  # clipped at 1.2
    assert stats["clip_frac"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("observation", "says"),
    [
        (seen(1), r"looks at 2 cameras, and there is 1 \(eye0\)"),
        (seen(2, None), "takes a state of 5 numbers, and there is no state"),
        (seen(2, 7), "takes a state of 5 numbers, and there is a state of 7 numbers"),
    ],
)
def test_what_the_environment_does_not_offer_is_named(observation, says):
    with pytest.raises(ConfigError, match=says):
        made().encode(observation)


def test_statistics_of_other_sizes_are_named():
    policy = made()
    with pytest.raises(ConfigError, match=r"set policy\.state_size=8"):
        policy.set_state_stats(np.zeros(8), np.ones(8), np.ones(8, bool))
    with pytest.raises(ConfigError, match=r"Set policy\.num_action_tokens=7"):
        policy.set_action_stats(np.zeros(7), np.ones(7), np.ones(7, bool))


def test_it_is_saved_and_read_back_whole(tmp_path):
    policy = made(dialect="rlinf")
    policy.set_action_stats(np.full(4, -0.5), np.full(4, 0.5), np.ones(4, bool))
    policy.save_pretrained(tmp_path / "saved")
    other = OpenVLAOFTPolicy.from_pretrained(tmp_path / "saved")
    inputs, sample = policy.encode(seen()), policy.act(policy.encode(seen()))
    again = other.act(other.encode(seen()))
    assert torch.equal(again.token_ids, sample.token_ids)
    assert torch.equal(again.logprobs, sample.logprobs)
    assert torch.equal(other.values(inputs), policy.values(inputs))
    assert np.array_equal(other.actions(again), policy.actions(sample))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.restore(tmp_path / "saved")
    assert torch.equal(other.act(inputs).logprobs, sample.logprobs)
    assert other.config.dialect == "rlinf" and other.config.chunk_size == 3


@pytest.mark.parametrize(("key", "value"), [("chunk_size", 4), ("dialect", "official"), ("num_cameras", 1)])
def test_a_saved_policy_is_not_begun_as_another_function(tmp_path, key, value):
    made().save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"another architecture: {key} "):
        OpenVLAOFTPolicy(micro(checkpoint=tmp_path / "saved", **{key: value}))


def test_each_kind_names_the_other(tmp_path):
    made().save_pretrained(tmp_path / "oft")
    with pytest.raises(CheckpointError, match="written by ReachRL with policy.kind=openvla_oft, configured is openvla"):
        OpenVLAPolicy.from_pretrained(tmp_path / "oft")
    config = load_config("toy").policy
    OpenVLAPolicy(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="set policy.kind=openvla$"):
        OpenVLAOFTPolicy.from_pretrained(tmp_path / "plain")


def adapted(base: Path, **changes: object) -> OpenVLAOFTPolicy:
    torch.manual_seed(2)
    policy = OpenVLAOFTPolicy(micro(checkpoint=base, lora={"rank": 3, "alpha": 6.0}, **changes))
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_adapters_train_on_a_frozen_base_with_cached_features(tmp_path, critic):
    made().save_pretrained(tmp_path / "base")
    policy = adapted(tmp_path / "base", critic=critic)
    check_policy(policy, seen())
    cached = policy.cache(policy.encode(seen()))
    assert cached.pixel_values is None and cached.vision_features.shape == (3, 8, 16)  # 4 patches a camera
    policy.evaluate(cached, policy.encode_actions(np.zeros((3, 3, 4)))[0]).logprobs.sum().backward()
    held = [parameter for group in policy.parameter_groups().values() for parameter in group]
    assert policy.proprio_projector.fc1.weight.grad is None
    assert all(parameter.dtype is torch.float32 for parameter in held)
    policy.save_pretrained(tmp_path / "trained")
    other = OpenVLAOFTPolicy.from_pretrained(tmp_path / "trained")
    inputs = policy.encode(seen())
    assert torch.equal(other.act(inputs).logprobs, policy.act(inputs).logprobs)
    merged = OpenVLAOFTPolicy(micro(checkpoint=tmp_path / "trained", critic="shared"))
    assert (merged.act(inputs).logprobs - policy.act(inputs).logprobs).abs().max() < 1e-4


def test_predict_takes_frames_and_state():
    actions = made().predict(
        images=dict(zip(("a", "b"), seen().frames[:2], strict=True)), instruction="reach", state=np.zeros(5)
    )
    assert actions.shape == (3, 4) and actions.dtype == np.float32
