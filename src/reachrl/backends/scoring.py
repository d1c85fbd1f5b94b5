"""Scores the decisions of a rollout by the weights about to be trained, a block of them in each process."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from reachrl.algorithms.base import rows_to_score
from reachrl.backends.group import Group
from reachrl.config.algorithm import AlgorithmSection
from reachrl.policies.base import Evaluation, Policy, PolicyInputs
from reachrl.types import Observation, Rollout, Scored


class Scorer:
    """Scores rollouts, and keeps the vision features of the last one for the update.

    Args:
        policy: what is trained.
        config: the `algorithm` section.
        group: who shares the work; each process calls the same methods with the same rollouts.
        temperature: of the sampling distribution.
    """

    def __init__(self, policy: Policy, config: AlgorithmSection, group: Group, *, temperature: float) -> None:
        self.policy, self.config, self.group, self.temperature = policy, config, group, temperature
        self._scored = np.zeros(0, np.int64)  # rows of the last rollout that were scored, ascending
        self._inputs: PolicyInputs | None = None  # of its block of the last scored rollout, vision features cached

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Scored:
        """Old log-probs and values of every decision, values of the frames that follow.

        Features of frozen towers are kept for the update: the rollout's if it holds them, or else computed here.
        """
        self.release()  # the last iteration's go before this one's come
        steps, envs = rollout.valid.shape
        with_values = self.config.needs.values
        self._scored = rows_to_score(rollout, all_rows=with_values)
        flat, seen = rollout.decisions(), self._seen(rollout)
        if len(self._scored) < len(flat):  # all of them need no copy
            flat = flat.rows(self._scored)
            seen = None if seen is None else seen.rows(torch.from_numpy(self._scored))
        ids, mask = (
            torch.from_numpy(each.reshape(steps * envs, -1)[self._scored])
            for each in (rollout.token_ids, rollout.token_mask)
        )
        logprobs, values, cached = [], [], []
        block = self.group.block(len(ids))
        batch = self.config.score_batch_size
        for first in range(block.start, block.stop, batch):
            rows = slice(first, min(first + batch, block.stop))
            inputs = self._encode(flat, rows) if seen is None else seen.rows(torch.arange(len(ids))[rows])
            out = self._evaluate(inputs, ids[rows], mask[rows])
            logprobs.append(out.logprobs.float().cpu().where(mask[rows], 0))
            if out.values is not None:
                values.append(out.values.float().cpu())
            cached.append(inputs)
        self._dummy_passes(flat, ids, mask, block, made=len(cached))
        if not self.config.train_vision:
            self._inputs = type(cached[0]).concat(cached) if seen is None else seen
        scored = np.zeros((steps * envs, ids.shape[1]), dtype=np.float32)
        scored[self._scored] = self.group.gather(torch.cat(logprobs)).numpy()
        logprobs_of_all = scored.reshape(steps, envs, -1)
        if not with_values:
            return Scored(old_logprobs=logprobs_of_all, values=None, final_values=None)
        last = self._values(rollout.last_observation)
        finals = np.zeros((steps, envs), dtype=np.float32)
        if len(rollout.final_rows):
            t, n = rollout.final_rows.T
            finals[t, n] = self._values(rollout.final_observation)
        return Scored(
            old_logprobs=logprobs_of_all,
            values=np.concatenate([self.group.gather(torch.cat(values)).reshape(steps, envs).numpy(), last[None]]),
            final_values=finals,
        )

    def own(self, rows: Tensor) -> Tensor | None:
        """Which rows of the rollout are in this process's block, bool[B]; None: all, where there is one process."""
        if self.group.alone:
            return None
        block, places = self.group.block(len(self._scored)), self._places(rows)
        return (places >= block.start) & (places < block.stop)

    def inputs(self, rollout: Rollout, keep: Tensor) -> Callable[[Tensor], PolicyInputs]:
        """What gives the model-ready rows of the rows `keep` of the rollout: cached ones, or encoded when called."""
        cached = self._inputs
        if cached is not None:
            first, places = self.group.block(len(self._scored)).start, self._places(keep)
            last = len(cached) - 1
            # A row of another process's block only stands in for none: see `PolicyGradient._scores`.
            return lambda rows: cached.rows((places[rows] - first).clamp(0, last))
        flat = rollout.decisions()
        return lambda rows: self.policy.encode(flat.rows(keep[rows].numpy()))

    def release(self) -> None:
        """Release the cached rows."""
        self._inputs = None

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

    def _seen(self, rollout: Rollout) -> PolicyInputs | None:
        """The inputs that the rollout holds, in the order of `decisions()`; None where they are of no use."""
        if rollout.inputs is None or self.config.train_vision or not self.group.alone:
            return None
        return type(rollout.inputs[0]).concat(rollout.inputs)

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
