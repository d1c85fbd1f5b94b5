"""The learner of one process: scores rollouts and updates the policy, alone or together with others."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from reachrl.algorithms.base import PPOBatch, UpdateStats
from reachrl.algorithms.ppo import PPO
from reachrl.backends import sharding
from reachrl.backends.base import Done, Pending, SharedWeights
from reachrl.backends.group import Group
from reachrl.backends.weights import PackedWeights, acting_parameters, learner_answer, pack
from reachrl.config.ppo import PPOConfig
from reachrl.errors import ExtensionError
from reachrl.functional.gae import gae
from reachrl.policies.base import Policy, PolicyInputs
from reachrl.registry import build
from reachrl.run.optimizer_state import read_optimizer, save_optimizer
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Observation, Rewards, Rollout, Scored


class LocalLearner:
    """Scores rollouts and updates the policy in place, alone or with a block of each rollout for every process.

    Args:
        policy: what is trained.
        config: the `ppo` section.
        seed: of the shuffles.
        group: who shares the work; each process calls the same methods with the same rollouts.
        whole: where the group is sharded, the leader's second copy of the policy, in one piece: what is saved and
            loaded. `policy` is split here and takes the leader's weights with the first `share`.

    Raises:
        ExtensionError: an algorithm of another kind that is no `PPO`.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig,
        *,
        seed: int,
        group: Group | None = None,
        whole: Policy | None = None,
    ) -> None:
        self.policy, self.config, self.group = policy, config, group or Group()
        self.seed, self._whole = seed, whole
        if self.group.sharded:
            sharding.shard(policy, self.group)
        self.algorithm: PPO = build("algorithms", config, policy, seed=seed)
        if not isinstance(self.algorithm, PPO):
            raise ExtensionError(
                f"ppo.kind={config.kind}: {type(self.algorithm).__name__} is no subclass of "
                "reachrl.algorithms.ppo.PPO, whose optimiser the learner saves; derive it"
            )
        if not self.group.alone:
            self.algorithm.group = self.group
        self.version = 0
        self._log = SpanLog("learner")
        self._read_state: dict[str, Any] | None = None  # of a checkpoint, until it is shared
        self._inputs: PolicyInputs | None = None  # of its block of the last scored rollout, vision features cached

    def export_weights(self) -> SharedWeights:
        """The current version of the shared policy."""
        return SharedWeights(self.version, self.policy)

    def pack_weights(self, *, image_size: int) -> PackedWeights:
        """The current version to be sent; every process of a sharded group must call it.

        Args:
            image_size: side of the frames of the fixed batch that checks the transfer.
        """
        with self._log.span("pack weights"):
            acting = acting_parameters(self.policy, train_vision=self.config.train_vision)
            buckets = pack(sharding.whole_tensors(acting), keep=self.group.rank == 0)
            ids, logprobs = learner_answer(
                self.policy, seed=self.seed, image_size=image_size, temperature=self.config.temperature
            )
        return PackedWeights(self.version, buckets, ids, logprobs)

    def score(self, rollout: Rollout) -> Pending[Scored]:
        """Old log-probs and values of every decision, values of the frames that follow."""
        return Done(self.score_now(rollout))

    @torch.no_grad()
    def score_now(self, rollout: Rollout) -> Scored:
        """Old log-probs and values of every decision, values of the frames that follow.

        Vision features are computed once here and kept for the update while the towers are frozen.
        """
        began = time.time()
        self._move_optimizer(self.policy.device)  # back, if it was handed over
        self._inputs = None  # the last iteration's features go before this one's come
        steps, envs = rollout.valid.shape
        flat = Observation(
            images=rollout.images.reshape(-1, *rollout.images.shape[2:]),
            instructions=tuple(text for row in rollout.instructions for text in row),
        )
        ids = torch.from_numpy(rollout.action_ids).reshape(steps * envs, -1)
        logprobs, values, cached = [], [], []
        block = self.group.block(len(ids))
        batch = self.config.score_batch_size
        for first in range(block.start, block.stop, batch):
            rows = slice(first, min(first + batch, block.stop))
            inputs = self._encode(flat, rows)
            out = self.policy.evaluate(inputs, ids[rows].to(self.policy.device), temperature=self.config.temperature)
            logprobs.append(out.logprobs.float().cpu())
            values.append(out.values.float().cpu())
            cached.append(inputs)
        self._pass_with_the_others(flat, ids, block, made=len(cached))
        self._inputs = None if self.config.train_vision else type(cached[0]).concat(cached)
        last = self._values(rollout.last_observation)
        finals = np.zeros((steps, envs), dtype=np.float32)
        if len(rollout.final_rows):
            t, n = rollout.final_rows.T
            texts = tuple(rollout.instructions[i][j] for i, j in rollout.final_rows)
            finals[t, n] = self._values(Observation(images=rollout.final_images, instructions=texts))
        scored = Scored(
            old_logprobs=self.group.gather(torch.cat(logprobs)).reshape(steps, envs, -1).numpy(),
            values=np.concatenate([self.group.gather(torch.cat(values)).reshape(steps, envs).numpy(), last[None]]),
            final_values=finals,
        )
        self._log.add("score", began)
        return scored

    def update(
        self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int, train_policy: bool
    ) -> UpdateStats:
        """Advantages, then the algorithm's epochs over the valid decisions."""
        began = time.time()
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
        self._log.add("update", began)
        return stats

    def take_spans(self) -> list[Span]:
        """When was scored and when updated."""
        return self._log.take()

    def save(self, folder: Path) -> None:
        """Write `policy/` and `optimizer.safetensors`; every process of a sharded group must call it.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        self.save_policy(folder / "policy")
        leads = self.group.rank == 0
        state = None
        if self.group.sharded:
            state = sharding.whole_optimizer_state(self.algorithm.optimizer, keep=leads)
        if leads:
            save_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors", state)

    @torch.no_grad()
    def save_policy(self, folder: Path) -> None:
        """Write the policy alone; every process of a sharded group must call it."""
        if self.group.sharded:
            places = {} if self._whole is None else dict(self._whole.named_parameters())
            for name, tensor in sharding.whole_tensors(self.policy.named_parameters()):
                if places:
                    places[name].copy_(tensor)
        if self.group.rank == 0:
            (self._whole or self.policy).save_pretrained(folder)

    def load(self, folder: Path, *, version: int) -> None:
        """Read `policy/` and `optimizer.safetensors` into the objects in use; in a group the leader, then all `share`.

        Raises:
            CheckpointError: a file is missing, damaged or of another architecture.
        """
        self.version = version
        (self._whole or self.policy).restore(folder / "policy")
        state = read_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors")
        if self.group.sharded:
            self._read_state = state
        else:
            self.algorithm.optimizer.load_state_dict(state)

    def share(self) -> None:
        """Give everyone in the group the leader's weights and optimiser state; every process must call it."""
        optimizer, leads = self.algorithm.optimizer, self.group.rank == 0
        sharding.share_weights(self.policy, (self._whole or self.policy) if leads else None)
        state = (self._read_state or optimizer.state_dict()) if leads else None
        self._read_state = None
        sharding.share_optimizer_state(optimizer, state, self.group)

    def hand_over(self) -> None:
        """Give the accelerator's memory to whoever acts there, until the next rollout is scored.

        Cached features and gradients go, the optimiser's state moves to main memory (in pieces it stays: it is small).
        """
        self._inputs = None
        self.algorithm.optimizer.zero_grad(set_to_none=True)
        self._move_optimizer("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _move_optimizer(self, device: torch.device | str) -> None:
        for entries in self.algorithm.optimizer.state.values():
            for name, value in entries.items():
                if name != "step" and isinstance(value, Tensor) and not isinstance(value, DTensor):
                    entries[name] = value.to(device)

    def close(self) -> None:
        """There is nobody to end."""

    def _pass_with_the_others(self, flat: Observation, ids: Tensor, block: slice, *, made: int) -> None:
        """Where weights are split every process must make as many passes: whose block is smaller repeats a row."""
        if self.group.sharded:
            rows = slice(block.start, block.start + 1)
            for _ in range(self.group.passes(len(ids), self.config.score_batch_size) - made):
                inputs = self._encode(flat, rows)
                self.policy.evaluate(inputs, ids[rows].to(self.policy.device), temperature=self.config.temperature)

    def _encode(self, observation: Observation, rows: slice) -> PolicyInputs:
        part = Observation(images=observation.images[rows], instructions=observation.instructions[rows])
        inputs = self.policy.encode(part)
        return inputs if self.config.train_vision else self.policy.cache(inputs)

    def _values(self, observation: Observation) -> np.ndarray:
        count, batch = len(observation.images), self.config.score_batch_size
        parts = [
            self.policy.values(self._encode(observation, slice(first, first + batch)))
            for first in range(0, count, batch)
        ]
        return torch.cat(parts).float().cpu().numpy()

    def _rows(self, rollout: Rollout, keep: Tensor) -> Callable[[Tensor], PolicyInputs]:
        cached = self._inputs
        if cached is not None:
            first = self.group.block(rollout.valid.size).start
            last = len(cached) - 1
            # A row of another process's block only stands in for none: see `PPO._scores`.
            return lambda rows: cached.rows((keep[rows] - first).clamp(0, last))
        images = rollout.images.reshape(-1, *rollout.images.shape[2:])
        texts = [text for row in rollout.instructions for text in row]

        def encode(rows: Tensor) -> PolicyInputs:
            index = keep[rows].numpy()
            return self.policy.encode(Observation(images=images[index], instructions=tuple(texts[i] for i in index)))

        return encode
