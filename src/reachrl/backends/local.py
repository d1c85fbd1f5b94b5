"""Everything in one process: actors and learner share one policy object, environments are processes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reachrl.algorithms.base import PPOBatch, UpdateStats
from reachrl.algorithms.ppo import PPO
from reachrl.backends.base import Weights
from reachrl.backends.group import Group
from reachrl.config.ppo import PPOConfig
from reachrl.envs.vector import VectorEnv
from reachrl.functional.gae import gae
from reachrl.policies.base import Policy, PolicyInput
from reachrl.registry import build
from reachrl.rollout.collector import Collector
from reachrl.run.optimizer_state import load_optimizer, save_optimizer
from reachrl.types import Observation, Rewards, Rollout, Scored, Start

SCORE_ROWS = 256  # rows per no-gradient forward pass


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The learner's own policy object: nothing is copied in one process."""

    version: int
    policy: Policy


class LocalActors:
    """One policy, one set of environment processes."""

    def __init__(self, policy: Policy, envs: VectorEnv, *, seed: int, temperature: float) -> None:
        self.policy, self.envs = policy, envs
        self.collector = Collector(policy, envs, seed=seed, temperature=temperature)
        self._version = -1
        self._lost_before = 0  # by the processes that this one continues

    def load_weights(self, weights: Weights) -> int:
        """Note the version; the weights are already here."""
        shared = isinstance(weights, SharedWeights) and weights.policy is self.policy
        assert shared, "local actors share the learner's policy"
        self._version = weights.version
        return self._version

    def collect(
        self, assign: Callable[[], Start], num_steps: int, on_step: Callable[[], None] | None = None
    ) -> Rollout:
        """`num_steps` decisions in every environment."""
        return self.collector.collect(assign, num_steps, policy_version=self._version, on_step=on_step)

    @property
    def lost_episodes(self) -> int:
        """Episodes lost with a dead or stuck worker since the run began."""
        return self._lost_before + self.envs.lost_episodes

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, and how many were lost so far."""
        return {"lost_episodes": self.lost_episodes, "collector": self.collector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replay the running episodes."""
        self._lost_before = state["lost_episodes"]
        self.collector.load_state_dict(state["collector"])

    def close(self) -> None:
        """Stop the environment processes."""
        self.envs.close()


class LocalLearner:
    """Scores rollouts and updates the policy in place, alone or with a block of each rollout for every process.

    Args:
        policy: what is trained.
        config: the `ppo` section.
        seed: of the shuffles.
        group: who shares the work; each process calls the same methods with the same rollouts.
    """

    def __init__(self, policy: Policy, config: PPOConfig, *, seed: int, group: Group | None = None) -> None:
        self.policy, self.config, self.group = policy, config, group or Group()
        self.algorithm: PPO = build("algorithms", config, policy, seed=seed)
        if not self.group.alone:
            self.algorithm.group = self.group
        self.version = 0
        self._inputs: PolicyInput | None = None  # of its block of the last scored rollout, vision features cached

    def export_weights(self) -> SharedWeights:
        """The current version of the shared policy."""
        return SharedWeights(self.version, self.policy)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Scored:
        """Old log-probs and values of every decision, values of the frames that follow.

        Vision features are computed once here and kept for the update while the towers are frozen.
        """
        self._inputs = None  # the last iteration's features go before this one's come
        steps, envs = rollout.valid.shape
        flat = Observation(
            images=rollout.images.reshape(-1, *rollout.images.shape[2:]),
            instructions=tuple(text for row in rollout.instructions for text in row),
        )
        ids = torch.from_numpy(rollout.action_ids).reshape(steps * envs, -1)
        logprobs, values, cached = [], [], []
        block = self.group.block(len(ids))
        for first in range(block.start, block.stop, SCORE_ROWS):
            rows = slice(first, min(first + SCORE_ROWS, block.stop))
            inputs = self._encode(flat, rows)
            out = self.policy.evaluate(inputs, ids[rows].to(self.policy.device), temperature=self.config.temperature)
            logprobs.append(out.logprobs.float().cpu())
            values.append(out.values.float().cpu())
            cached.append(inputs)
        self._inputs = None if self.config.train_vision else _concatenate(cached)
        last = self._values(rollout.last_observation)
        finals = np.zeros((steps, envs), dtype=np.float32)
        if len(rollout.final_rows):
            t, n = rollout.final_rows.T
            texts = tuple(rollout.instructions[i][j] for i, j in rollout.final_rows)
            finals[t, n] = self._values(Observation(images=rollout.final_images, instructions=texts))
        return Scored(
            old_logprobs=self.group.gather(torch.cat(logprobs)).reshape(steps, envs, -1).numpy(),
            values=np.concatenate([self.group.gather(torch.cat(values)).reshape(steps, envs).numpy(), last[None]]),
            final_values=finals,
        )

    def update(
        self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int, train_policy: bool
    ) -> UpdateStats:
        """Advantages, then the algorithm's epochs over the valid decisions."""
        advantages, returns = gae(
            rewards.total,
            scored.values,
            scored.final_values,
            rollout.terminated,
            rollout.truncated,
            rollout.valid,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            bootstrap_truncated=self.config.bootstrap_truncated,
        )
        keep = torch.from_numpy(np.flatnonzero(rollout.valid))
        block = self.group.block(rollout.valid.size)

        def flat(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.reshape(rollout.valid.size, *array.shape[2:]))[keep]

        batch = PPOBatch(
            inputs=self._rows(rollout, keep),
            action_ids=flat(rollout.action_ids),
            behaviour_logprobs=flat(rollout.behaviour_logprobs),
            old_logprobs=flat(scored.old_logprobs),
            old_values=flat(scored.values[:-1]),
            advantages=flat(advantages),
            returns=flat(returns),
            own=None if self.group.alone else (keep >= block.start) & (keep < block.stop),
        )
        stats = self.algorithm.update(batch, iteration=iteration, train_policy=train_policy)
        self.version += 1
        return stats

    def save(self, folder: Path) -> None:
        """Write `policy/` and `optimizer.safetensors`."""
        self.policy.save_pretrained(folder / "policy")
        save_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        """Read `policy/` and `optimizer.safetensors` into the objects in use.

        Raises:
            CheckpointError: a file is missing, damaged or of another architecture.
        """
        self.policy.restore(folder / "policy")
        load_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors")

    def _encode(self, observation: Observation, rows: slice) -> PolicyInput:
        part = Observation(images=observation.images[rows], instructions=observation.instructions[rows])
        inputs = self.policy.encode(part)
        if self.config.train_vision:
            return inputs
        assert inputs.pixel_values is not None
        return PolicyInput(
            prompt_ids=inputs.prompt_ids,
            prompt_mask=inputs.prompt_mask,
            vision_features=self.policy.vision_features(inputs.pixel_values),
        )

    def _values(self, observation: Observation) -> np.ndarray:
        count = len(observation.images)
        parts = [
            self.policy.values(self._encode(observation, slice(first, first + SCORE_ROWS)))
            for first in range(0, count, SCORE_ROWS)
        ]
        return torch.cat(parts).float().cpu().numpy()

    def _rows(self, rollout: Rollout, keep: Tensor) -> Callable[[Tensor], PolicyInput]:
        cached = self._inputs
        if cached is not None:
            first = self.group.block(rollout.valid.size).start
            return lambda rows: cached.rows(keep[rows] - first)
        images = rollout.images.reshape(-1, *rollout.images.shape[2:])
        texts = [text for row in rollout.instructions for text in row]

        def encode(rows: Tensor) -> PolicyInput:
            index = keep[rows].numpy()
            return self.policy.encode(Observation(images=images[index], instructions=tuple(texts[i] for i in index)))

        return encode


def _concatenate(parts: list[PolicyInput]) -> PolicyInput:
    assert all(part.vision_features is not None for part in parts)
    # A long instruction lengthens its own part only; padding changes no answer.
    length = max(part.prompt_ids.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return functional.pad(tensor, (0, length - tensor.shape[1]))

    return PolicyInput(
        prompt_ids=torch.cat([padded(part.prompt_ids) for part in parts]),
        prompt_mask=torch.cat([padded(part.prompt_mask) for part in parts]),
        vision_features=torch.cat([part.vision_features for part in parts if part.vision_features is not None]),
    )
