"""What an algorithm receives and returns."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from reachrl.policies.base import PolicyInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOBatch:
    """The valid decisions of one iteration, flattened to `B` rows.

    `inputs(rows)` gives model-ready rows i64[b]: cached ones, or encoded from uint8 frames that stay uint8 until
    then. Where several processes share the rows, `own` says which are this one's; a gradient is the sum
    over the processes.
    """

    inputs: Callable[[Int64[Tensor, "b"]], PolicyInputs]
    action_ids: Int64[Tensor, "B A"]
    behaviour_logprobs: Float[Tensor, "B A"]
    old_logprobs: Float[Tensor, "B A"]
    old_values: Float[Tensor, "B"]
    advantages: Float[Tensor, "B"]
    returns: Float[Tensor, "B"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """How one update went; means over the optimiser steps taken unless said otherwise.

    `kl` is KL(before || after the update), measured on the batch with the weights that the update ended with;
    `engine_kl` is KL(sampler || learner) of the same actions before the update; both in nats per action token.
    `clip_frac` is the share of ratios whose gradient the clip cut. `explained_variance` is that of the old values.
    Without a step of the policy (critic warm-up) or of the critic (no rows) its figures are NaN.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_frac: float
    grad_norm: float
    value_grad_norm: float
    changed_weights: float
    value_changed_weights: float
    explained_variance: float
    engine_kl: float
    policy_steps: int
    value_steps: int
    lr: float

    def metrics(self) -> dict[str, float]:
        """By the names used in `metrics.jsonl`."""
        record = asdict(self)
        return {
            "loss/policy": record.pop("policy_loss"),
            "loss/value": record.pop("value_loss"),
        } | record


class Algorithm(Protocol):
    """Improves a policy from one batch."""

    def update(self, batch: PPOBatch, *, iteration: int, train_policy: bool) -> UpdateStats:
        """One iteration's optimiser steps; with `train_policy` false only the critic moves."""
        ...
