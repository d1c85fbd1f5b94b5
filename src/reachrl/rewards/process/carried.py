"""State carried from one rollout to the next for unfinished episodes: frames, scores, reward scale."""

import base64
import hashlib
import zlib
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from reachrl.rewards.episodes import first_rows
from reachrl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """The episodes that were running when a rollout ended, by environment.

    A clip that reaches back beyond a rollout's first row finds its frames here. The potential of the state at the
    border is the one it was paid with, although a refit may score the same frame otherwise now, and rewards are divided
    by the same number from an episode's first decision to its last: else a potential would not telescope.
    """

    running: Bool[np.ndarray, "N"]  # whether an episode runs on; nothing is carried of the others
    last: tuple[str, ...]  # digest of each environment's last observation
    frames: UInt8[np.ndarray, "K N H W 3"]  # those before the last observation, oldest first
    known: Int64[np.ndarray, "N"]  # how many of the newest of them belong to the running episode
    scores: Float32[np.ndarray, "N"]  # of the last observation
    highest: Float32[np.ndarray, "N"]  # of the running episode's scores so far
    scales: Float64[np.ndarray, "N"]  # what the episode's rewards are divided by

    @classmethod
    def nothing(cls, rollout: Rollout, reach: int) -> Self:
        """Before a rollout whose first rows begin episodes: `reach` frames that belong to none of them."""
        num_envs = rollout.valid.shape[1]
        return cls(
            running=np.zeros(num_envs, dtype=bool),
            last=("",) * num_envs,
            frames=np.zeros((reach, num_envs, *rollout.frames.shape[2:]), np.uint8),
            known=np.zeros(num_envs, np.int64),
            scores=np.zeros(num_envs, np.float32),
            highest=np.zeros(num_envs, np.float32),
            scales=np.ones(num_envs),
        )

    def into(self, rollout: Rollout, reach: int) -> Self:
        """The part that belongs to episodes which `rollout` continues.

        A rollout of other episodes, such as one that is scored for a film, begins with other frames.
        """
        if self.frames.shape != (reach, *rollout.frames.shape[1:]):
            return self.nothing(rollout, reach)
        same = [digest == found for digest, found in zip(self.last, _digests(rollout.frames[0]), strict=True)]
        running = self.running & np.array(same)
        return replace(self, running=running, known=np.where(running, self.known, 0))

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; frames as zlib-compressed bytes in base 64."""
        return {
            "running": self.running.tolist(),
            "last": list(self.last),
            "frames": base64.b64encode(zlib.compress(self.frames.tobytes(), 1)).decode(),
            "shape": list(self.frames.shape),
            "known": self.known.tolist(),
            "scores": self.scores.tolist(),
            "highest": self.highest.tolist(),
            "scales": self.scales.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """What `state_dict` described."""
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(state["frames"])), np.uint8)
        return cls(
            running=np.array(state["running"], bool),
            last=tuple(state["last"]),
            frames=pixels.reshape(state["shape"]),
            known=np.array(state["known"], np.int64),
            scores=np.array(state["scores"], np.float32),
            highest=np.array(state["highest"], np.float32),
            scales=np.array(state["scales"], np.float64),
        )


def carry(
    rollout: Rollout,
    before: Carried,
    *,
    scores: Float32[np.ndarray, "N"],
    highest: Float32[np.ndarray, "N"],
    scales: Float64[np.ndarray, "N"],
) -> Carried:
    """What `rollout` leaves to the next one.

    Args:
        rollout: the one that was just scored.
        before: what it had itself been left.
        scores: of the frame that its last row led to.
        highest: of each last episode's scores so far.
        scales: what the rewards of its last row were divided by.
    """
    num_steps, reach = len(rollout.valid), len(before.frames)
    over = rollout.terminated[-1] | rollout.truncated[-1] | ~rollout.valid[-1]
    begun = first_rows(rollout)[-1]  # 0: at the first row or before it
    known = np.minimum(num_steps - begun + np.where(begun == 0, before.known, 0), reach)
    recent = rollout.frames[max(0, num_steps - reach) :]
    frames = np.concatenate([before.frames, recent])[len(recent) :]
    return Carried(
        running=~over,
        last=_digests(rollout.last_observation.frames),
        frames=frames,
        known=np.where(over, 0, known),
        scores=scores,
        highest=highest,
        scales=scales,
    )


def _digests(images: UInt8[np.ndarray, "N H W 3"]) -> tuple[str, ...]:
    return tuple(hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images)
