"""Policies and runs whose plans are tested, and what is measured of them."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reachrl.config.env import MetaworldConfig
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.rollout import RolloutSection
from reachrl.config.train import TrainConfig
from reachrl.plan.device import Device
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla_oft.inputs import OFTInputs
from reachrl.registry import resolve

SIZES = {
    "image_size": 28,
    "towers": (
        {
            "kind": "vit",
            "width": 64,
            "depth": 3,
            "num_heads": 4,
            "mlp_width": 200,
            "patch_size": 7,
            "layer_scale": True,
            "class_token": True,
            "num_registers": 4,
        },
        {"kind": "conv", "stages": [{"channels": 32, "kernel": 7, "stride": 7}]},
    ),
    "language_model": {"hidden_size": 128, "intermediate_size": 344, "num_layers": 5, "num_heads": 4},
}
GQA = {"language_model": {**SIZES["language_model"], "num_kv_heads": 2}}
LORA = {"lora": {"rank": 8}, "checkpoint": "nowhere"}
ALL_PARTS = {"lora": {"rank": 8, "parts": ["language_model", "projector", "vision"]}, "checkpoint": "nowhere"}
MIXED = {"compute_dtype": "bfloat16"}
ONE_TOWER = {
    "towers": SIZES["towers"][:1],
    "image_mean": ((0.5, 0.5, 0.5),),
    "image_std": ((0.5, 0.5, 0.5),),
}
OFT = {"chunk_size": 4, "num_cameras": 2, "state_size": 4}
# Name -> options; what is trained, in which numbers, and how.
VARIANTS = {
    "full": {},
    "grouped heads": GQA,
    "one tower": ONE_TOWER,
    "full vocabulary": {"vocabulary": "full", "dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "separate critic": {"critic": "separate"},
    "detached value": {"value_gradient_to_trunk": False},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": LORA,
    "lora bfloat16": {**LORA, "dtype": "bfloat16"},
    "lora everywhere": ALL_PARTS,
    "adapter critic": {**LORA, "critic": "adapter", "dtype": "bfloat16"},
    "lora checkpointing": {**LORA, "gradient_checkpointing": True},
    "mixed": MIXED,
    "lora mixed": {**LORA, **MIXED},
    "mixed checkpointing": {**MIXED, "gradient_checkpointing": True},
    "copy": {**LORA, "rollout_copy": True},
    "copy in 8 bits": {
        **LORA,
        "rollout_copy": True,
        "rollout_precision": "float8",
        "dtype": "bfloat16",
        "language_model": {**SIZES["language_model"], "intermediate_size": 352},
    },
    "oft": OFT,
    "oft lora": {**OFT, **LORA, "critic": "adapter", "gradient_checkpointing": True, "rollout_copy": True},
}
# The towers are trained in a few of them only.
WITH_VISION = ("full", "one tower", "bfloat16", "lora everywhere")
ROWS = 4
CPU = Device(name="cpu", memory=16, bf16=0.1, fp32=0.1, bandwidth=20)


def configure(**changes: object) -> PrismaticConfig:
    section = OpenVLAOFTConfig if "chunk_size" in changes else OpenVLAConfig
    return section.model_validate({**SIZES, **changes})


def build(config: PrismaticConfig) -> OpenVLAPolicy:
    """The policy that `config` describes, with random weights where it asks for a checkpoint's."""
    plain = config.model_copy(update={"lora": None, "checkpoint": None, "critic": "shared"})
    policy = resolve("policies", config.kind)(config if config.lora is None else plain)
    if config.lora is not None:
        policy.config = config
        policy.add_adapters(Path("nowhere"))
    return policy


def rows_of(policy: OpenVLAPolicy, rows: int = ROWS) -> tuple[OpenVLAInputs, OpenVLAInputs, torch.Tensor]:
    """Frames, the same with cached features, and actions; one prompt is shorter, so that a mask is needed.

    Where padding stands behind the answer, as much as there can be: plans have room for that.
    """
    config, cameras = policy.config, policy.num_cameras
    mask = torch.ones(rows, config.prompt_length, dtype=torch.bool)
    mask[0, 1 if policy.num_actions > 1 else -2 :] = False
    ids = torch.randint(3, 100, mask.shape)
    pixels = torch.randn(rows, 3 * len(config.towers) * cameras, config.image_size, config.image_size)
    given = {"prompt_ids": ids, "prompt_mask": mask, "pixel_values": pixels}
    if isinstance(config, OpenVLAOFTConfig):
        seen = OFTInputs(**given, state=torch.zeros(rows, config.state_size or 0))
    else:
        seen = OpenVLAInputs(**given)
    with torch.no_grad():
        cached = replace(seen, pixel_values=None, vision_features=policy.vision_features(pixels))
    return seen, cached, torch.full((rows, policy.num_action_tokens), policy.first_action_id)


def run_of(policy: PrismaticConfig, *, passes: int = 1, train_vision: bool = False) -> TrainConfig:
    """One decision in each of `ROWS` environments for every pass of the minibatch that they make."""
    rows = {"minibatch_size": passes * ROWS, "micro_batch_size": ROWS}
    ppo = PPOConfig(importance_cap=2.0, epochs=1, train_vision=train_vision, **rows)
    env = MetaworldConfig(num_envs=ROWS, cameras=("corner2", "gripperPOV")[: getattr(policy, "num_cameras", 1)])
    return TrainConfig(env=env, rollout=RolloutSection(num_steps=passes), policy=policy, algorithm=ppo)


def large(layers: int = 32, **changes: object) -> TrainConfig:
    """The 7B policy in a run of 2,048 decisions an iteration, 16 rows a pass; tracing fewer layers takes less time."""
    policy = OpenVLAConfig.openvla_7b(**{"checkpoint": "openvla-7b", **changes})
    llm = policy.language_model.model_copy(update={"num_layers": layers})
    return TrainConfig(
        env=MetaworldConfig(num_envs=16),
        rollout=RolloutSection(num_steps=128),
        policy=policy.model_copy(update={"language_model": llm}),
        algorithm=PPOConfig(micro_batch_size=16),
    )


def train(policy: OpenVLAPolicy, inputs: OpenVLAInputs, actions: torch.Tensor) -> None:
    out = policy.evaluate(inputs, actions)
    (out.logprobs.sum() + out.entropy.sum() + out.values.square().sum()).backward()


def products(run: Callable[[], object]) -> int:
    """FLOPs by PyTorch's own count; attention unfused, since it does not know the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def given_bytes(inputs: OpenVLAInputs) -> int:
    """Bytes of a policy's inputs."""
    state = getattr(inputs, "state", None)
    fields = (inputs.prompt_ids, inputs.prompt_mask, inputs.pixel_values, inputs.vision_features, state)
    return sum(each.nbytes for each in fields if each is not None)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive and were made while it was on, now and at the most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes and key not in self.known:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._track, out)
        return out


def tensors(policy: OpenVLAPolicy, inputs: OpenVLAInputs, actions: torch.Tensor) -> list[torch.Tensor]:
    state = getattr(inputs, "state", None)
    given = [inputs.prompt_ids, inputs.prompt_mask, inputs.pixel_values, inputs.vision_features, state, actions]
    gradients = [parameter.grad for parameter in policy.parameters()]
    rest = [tensor for tensor in [*given, *gradients] if tensor is not None]
    return [*policy.parameters(), *policy.buffers(), *rest]
