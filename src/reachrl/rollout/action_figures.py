"""How large the actions of a rollout are, beside what the environment can carry out."""

import numpy as np
import torch

from reachrl.policies.base import Policy
from reachrl.types import Rollout

_NEAR = 1e-3  # of the range: at the bound
_FAR = 1e-2  # of the range: beyond it, which rounding alone does not do


def action_figures(rollout: Rollout, policy: Policy) -> dict[str, float]:
    """Shares of the action numbers of valid decisions, and their mean size; NaN where no decision is data.

    Args:
        rollout: [T N ...]; without `action_bounds` there are no figures.
        policy: decodes its tokens.

    Returns:
        `actions/at_bounds`: share at a bound or beyond; `actions/beyond_bounds`: share that is clipped;
        `actions/size`: mean absolute number, in units of half the range.
    """
    if rollout.action_bounds is None:
        return {}
    well_formed = rollout.valid & ~rollout.malformed  # what a malformed answer stands for is no action
    ids, mask = (torch.from_numpy(each[well_formed]) for each in (rollout.token_ids, rollout.token_mask))
    names = ("actions/at_bounds", "actions/beyond_bounds", "actions/size")
    if not len(ids):
        return dict.fromkeys(names, float("nan"))
    actions = policy.decode_actions(ids, mask).astype(np.float64)
    low, high = rollout.action_bounds.astype(np.float64)
    half = np.where(np.isfinite(high - low) & (high > low), (high - low) / 2, 1.0)
    excess = np.maximum(actions - high, low - actions) / (2 * half)  # above 0 outside; -inf where there is no bound
    size = np.abs(actions - np.where(np.isfinite(high + low), (high + low) / 2, 0.0)) / half
    return dict(
        zip(names, (float((excess >= -_NEAR).mean()), float((excess > _FAR).mean()), float(size.mean())), strict=True)
    )
