"""Changes to a configuration that does not fit, by greedy search: the one that saves most memory first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reachrl.config.loading import config_dict, validate
from reachrl.config.policy import NF4_BLOCK, PrismaticConfig
from reachrl.config.train import TrainConfig
from reachrl.plan.device import Device
from reachrl.plan.layout import layout_of, least_environments
from reachrl.plan.memory import MemoryPlan, micro_rows, plan_memory, score_rows, usable
from reachrl.plan.outline import algorithm_of, outline_of

_LEAST_ROWS = 4  # fewer at once leave most processors idle
_NO_LORA_RANK = 32  # what OpenVLA's recipe uses
_OFF_WITHOUT_COPY = {"compile_prefill": False, "rollout_precision": "as_trained"}  # of a policy that decodes itself


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the configuration."""

    overrides: dict[str, Any]
    """New values by dotted key, applied after the changes before it."""
    reason: str
    """Its effect and its cost, in words."""
    saves: float
    """Reduction of the peak, in bytes."""
    leaves: float
    """Peak after it and all changes before it, in bytes."""

    @property
    def text(self) -> str:
        """Command-line overrides, `key=value`."""
        return " ".join(f"{key}={_typed(value)}" for key, value in self.overrides.items())


def advise(config: TrainConfig, device: Device) -> list[Change]:
    """Find changes that make `config` fit on `device`; every change that helps if they do not suffice."""
    changes: list[Change] = []
    plan = plan_memory(config, device)
    while not plan.fits(device):
        best = min(_candidates(config, device, plan), key=lambda candidate: candidate[-1].peak, default=None)
        if best is None or best[-1].peak >= plan.peak:
            break
        overrides, reason, after = best
        changes.append(Change(overrides, reason, saves=plan.peak - after.peak, leaves=after.peak))
        config, plan = apply(config, overrides), after
    return changes


def apply(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """Return the configuration with `overrides` applied.

    Raises:
        ConfigError: the result is not valid.
    """
    data = config_dict(config)
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = data
        for parent in parents:
            node[parent] = node[parent] or {}  # a section that was none
            node = node[parent]
        node[leaf] = value
    return validate(data, where="plan")


def _candidates(
    config: TrainConfig, device: Device, plan: MemoryPlan
) -> Iterator[tuple[dict[str, Any], str, MemoryPlan]]:
    """Yield the valid single changes of `config`: overrides, reason, and the memory plan after the change."""
    for overrides, reason in _switches(config, device, plan):
        yield overrides, reason, plan_memory(apply(config, overrides), device)
    for key, rows, least, reason in _row_counts(config):
        if rows > least:
            fewer, after = _halved(config, device, plan, key, rows, least)
            yield {key: fewer}, reason, after


def _switches(config: TrainConfig, device: Device, plan: MemoryPlan) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield changes of options other than row counts; only keys that the policy's section has."""
    policy, has = config.policy, vars(config.policy)
    lora, critic = has.get("lora"), has.get("critic")
    if "lora" in has and lora is None and has.get("checkpoint") is not None:
        adapters: dict[str, Any] = {"policy.lora.rank": _NO_LORA_RANK}
        if critic == "separate":  # would copy what adapters leave frozen
            adapters["policy.critic"] = "adapter"
        yield adapters, "train adapters on frozen weights: gradients and Adam states of a hundredth of them"
    elif critic == "separate":
        yield {"policy.critic": "shared"}, "the value head reads the actor's trunk: no second trunk to keep and train"
    if _advise_four_bits(config, device):
        reason = "frozen weights in 4 bits, decoded at each use: a quarter of their memory, rounded, some more time"
        yield {"policy.lora.base": "nf4"}, reason
    if critic == "adapter":
        yield {"policy.critic": "shared"}, "the value head reads the actor's trunk: one pass instead of two"
    if has.get("rollout_copy"):
        off = {f"policy.{key}": value for key, value in _OFF_WITHOUT_COPY.items() if getattr(policy, key) != value}
        reason = "decode with the trained weights: no second trunk, a slower rollout"
        yield {"policy.rollout_copy": False, **off}, reason
    if has.get("gradient_checkpointing") is False and plan.worst == "update":
        yield {"policy.gradient_checkpointing": True}, "layers are computed again instead of kept: a third more time"
    if has.get("dtype") == "float32" and lora is not None:  # trained weights would lose their small steps
        overrides = {"policy.dtype": "bfloat16", "policy.compute_dtype": None}
        yield overrides, "frozen weights in half the bytes; adapters stay float32"
    layout = layout_of(config)
    if layout.learners > 1 and not layout.sharded and not getattr(policy, "four_bit", False):
        yield {"backend.sharding": "full"}, "split weights, gradients and Adam states over the learners; more to send"
    if algorithm_of(config).train_vision:
        yield {"algorithm.train_vision": False}, "freeze the towers and keep their features instead of training them"


def _row_counts(config: TrainConfig) -> Iterator[tuple[str, int, int, str]]:
    """Yield the row counts that may be halved: key, current value, minimum, and effect of a smaller value."""
    least = max(_LEAST_ROWS, least_environments(config))
    scored, envs = score_rows(config), config.env.num_envs
    yield (
        "algorithm.micro_batch_size",
        micro_rows(config),
        _LEAST_ROWS,
        "fewer rows in a pass; gradients add up to the same",
    )
    yield "algorithm.score_batch_size", scored, _LEAST_ROWS, "fewer rows in a pass that scores; the same scores"
    yield "env.num_envs", envs, least, "fewer rows to decode and to keep, and fewer decisions an iteration"


def _advise_four_bits(config: TrainConfig, device: Device) -> bool:
    """Return whether a 4-bit base is possible and frozen weights fill more than half of the device.

    Quantising changes the function that is trained, so it is advised only where no other change makes enough room.
    """
    policy = config.policy
    if not isinstance(policy, PrismaticConfig) or policy.lora is None or config.backend.sharding != "none":
        return False
    if policy.four_bit or not policy.language_model.has_widths_of(NF4_BLOCK):
        return False
    held = outline_of(config, accelerator=not device.is_cpu).weights
    return sum(part.bytes for part in held if part.trained_by is None) > usable(device) / 2


def _halved(
    config: TrainConfig, device: Device, plan: MemoryPlan, key: str, rows: int, least: int
) -> tuple[int, MemoryPlan]:
    """Halve `rows` until the configuration fits, nothing is saved, or `least` is reached; return rows and plan."""
    while rows > least and not plan.fits(device):
        fewer = max(rows // 2, least)
        after = plan_memory(apply(config, {key: fewer}), device)
        if after.peak >= plan.peak:
            break
        rows, plan = fewer, after
    return rows, plan


def _typed(value: Any) -> str:
    """Format a value for the command line."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
