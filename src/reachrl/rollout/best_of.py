"""Test-time search: of several sampled actions a decision, the one that ranks highest or their mean is carried out."""

import time
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Float64

from reachrl.envs.batch import EnvBatch
from reachrl.functional.action_stats import means_of
from reachrl.policies.base import ActionSample, Policy
from reachrl.rewards.process.base import RewardModel
from reachrl.rollout.acting import answer
from reachrl.rollout.episodes import EpisodePlayer
from reachrl.types import Observation, Start

Rank = Literal["logprob", "vote", "mean", "critic", "reward"]
RANKS: tuple[Rank, ...] = get_args(Rank)
LOOKS_AHEAD = ("critic", "reward")


class BestOfPlayer(EpisodePlayer):
    """Plays episodes with the best of `count` sampled actions in each decision.

    Candidate 0 has the noise of an ordinary evaluation and further ones have their own, so that the best of one is that
    evaluation and the candidates of a smaller `count` are among those of a larger one. Of equal candidates the first is
    taken.

    Args:
        policy: what acts.
        envs: where.
        temperature: of the sampling distribution.
        seed: of the noise.
        count: candidates a decision.
        rank: `logprob`: the likeliest. `vote`: the action nearest to all others (their medoid), which two candidates
            cannot outvote. `mean`: none of them, but their mean; it is recorded with the tokens of the nearest.
            `critic`: the highest value of the state that the action leads to, success counting as 1; values know the
            state alone, so a copy of the simulator is asked for it: an oracle look-ahead, which a robot does not have.
            `reward`: likewise, by the reward model's score of the frame that the action leads to.
        look_ahead: for `critic` and `reward`: `count` environments of their own.
        reward_model: for `reward`: one that looks at single frames.
    """

    def __init__(
        self,
        policy: Policy,
        envs: EnvBatch,
        *,
        temperature: float,
        seed: int,
        count: int,
        rank: Rank,
        look_ahead: EnvBatch | None = None,
        reward_model: RewardModel | None = None,
    ) -> None:
        super().__init__(policy, envs, mode="sampled", temperature=temperature, seed=seed)
        self.count, self.rank, self._look_ahead, self._reward_model = count, rank, look_ahead, reward_model
        self._taken: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]  # chunks of the running episodes
        self.seconds = 0.0
        """Spent on deciding so far."""
        self.decisions = 0
        """That were made in it."""

    @torch.no_grad()
    def _act(
        self, observation: Observation, current: Sequence[Start | None], decisions: Sequence[int]
    ) -> tuple[ActionSample, np.ndarray]:
        began = time.perf_counter()
        samples, actions = [], []
        inputs = self.policy.cache(self.policy.encode(observation))  # all candidates have seen the same
        for candidate in range(self.count):
            noise = self._noise(current, decisions, *([candidate] if candidate else []))
            sample, chosen = answer(self.policy, inputs, temperature=self.temperature, noise=noise, with_values=True)
            samples.append(sample)
            actions.append(chosen[:, : self._execute])
        for taken, made in zip(self._taken, decisions, strict=True):
            del taken[made:]  # a new episode has none
        offered = np.stack(actions, axis=1)  # [N candidates K D]
        scores = np.zeros((len(offered), self.count))
        if self.count > 1:
            scores = self._scores(samples, offered, current)
            scores[np.stack([sample.malformed.numpy() for sample in samples], axis=1)] = -np.inf
        best = scores.argmax(1)
        chosen = offered[np.arange(len(best)), best]
        if self.rank == "mean" and self.count > 1:
            chosen = means_of(offered, np.isfinite(scores))
        for n, action in enumerate(chosen):
            self._taken[n].append(action)
        self.seconds += time.perf_counter() - began
        self.decisions += sum(start is not None for start in current)
        return _picked(samples, torch.from_numpy(best)), chosen

    def _scores(
        self, samples: Sequence[ActionSample], offered: Float32[np.ndarray, "N C K D"], current: Sequence[Start | None]
    ) -> Float64[np.ndarray, "N C"]:
        if self.rank == "logprob":
            return np.stack([sample.logprobs.sum(-1).double().numpy() for sample in samples], axis=1)
        if self.rank == "vote":
            return -votes_against(offered)
        if self.rank == "mean":
            return -np.abs(offered - offered.mean(1, keepdims=True, dtype=np.float64)).sum((2, 3))
        return np.stack(
            [
                np.zeros(self.count) if start is None else self._worth_after(start, self._taken[n], offered[n])
                for n, start in enumerate(current)
            ]
        )

    @torch.no_grad()
    def _worth_after(
        self, start: Start, taken: Sequence[np.ndarray], candidates: Float32[np.ndarray, "C K D"]
    ) -> Float64[np.ndarray, "C"]:
        """What the state that each candidate leads to is worth: 1 for success; a value is 0 at the time limit."""
        envs = self._look_ahead
        assert envs is not None and envs.num_envs == self.count
        history = np.array(taken, np.float32).reshape(-1, candidates.shape[-1])
        envs.replay([start] * self.count, [history] * self.count)
        step = envs.step(candidates, [start] * self.count)
        seen = step.observation
        if self.rank == "critic":
            worth = self.policy.values(self.policy.encode(seen)).double().cpu().numpy()
            worth = np.where(step.terminated | step.truncated, 0.0, worth)
        else:
            assert self._reward_model is not None, "ranked by a reward model"
            scores = self._reward_model.score(seen.frames, seen.instructions, batch_size=self.count)
            worth = scores.astype(np.float64)
        return np.where(step.valid, np.where(step.success, 1.0, worth), -np.inf)


def votes_against(offered: Float32[np.ndarray, "N C K D"]) -> Float64[np.ndarray, "N C"]:
    """The mean distance (L1) of each candidate to the others of its row."""
    offered = offered.astype(np.float64)
    return np.abs(offered[:, :, None] - offered[:, None]).sum((2, 3, 4)) / max(1, offered.shape[1] - 1)


def _picked(samples: Sequence[ActionSample], best: torch.Tensor) -> ActionSample:
    """The chosen candidate of each row."""
    rows = torch.arange(len(best))

    def pick(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors)[best, rows]

    values = [sample.values for sample in samples if sample.values is not None]
    return ActionSample(
        token_ids=pick([sample.token_ids for sample in samples]),
        token_mask=pick([sample.token_mask for sample in samples]),
        logprobs=pick([sample.logprobs for sample in samples]),
        values=pick(values) if len(values) == len(samples) else None,
        malformed=pick([sample.malformed for sample in samples]),
    )
