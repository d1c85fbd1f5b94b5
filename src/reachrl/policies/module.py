"""A policy as a module with weights: how it is built, saved, trained and sharded."""

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
    """The part of the interface of a policy that does not depend on what it sees and decides."""

    Config: ClassVar[type[Section]]

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic behind the log-probs: how closely two passes over the same rows can agree."""
        return next(self.parameters()).dtype

    @property
    def acting_dtype(self) -> torch.dtype:
        """The type of the arithmetic behind the log-probs of `act`, if that is coarser."""
        return self.compute_dtype

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role: `vision`, `trunk` (projector, language model), `value`.

        What is frozen for good (the weights under adapters) is in none of them.
        """

    def trunk_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parts of the trunk that may have a learning rate of their own: `projector` and `head` (the output layer)."""
        return {}

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What must be equal for weights to fit; stored in checkpoints and compared on load."""

    def sharding_units(self) -> list[nn.Module]:
        """Modules that are computed by calling them, none inside another: what sharded learners gather one at a time.

        What is in none of them is gathered for each pass as one piece.
        """
        return []

    @abstractmethod
    def reset_critic(self) -> None:
        """Begin a critic with a trunk of its own anew, after a warm start that trained the actor.

        Its trunk gets the actor's current weights, its head has learned nothing. Nothing to do for a shared critic.
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
        """Read what `save_pretrained` wrote.

        Where the section marks keys as `Affects.TRAINING | Affects.FUTURE`, these come as keyword arguments, to be
        taken instead of the stored ones: a run may go on with others.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """

    def restore(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote back into this policy; override to do it without building a second one.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """
        saved = type(self).from_pretrained(folder)
        if saved.architecture() != self.architecture():
            raise CheckpointError(f"{folder}: the checkpoint's architecture is not the configuration's")
        self.load_state_dict(saved.state_dict())

    @classmethod
    def outline(cls: type[P], config: Any, *, recorder: Callable[[Any], Any] | None = None) -> P:
        """Build the policy that `config` describes on the meta device: shapes without numbers, for planning.

        Called under `torch.device("meta")`. Override it where the constructor reads a checkpoint, which need not exist.
        What the plan then runs there (`act`, `cache`, `evaluate`, `values`) must not read numbers, as `item()` and
        `if mask.any()` do; ask for the device first, as for an accelerator, which would have to wait.

        Args:
            config: the policy's section.
            recorder: stands for what records work on an accelerator, for policies whose acting replays recordings; it
                takes work and returns what repeats it. None: as on a CPU.
        """
        return cls(config)

    def acting_rows(self, rows: int) -> int:
        """Rows for which acting holds memory when it is asked for `rows`: more where recordings have fixed sizes."""
        return rows
