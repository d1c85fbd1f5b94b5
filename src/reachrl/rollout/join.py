"""Joining rollouts: of different environments, or of the same ones one after the other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reachrl.types import PER_STEP, Observation, Rewards, Rollout


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Join rollouts along the environments, as if one collector had stepped all of them.

    Args:
        parts: [T_i N_i ...] each, in the order of their environments, all of one policy version. Those of whole
            episodes may be of different lengths; the shorter ones get rows that are no data.

    Returns:
        [T sum(N_i) ...]; episodes come in the order in which they ended, then of their environments.
    """
    if len(parts) == 1:
        return parts[0]
    longest = max(len(part.valid) for part in parts)
    parts = [_lengthened(part, longest) for part in parts]
    firsts = np.cumsum([0, *(part.valid.shape[1] for part in parts)])
    rows = np.concatenate([part.final_rows + np.array([0, first]) for part, first in zip(parts, firsts, strict=False)])
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # by step, then environment
    episodes = [episode for part in parts for episode in part.episodes]
    return replace(
        parts[0],
        **_concatenated(parts, axis=1),
        instructions=tuple(
            tuple(text for row in step for text in row)
            for step in zip(*(part.instructions for part in parts), strict=True)
        ),
        last_observation=Observation.concat([part.last_observation for part in parts]),
        final_observation=Observation.concat([part.final_observation for part in parts]).rows(order),
        final_rows=rows[order],
        episodes=tuple(episodes[place] for place in order),
        inputs=_inputs_side_by_side(parts),
    )


def append_rollouts(first: Rollout, second: Rollout) -> Rollout:
    """Join rollouts of whole episodes along time, of the same environments and policy version."""
    return replace(
        first,
        **_concatenated((first, second), axis=0),
        instructions=first.instructions + second.instructions,
        last_observation=second.last_observation,
        final_observation=Observation.concat([first.final_observation, second.final_observation]),
        final_rows=np.concatenate([first.final_rows, second.final_rows + np.array([len(first.valid), 0])]),
        episodes=first.episodes + second.episodes,
        inputs=None if first.inputs is None or second.inputs is None else first.inputs + second.inputs,
    )


def append_rewards(first: Rewards, second: Rewards) -> Rewards:
    """The rewards of rollouts that `append_rollouts` joined."""
    progress = None
    if first.progress is not None and second.progress is not None:
        progress = np.concatenate([first.progress, second.progress])
    return Rewards(
        total=np.concatenate([first.total, second.total]),
        parts={name: np.concatenate([part, second.parts[name]]) for name, part in first.parts.items()},
        progress=progress,
    )


def _concatenated(parts: Sequence[Rollout], *, axis: int) -> dict[str, Any]:
    """The arrays of all parts by field, joined along the steps (axis 0) or the environments (axis 1)."""
    versions = {part.policy_version for part in parts}
    assert len(versions) == 1, f"rollouts of several policy versions: {versions}"
    states = [part.state for part in parts if part.state is not None]
    return {name: np.concatenate([getattr(part, name) for part in parts], axis) for name in PER_STEP} | {
        "images": {camera: np.concatenate([part.images[camera] for part in parts], axis) for camera in parts[0].images},
        "state": np.concatenate(states, axis) if states else None,
    }


def _inputs_side_by_side(parts: Sequence[Rollout]) -> tuple[Any, ...] | None:
    """Each step's inputs of all parts; None if one has none."""
    kept = [part.inputs for part in parts if part.inputs is not None]
    if len(kept) < len(parts):
        return None
    return tuple(type(step[0]).concat(step) for step in zip(*kept, strict=True))


def _lengthened(rollout: Rollout, num_steps: int) -> Rollout:
    """Pad the rollout with invalid rows."""
    more = num_steps - len(rollout.valid)
    if not more:
        return rollout

    def repeated(array: np.ndarray) -> np.ndarray:
        # The last row once more, as a policy that scores all of them can score it.
        return np.concatenate([array, np.repeat(array[-1:], more, axis=0)])

    texts = (rollout.last_observation.instructions,) * more
    arrays = rollout.each_array(repeated)
    for name in ("success", "terminated", "truncated", "valid", "executed"):
        arrays[name][-more:] = 0
    return replace(
        rollout,
        **arrays,
        instructions=rollout.instructions + texts,
        inputs=None if rollout.inputs is None else rollout.inputs + rollout.inputs[-1:] * more,
    )
