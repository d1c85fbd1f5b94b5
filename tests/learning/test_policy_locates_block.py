"""A policy from scratch learns to say where a block lies, from few thousand pictures."""

import numpy as np
import torch

from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.types import Observation

SIZE = 48
CONFIG = OpenVLAConfig.model_validate(
    {
        "image_size": SIZE,
        "towers": [{"kind": "conv", "stages": [{"channels": 16, "kernel": 5, "stride": 4}, {"channels": 48}]}] * 2,
        "num_action_tokens": 2,
        "language_model": {"hidden_size": 64, "intermediate_size": 170, "num_layers": 3, "num_heads": 4},
    }
)


def pictures(rng: np.random.Generator, count: int) -> tuple[Observation, np.ndarray]:
    """A red block on grey noise, and its place in [-1, 1]."""
    images = rng.normal(120, 20, (count, SIZE, SIZE, 3))
    place = rng.uniform(0, 1, (count, 2))
    for image, (x, y) in zip(images, (3 + place * (SIZE - 6)).astype(int), strict=True):
        image[y - 3 : y + 3, x - 3 : x + 3] = (220, 40, 40)
    frames = images.clip(0, 255).astype(np.uint8)
    return Observation(images={"camera": frames}, instructions=("reach the block",) * count), place.astype(
        np.float32
    ) * 2 - 1


def test_a_block_is_located() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    policy = OpenVLAPolicy(CONFIG)
    optimiser = torch.optim.AdamW(policy.parameters(), 1e-3)
    for step in range(250):
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 30)
        observation, target = pictures(rng, 32)
        loss = -policy.evaluate(policy.encode(observation), policy.encode_actions(target[:, None])[0]).logprobs.mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
    observation, target = pictures(rng, 200)
    places = policy.actions(policy.act(policy.encode(observation)))[:, 0]
    assert np.abs(places - target).mean() < 0.15  # with unrelated rows for neighbouring bins: 0.58
    # without the right picture nothing is left: the answer comes from looking
    assert np.abs(places - np.roll(target, 1, axis=0)).mean() > 0.5
