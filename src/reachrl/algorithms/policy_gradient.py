"""Clipped policy gradients: epochs over minibatches, exact gradient accumulation, KL stop; alone or on shared rows."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from reachrl.algorithms.base import Algorithm, Batch
from reachrl.algorithms.lr_groups import grouped_optimizer, schedule_factor
from reachrl.algorithms.minibatches import (
    check_first_ratio,
    check_losses,
    check_norms,
    chunk_slots,
    credited_mask,
    equal_parts,
    row_weights,
    summary,
    token_actions_of,
)
from reachrl.algorithms.shared_gradients import clip_gradients, idle_passes, reduced_figures, sum_gradients
from reachrl.config.algorithm import KL_ROWS, STOP_ROWS, PolicyGradientSection
from reachrl.functional.ppo import evened, policy_loss, token_kl
from reachrl.functional.schedules import entropy_bonus, kl_adapted
from reachrl.policies.base import Evaluation, Policy, PolicyInputs
from reachrl.run.weight_change import WeightSample, check_float32
from reachrl.streams import Stream, generator


class PolicyGradient(Algorithm):
    """Owns an AdamW optimiser of the policy's parameters, and of a critic's if its section needs values.

    A subclass makes the batch. One with a critic also overrides `_critic_loss` and `_value_learning_rates`, and may
    train the critic alone for an iteration (`_trains_policy`) or for more epochs (`_critic_epochs`).

    The seed is that of the minibatch shuffles.
    """

    Config: ClassVar[type[PolicyGradientSection]]
    config: PolicyGradientSection

    def __init__(self, config: PolicyGradientSection, policy: Policy, *, seed: int, temperature: float) -> None:
        super().__init__(config, policy, seed=seed, temperature=temperature)
        groups = policy.parameter_groups()
        self._policy_parameters = groups["trunk"] + (groups["vision"] if config.train_vision else [])
        self._value_parameters = groups["value"] if config.needs.values else []
        check_float32([*self._policy_parameters, *self._value_parameters], type(policy).__name__)
        if not config.train_vision:
            policy.freeze(["vision"])
        if not config.needs.values:
            policy.freeze(["value"])
        self._parts, self.optimizer = grouped_optimizer(config, policy, self._policy_parameters, self._value_parameters)
        self._trained = 0  # iterations that moved the policy
        self._kl_factor = 1.0  # of the learning rate, with `lr_schedule=kl`
        self._entropy_extra = 0.0  # what `entropy_floor` has added to `entropy_coef`
        self._token_actions = token_actions_of(config, policy)
        self._slots = chunk_slots(policy)

    def update(self, batch: Batch, *, iteration: int) -> dict[str, float]:
        """Train on one iteration's batch; without rows, nothing is trained.

        Raises:
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
            ExtensionError: the policy scores actions otherwise than a moment ago with the same weights.
        """
        lr = self._set_options(iteration)
        train_policy = self._trains_policy()
        self._train_only_critic(not train_policy)
        sums: dict[str, float] = defaultdict(float)
        weights, value_weights = WeightSample(self._policy_parameters), WeightSample(self._value_parameters)
        policy_steps = value_steps = unchecked = 0
        moving, critic = train_policy, bool(self._value_parameters)
        for epoch in range(max(self.config.epochs, self._critic_epochs or 0)):
            if moving and epoch == self.config.epochs:
                moving = False
                self._train_only_critic(True)
            minibatches = self._minibatches(len(batch.rows), iteration, epoch)
            for number, rows in enumerate(minibatches, start=1):
                if not (moving or critic):
                    break
                stats = self._backward(batch, rows, train_policy=moving)
                if moving and policy_steps == 0:
                    check_first_ratio(stats["log_ratio_max"], self.policy)
                if moving:
                    weights.remember()
                if critic:
                    value_weights.remember()
                norms = self._step(train_policy=moving)
                if critic:
                    value_steps += 1
                    sums["value_loss"] += stats["value_loss"]
                    sums["value_grad_norm"] += norms[1]
                if not moving:
                    continue
                policy_steps += 1
                sums["grad_norm"] += norms[0]
                for name in ("policy_loss", "entropy", "clip_frac"):
                    sums[name] += stats[name]
                unchecked += len(rows)
                ends_epoch = number == len(minibatches)
                if ends_epoch and epoch + 1 == self.config.epochs:
                    continue  # nothing is left to stop
                if unchecked >= STOP_ROWS or ends_epoch:
                    moving, unchecked = not self._went_too_far(batch, iteration), 0
                    self._train_only_critic(not moving)  # for what is left of the epoch
            if train_policy and not moving and self._critic_epochs is None:
                break
        self._train_only_critic(False)
        if policy_steps:
            self._trained += 1
            sums["kl"] = self._kl_since(batch, iteration, KL_ROWS)
            if self.config.lr_schedule == "kl":
                self._kl_factor = kl_adapted(self._kl_factor, sums["kl"], self.config.kl_to_aim_at)
            sums["changed"] = weights.changed(self.optimizer)
        if value_steps:
            sums["value_changed"] = value_weights.changed(self.optimizer)
        figures = summary(sums, policy_steps, value_steps, critic=bool(self._value_parameters)) | {"lr": lr}
        return figures | self._hold_entropy(figures["entropy"]) | (batch.stats or {})

    def state_dict(self) -> dict[str, Any]:
        """How many iterations moved the policy, and what its schedules have come to."""
        state: dict[str, Any] = {"trained": self._trained}
        if self.config.lr_schedule == "kl":
            state["kl_factor"] = self._kl_factor
        if self.config.entropy_floor is not None:
            state["entropy_extra"] = self._entropy_extra
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there; checkpoints of earlier versions have no schedules."""
        self._trained = int(state["trained"])
        self._kl_factor = float(state.get("kl_factor", 1.0))
        self._entropy_extra = 0.0 if self.config.entropy_floor is None else float(state.get("entropy_extra", 0.0))

    def _trains_policy(self) -> bool:
        """Whether this iteration moves the policy, not the critic alone."""
        return True

    def _critic_loss(self, values: Tensor, batch: Batch, rows: Tensor) -> tuple[Tensor, float]:
        """Mean loss of the values of `rows`, and its weight against the policy's; for subclasses with a critic."""
        raise NotImplementedError(
            f"{type(self).__name__} needs values, but has no loss for them: override _critic_loss"
        )

    @property
    def _critic_epochs(self) -> int | None:
        """Passes of the critic; None: it ends with the policy's."""
        return None

    def _value_learning_rates(self) -> Sequence[float]:
        """Of a critic's parameters, where there is one."""
        return ()

    def _hold_entropy(self, entropy: float) -> dict[str, float]:
        """Adapt the weight of the entropy bonus to `entropy_floor`; figures about it, none where it is off."""
        config, used = self.config, self._entropy_extra
        if config.entropy_floor is None:
            return {}
        self._entropy_extra = entropy_bonus(used, entropy, floor=config.entropy_floor, step=config.entropy_step)
        return {"entropy_coef": config.entropy_coef + used, "entropy_low": entropy < config.entropy_floor}

    def _went_too_far(self, batch: Batch, iteration: int) -> bool:
        """Whether the steps so far have moved the policy by more than `target_kl`."""
        target = self.config.target_kl
        return target is not None and self._kl_since(batch, iteration, STOP_ROWS) > target

    def _set_options(self, iteration: int) -> float:
        """Give the optimiser the configured options, whatever a checkpoint has it do; returns the policy's rate."""
        config = self.config
        factor = min(1.0, (self._trained + 1) / (config.lr_warmup_iterations + 1))
        factor *= schedule_factor(config, iteration, self.num_iterations, self._kl_factor)
        own = {"projector": config.projector_lr, "head": config.head_lr}
        rates = [(own.get(part) or config.lr) * factor for part in self._parts]
        rates += self._value_learning_rates()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group |= {"lr": lr, "eps": config.adam_eps, "weight_decay": config.weight_decay}
        return config.lr * factor

    def _minibatches(self, num_rows: int, iteration: int, epoch: int) -> tuple[Tensor, ...]:
        order = generator(self.seed, Stream.MINIBATCHES, iteration, epoch).permutation(num_rows)
        return equal_parts(torch.from_numpy(order), self.config.minibatch_size)

    def _train_only_critic(self, only: bool) -> None:
        for parameter in self._policy_parameters:
            parameter.requires_grad_(not only)
            if only:
                parameter.grad = None

    def _backward(self, batch: Batch, rows: Tensor, *, train_policy: bool) -> dict[str, float]:
        """Accumulate the minibatch's mean-loss gradient over micro-batches; returns row means."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        mine = rows if batch.own is None else rows[batch.own[rows]]
        micros = equal_parts(mine, self.config.micro_batch_size)
        group = self.group
        scale = group.size if group is not None and group.sharded else 1  # from the mean over processes to their sum
        idle = idle_passes(group, len(micros))
        for micro in micros:
            share = len(micro) / len(rows)
            inputs, device = batch.inputs(micro), self.policy.device
            loss = torch.zeros((), device=device)
            values: Tensor | None = None
            if train_policy:
                out = self._evaluate(inputs, batch, micro)
                values = out.values
                loss = self._policy_loss(out, batch, micro, share, sums)
            elif self._value_parameters:
                values = self.policy.values(inputs)
            if self._value_parameters:
                assert values is not None
                error, weight = self._critic_loss(values, batch, micro)
                sums["value_loss"] += share * error.item()
                loss = loss + weight * error
            (loss * (share * scale)).backward()
        for _ in range(idle):
            (self._scores(batch, rows[:1], with_policy=train_policy) * 0).backward()
        figures = self._over_processes(sums)
        check_losses(figures, critic=bool(self._value_parameters))
        return figures

    def _policy_loss(
        self, out: Evaluation, batch: Batch, micro: Tensor, share: float, sums: dict[str, float]
    ) -> Tensor:
        """Mean clipped surrogate of the rows, minus the entropy bonus; adds their figures to `sums`."""
        config, device = self.config, self.policy.device
        mask, old_logprobs = credited_mask(batch, micro, self._slots).to(device), batch.old_logprobs[micro].to(device)
        surrogate, ratio_stats = policy_loss(
            out.logprobs,
            old_logprobs,
            batch.advantages[micro].to(device),
            mask,
            clip_eps_low=config.clip_eps_low,
            clip_eps_high=config.clip_eps_high,
            ratio_level=config.ratio_level,
            token_actions=None if self._token_actions is None else self._token_actions.to(device),
            importance=row_weights(batch, micro, mask, config.importance_cap),
            dual_clip=config.dual_clip,
        )
        entropy = evened(out.entropy, batch.token_mask[micro].to(device)).mean()
        sums["policy_loss"] += share * surrogate.mean().item()
        sums["entropy"] += share * entropy.item()
        sums["clip_frac"] += share * ratio_stats["clip_frac"].item()
        sums["log_ratio_max"] = max(sums["log_ratio_max"], ratio_stats["log_ratio_max"].item())
        return surrogate.mean() - (config.entropy_coef + self._entropy_extra) * entropy

    def _evaluate(self, inputs: PolicyInputs, batch: Batch, rows: Tensor) -> Evaluation:
        """Score the tokens of `rows`, with values only where there is a critic."""
        ids, mask = (each[rows].to(self.policy.device) for each in (batch.token_ids, batch.token_mask))
        if self._value_parameters:
            return self.policy.evaluate(inputs, ids, mask, temperature=self.temperature)
        return self.policy.evaluate(inputs, ids, mask, temperature=self.temperature, with_values=False)

    def _scores(self, batch: Batch, rows: Tensor, *, with_policy: bool) -> Tensor:
        """Sum of all outputs for `rows`: run as an idle pass so that FSDP's collectives match on every process."""
        inputs = batch.inputs(rows)
        if not with_policy:
            return self.policy.values(inputs).sum()
        out = self._evaluate(inputs, batch, rows)
        total = out.logprobs.sum() + out.entropy.sum()
        return total if out.values is None else total + out.values.sum()

    @torch.no_grad()
    def _kl_since(self, batch: Batch, iteration: int, most: int) -> float:
        """KL(old || current policy) in nats per token: the mean over the batch, or over `most` random rows of it."""
        order = generator(self.seed, Stream.KL_ROWS, iteration).permutation(len(batch.token_ids))
        rows = torch.from_numpy(order[:most])
        parts = equal_parts(rows if batch.own is None else rows[batch.own[rows]], self.config.score_batch_size)
        idle = idle_passes(self.group, len(parts))
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            out = self._evaluate(batch.inputs(part), batch, part)
            old, mask = batch.old_logprobs[part].double(), batch.token_mask[part]
            total += token_kl(out.logprobs.cpu().double(), old, mask).sum()
        for _ in range(idle):
            self._scores(batch, rows[:1], with_policy=True)
        if self.group is not None:
            self.group.sum_([total])
        return total.item() / len(rows)

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of the whole minibatch; sums its gradient over the processes."""
        if self.group is None:
            return dict(sums)
        if not self.group.sharded:
            sum_gradients(self.group, [each for options in self.optimizer.param_groups for each in options["params"]])
        return reduced_figures(self.group, sums)

    def _step(self, *, train_policy: bool) -> tuple[float, float]:
        limit, critic = self.config.max_grad_norm, self._value_parameters
        norm = clip_gradients(self._policy_parameters, limit) if train_policy else 0.0
        norms = norm, clip_gradients(critic, limit) if critic else 0.0
        check_norms(norms)
        self.optimizer.step()
        return norms
