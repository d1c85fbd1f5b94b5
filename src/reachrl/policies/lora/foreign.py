"""Adapters that another tool trained, taken over into a policy's own set to be trained on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from reachrl.config.language_model import LoRAConfig
from reachrl.errors import CheckpointError
from reachrl.policies.lora.adapters import ACTOR, PREFIX, tensors
from reachrl.policies.lora.deltas import deltas

_SHOWN = 4


@torch.no_grad()
def take_adapters(
    policy: nn.Module,
    folder: Path,
    config: LoRAConfig,
    targets: Mapping[str, Sequence[str]],
    name_of: Callable[[str], str],
    *,
    skipped: Callable[[str], bool],
) -> None:
    """Copy the matrices of another tool's adapters into the actor's set; what the tool left out stays without effect.

    Args:
        policy: on the base of the adapters, with adapters of its own that change nothing yet.
        folder: with plain LoRA in peft's files.
        config: by which the policy's adapters were made.
        targets: by part, how the names of its linear maps end in the policy's family.
        name_of: the policy's name of a weight by the name it is stored under.
        skipped: which weights the policy knowingly does not have; their adapters are left out.

    Raises:
        CheckpointError: a file is damaged, or the policy's adapters have another rank or scale, or are not on all maps
            that these are on; says what to set.
    """
    found = {name: delta for name, delta in deltas(folder, name_of).items() if not skipped(name)}
    own = {key.removeprefix(PREFIX): tensor for key, tensor in tensors(policy, ACTOR).items()}
    _check_sizes(folder, found, config)
    _check_parts(folder, found, own, config, targets)
    for name, (a, b, _) in found.items():
        for matrix, stored in (("A", a), ("B", b)):
            mine = own[_key(name, matrix)]
            if mine.shape != stored.shape:
                raise CheckpointError(
                    f"{folder}: the adapter of {name} is {list(stored.shape)}, expected {list(mine.shape)}; is "
                    "it the right base?"
                )
            mine.copy_(stored)


def _key(name: str, matrix: str) -> str:
    return f"{name.removesuffix('.weight')}.lora_{matrix}.weight"


def _check_sizes(folder: Path, found: Mapping[str, tuple[Tensor, Tensor, float]], config: LoRAConfig) -> None:
    a, _, scale = next(iter(found.values()))
    rank = len(a)
    if rank != config.rank or abs(scale - config.alpha / config.rank) > 1e-9 * scale:
        raise CheckpointError(
            f"{folder} holds adapters of rank {rank} and scale {scale:g}, policy.lora has rank {config.rank} and scale "
            f"{config.alpha / config.rank:g}: set policy.lora.rank={rank} and policy.lora.alpha={scale * rank:g} to "
            f"train on, or fold them in first with  reachrl export {folder} --merge --out MERGED"
        )


def _check_parts(
    folder: Path,
    found: Mapping[str, object],
    own: Mapping[str, object],
    config: LoRAConfig,
    targets: Mapping[str, Sequence[str]],
) -> None:
    left = [name for name in found if _key(name, "A") not in own]
    if not left:
        return
    ends = {part: tuple(f".{end}.weight" for end in ends) for part, ends in targets.items()}
    parts = {part for name in left for part, its in ends.items() if f".{name}".endswith(its)} - set(config.parts)
    known = [name for name in left if any(f".{name}".endswith(ends[part]) for part in parts)]
    if len(known) == len(left):
        wanted = ", ".join(f'"{part}"' for part in targets if part in {*parts, *config.parts})
        raise CheckpointError(
            f"{folder} has adapters on {len(left)} weights that policy.lora.parts leaves out, such as {left[0]}: set "
            f"policy.lora.parts=[{wanted}] to train on"
        )
    strange = [name for name in left if name not in known]
    raise CheckpointError(
        f"{folder} has adapters on {', '.join(strange[:_SHOWN])}, which no part of policy.lora.parts covers: fold them "
        f"in first with  reachrl export {folder} --merge --out MERGED  and set policy.checkpoint=MERGED"
    )
