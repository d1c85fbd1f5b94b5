"""Reads adapter files as pairs of matrices with a scale, and checks them against our configuration."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reachrl.errors import CheckpointError
from reachrl.policies.lora.adapters import PREFIX, Sets
from reachrl.policies.lora.files import CONFIG_FILE, VALUE_FILE, WEIGHTS_FILE, base_of, place, read_adapter
from reachrl.policies.storage.weights import read_json, weight_files

# Options of peft's LoRA under which the same two matrices would mean something else.
_FOREIGN = (
    *("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others train beside a base that they changed first
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
_SHOWN = 6


def deltas(folder: Path, name_of: Callable[[str], str]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Read the adapters in `folder` as (A, B, scale) by the name of the adapted weight.

    Args:
        folder: with plain LoRA in peft's files.
        name_of: the policy's name of a weight by the name it is stored under.

    Raises:
        CheckpointError: files are missing or damaged, the adapters are of a kind that cannot be folded in, a tensor
            is no part of a pair of the stated rank, or adapters of another tool change nothing at all.
    """
    rank, scale = _rank_and_scale(folder / CONFIG_FILE)
    pairs = _pairs(folder / WEIGHTS_FILE, matrices(folder, name_of))
    odd = [
        f"{name} ({list(a.shape)} and {list(b.shape)})"
        for name, (a, b) in pairs.items()
        if min(a.ndim, b.ndim) < 2 or not a.shape[0] == b.shape[1] == rank
    ]
    if odd:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: the matrices A and B of {_some(odd)} are not of rank {rank}, which "
            f"{CONFIG_FILE} states as r; the scale would be wrong. Put the two files of one adapter together"
        )
    # Ours may be as they began: a run that has trained its critic alone.
    if not (folder / VALUE_FILE).is_file() and not any(a.any() and b.any() for a, b in pairs.values()):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} holds adapters that change nothing: of each pair of matrices one is zero, so the "
            "base alone would act under their name. Give the folder that was saved after training"
        )
    return {name: (a, b, scale) for name, (a, b) in pairs.items()}


def matrices(folder: Path, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Read the tensors of an adapter by the policy's names, such as `NAME.lora_A.weight`.

    Of an adapted head peft also stores the frozen weight, as `NAME.base_layer.weight`, and with `save_embedding_layers`
    that of the embedding, as `NAME.weight`. They are omitted if they equal the base's.

    Raises:
        CheckpointError: the file is missing or damaged, or a stored weight is not that of the base.
    """
    found, copies = {}, {}
    for key, tensor in read_adapter(folder).items():
        name = key.removeprefix(PREFIX)
        target = found if ".lora_" in name else copies
        if target.setdefault(known := name_of(name), tensor) is not tensor:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} holds {known} twice: save the adapters anew with peft")
    if copies:
        found_copies = {name.replace(".base_layer.", "."): tensor for name, tensor in copies.items()}
        _check_copies(folder, found_copies, name_of)
    return found


def _check_copies(folder: Path, copies: dict[str, Tensor], name_of: Callable[[str], str]) -> None:
    """Refuse weights beside the matrices that are not those of the base, rounded to the type they are stored in."""
    left, differing = set(copies), []
    for path in weight_files(base_of(folder)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                if (name := name_of(key)) in left:
                    left.remove(name)
                    if not torch.equal(copies[name], file.get_tensor(key).to(copies[name].dtype)):
                        differing.append(name)
    if differing or left:
        problems = [f"{_some(sorted(differing))} with other numbers than the base"] if differing else []
        problems += [f"unknown tensors {_some(sorted(left))}, which the base does not have"] if left else []
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} holds {'; '.join(problems)}. Expected are pairs of LoRA matrices, and besides at "
            "most copies of the base's weights: what was trained beside the adapters would be lost. Is it the right "
            "base? Else merge them with the tool that made them"
        )


def _pairs(path: Path, stored: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """All tensors of a file as (A, B), by the name of the weight they change; what is dropped would go unnoticed."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in stored.items():
        match = _MATRIX.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            found.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    problems = [f"unknown tensors {_some(strange)}"] if strange else []
    lone = [name for name, pair in found.items() if len(pair) < 2]
    problems += [f"one matrix alone for {_some(lone)}"] if lone else []
    problems += [] if found else ["no LoRA matrices"]
    if problems:
        raise CheckpointError(
            f"{path} holds {'; '.join(problems)}. Expected are only pairs {PREFIX}NAME.lora_A.weight and "
            ".lora_B.weight, as peft's save_pretrained writes them; save the adapters anew, or merge "
            "them with the tool that made them"
        )
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _rank_and_scale(path: Path) -> tuple[int, float]:
    """Rank and scale from peft's configuration; plain LoRA only."""
    config = read_json(path)
    foreign = [key for key in _FOREIGN if config.get(key)]
    foreign += ["trained biases"] if config.get("bias", "none") != "none" else []
    init = config.get("init_lora_weights")
    foreign += [] if init in _INITS else [f"init_lora_weights={init!r}"]
    if config.get("peft_type") != "LORA" or foreign:
        raise CheckpointError(
            f"{path}: expected plain LoRA, found {config.get('peft_type')}"
            + (f" with {', '.join(foreign)}" if foreign else "")
            + "; merge it with the tool that made it"
        )
    rank, alpha = rank_and_alpha(config, path)
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def rank_and_alpha(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """Return rank and alpha of an adapter.

    Args:
        config: peft's.
        path: where it lies, for the message.

    Raises:
        CheckpointError: they give no scale, or one of 0, under which the base alone would act.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    numbers = not isinstance(rank, bool) and not isinstance(alpha, bool)
    if not (numbers and isinstance(rank, int) and isinstance(alpha, int | float)) or not (
        rank >= 1 and 0 < alpha < math.inf
    ):
        raise CheckpointError(
            f"{path}: r = {rank!r} and lora_alpha = {alpha!r}; expected a whole number and a number, both above 0: "
            "with a scale of 0 the base would act under the adapter's name. Copy them from the run that trained the "
            "adapters"
        )
    return rank, float(alpha)


def check_agreement(folder: Path, sets: Sets) -> None:
    """Check that a saved policy's configuration and peft's file beside it describe the same adapters.

    The policy is loaded by the first and exported by the second.

    Args:
        folder: with adapters and a configuration of ours.
        sets: by that configuration; none where it describes a policy without adapters.

    Raises:
        CheckpointError: naming what differs.
    """
    if not sets:
        raise CheckpointError(
            f"{folder} holds adapters, but its config.json describes a policy without (lora is unset); put the two "
            "files of one policy together"
        )
    for adapter, ours in sets.items():
        path = place(folder, adapter) / CONFIG_FILE
        stated = read_json(path)
        _rank_and_scale(path)
        targets = stated.get("target_modules")
        differing = [
            f"{name} = {found!r} there, {expected!r} by config.json"
            for name, found, expected in (
                ("r", stated.get("r"), ours.r),
                ("lora_alpha", stated.get("lora_alpha"), ours.lora_alpha),
                ("lora_dropout", stated.get("lora_dropout", 0.0), ours.lora_dropout),
                ("use_rslora", bool(stated.get("use_rslora")), False),
                (
                    "target_modules",
                    sorted(targets) if isinstance(targets, list) else targets,
                    sorted(ours.target_modules or ()),
                ),
            )
            if found != expected
        ]
        if differing:
            raise CheckpointError(
                f"{path} and the config.json of {folder} disagree: {'; '.join(differing)}. The policy would act by "
                "one and be exported by the other; put back what was saved"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
