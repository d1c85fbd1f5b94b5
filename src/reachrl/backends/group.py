"""Processes that share one learner's work, as `torchrun` starts them."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from reachrl import torchrun

# A follower waits for its next piece of work through whole rollouts of its leader.
_TIMEOUT = timedelta(hours=2)


class Group:
    """This process among those of `torchrun`; alone without it.

    Args:
        rank: of this process; 0 leads.
        size: number of processes.
        sharded: whether each keeps only its part of the weights.
    """

    END: ClassVar[str] = "end"
    """The message that ends the followers."""

    def __init__(self, rank: int = 0, size: int = 1, *, sharded: bool = False):
        self.rank, self.size, self.sharded = rank, size, sharded and size > 1

    @classmethod
    def from_environment(cls, *, sharded: bool = False) -> "Group":
        """Join the processes that `torchrun` started with this one."""
        if torchrun.size() > 1 and not distributed.is_initialized():
            if torch.cuda.is_available() and (number := torchrun.local_rank()) is not None:
                torch.cuda.set_device(number)  # where collectives and split weights live
            # Objects and CPU tensors travel by gloo, gradients on GPUs by NCCL.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=_TIMEOUT)
        return cls(torchrun.rank(), torchrun.size(), sharded=sharded)

    @property
    def alone(self) -> bool:
        """Whether the group has one process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether other processes follow this one."""
        return self.rank == 0 and not self.alone

    def block(self, rows: int) -> slice:
        """This process's part of `rows` rows."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def passes(self, rows: int, per_pass: int) -> int:
        """How many passes of `per_pass` rows the largest block of `rows` takes."""
        largest = math.ceil(rows / self.size)
        return math.ceil(largest / per_pass)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes, one below the other, on the CPU."""
        if self.alone:
            return part.cpu()
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, part.cpu())
        return torch.cat(parts)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def max_(self, tensor: Tensor) -> None:
        """Replace each element by the greatest of the processes."""
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)

    def send(self, message: Any) -> None:
        """Give the followers a message; only the leader may."""
        self.agree(message)

    def receive(self) -> Any:
        """The leader's next message."""
        return self.agree(None)

    def agree(self, message: Any) -> Any:
        """Receive the message that the leader broadcast."""
        box = [message]
        distributed.broadcast_object_list(box)
        return box[0]

    def dismiss(self) -> None:
        """End the followers; only the leader may."""
        self.send((self.END, {}))
        self.leave()

    def leave(self) -> None:
        """Part from the others, all at once: who left early would close connections that others still read from."""
        distributed.barrier()
        distributed.destroy_process_group()
