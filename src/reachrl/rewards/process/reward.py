"""The process reward: task success plus the reward model's score of the frames an action led to."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32, Int64

from reachrl.config.reward import ProcessRewardConfig
from reachrl.errors import ConfigError
from reachrl.functional.discount import discounts
from reachrl.rewards.base import Reward
from reachrl.rewards.episodes import episode_parts, first_rows, frame_numbers
from reachrl.rewards.process.base import RewardModel, load_reward_model
from reachrl.rewards.process.carried import Carried, carry
from reachrl.rewards.process.scorer import FrameScorer, FrameScoring
from reachrl.rewards.process.segment import gripper_cuts
from reachrl.rewards.running_scale import RunningScale
from reachrl.rewards.shaping import pay_at_ends, pay_new_highs, potential_difference, terminal_steps
from reachrl.rewards.task import success_reward
from reachrl.types import Rewards, Rollout

# (rollout, iteration, model in use) -> a refitted model with figures about it, or None: nothing is due.
Refit = Callable[[Rollout, int, RewardModel], tuple[RewardModel, dict[str, float]] | None]


class ProcessReward(Reward):
    """Dense reward from a fitted reward model.

    Rollouts are scored in the order in which they were collected: what an episode needs of the rollout before (see
    `Carried`) is kept from call to call and in the state.

    Args:
        config: weight, mode, and what is done to the scores.
        gamma: the learner's discount; a potential shaped with another one changes the best policy.
        bootstrap_truncated: the learner's; where it treats a time limit as terminal, so must the potential.
        model: the reward model; at a weight above 0 it is read from `config.checkpoint` when None.
        refit: fits the model anew on fresh episodes when due; None: it stays as it is.
        scoring: who runs the model; None: this process.
        read_version: gives the model of a version again; needed to resume a run that refits.

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
        refit: Refit | None = None,
        scoring: FrameScoring | None = None,
        read_version: Callable[[int], RewardModel] | None = None,
    ) -> None:
        if model is None and config.weight > 0:
            if config.checkpoint is None:
                raise ConfigError(
                    "The process reward has no model: run the `reward fit` stage first, or set `reward.checkpoint` "
                    "to the folder of a fitted one."
                )
            model = load_reward_model(config.checkpoint)
        self.config, self.gamma, self.bootstrap_truncated = config, gamma, bootstrap_truncated
        self.version = 0  # of the model; each refit adds one
        self._refit, self._read_version, self._scoring = refit, read_version, scoring
        self._scale = RunningScale()
        self._carried: Carried | None = None
        self._scorer: FrameScorer | None = None
        if model is not None:
            self._use(model)

    @property
    def model(self) -> RewardModel | None:
        """The model in use."""
        return None if self._scorer is None else self._scorer.model

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every decision of `rollout`; no frame is scored twice."""
        task = success_reward(rollout, gamma=self.gamma)
        if self.config.weight == 0:
            return Rewards(total=task, parts={"task": task, "process": np.zeros_like(task)})
        now, after = frame_numbers(rollout)
        carried = self._continued(rollout)
        scores = self._scores(rollout, now, after, carried)
        before = scores[now]
        before[0] = np.where(carried.running, carried.scores, before[0])
        process, highest = self._paid(rollout, before, scores[after], carried)
        scales = np.ones(process.shape)
        if self.config.normalise:
            self._scale.update(process[rollout.valid])
            # An episode keeps the number that was in force in the rollout in which it began.
            kept = (first_rows(rollout)[:-1] == 0) & carried.running
            scales = np.where(kept, carried.scales, self._scale.deviation)
            process = process / scales.astype(np.float32)
        self._carried = carry(rollout, carried, scores=scores[after[-1]], highest=highest, scales=scales[-1])
        if self.config.clip is not None:
            process = np.clip(process, -np.float32(self.config.clip), np.float32(self.config.clip))
        process = np.where(rollout.valid, np.float32(self.config.weight) * process, np.float32(0))
        progress = np.where(rollout.valid, scores[after], np.float32(0))
        return Rewards(total=task + process, parts={"task": task, "process": process}, progress=progress)

    def adapt(self, rollout: Rollout, *, iteration: int) -> dict[str, float]:
        """Refit the model when it is due."""
        if self._refit is None or self._scorer is None:
            return {}
        found = self._refit(rollout, iteration, self._scorer.model)
        if found is None:
            return {}
        model, figures = found
        self.version += 1
        self._use(model)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The model's version, the running scale, and what the running episodes need."""
        carried = None if self._carried is None else self._carried.state_dict()
        return {"version": self.version, "scale": self._scale.state_dict(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same version, scale and running episodes."""
        self._scale.load_state_dict(state["scale"])
        carried = state.get("carried")  # absent where an earlier version wrote the state
        self._carried = None if carried is None else Carried.from_state(carried)
        if state["version"] != self.version:
            assert self._read_version is not None, "a state with a refitted model comes from a run that refits"
            self._use(self._read_version(state["version"]))
            self.version = state["version"]

    def _use(self, model: RewardModel) -> None:
        if self.config.device != "auto" and self._scoring is None:
            model = model.to(torch.device(self.config.device))
        self._scorer = FrameScorer(model.eval(), batch_size=self.config.score_batch, scoring=self._scoring)

    def _continued(self, rollout: Rollout) -> Carried:
        assert self._scorer is not None, "frames are scored only where the weight is above 0"
        if self._carried is None:
            return Carried.nothing(rollout, self._scorer.reach)
        return self._carried.into(rollout, self._scorer.reach)

    def _scores(
        self, rollout: Rollout, now: Int64[np.ndarray, "T N"], after: Int64[np.ndarray, "T N"], carried: Carried
    ) -> Float32[np.ndarray, "F"]:
        assert self._scorer is not None, "frames are scored only where the weight is above 0"
        wanted = [after[rollout.valid]]
        if self.config.mode == "potential":
            wanted.append(now[rollout.valid])
        elif self.config.pay == "keyframes":
            wanted.append(np.array([now[first, n] for first, _, n in episode_parts(rollout)]))
        return self._scorer.scores(rollout, np.unique(np.concatenate(wanted)), carried)

    def _paid(
        self,
        rollout: Rollout,
        before: Float32[np.ndarray, "T N"],
        after: Float32[np.ndarray, "T N"],
        carried: Carried,
    ) -> tuple[Float32[np.ndarray, "T N"], Float32[np.ndarray, "N"]]:
        """The dense reward of each decision before scaling, and the last episodes' highest scores so far."""
        highest = np.where(carried.running, carried.highest, before[0])
        if self.config.pay == "keyframes":
            paid = np.zeros_like(after)
            for first, last, n in episode_parts(rollout):
                rows = slice(first, last + 1)
                so_far = highest[n] if first == 0 else before[first, n]
                paid[rows, n], highest[n] = pay_new_highs(
                    after[rows, n], so_far, rollout.executed[rows, n], gamma=self.gamma
                )
            return paid, highest
        return self._paid_for_scores(rollout, before, after), highest

    def _paid_for_scores(
        self, rollout: Rollout, before: Float32[np.ndarray, "T N"], after: Float32[np.ndarray, "T N"]
    ) -> Float32[np.ndarray, "T N"]:
        potential = self.config.mode == "potential"
        terminal = terminal_steps(rollout, bootstrap_truncated=self.bootstrap_truncated)
        if self.config.pay == "steps":
            if potential:
                return potential_difference(before, after, terminal, rollout.executed, gamma=self.gamma)
            # A frame is seen after the last action of a chunk.
            return after * discounts(self.gamma, np.maximum(rollout.executed - 1, 0)).astype(np.float32)
        paid = np.zeros_like(after)
        for first, last, n in episode_parts(rollout):
            rows = slice(first, last + 1)
            paid[rows, n] = pay_at_ends(
                np.concatenate([before[first : first + 1, n], after[rows, n]]),
                self._segment_ends(rollout.ee_state[rows, n, 3]),
                rollout.executed[rows, n],
                potential=potential,
                gamma=self.gamma,
                terminal=bool(terminal[last, n]),
            )
        return paid

    def _segment_ends(self, opening: Float32[np.ndarray, "L"]) -> Int64[np.ndarray, "S"]:
        cuts = gripper_cuts(opening, gripper_change=self.config.gripper_change, min_segment=self.config.min_segment)
        return np.append(cuts - 1, len(opening) - 1)
