"""A small OpenVLA with one tower and three layers, its adapters, and what several tests ask of it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from reachrl.backends.learner import LocalLearner
from reachrl.backends.weights import PackedWeights
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.envs.base import Shown
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.types import Observation

VIT = {"kind": "vit", "width": 16, "depth": 3, "num_heads": 2, "mlp_width": 24, "patch_size": 8}


def shown(size: int) -> Shown:
    """What environments with one camera show."""
    return Shown(cameras={"camera": (size, size, 3)}, state_size=None)


PROBE = {"seed": 3, "shown": shown(16), "temperature": 1.2}


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
    unseal(folder)


def unseal(folder: Path) -> Path:
    """Let a test change files of a saved folder and meet what is checked beside the manifest."""
    for manifest in folder.rglob("manifest.json"):
        manifest.unlink()
    return folder


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


class Official(PreTrainedModel):
    """A policy's modules as the official model of `transformers` holds them: peft treats its head by what it is."""

    config_class = PretrainedConfig

    def __init__(self, policy: OpenVLAPolicy, base: Path) -> None:
        super().__init__(PretrainedConfig())
        self.vision_backbone, self.projector = policy.vision_backbone, policy.projector
        self.language_model = policy.language_model
        self.name_or_path = str(base)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.lm_head


def foreign(
    base: Path,
    folder: Path,
    *,
    written: dict[str, object] | None = None,
    read_by: Callable[[Path], OpenVLAPolicy] = OpenVLAPolicy.from_pretrained,
    **patched: object,
) -> Path:
    """What another tool writes by peft: adapters of a layer, of the head and of the patch embedding.

    Peft adds the head's own weight to the file. `written` are options of peft; `patched` changes its file afterwards.
    """
    torch.manual_seed(3)
    targets = ["layers.1.mlp.up_proj", "lm_head", "patch_embed.proj"]
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, **(written or {})})  # pyright: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Official(read_by(base), base), config)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=1.0 if ".lora_A" in name else 0.1)
        model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | patched))
    return folder


def inputs(policy: OpenVLAPolicy) -> OpenVLAInputs:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return policy.encode(
        Observation(images={"camera": images}, instructions=("push the puck", "close it", "open the window"))
    )


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
    learner = LocalLearner(policy, PPOConfig(**changes), seed=3, temperature=1.2)  # pyright: ignore[reportArgumentType]
    return learner.pack_weights(shown=PROBE["shown"])
