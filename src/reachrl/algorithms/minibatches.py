"""Minibatches of an update: their sizes, the check of the first one, and the statistics over all of them."""

import math

import torch
from torch import Tensor

from reachrl.algorithms.base import Batch
from reachrl.config.algorithm import PolicyGradientSection
from reachrl.errors import ConfigError, DivergedError, ExtensionError
from reachrl.functional.ppo import importance_weights
from reachrl.policies.base import Policy

# How far the very first ratio or its inverse may be above 1: rounding in another batch shape, nothing more.
FIRST_RATIO_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def equal_parts(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Split rows into as few parts of at most `most` as it takes, with sizes that differ by one at most."""
    return rows.tensor_split(math.ceil(len(rows) / most)) if len(rows) else ()


def token_actions_of(config: PolicyGradientSection, policy: Policy) -> Tensor | None:
    """Which action of a chunk each token slot belongs to, where ratios are those of actions; None: a row is one.

    Raises:
        ConfigError: the policy's tokens belong to no single action.
    """
    if config.ratio_level != "action" or policy.num_actions == 1:
        return None
    slots = policy.token_actions()
    if slots is None:
        raise ConfigError(
            f"algorithm.ratio_level=action, but an answer of {type(policy).__name__} stands for {policy.num_actions} "
            "actions as a whole: no token belongs to one of them. Set algorithm.ratio_level=chunk or token"
        )
    return slots


def check_first_ratio(log_ratio_max: float, policy: Policy) -> None:
    """Check that the very first minibatch has a probability ratio of 1.

    Raises:
        ExtensionError: the policy scores actions otherwise than a moment ago with the same weights.
    """
    if log_ratio_max > math.log1p(FIRST_RATIO_TOLERANCE[policy.compute_dtype]):
        raise ExtensionError(
            f"the first minibatch has a probability ratio of {math.exp(log_ratio_max):.4f} or its inverse, "
            f"expected 1: {type(policy).__name__} gave the same actions other log-probs a moment ago with "
            "the same weights. Its `evaluate` must answer the same with and without gradients, in batches of any "
            "size, without chance (dropout); where only rounding is to blame, compute in float32"
        )


def summary(sums: dict[str, float], policy_steps: int, value_steps: int, *, critic: bool) -> dict[str, float]:
    """Means over the steps taken; `kl` is KL(before || after the update), in nats per action token.

    Without a step of the policy (critic warm-up, no rows) or of the critic its figures are NaN.
    """

    def mean(name: str, steps: int) -> float:
        return sums[name] / steps if steps else math.nan  # not looked at is not 0

    figures = {
        "loss/policy": mean("policy_loss", policy_steps),
        "entropy": mean("entropy", policy_steps),
        "kl": sums["kl"] if policy_steps else math.nan,
        "clip_frac": mean("clip_frac", policy_steps),
        "grad_norm": mean("grad_norm", policy_steps),
        "changed_weights": mean("changed", min(policy_steps, 1)),
        "policy_steps": policy_steps,
    }
    if critic:
        figures |= {
            "loss/value": mean("value_loss", value_steps),
            "value_grad_norm": mean("value_grad_norm", value_steps),
            "value_changed_weights": mean("value_changed", min(value_steps, 1)),
            "value_steps": value_steps,
        }
    return figures


def row_weights(batch: Batch, rows: Tensor, mask: Tensor, cap: float | None) -> Tensor | None:
    """Weight of each decision in the loss: the truncated importance weight times the batch's own; None: all 1.

    Args:
        batch: with the sampler's and the learner's log-probs.
        rows: of the batch.
        mask: of the tokens that count in these rows, on the device where the weights are needed.
        cap: of the importance weight; None: it is 1.
    """
    weights = None if batch.weights is None else batch.weights[rows].to(mask.device)
    if cap is None:
        return weights
    old, behaviour = (each[rows].to(mask.device) for each in (batch.old_logprobs, batch.behaviour_logprobs))
    importance = importance_weights(old, behaviour, mask, cap)
    return importance if weights is None else importance * weights


def credited_mask(batch: Batch, rows: Tensor, slots: Tensor | None) -> Tensor:
    """The tokens bool[b A] that a row's advantage is due to: those of the actions that were carried out.

    A chunk is cut short by success, by the time limit or by `env.execute`; the effect of its other actions is unknown.
    Where tokens stand for the chunk as a whole, and in malformed answers, all of them count.

    Args:
        batch: with the number of actions carried out, or None.
        rows: of the batch.
        slots: which action each token slot belongs to; None: they stand for the chunk as a whole.
    """
    mask = batch.token_mask[rows]
    if slots is None or batch.executed is None:
        return mask
    return mask & ((slots < batch.executed[rows, None]) | batch.malformed[rows, None])


def chunk_slots(policy: Policy) -> Tensor | None:
    """Which action of a chunk each token slot belongs to, in main memory; None for single actions or whole chunks."""
    slots = policy.token_actions() if policy.num_actions > 1 else None
    return None if slots is None else slots.cpu()


def check_losses(figures: dict[str, float], *, critic: bool) -> None:
    """Check a minibatch's figures before its step is taken.

    Raises:
        DivergedError: one is not finite.
    """
    if not all(math.isfinite(value) for value in figures.values()):
        raise DivergedError(
            f"a loss is not finite: {figures}. Weights were not changed by it; resume from the last "
            f"checkpoint with a lower algorithm.lr{' or algorithm.value_lr' if critic else ''}."
        )


def check_norms(norms: tuple[float, float]) -> None:
    """Check the gradient norms of policy and critic before a step.

    Raises:
        DivergedError: one is not finite.
    """
    if not all(map(math.isfinite, norms)):
        raise DivergedError(f"a gradient is not finite (norms {norms}); no step was taken. Lower algorithm.lr.")
