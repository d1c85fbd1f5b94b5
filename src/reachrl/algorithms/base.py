"""The interface of an algorithm: its batch, its update and its state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from reachrl.config.algorithm import AlgorithmSection
from reachrl.errors import ExtensionError
from reachrl.functional.ppo import token_kl
from reachrl.policies.base import Policy, PolicyInputs
from reachrl.registry import resolve
from reachrl.types import Rewards, Rollout, Scored


def _no_inputs(rows: Int64[Tensor, "b"]) -> PolicyInputs:
    raise AssertionError("the learner gives a batch its inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The decisions that an update learns from, flattened to `B` rows.

    `rows` are their places in the rollout (decision `t` of environment `n` of `N` is row `t * N + n`). The learner adds
    `inputs`, which gives model-ready rows i64[b]: cached ones, or encoded from uint8 frames that stay uint8 until then.
    Where several processes share the rows, `own` says which are this one's; a gradient is the sum over the processes.
    """

    rows: Int64[Tensor, "B"]
    token_ids: Int64[Tensor, "B A"]
    token_mask: Bool[Tensor, "B A"]
    """The slots that hold a row's tokens; the others hold id 0 and log-prob 0, and no mean counts them."""
    malformed: Bool[Tensor, "B"]
    """Rows that stood for no action; they are learned from like the others."""
    executed: Int32[Tensor, "B"] | None = None
    """Actions of each row's chunk that were carried out; None: all."""
    behaviour_logprobs: Float[Tensor, "B A"]
    old_logprobs: Float[Tensor, "B A"]
    advantages: Float[Tensor, "B"]
    returns: Float[Tensor, "B"] | None = None
    """What the values are trained towards; None without a critic."""
    old_values: Float[Tensor, "B"] | None = None
    weights: Float[Tensor, "B"] | None = None
    """Weight of each row in the loss; None: all weigh 1."""
    stats: dict[str, float] | None = None
    """Figures about the making of the batch."""
    inputs: Callable[[Int64[Tensor, "b"]], PolicyInputs] = _no_inputs
    own: Bool[Tensor, "B"] | None = None


class Group(Protocol):
    """Processes that share the rows of a batch."""

    sharded: bool
    """Whether each has only a part of the weights: the backward pass then leaves the mean of the processes' gradients,
    and all must make as many passes."""
    size: int
    """How many there are."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        ...

    def max_(self, tensor: Tensor) -> None:
        """Replace each element by the greatest of the processes."""
        ...


class Algorithm(ABC):
    """Assigns credit to decisions and updates the policy.

    What it needs of the collector and of the learner its section says (`AlgorithmSection.needs`).

    Args:
        config: its section.
        policy: what is trained, in place.
        seed: of whatever it draws; with the number of the iteration mixed in, a resumed run needs no RNG state.
        temperature: of the distribution that actions are sampled from and scored by.
    """

    Config: ClassVar[type[AlgorithmSection]]
    optimizer: torch.optim.Optimizer
    """Of the trained parameters; the learner saves, moves and shares its state."""
    num_iterations: int | None = None
    """Iterations of the run, over which schedules run; None: unknown."""
    group: Group | None = None
    """The processes that share each batch; None: this one alone."""

    def __init__(self, config: Any, policy: Policy, *, seed: int, temperature: float) -> None:
        self.config, self.policy, self.seed, self.temperature = config, policy, seed, temperature

    @classmethod
    def wants_more(cls, config: Any, rollout: Rollout, rewards: Rewards, *, rollouts: int) -> bool:
        """Whether another rollout is to be added to this iteration's, up to the section's `needs.max_rollouts`.

        Args:
            config: the section.
            rollout: all that was collected so far.
            rewards: of it.
            rollouts: how many it consists of.
        """
        return False

    @abstractmethod
    def batch(self, rollout: Rollout, rewards: Rewards, scored: Scored) -> Batch:
        """Credit of every decision that is to be learned from.

        Args:
            rollout: what was collected.
            rewards: of each step, f32[T N].
            scored: log-probs under the weights about to be trained; values if the section's `needs` ask for them.
        """

    @abstractmethod
    def update(self, batch: Batch, *, iteration: int) -> dict[str, float]:
        """One iteration's optimiser steps.

        Args:
            batch: what `batch` made, with its inputs; it may have no rows.
            iteration: number of the iteration.

        Returns:
            Figures by the names they have in `metrics.jsonl`; NaN: there was nothing to measure.

        Raises:
            DivergedError: a loss or gradient is not finite; no step was taken with it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimiser's state; JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (nothing to do is a good answer)
        """Continue from `state_dict`'s answer."""


def decisions(rollout: Rollout, scored: Scored, keep: Int64[Tensor, "B"], **credit: np.ndarray) -> dict[str, Any]:
    """The rows `keep` of what every batch holds, as arguments of `Batch`.

    Args:
        rollout: [T N ...].
        scored: of the same rollout.
        keep: rows, see `Batch`.
        credit: further arrays [T N ...] by name, such as `advantages`.
    """
    arrays = {
        "token_ids": rollout.token_ids,
        "token_mask": rollout.token_mask,
        "malformed": rollout.malformed,
        "executed": rollout.executed,
        "behaviour_logprobs": rollout.behaviour_logprobs,
        "old_logprobs": scored.old_logprobs,
    } | credit

    def flat(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.reshape(rollout.valid.size, *array.shape[2:]))[keep]

    return {"rows": keep} | {name: flat(array) for name, array in arrays.items()}


def valid_rows(rollout: Rollout) -> Int64[Tensor, "B"]:
    """Rows of the decisions that are data."""
    return torch.from_numpy(np.flatnonzero(rollout.valid))


def rows_to_score(rollout: Rollout, *, all_rows: bool) -> np.ndarray:
    """Rows of the rollout to score: the valid ones, or all where values are needed to bootstrap earlier steps."""
    rows = np.arange(rollout.valid.size) if all_rows else np.flatnonzero(rollout.valid)
    return rows if len(rows) else np.arange(rollout.valid.size)


def engine_kl(rollout: Rollout, scored: Scored) -> float:
    """KL(sampler || learner) in nats per action token; NaN without a valid decision."""
    old, behaviour, mask = (
        torch.from_numpy(each[rollout.valid])
        for each in (scored.old_logprobs, rollout.behaviour_logprobs, rollout.token_mask)
    )
    return token_kl(old.double(), behaviour.double(), mask).mean().item()


def new_algorithm(config: AlgorithmSection, policy: Policy, *, seed: int, temperature: float) -> Algorithm:
    """The configured algorithm.

    Raises:
        ExtensionError: it is no `Algorithm`.
    """
    kind: str = config.kind  # pyright: ignore[reportAttributeAccessIssue]
    cls = resolve("algorithms", kind)
    if not issubclass(cls, Algorithm):
        raise ExtensionError(
            f"{cls.__name__}: an algorithm must be a subclass of reachrl.algorithms.base.Algorithm, which says what "
            "the learner calls and saves; derive it"
        )
    return cls(config, policy, seed=seed, temperature=temperature)
