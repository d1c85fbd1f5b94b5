"""The learner of one process: scores rollouts and updates the policy, alone or together with others."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reachrl.algorithms.base import Stats, engine_kl, new_algorithm, rows_to_score
from reachrl.backends import sharding
from reachrl.backends.base import Done, Pending, SharedWeights
from reachrl.backends.group import Group
from reachrl.backends.weights import PackedWeights, acting_parameters, learner_answer, pack
from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.train import TrainConfig
from reachrl.envs.base import Shown
from reachrl.policies.base import Evaluation, Policy, PolicyInputs
from reachrl.rollout.action_figures import action_figures
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import read_state
from reachrl.run.optimizer_state import read_optimizer, save_optimizer
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Observation, Rewards, Rollout, Scored


class LocalLearner:
    """Scores rollouts and updates the policy in place, alone or with a block of each rollout for every process.

    Args:
        policy: what is trained.
        config: the `algorithm` section.
        seed: of the shuffles.
        temperature: of the sampling distribution.
        group: who shares the work; each process calls the same methods with the same rollouts.
        whole: where the group is sharded, the leader's second copy of the policy, in one piece: what is saved and
            loaded. `policy` is split here and takes the leader's weights with the first `share`.

    Raises:
        ExtensionError: an algorithm that is no `Algorithm`.
    """

    def __init__(
        self,
        policy: Policy,
        config: AlgorithmSection,
        *,
        seed: int,
        temperature: float,
        group: Group | None = None,
        whole: Policy | None = None,
        num_iterations: int | None = None,
    ) -> None:
        self.policy, self.config, self.group = policy, config, group or Group()
        self.seed, self.temperature, self._whole = seed, temperature, whole
        if self.group.sharded:
            sharding.shard(policy, self.group)
        self.algorithm = new_algorithm(config, policy, seed=seed, temperature=temperature)
        if not self.group.alone:
            self.algorithm.group = self.group
        self.algorithm.num_iterations = num_iterations
        self.version = 0
        self._log = SpanLog("learner")
        self._read_state: dict[str, Any] | None = None  # of a checkpoint, until it is shared
        self._scored = np.zeros(0, np.int64)  # rows of the last rollout that were scored, ascending
        self._inputs: PolicyInputs | None = None  # of its block of the last scored rollout, vision features cached

    def export_weights(self) -> SharedWeights:
        """The current version of the shared policy."""
        return SharedWeights(self.version, self.policy)

    def pack_weights(self, *, shown: Shown) -> PackedWeights:
        """The current version to be sent; every process of a sharded group must call it.

        Args:
            shown: what the environments show: the shape of the fixed batch that checks the transfer.
        """
        with self._log.span("pack weights"):
            acting = acting_parameters(self.policy, train_vision=self.config.train_vision)
            buckets = pack(sharding.whole_tensors(acting), keep=self.group.rank == 0)
            answer = learner_answer(self.policy, seed=self.seed, shown=shown, temperature=self.temperature)
        return PackedWeights(self.version, buckets, *answer)

    def score(self, rollout: Rollout) -> Pending[Scored]:
        """Old log-probs and values of every decision, values of the frames that follow."""
        return Done(self.score_now(rollout))

    @torch.no_grad()
    def score_now(self, rollout: Rollout) -> Scored:
        """Old log-probs and values of every decision, values of the frames that follow.

        Vision features are computed once here and kept for the update while the towers are frozen.
        """
        began = time.time()
        sharding.move_state(self.algorithm.optimizer, self.policy.device)  # back, if it was handed over
        self._inputs = None  # the last iteration's features go before this one's come
        steps, envs = rollout.valid.shape
        with_values = self.config.needs.values
        self._scored = rows_to_score(rollout, all_rows=with_values)
        flat = rollout.decisions()
        if len(self._scored) < len(flat):  # all of them need no copy
            flat = flat.rows(self._scored)
        ids, mask = (
            torch.from_numpy(each.reshape(steps * envs, -1)[self._scored])
            for each in (rollout.token_ids, rollout.token_mask)
        )
        logprobs, values, cached = [], [], []
        block = self.group.block(len(ids))
        batch = self.config.score_batch_size
        for first in range(block.start, block.stop, batch):
            rows = slice(first, min(first + batch, block.stop))
            inputs = self._encode(flat, rows)
            out = self._evaluate(inputs, ids[rows], mask[rows])
            logprobs.append(out.logprobs.float().cpu().where(mask[rows], 0))
            if out.values is not None:
                values.append(out.values.float().cpu())
            cached.append(inputs)
        self._dummy_passes(flat, ids, mask, block, made=len(cached))
        self._inputs = None if self.config.train_vision else type(cached[0]).concat(cached)
        scored = np.zeros((steps * envs, ids.shape[1]), dtype=np.float32)
        scored[self._scored] = self.group.gather(torch.cat(logprobs)).numpy()
        logprobs_of_all = scored.reshape(steps, envs, -1)
        if not with_values:
            self._log.add("score", began)
            return Scored(old_logprobs=logprobs_of_all, values=None, final_values=None)
        last = self._values(rollout.last_observation)
        finals = np.zeros((steps, envs), dtype=np.float32)
        if len(rollout.final_rows):
            t, n = rollout.final_rows.T
            finals[t, n] = self._values(rollout.final_observation)
        scored = Scored(
            old_logprobs=logprobs_of_all,
            values=np.concatenate([self.group.gather(torch.cat(values)).reshape(steps, envs).numpy(), last[None]]),
            final_values=finals,
        )
        self._log.add("score", began)
        return scored

    def update(self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int) -> Stats:
        """The algorithm's batch, then its optimiser steps.

        Beside its figures, `engine_kl` is KL(sampler || learner) of the valid decisions before the update, in nats per
        action token; `actions/...` say how large the actions were.
        """
        began = time.time()
        self._meet(rollout)
        batch = self.algorithm.batch(rollout, rewards, scored)
        block = self.group.block(len(self._scored))
        places = self._places(batch.rows)
        batch = replace(
            batch,
            inputs=self._rows(rollout, batch.rows),
            own=None if self.group.alone else (places >= block.start) & (places < block.stop),
        )
        stats = self.algorithm.update(batch, iteration=iteration) | {"engine_kl": engine_kl(rollout, scored)}
        stats |= action_figures(rollout, self.policy)
        self.version += 1
        self._log.add("update", began)
        return stats

    def _meet(self, rollout: Rollout) -> None:
        """Note what the policy is about to be trained on, and warn of what is new to it."""
        policy = self._whole or self.policy
        if policy.trained_on is None or self.group.rank > 0:
            return
        instructions = {text for row in rollout.instructions for text in row}
        policy.warn_of_unfamiliar(instructions, rollout.images)
        policy.note_training(instructions, rollout.images)

    def take_spans(self) -> list[Span]:
        """When was scored and when updated."""
        return self._log.take()

    def save(self, folder: Path) -> None:
        """Write `policy/`, `optimizer.safetensors` and `algorithm.json`; every process of a sharded group must call it.

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
            write_json_atomic(folder / "algorithm.json", self.algorithm.state_dict())

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
        """Read what `save` wrote into the objects in use; in a group the leader, then all `share`.

        Raises:
            CheckpointError: a file is missing, damaged or of another architecture.
        """
        self.version = version
        (self._whole or self.policy).restore(folder / "policy")
        self.algorithm.load_state_dict(read_state(folder / "algorithm.json"))
        state = read_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors")
        if self.group.sharded:
            self._read_state = state
        else:
            self.algorithm.optimizer.load_state_dict(state)

    def share(self) -> None:
        """Broadcast the leader's weights and optimiser state to the group; every process must call it."""
        optimizer, leads = self.algorithm.optimizer, self.group.rank == 0
        sharding.share_weights(self.policy, (self._whole or self.policy) if leads else None)
        state = (self._read_state or optimizer.state_dict()) if leads else None
        self._read_state = None
        sharding.share_optimizer_state(optimizer, state, self.group)
        if not self.group.alone:
            self.algorithm.load_state_dict(self.group.agree(self.algorithm.state_dict()))

    def hand_over(self) -> None:
        """Release the accelerator's memory for the actor there, until the next rollout is scored.

        Cached features and gradients go, the optimiser's state moves to main memory (in pieces it stays: it is small).
        """
        self._inputs = None
        self.algorithm.optimizer.zero_grad(set_to_none=True)
        sharding.move_state(self.algorithm.optimizer, "cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing to close."""

    def _dummy_passes(self, flat: Observation, ids: Tensor, mask: Tensor, block: slice, *, made: int) -> None:
        """Repeat a row so that every process of a sharded group makes equally many passes (FSDP collectives match)."""
        if self.group.sharded:
            rows = slice(block.start, block.start + 1)
            for _ in range(self.group.passes(len(ids), self.config.score_batch_size) - made):
                inputs = self._encode(flat, rows)
                self._evaluate(inputs, ids[rows], mask[rows])

    def _evaluate(self, inputs: PolicyInputs, token_ids: Tensor, token_mask: Tensor) -> Evaluation:
        """Score given tokens, with values only if the algorithm needs them."""
        ids, mask = token_ids.to(self.policy.device), token_mask.to(self.policy.device)
        if self.config.needs.values:
            return self.policy.evaluate(inputs, ids, mask, temperature=self.temperature)
        return self.policy.evaluate(inputs, ids, mask, temperature=self.temperature, with_values=False)

    def _encode(self, observation: Observation, rows: slice) -> PolicyInputs:
        inputs = self.policy.encode(observation.rows(rows))
        return inputs if self.config.train_vision else self.policy.cache(inputs)

    def _values(self, observation: Observation) -> np.ndarray:
        count, batch = len(observation), self.config.score_batch_size
        parts = [
            self.policy.values(self._encode(observation, slice(first, first + batch)))
            for first in range(0, count, batch)
        ]
        return torch.cat(parts).float().cpu().numpy()

    def _places(self, rows: Tensor) -> Tensor:
        """Where rows of the rollout are among those that were scored."""
        return torch.from_numpy(np.searchsorted(self._scored, rows.numpy()))

    def _rows(self, rollout: Rollout, keep: Tensor) -> Callable[[Tensor], PolicyInputs]:
        cached = self._inputs
        if cached is not None:
            first, places = self.group.block(len(self._scored)).start, self._places(keep)
            last = len(cached) - 1
            # A row of another process's block only stands in for none: see `PolicyGradient._scores`.
            return lambda rows: cached.rows((places[rows] - first).clamp(0, last))
        flat = rollout.decisions()
        return lambda rows: self.policy.encode(flat.rows(keep[rows].numpy()))


def new_learner(config: TrainConfig, policy: Policy, group: Group, whole: Policy | None = None) -> LocalLearner:
    """The learner of a run, in this process; see `LocalLearner`."""
    temperature = config.rollout.temperature
    return LocalLearner(
        policy,
        config.algorithm,
        seed=config.seed,
        temperature=temperature,
        group=group,
        whole=whole,
        num_iterations=config.num_iterations,
    )
