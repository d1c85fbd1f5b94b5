"""The process reward: task success plus what the progress model thinks of the frames an action led to."""

from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int64

from reachrl.config.reward import ProcessRewardConfig
from reachrl.errors import ConfigError
from reachrl.rewards.process.base import RewardModel, load_reward_model
from reachrl.rewards.shaping import potential_difference, terminal_steps
from reachrl.rewards.task import success_reward
from reachrl.types import Rewards, Rollout


class ProcessReward:
    """Dense reward from a fitted, frozen progress model.

    Args:
        config: weight and mode.
        gamma: the learner's discount; a potential shaped with another one changes the best policy.
        bootstrap_truncated: the learner's; where it treats a time limit as terminal, so must the potential.
        model: the progress model; at a weight above 0 it is read from `config.checkpoint` when None.

    Raises:
        ConfigError: neither a model nor a checkpoint was given.
        CheckpointError: the checkpoint cannot be read.
    """

    Config: ClassVar[type[ProcessRewardConfig]] = ProcessRewardConfig

    def __init__(
        self,
        config: ProcessRewardConfig,
        *,
        gamma: float,
        bootstrap_truncated: bool = True,
        model: RewardModel | None = None,
    ) -> None:
        if model is None and config.weight > 0:
            if config.checkpoint is None:
                raise ConfigError(
                    "The process reward has no model: run the `reward fit` stage first, or set `reward.checkpoint` "
                    "to the folder of a fitted one."
                )
            model = load_reward_model(config.checkpoint)
        self.config = config
        self.gamma = gamma
        self.bootstrap_truncated = bootstrap_truncated
        self.model = None if model is None else model.eval().requires_grad_(False)

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every step of `rollout`; no frame is scored twice."""
        task = success_reward(rollout)
        process = self._process(rollout) if self.config.weight > 0 else np.zeros_like(task)
        return Rewards(total=task + process, parts={"task": task, "process": process})

    def _process(self, rollout: Rollout) -> Float32[np.ndarray, "T N"]:
        now, after = frame_numbers(rollout)
        potential = self.config.mode == "potential"
        terminal = terminal_steps(rollout, bootstrap_truncated=self.bootstrap_truncated)
        # The potential of a terminal state is 0 by definition: its frame need not be scored.
        wanted = [after[rollout.valid & ~terminal]] if potential else [after[rollout.valid]]
        if potential:
            wanted.append(now[rollout.valid])
        scores = self._score(rollout, np.unique(np.concatenate(wanted)))
        if potential:
            process = potential_difference(scores[now], scores[after], terminal, gamma=self.gamma)
        else:
            process = scores[after]
        return np.where(rollout.valid, np.float32(self.config.weight) * process, np.float32(0))

    def _score(self, rollout: Rollout, wanted: Int64[np.ndarray, "K"]) -> Float32[np.ndarray, "F"]:
        """Scores by frame number; frames that are not wanted keep 0."""
        assert self.model is not None, "frames are scored only where the weight is above 0"
        num_steps, num_envs = rollout.valid.shape
        instructions = [text for row in rollout.instructions for text in row]
        instructions += rollout.last_observation.instructions
        instructions += [rollout.instructions[t][n] for t, n in rollout.final_rows.tolist()]
        running = rollout.images.reshape(num_steps * num_envs, *rollout.images.shape[2:])
        banks = (running, rollout.last_observation.images, rollout.final_images)
        scores = np.zeros(len(instructions), dtype=np.float32)
        offset = 0
        for bank in banks:  # one bank after the other, in chunks: the frames of a rollout are never copied at once
            chosen = wanted[(wanted >= offset) & (wanted < offset + len(bank))]
            for start in range(0, len(chosen), self.config.score_batch):
                rows = chosen[start : start + self.config.score_batch]
                scores[rows] = self.model.score(
                    bank[rows - offset], [instructions[row] for row in rows], batch_size=self.config.score_batch
                )
            offset += len(bank)
        return scores


def frame_numbers(rollout: Rollout) -> tuple[Int64[np.ndarray, "T N"], Int64[np.ndarray, "T N"]]:
    """Number a rollout's frames and say which one each step saw and which one it led to.

    Frames are numbered through `images` row by row, then `last_observation`, then `final_images`. A step that
    ended an episode led to that episode's final frame, not to the next one's first.

    Returns:
        (seen, led to), both [T N].
    """
    num_steps, num_envs = rollout.valid.shape
    now = np.arange(num_steps * num_envs, dtype=np.int64).reshape(num_steps, num_envs)
    after = now + num_envs
    ended: Bool[np.ndarray, "T N"] = np.zeros((num_steps, num_envs), dtype=bool)
    if len(rollout.final_rows):
        t, n = rollout.final_rows.T
        after[t, n] = (num_steps + 1) * num_envs + np.arange(len(rollout.final_rows))
        ended[t, n] = True
    lost = (rollout.terminated | rollout.truncated) & rollout.valid & ~ended
    assert not lost.any(), f"no final frame for the episodes that ended at (t, n) = {np.argwhere(lost).tolist()}"
    return now, after
