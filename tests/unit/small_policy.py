"""A small OpenVLA with one tower and three layers, its adapters, and what several tests ask of it."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from reachrl.backends.learner import LocalLearner
from reachrl.backends.weights import PackedWeights
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.policies.base import PolicyInput
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.types import Observation

VIT = {"kind": "vit", "width": 16, "depth": 3, "num_heads": 2, "mlp_width": 24, "patch_size": 8}
PROBE = {"seed": 3, "image_size": 16, "temperature": 1.2}


def small(**changes: object) -> OpenVLAConfig:
    sizes: dict[str, object] = {
        "image_size": 16,
        "towers": (VIT,),
        "image_mean": ((0.5, 0.5, 0.5),),
        "image_std": ((0.5, 0.5, 0.5),),
        "language_model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2},
        "value_hidden_size": 8,
    }
    return OpenVLAConfig.model_validate({**sizes, **changes})


def save_base(folder: Path) -> None:
    """Write a policy that adapters can stand on; its values and action statistics are not those of a new one."""
    torch.manual_seed(0)
    policy = OpenVLAPolicy(small())
    with torch.no_grad():
        policy.value_head.fc2.weight.normal_()
    policy.set_action_stats(np.full(4, -0.5), np.full(4, 0.5), np.ones(4, bool))
    policy.save_pretrained(folder)


def adapted(base: Path, seed: int | None = 1, **changes: object) -> OpenVLAPolicy:
    """Adapters on `base`; with a seed, ones that change something."""
    lora = {"rank": 3, "alpha": 6.0, **changes.pop("lora", {})}  # pyright: ignore[reportGeneralTypeIssues]
    torch.manual_seed(seed or 0)
    policy = OpenVLAPolicy(small(checkpoint=base, lora=lora, **changes))
    if seed is not None:
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return policy


def foreign(base: Path, folder: Path, **config: object) -> Path:
    """What another tool writes: peft's two files, here for the head and the patch embedding as well."""
    torch.manual_seed(3)
    state = load_file(base / "model.safetensors")
    folder.mkdir()
    chosen = ("language_model.model.layers.1.mlp.up_proj", "language_model.lm_head")
    chosen += ("vision_backbone.featurizer.patch_embed.proj",)
    stored = {}
    for name in chosen:
        shape = state[f"{name}.weight"].shape
        stored[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, *shape[1:])
        stored[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape[0], 2, *(1 for _ in shape[2:])) * 0.1
    save_file(stored, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return folder


def inputs(policy: OpenVLAPolicy) -> PolicyInput:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return policy.encode(Observation(images=images, instructions=("push the puck", "close it", "open the window")))


def scores(policy: OpenVLAPolicy) -> torch.Tensor:
    ids = torch.arange(12).view(3, 4) + policy.first_action_id
    return policy.evaluate(inputs(policy), ids).logprobs


def assert_apart(policy: OpenVLAPolicy) -> None:
    """Values train the critic's adapters alone, log-probs the actor's."""
    ids = torch.arange(12).view(3, 4) + policy.first_action_id
    groups = policy.parameter_groups()
    policy.evaluate(inputs(policy), ids).values.sum().backward()
    assert all(p.grad is None for p in groups["trunk"])
    assert all(p.grad is not None for p in groups["value"])
    assert all(p.grad.abs().sum() > 0 for p in groups["value"] if p.ndim == 2)
    policy.zero_grad()
    policy.evaluate(inputs(policy), ids).logprobs.sum().backward()
    assert all(p.grad is None for p in groups["value"])
    assert all(p.grad is not None for p in groups["trunk"])


def packed(policy: OpenVLAPolicy, **changes: object) -> PackedWeights:
    learner = LocalLearner(policy, PPOConfig(temperature=1.2, **changes), seed=3)  # pyright: ignore[reportArgumentType]
    return learner.pack_weights(image_size=16)
