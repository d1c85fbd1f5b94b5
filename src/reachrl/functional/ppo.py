"""The losses of PPO for answers of several tokens, up to `A` in a row; pure functions of tensors.

A mask says which slots of a row hold its tokens, one at least; what stands in the others is never read.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F


def evened(values: Float[Tensor, "B A"], mask: Bool[Tensor, "B A"]) -> Float[Tensor, "B A"]:
    """Scale each row, so that the plain mean over all `A` slots is that over the row's own; 0 in the others.

    Where all slots are a row's own its values stay what they are, to the last bit.
    """
    lengths = mask.sum(-1, keepdim=True).to(values.dtype)
    return values.where(mask, 0) * (mask.shape[-1] / lengths)


def policy_loss(
    logprobs: Float[Tensor, "B A"],
    old_logprobs: Float[Tensor, "B A"],
    advantages: Float[Tensor, "B"],
    mask: Bool[Tensor, "B A"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    ratio_level: Literal["token", "action", "chunk"],
    token_actions: Int64[Tensor, "A"] | None = None,
    importance: Float[Tensor, "B"] | None = None,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, ""]]]:
    """Clipped surrogate loss of each row, and how the ratio behaved.

    The log-probability of an action, or of a chunk of them, is the sum over its tokens; that one ratio is clipped. With
    several ratios in a row, of tokens or of the actions of a chunk, the row's loss is the mean over them.

    Args:
        logprobs: of the weights in training.
        old_logprobs: of the weights that the iteration began with.
        advantages: one per row.
        mask: the row's tokens.
        clip_eps_low: the ratio is clipped at 1 - clip_eps_low.
        clip_eps_high: the ratio is clipped at 1 + clip_eps_high.
        ratio_level: what one ratio covers.
        token_actions: for `action`, which action of the chunk each slot belongs to; None: a row is one action.
        importance: truncated weight of each row against the sampler's distribution, or none.
        dual_clip: with a negative advantage A the loss is at most -dual_clip * A; none: no bound.

    Returns:
        loss per row f32[B] and scalars: `clip_frac`, the share of ratios whose gradient the clip cuts (outside the
        interval on the side that their advantage favours; SB3 and TorchRL also count those on the other side, which
        are pulled back); `log_ratio_max`, the greatest |log ratio|.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; action-level sum: VLA-RL (arXiv 2505.18719), eq. 1;
        dual clip: Ye et al. 2020 (arXiv 1912.09729), eq. 5.
    """
    log_ratio = (logprobs - old_logprobs).where(mask, 0)
    if ratio_level == "action" and token_actions is not None:
        log_ratio, mask = _by_action(log_ratio, mask, token_actions)
    elif ratio_level != "token":
        log_ratio, mask = log_ratio.sum(-1, keepdim=True), torch.ones_like(mask[:, :1])
    ratio = log_ratio.exp()
    advantage = advantages.unsqueeze(-1)
    unclipped, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    loss, cut = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        most = torch.where(advantage < 0, -dual_clip * advantage, torch.inf)
        cut, loss = cut | (loss > most), torch.minimum(loss, most)
    loss = evened(loss, mask).mean(-1)
    if importance is not None:
        loss = loss * importance
    with torch.no_grad():
        stats = {
            "clip_frac": evened(cut.float(), mask).mean(),
            "log_ratio_max": log_ratio.abs().max(),
        }
    return loss, stats


def _by_action(
    log_ratio: Float[Tensor, "B A"], mask: Bool[Tensor, "B A"], token_actions: Int64[Tensor, "A"]
) -> tuple[Float[Tensor, "B H"], Bool[Tensor, "B H"]]:
    """Sums over the tokens of each action of a chunk, and which actions have any."""
    belongs = token_actions[:, None] == torch.arange(int(token_actions.max()) + 1, device=token_actions.device)
    return log_ratio @ belongs.to(log_ratio.dtype), (mask[:, :, None] & belongs).any(1)


def token_kl(
    logprobs: Float[Tensor, "B A"], old_logprobs: Float[Tensor, "B A"], mask: Bool[Tensor, "B A"]
) -> Float[Tensor, "B"]:
    """KL(old || new) of each row in nats per action token, estimated from tokens that the old policy sampled.

    By the chain rule the KL of an answer is the sum over its tokens; the mean does not depend on their number.

    Source: the k3 estimator of Schulman, "Approximating KL divergence" (2020), for each token.
    """
    log_ratio = (logprobs - old_logprobs).where(mask, 0)
    return evened(log_ratio.expm1() - log_ratio, mask).mean(-1)


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
    old_logprobs: Float[Tensor, "B A"],
    behaviour_logprobs: Float[Tensor, "B A"],
    mask: Bool[Tensor, "B A"],
    cap: float,
) -> Float[Tensor, "B"]:
    """Truncated importance weight min(pi_old / pi_behaviour, cap) of each answer.

    Source: Espeholt et al. 2018 (arXiv 1802.01561), the truncated rho.
    """
    return (old_logprobs - behaviour_logprobs).where(mask, 0).sum(-1).exp().clamp(max=cap)
