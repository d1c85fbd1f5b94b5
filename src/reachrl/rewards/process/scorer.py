"""Scores the frames of a rollout with a reward model, each frame once."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from reachrl.errors import ConfigError
from reachrl.rewards.episodes import first_rows
from reachrl.rewards.process.base import RewardModel
from reachrl.rewards.process.carried import Carried
from reachrl.run.spans import Span
from reachrl.types import Rollout

CACHE_SIZE = 500_000  # scores remembered, about 100 bytes each


class FrameScoring(Protocol):
    """Interface of a reward model that runs in other processes."""

    parallel: int
    """How many passes it makes at a time."""

    def __call__(
        self,
        model: RewardModel,
        clips: UInt8[np.ndarray, "B F H W 3"],
        instructions: Sequence[str],
        *,
        batch_size: int,
    ) -> Float32[np.ndarray, "B"]:
        """P(progress) of each clip, in passes of `batch_size`."""
        ...

    def take_spans(self) -> list[Span]:
        """Timing spans recorded since the last call."""
        ...


class FrameScorer:
    """A reward model with a cache: the same frames with the same instruction are scored once.

    Frames come back: the last one of a rollout is the first of the next, and every episode from the same start
    state begins with the same frame.

    Args:
        model: a fitted model, in evaluation mode.
        batch_size: clips a forward pass; short batches are padded to it.
        scoring: who runs the model; None: this process.
    """

    def __init__(self, model: RewardModel, *, batch_size: int, scoring: FrameScoring | None = None) -> None:
        self.model, self.batch_size = model, batch_size
        self._run = model.score if scoring is None else partial(scoring, model)
        self._at_once = batch_size * (1 if scoring is None else scoring.parallel)
        self.num_scored = 0  # clips that went through the model
        self._known: OrderedDict[bytes, float] = OrderedDict()

    @property
    def reach(self) -> int:
        """How many frames before the newest one a clip begins."""
        return (self.model.num_frames - 1) * self.model.frame_stride

    def scores(
        self, rollout: Rollout, wanted: Int64[np.ndarray, "K"], before: Carried | None = None
    ) -> Float32[np.ndarray, "F"]:
        """P(progress) by frame number (see `frame_numbers`); frames that are not wanted keep 0.

        Args:
            rollout: where the frames are.
            wanted: numbers of the frames to score, each once.
            before: holds the `reach` frames before the rollout's first row; None: every first row begins an episode.

        Raises:
            ConfigError: the model's clips need frames that chunks of actions leave out.
        """
        if self.model.num_frames > 1 and (rollout.executed > 1).any():
            raise ConfigError(
                f"the reward model sees {self.model.num_frames} frames {self.model.frame_stride} control steps apart, "
                "but with env.execute above 1 a rollout shows no frame inside a chunk: choose a reward model "
                "that sees one frame (reward_model.num_frames=1), or set env.execute=1"
            )
        before = before or Carried.nothing(rollout, self.reach)
        frames = _Frames(rollout, before.frames)
        scores = np.zeros(len(frames), dtype=np.float32)
        numbers = clip_numbers(
            rollout, before.known, num_frames=self.model.num_frames, frame_stride=self.model.frame_stride
        )
        for start in range(0, len(wanted), self._at_once):  # the frames of a rollout are never copied all together
            rows = wanted[start : start + self._at_once]
            clips = frames.images(numbers[rows])
            scores[rows] = self._score(clips, [frames.instruction(row) for row in rows.tolist()])
        return scores

    def _score(self, clips: UInt8[np.ndarray, "B F H W 3"], instructions: Sequence[str]) -> Float32[np.ndarray, "B"]:
        keys = [
            hashlib.blake2b(clip.tobytes() + text.encode(), digest_size=16).digest()
            for clip, text in zip(clips, instructions, strict=True)
        ]
        new = list({key: row for row, key in enumerate(keys) if key not in self._known}.values())
        if new:
            found = self._run(clips[new], [instructions[row] for row in new], batch_size=self.batch_size)
            self._known.update(zip([keys[row] for row in new], found.tolist(), strict=True))
            self.num_scored += len(new)
        scores = np.array([self._known[key] for key in keys], dtype=np.float32)
        while len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return scores


class _Frames:
    """A rollout's frames, and after them those before it, under one numbering, without copying them together."""

    def __init__(self, rollout: Rollout, before: UInt8[np.ndarray, "K N H W 3"]) -> None:
        self._rollout = rollout
        num_steps, num_envs = rollout.valid.shape
        running = rollout.frames.reshape(num_steps * num_envs, *rollout.frames.shape[2:])
        earlier = before.reshape(-1, *rollout.frames.shape[2:])
        self._banks = (running, rollout.last_observation.frames, rollout.final_frames, earlier)
        self._offsets = np.cumsum([0, *(len(bank) for bank in self._banks)])

    def __len__(self) -> int:
        return int(self._offsets[-2])

    def images(self, numbers: Int64[np.ndarray, "B F"]) -> UInt8[np.ndarray, "B F H W 3"]:
        """The frames of clips."""
        found = np.empty((*numbers.shape, *self._banks[0].shape[1:]), dtype=np.uint8)
        for bank, offset in zip(self._banks, self._offsets, strict=False):
            inside = (numbers >= offset) & (numbers < offset + len(bank))
            found[inside] = bank[numbers[inside] - offset]
        return found

    def instruction(self, number: int) -> str:
        """The instruction of a frame."""
        rollout, (_, last, final, *_) = self._rollout, self._offsets
        num_envs = rollout.valid.shape[1]
        if number < last:
            return rollout.instructions[number // num_envs][number % num_envs]
        if number < final:
            return rollout.last_observation.instructions[number - last]
        t, n = rollout.final_rows[number - final]
        return rollout.instructions[t][n]


def clip_numbers(
    rollout: Rollout, known: Int64[np.ndarray, "N"] | None = None, *, num_frames: int, frame_stride: int
) -> Int64[np.ndarray, "F C"]:
    """Which frames each frame's clip of C = `num_frames` consists of, oldest first, by frame number.

    Frames from before the rollout are numbered after its own, the earliest first; an episode's first frame stands in
    for earlier ones.

    Args:
        rollout: where the frames are.
        known: how many frames before the first row belong to that row's episode; None: no such frame.
        num_frames: of a clip.
        frame_stride: decisions between two of them.
    """
    num_steps, num_envs = rollout.valid.shape
    known = np.zeros(num_envs, np.int64) if known is None else known
    starts = first_rows(rollout)
    back = np.arange(num_frames - 1, -1, -1) * frame_stride
    t, n = np.divmod(np.arange((num_steps + 1) * num_envs), num_envs)
    after_all = (num_steps + 1) * num_envs + len(rollout.final_rows)

    def numbered(rows: Int64[np.ndarray, "R C"], t: Int64[np.ndarray, "R"], n: Int64[np.ndarray, "R"]) -> np.ndarray:
        first = np.where(starts[t, n] == 0, -known[n], starts[t, n])
        rows = np.maximum(rows, first[:, None])
        # Row -1 is the last of the frames before the rollout.
        return np.where(rows < 0, after_all + (back[0] + rows) * num_envs, rows * num_envs) + n[:, None]

    running = numbered(t[:, None] - back, t, n)
    t, n = rollout.final_rows.T
    # The final frame itself is no row of `images`; what lies before it is.
    own = (num_steps + 1) * num_envs + np.arange(len(t))
    final = np.where(back == 0, own[:, None], numbered(t[:, None] + 1 - back, t, n))
    return np.concatenate([running, final])
