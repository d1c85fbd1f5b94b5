"""An optimizer's state as safetensors: exact round trip, no pickle, refused when it belongs to other parameters."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer

from reachrl.errors import CheckpointError
from reachrl.run.atomic import replacing


def _description(optimizer: Optimizer) -> dict[str, Any]:
    """What must be equal for a state to fit: the class and each group's parameter shapes, in order.

    Neighbouring groups of one `role` count as one: they differ in their options, which are not stored.
    """
    shapes: list[list[list[int]]] = []
    role = None
    for group in optimizer.param_groups:
        own = [list(parameter.shape) for parameter in group["params"]]
        if shapes and role is not None and group.get("role") == role:
            shapes[-1] += own
        else:
            shapes.append(own)
        role = group.get("role")
    return {"class": type(optimizer).__name__, "shapes": shapes}


def save_optimizer(optimizer: Optimizer, path: Path, state: dict[str, Any] | None = None) -> None:
    """Write the optimizer's state (moments, step counters); the file is complete or absent.

    Its options (learning rates, decay) are the configuration's, which may change between two attempts at a run.

    Args:
        optimizer: any optimizer whose state is tensors and JSON values (AdamW, Adam, SGD, ...).
        path: the safetensors file.
        state: its `state_dict` with whole tensors, where the optimizer itself holds only parts of them.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    state = optimizer.state_dict() if state is None else state
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"state.{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.detach().cpu().contiguous().clone()
            else:
                values[key] = value
    content = {**_description(optimizer), "values": values, "indices": list(state["state"])}
    with replacing(path) as copy:
        save_file(tensors, copy, metadata={"optimizer": json.dumps(content)})


def load_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` wrote into an optimizer built over the same parameters.

    Raises:
        CheckpointError: see `read_optimizer`.
    """
    optimizer.load_state_dict(read_optimizer(optimizer, path))


def read_optimizer(optimizer: Optimizer, path: Path) -> dict[str, Any]:
    """What `save_optimizer` wrote, in the form of `optimizer.state_dict()`, for an optimizer over the same parameters.

    The options in it are those of `optimizer`.

    Raises:
        CheckpointError: the file is missing or truncated, or belongs to another optimizer or other parameters.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            content = json.loads((file.metadata() or {})["optimizer"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the optimizer's state is missing; resume from another checkpoint.") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated or not an optimizer's state ({error}); resume from another checkpoint."
        ) from error
    expected = _description(optimizer)
    if content["class"] != expected["class"]:
        raise CheckpointError(f"{path}: state of {content['class']}, but the optimizer is {expected['class']}.")
    if content["shapes"] != expected["shapes"]:
        raise CheckpointError(f"{path}: {_first_difference(content['shapes'], expected['shapes'])}")
    state: dict[int, dict[str, Any]] = {index: {} for index in content["indices"]}
    for key, value in [*tensors.items(), *content["values"].items()]:
        _, index, name = key.split(".", 2)
        state[int(index)][name] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _first_difference(found: list[list[list[int]]], expected: list[list[list[int]]]) -> str:
    remedy = "The checkpoint belongs to another model or other frozen parts: use the configuration it was made with."
    if len(found) != len(expected):
        return f"{len(found)} parameter groups stored, {len(expected)} expected. {remedy}"
    for number, (stored, wanted) in enumerate(zip(found, expected, strict=True)):
        if len(stored) != len(wanted):
            return f"group {number}: {len(stored)} parameters stored, {len(wanted)} expected. {remedy}"
        for index, (a, b) in enumerate(zip(stored, wanted, strict=True)):
            if a != b:
                return f"group {number}, parameter {index}: shape {a} stored, {b} expected. {remedy}"
    raise AssertionError("the descriptions are equal")
