"""Rollouts of some environments each, put together to the rollout of all."""

from collections.abc import Sequence

import numpy as np

from reachrl.types import Observation, Rollout

_BY_STEP_AND_ENV = (
    *("images", "action_ids", "behaviour_logprobs", "success", "terminated", "truncated", "valid"),
    *("ee_state", "progress"),
)


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Lay rollouts of equal length side by side, as if one collector had stepped all environments.

    Args:
        parts: [T N_i ...] each, in the order of their environments, all of one policy version.

    Returns:
        [T sum(N_i) ...]; episodes come in the order in which they ended, then of their environments.
    """
    if len(parts) == 1:
        return parts[0]
    versions = {part.policy_version for part in parts}
    assert len(versions) == 1, f"rollouts of several policy versions: {versions}"
    firsts = np.cumsum([0, *(part.valid.shape[1] for part in parts)])
    rows = np.concatenate([part.final_rows + np.array([0, first]) for part, first in zip(parts, firsts, strict=False)])
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # by step, then environment
    episodes = [episode for part in parts for episode in part.episodes]
    return Rollout(
        **{name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in _BY_STEP_AND_ENV},
        instructions=tuple(
            tuple(text for row in step for text in row)
            for step in zip(*(part.instructions for part in parts), strict=True)
        ),
        last_observation=Observation(
            images=np.concatenate([part.last_observation.images for part in parts]),
            instructions=tuple(text for part in parts for text in part.last_observation.instructions),
        ),
        final_images=np.concatenate([part.final_images for part in parts])[order],
        final_rows=rows[order],
        episodes=tuple(episodes[place] for place in order),
        policy_version=parts[0].policy_version,
    )
