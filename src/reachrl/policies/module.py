"""The part of a policy's interface that concerns its weights: building, storage, parameter groups, sharding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from reachrl.config.base import Section
from reachrl.errors import CheckpointError

P = TypeVar("P", bound=nn.Module)


class PolicyModule(nn.Module, ABC):
    """Base class of `Policy`, independent of observations and actions."""

    Config: ClassVar[type[Section]]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type in which log-probs are computed; decides the tolerance between two passes over the same rows."""
        return next(self.parameters()).dtype

    @property
    def acting_dtype(self) -> torch.dtype:
        """Data type in which `act` computes log-probs, if it is coarser than `compute_dtype`."""
        return self.compute_dtype

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return trainable parameters by role: `vision`, `trunk` (projector, language model), `value`.

        Permanently frozen weights, such as those under adapters, are in none of them.
        """

    def trunk_parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parts of the trunk with separate learning rates: `projector` and `head` (the output layer)."""
        return {}

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return the options that must be equal for weights to fit; stored in checkpoints and compared on load."""

    def sharding_units(self) -> list[nn.Module]:
        """Return the modules that FSDP shards and gathers one at a time: called as modules, none inside another.

        All other parameters form one more unit, gathered for a whole pass.
        """
        return []

    @abstractmethod
    def reset_critic(self) -> None:
        """Reset a separate critic after a warm start that trained the actor.

        Its trunk is copied from the actor, its head is initialised. A shared critic is left as it is.
        """

    def freeze(self, roles: Sequence[str]) -> None:
        """Stop gradients into the parameter groups named in `roles`."""
        for role in roles:
            for parameter in self.parameter_groups()[role]:
                parameter.requires_grad_(False)

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and action statistics into `folder`."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls: type[P], folder: Path) -> P:
        """Load a policy that `save_pretrained` wrote.

        Keys that the section marks as `Affects.TRAINING | Affects.FUTURE` are passed as keyword arguments and override
        the stored values.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """

    def restore(self, folder: Path) -> None:
        """Load a saved policy into this one; the default builds a second policy, override it to avoid that.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """
        saved = type(self).from_pretrained(folder)
        if saved.architecture() != self.architecture():
            raise CheckpointError(f"{folder}: the checkpoint's architecture is not the configuration's")
        self.load_state_dict(saved.state_dict())

    @classmethod
    def outline(cls: type[P], config: Any, *, recorder: Callable[[Any], Any] | None = None) -> P:
        """Build the policy of `config` on the meta device, for planning.

        Called under `torch.device("meta")`. Override it if the constructor reads a checkpoint, which need not exist.
        The plan then traces `act`, `cache`, `evaluate` and `values`, which must not read values there, as `item()` and
        `if mask.any()` do: test for the device first.

        Args:
            config: the policy's section.
            recorder: replaces the recording of CUDA graphs, for policies that act by replaying them: takes a function
                and returns one that replays it. None: as on a CPU.
        """
        return cls(config)

    def acting_rows(self, rows: int) -> int:
        """Return the rows that acting on `rows` rows allocates: more if recordings have fixed batch sizes."""
        return rows
