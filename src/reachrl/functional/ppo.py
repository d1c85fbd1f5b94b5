"""The losses of PPO for actions made of several tokens; pure functions of tensors."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def policy_loss(
    logprobs: Float[Tensor, "B A"],
    old_logprobs: Float[Tensor, "B A"],
    advantages: Float[Tensor, "B"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    ratio_level: Literal["action", "token"],
    importance: Float[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """Clipped surrogate loss of each row, and how the ratio behaved.

    The log-probability of an action is the sum over its tokens; `action` clips that one ratio, `token` clips
    each token's and averages.

    Args:
        logprobs: of the weights in training.
        old_logprobs: of the weights that the iteration began with.
        advantages: one per action.
        clip_eps_low: the ratio is clipped at 1 - clip_eps_low.
        clip_eps_high: the ratio is clipped at 1 + clip_eps_high.
        ratio_level: what one ratio covers.
        importance: truncated weight of each row against the sampler's distribution, or none.

    Returns:
        loss per row f32[B] and scalars: `clip_frac`, the share of ratios whose gradient the clip cuts (outside the
        interval on the side that their advantage favours; SB3 and TorchRL also count those on the other side, which
        are pulled back); `log_ratio_max`, the greatest |log ratio|.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; action-level sum: VLA-RL (arXiv 2505.18719), eq. 1.
    """
    log_ratio = logprobs - old_logprobs
    if ratio_level == "action":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    advantage = advantages.unsqueeze(-1)
    unclipped, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    loss = torch.maximum(unclipped, clipped).mean(-1)
    if importance is not None:
        loss = loss * importance
    with torch.no_grad():
        stats = {
            "clip_frac": (clipped > unclipped).float().mean(),
            "log_ratio_max": log_ratio.abs().max(),
        }
    return loss, stats


def token_kl(logprobs: Float[Tensor, "B A"], old_logprobs: Float[Tensor, "B A"]) -> Float[Tensor, "B"]:
    """KL(old || new) of each row in nats per action token, estimated from tokens that the old policy sampled.

    By the chain rule the KL of an action is the sum over its tokens; the mean does not depend on their number.

    Source: the k3 estimator of Schulman, "Approximating KL divergence" (2020), for each token.
    """
    log_ratio = logprobs - old_logprobs
    return (log_ratio.expm1() - log_ratio).mean(-1)


def value_loss(
    values: Float[Tensor, "B"],
    old_values: Float[Tensor, "B"],
    returns: Float[Tensor, "B"],
    *,
    kind: Literal["mse", "huber"],
    clip: float | None = None,
) -> Float[Tensor, "B"]:
    """Half squared error (or Huber with delta 1) of each row; with `clip`, the larger of clipped and not.

    Source: PPO2's value clipping (Engstrom et al. 2020, arXiv 2005.12729, section 3).
    """

    def error(prediction: Tensor) -> Tensor:
        if kind == "mse":
            return 0.5 * (prediction - returns).square()
        return F.huber_loss(prediction, returns, reduction="none", delta=1.0)

    loss = error(values)
    if clip is None:
        return loss
    return torch.maximum(loss, error(old_values + (values - old_values).clamp(-clip, clip)))


def importance_weights(
    old_logprobs: Float[Tensor, "B A"], behaviour_logprobs: Float[Tensor, "B A"], cap: float
) -> Float[Tensor, "B"]:
    """Truncated importance weight min(pi_old / pi_behaviour, cap) of each action.

    Source: Espeholt et al. 2018 (arXiv 1802.01561), the truncated rho.
    """
    return (old_logprobs - behaviour_logprobs).sum(-1).exp().clamp(max=cap)
