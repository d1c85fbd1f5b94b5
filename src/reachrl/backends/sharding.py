"""Sharding of a policy and its optimiser over a process group (FSDP2)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from reachrl.backends.group import Group
from reachrl.policies.base import Policy


def shard(policy: Policy, group: Group) -> None:
    """Shard a policy's weights over the group; each unit is gathered while it computes.

    The backward pass reduce-scatters the mean of the gradients. Create the optimiser afterwards: its state is sharded
    like the weights.

    Args:
        policy: whole, with its weights anywhere; every process calls this with the same architecture.
        group: of more than one process.
    """
    mesh = init_device_mesh(policy.device.type, (group.size,))
    # Gathered in the type they are stored in: mixed precision is the policy's own (`compute_dtype`), so that split
    # weights compute what whole ones do.
    for unit in policy.sharding_units():
        fully_shard(unit, mesh=mesh)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    for method in ("evaluate", "values", "cache"):  # what the learner calls
        register_fsdp_forward_method(policy, method)


def whole_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Gather the tensors one after the other; every process of the group must iterate over all of them."""
    for name, tensor in named:
        yield name, whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor; every process of the group must call it."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


@torch.no_grad()
def share_weights(policy: Policy, source: Policy | None) -> None:
    """Broadcast the weights and buffers of an unsharded policy to every process's policy, sharded or not.

    Args:
        policy: of this process.
        source: on the leader, possibly its `policy` itself; None on the others.
    """
    theirs = {} if source is None else dict([*source.named_parameters(), *source.named_buffers()])
    for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
        given = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if source is not None:
            given.copy_(theirs[name])
        tensor.copy_(_from_leader(given, tensor))


def _from_leader(given: Tensor, like: Tensor | None) -> Tensor:
    """Broadcast the leader's `given`; return this process's shard of it where `like` is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(given, like.device_mesh, like.placements)
    torch.distributed.broadcast(given, src=0)
    return given


@torch.no_grad()
def share_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, group: Group) -> None:
    """Broadcast an optimiser state to every process; each keeps its shard where parameters are sharded.

    Args:
        optimizer: of this process.
        state: as `state_dict` of an optimiser over whole parameters gives it; None on all but the leader.
        group: the processes.
    """
    outline = None
    if state is not None:
        outline = {
            index: {
                name: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
            for index, entries in state["state"].items()
        }
        outline = {"state": outline, "param_groups": state["param_groups"]}
    received = group.agree(outline)
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    for index, entries in received["state"].items():
        parameter = parameters[index]
        for name, value in entries.items():
            if not isinstance(value, Tensor):
                continue
            like = isinstance(parameter, DTensor) and value.shape == parameter.shape
            given = torch.empty(value.shape, dtype=value.dtype, device=parameter.device if like else "cpu")
            if state is not None:
                given.copy_(state["state"][index][name])
            entries[name] = _from_leader(given, parameter if like else None)
    optimizer.load_state_dict(received)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Gather the optimiser's `state_dict` into main memory; every process must call it.

    Args:
        optimizer: over a sharded policy's parameters.
        keep: whether this process gets the tensors.
    """
    found = optimizer.state_dict()
    state = {}
    for index, entries in found["state"].items():
        state[index] = {}
        for name, value in entries.items():
            given = whole(value) if isinstance(value, Tensor) else value
            if keep:
                state[index][name] = given.cpu() if isinstance(given, Tensor) else given
    return {"state": state, "param_groups": found["param_groups"]}


def move_state(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Move an optimiser's moments to `device`; step counters and sharded tensors stay where they are."""
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if name != "step" and isinstance(value, Tensor) and not isinstance(value, DTensor):
                entries[name] = value.to(device)
