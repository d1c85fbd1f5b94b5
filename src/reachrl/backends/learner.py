"""The learner of one process: scores rollouts and updates the policy, alone or together with others."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reachrl.algorithms.base import engine_kl, new_algorithm
from reachrl.backends import sharding
from reachrl.backends.base import Pending, SharedWeights
from reachrl.backends.group import Group
from reachrl.backends.scoring import Scorer
from reachrl.backends.weights import PackedWeights, acting_parameters, learner_answer, pack
from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.train import TrainConfig
from reachrl.envs.base import Shown
from reachrl.policies.base import Policy
from reachrl.rollout.action_figures import action_figures
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import read_state
from reachrl.run.optimizer_state import read_optimizer, save_optimizer
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Rewards, Rollout, Scored


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
        self._shown: Shown | None = None
        self._log = SpanLog("learner")
        self._read_state: dict[str, Any] | None = None  # of a checkpoint, until it is shared
        self._scorer = Scorer(policy, config, self.group, temperature=temperature)

    def lead(self, shown: Shown | None = None) -> None:
        """Give the followers, if there are any, this process's weights; from here on they repeat its calls.

        Args:
            shown: what the environments show, where `export_weights` is to pack weights of a sharded group.
        """
        self._shown = shown
        if self.group.leads:
            self.share()

    def _tell(self, name: str, **arguments: Any) -> None:
        """Let the followers make the same call, if this process leads."""
        if self.group.leads:
            self.group.send((name, arguments))

    def export_weights(self) -> SharedWeights | PackedWeights:
        """The policy of this process or, in a sharded group, the gathered weights, packed."""
        if not self.group.sharded:
            return SharedWeights(self.version, self.policy)
        assert self._shown is not None
        return self.pack_weights(shown=self._shown)

    def pack_weights(self, *, shown: Shown) -> PackedWeights:
        """The current version to be sent; a collective of a sharded group.

        Args:
            shown: what the environments show: the shape of the fixed batch that checks the transfer.
        """
        if self.group.sharded:
            self._tell("pack_weights", shown=shown)
        with self._log.span("pack weights"):
            acting = acting_parameters(self.policy, train_vision=self.config.train_vision)
            buckets = pack(sharding.whole_tensors(acting), keep=self.group.rank == 0)
            answer = learner_answer(self.policy, seed=self.seed, shown=shown, temperature=self.temperature)
        return PackedWeights(self.version, buckets, *answer)

    def score(self, rollout: Rollout, *, number: int | None = None) -> Pending[Scored]:
        """`score_now` in all processes.

        Args:
            rollout: what was collected.
            number: under which the followers were offered the rollout; None sends it to them.
        """
        self._tell("score_now", rollout=rollout if number is None else number)
        return Pending.done(self.score_now(rollout))

    def score_now(self, rollout: Rollout) -> Scored:
        """Old log-probs and values of every decision, values of the frames that follow."""
        began = time.time()
        sharding.move_state(self.algorithm.optimizer, self.policy.device)  # back, if it was handed over
        scored = self._scorer.score(rollout)
        self._log.add("score", began)
        return scored

    def update(self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int) -> dict[str, float]:
        """The algorithm's batch, then its optimiser steps.

        Beside its figures, `engine_kl` is KL(sampler || learner) of the valid decisions before the update, in nats per
        action token; `actions/...` say how large the actions were.
        """
        self._tell("update", rewards=rewards, scored=scored, iteration=iteration)  # they have the rollout
        began = time.time()
        self._meet(rollout)
        batch = self.algorithm.batch(rollout, rewards, scored)
        batch = replace(batch, inputs=self._scorer.inputs(rollout, batch.rows), own=self._scorer.own(batch.rows))
        stats = self.algorithm.update(batch, iteration=iteration) | {"engine_kl": engine_kl(rollout, scored)}
        stats |= action_figures(rollout, self.policy)
        self.version += 1
        self._scorer.release()  # before the next rollout's features come
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
        """Write `policy/`, `optimizer.safetensors` and `algorithm.json`; a collective of a sharded group.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        if self.group.sharded:
            self._tell("save", folder=folder)
        self._save_policy(folder / "policy")
        leads = self.group.rank == 0
        state = None
        if self.group.sharded:
            state = sharding.whole_optimizer_state(self.algorithm.optimizer, keep=leads)
        if leads:
            save_optimizer(self.algorithm.optimizer, folder / "optimizer.safetensors", state)
            write_json_atomic(folder / "algorithm.json", self.algorithm.state_dict())

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone; a collective of a sharded group."""
        if self.group.sharded:
            self._tell("save_policy", folder=folder)
        self._save_policy(folder)

    @torch.no_grad()
    def _save_policy(self, folder: Path) -> None:
        if self.group.sharded:
            places = {} if self._whole is None else dict(self._whole.named_parameters())
            for name, tensor in sharding.whole_tensors(self.policy.named_parameters()):
                if places:
                    places[name].copy_(tensor)
        if self.group.rank == 0:
            (self._whole or self.policy).save_pretrained(folder)

    def load(self, folder: Path, *, version: int) -> None:
        """Read what `save` wrote into the objects in use, and share it with the followers.

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
        if self.group.leads:
            self.share()

    def share(self) -> None:
        """Broadcast the leader's weights and optimiser state to the group."""
        self._tell("share")
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
        self._tell("hand_over")
        self._scorer.release()
        self.algorithm.optimizer.zero_grad(set_to_none=True)
        sharding.move_state(self.algorithm.optimizer, "cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the followers."""
        if self.group.leads:
            self.group.dismiss()


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
