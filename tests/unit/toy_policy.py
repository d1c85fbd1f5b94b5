"""A small OpenVLA for the toy environment, shared by tests that need decisions but no skill."""

import torch

from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.registry import build


def toy_config(*overrides: str) -> TrainConfig:
    """The `toy` preset with two environments."""
    return load_config("toy", ["env.num_envs=2", *overrides])


def toy_policy(config: TrainConfig, seed: int = 0):
    """A randomly initialised policy."""
    torch.manual_seed(seed)
    return build("policies", config.policy).eval()
