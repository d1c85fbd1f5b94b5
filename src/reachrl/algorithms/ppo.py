"""PPO: epochs over minibatches, exact gradient accumulation, KL stop, critic-only warm-up."""

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reachrl.algorithms.base import Group, PPOBatch, UpdateStats
from reachrl.config.ppo import KL_ROWS, STOP_ROWS, PPOConfig
from reachrl.errors import DivergedError, ExtensionError
from reachrl.functional.ppo import importance_weights, policy_loss, token_kl, value_loss
from reachrl.functional.stats import explained_variance
from reachrl.policies.base import Policy
from reachrl.run.weight_change import WeightSample, check_float32
from reachrl.streams import Stream, generator

# How far the very first ratio or its inverse may be above 1: rounding in another batch shape, nothing more.
FIRST_RATIO_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.3, torch.float16: 0.1}

_FIGURES = ("policy_loss", "entropy", "clip_frac", "value_loss")  # means over rows; log_ratio_max beside them
_TRAINED = "iterations"  # in the policy's options of the optimiser, and so in checkpoints: how many trained the policy


class PPO:
    """Owns the optimiser; the policy is trained in place.

    Args:
        config: the `ppo` section.
        policy: what is trained.
        seed: of the minibatch shuffles; iteration and epoch are mixed in, so resume needs no RNG state.
    """

    Config = PPOConfig
    group: Group | None = None
    """The processes that share each minibatch; none: this one alone."""

    def __init__(self, config: PPOConfig, policy: Policy, *, seed: int) -> None:
        self.config, self.policy, self.seed = config, policy, seed
        groups = policy.parameter_groups()
        self._policy_parameters = groups["trunk"] + (groups["vision"] if config.train_vision else [])
        self._value_parameters = groups["value"]
        check_float32([*self._policy_parameters, *self._value_parameters], type(policy).__name__)
        if not config.train_vision:
            policy.freeze(["vision"])
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._policy_parameters, "lr": config.lr, _TRAINED: 0},
                {"params": self._value_parameters, "lr": config.value_lr},
            ],
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )

    def update(self, batch: PPOBatch, *, iteration: int, train_policy: bool) -> UpdateStats:
        """Train on one iteration's batch.

        Args:
            batch: the iteration's decisions; without any, nothing is trained.
            iteration: number of the iteration (shuffling).
            train_policy: false during critic warm-up.

        Raises:
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
            ExtensionError: the policy scores actions otherwise than a moment ago with the same weights.
        """
        lr = self._set_options(iteration)
        advantages = self._normalized(batch.advantages)
        self._train_only_critic(not train_policy)
        sums: dict[str, float] = defaultdict(float)
        weights, value_weights = WeightSample(self._policy_parameters), WeightSample(self._value_parameters)
        policy_steps = value_steps = unchecked = 0
        moving = train_policy
        for epoch in range(self.config.epochs):
            minibatches = self._minibatches(len(advantages), iteration, epoch)
            for number, rows in enumerate(minibatches, start=1):
                stats = self._backward(batch, advantages, rows, train_policy=moving)
                if moving and policy_steps == 0:
                    self._check_first_ratio(stats["log_ratio_max"])
                if moving:
                    weights.remember()
                value_weights.remember()
                norms = self._step(train_policy=moving)
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
            if train_policy and not moving:
                break
        self._train_only_critic(False)
        if policy_steps:
            self.optimizer.param_groups[0][_TRAINED] = self._trained_before(iteration) + 1
            sums["kl"] = self._kl_since(batch, iteration, KL_ROWS)
            sums["changed"] = weights.changed(self.optimizer)
        if value_steps:
            sums["value_changed"] = value_weights.changed(self.optimizer)
        return self._summary(batch, sums, policy_steps, value_steps, lr)

    def _went_too_far(self, batch: PPOBatch, iteration: int) -> bool:
        """Whether the steps so far have moved the policy by more than `target_kl`."""
        target = self.config.target_kl
        return target is not None and self._kl_since(batch, iteration, STOP_ROWS) > target

    def _trained_before(self, iteration: int) -> int:
        """How many iterations have trained the policy; of checkpoints that do not say, by the scheduled warm-up."""
        trained = self.optimizer.param_groups[0].get(_TRAINED)
        return max(iteration - self.config.warmup_iterations, 0) if trained is None else trained

    def _set_options(self, iteration: int) -> float:
        """Give the optimiser the configured options, whatever a checkpoint has it do; returns the policy's rate."""
        config = self.config
        factor = min(1.0, (self._trained_before(iteration) + 1) / (config.lr_warmup_iterations + 1))
        for group, lr in zip(self.optimizer.param_groups, (config.lr * factor, config.value_lr), strict=True):
            group |= {"lr": lr, "eps": config.adam_eps, "weight_decay": config.weight_decay}
        return config.lr * factor

    def _normalized(self, advantages: Tensor) -> Tensor:
        # Over the whole batch of the iteration: per micro-batch would make memory settings part of the algorithm.
        if not self.config.normalize_advantages or len(advantages) < 2:
            return advantages
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def _minibatches(self, num_rows: int, iteration: int, epoch: int) -> tuple[Tensor, ...]:
        order = generator(self.seed, Stream.MINIBATCHES, iteration, epoch).permutation(num_rows)
        return equal_parts(torch.from_numpy(order), self.config.minibatch_size)

    def _train_only_critic(self, only: bool) -> None:
        for parameter in self._policy_parameters:
            parameter.requires_grad_(not only)
            if only:
                parameter.grad = None

    def _backward(self, batch: PPOBatch, advantages: Tensor, rows: Tensor, *, train_policy: bool) -> dict[str, float]:
        """Accumulate the minibatch's mean-loss gradient over micro-batches; returns row means."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        mine = rows if batch.own is None else rows[batch.own[rows]]
        micros = equal_parts(mine, config.micro_batch_size)
        group = self.group
        scale = group.size if group is not None and group.sharded else 1  # from the mean over processes to their sum
        idle = self._passes_of_the_others(len(micros))
        for micro in micros:
            share = len(micro) / len(rows)
            inputs, device = batch.inputs(micro), self.policy.device
            returns, old_values = batch.returns[micro].to(device), batch.old_values[micro].to(device)
            loss = torch.zeros((), device=device)
            if train_policy:
                out = self.policy.evaluate(inputs, batch.action_ids[micro].to(device), temperature=config.temperature)
                values = out.values
                old_logprobs = batch.old_logprobs[micro].to(device)
                importance = None
                if config.importance_cap is not None:
                    behaviour = batch.behaviour_logprobs[micro].to(device)
                    importance = importance_weights(old_logprobs, behaviour, config.importance_cap)
                surrogate, ratio_stats = policy_loss(
                    out.logprobs,
                    old_logprobs,
                    advantages[micro].to(device),
                    clip_eps_low=config.clip_eps_low,
                    clip_eps_high=config.clip_eps_high,
                    ratio_level=config.ratio_level,
                    importance=importance,
                )
                loss = surrogate.mean() - config.entropy_coef * out.entropy.mean()
                sums["policy_loss"] += share * surrogate.mean().item()
                sums["entropy"] += share * out.entropy.mean().item()
                sums["clip_frac"] += share * ratio_stats["clip_frac"].item()
                sums["log_ratio_max"] = max(sums["log_ratio_max"], ratio_stats["log_ratio_max"].item())
            else:
                values = self.policy.values(inputs)
            error = value_loss(values, old_values, returns, kind=config.value_loss, clip=config.value_clip).mean()
            sums["value_loss"] += share * error.item()
            ((loss + config.value_coef * error) * (share * scale)).backward()
        for _ in range(idle):
            (self._scores(batch, rows[:1], with_policy=train_policy) * 0).backward()
        figures = self._over_processes(sums)
        if not all(np.isfinite(value) for value in figures.values()):
            raise DivergedError(
                f"a loss is not finite: {figures}. Weights were not changed by it; resume from the last "
                "checkpoint with a lower ppo.lr or ppo.value_lr."
            )
        return figures

    def _passes_of_the_others(self, own: int) -> int:
        """How many more passes some other process makes over this minibatch, where all must make as many."""
        if self.group is None or not self.group.sharded:
            return 0
        most = torch.tensor([own])
        self.group.max_(most)
        return int(most) - own

    def _scores(self, batch: PPOBatch, rows: Tensor, *, with_policy: bool) -> Tensor:
        """A sum over all outputs for `rows`: a pass that keeps FSDP's collectives in step on every process."""
        inputs = batch.inputs(rows)
        if not with_policy:
            return self.policy.values(inputs).sum()
        ids = batch.action_ids[rows].to(self.policy.device)
        out = self.policy.evaluate(inputs, ids, temperature=self.config.temperature)
        return out.logprobs.sum() + out.entropy.sum() + out.values.sum()

    @torch.no_grad()
    def _kl_since(self, batch: PPOBatch, iteration: int, most: int) -> float:
        """KL(old || current policy) in nats per token: the mean over the batch, or over `most` random rows of it."""
        order = generator(self.seed, Stream.KL_ROWS, iteration).permutation(len(batch.action_ids))
        rows = torch.from_numpy(order[:most])
        parts = equal_parts(rows if batch.own is None else rows[batch.own[rows]], self.config.score_batch_size)
        idle = self._passes_of_the_others(len(parts))
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            ids = batch.action_ids[part].to(self.policy.device)
            out = self.policy.evaluate(batch.inputs(part), ids, temperature=self.config.temperature)
            total += token_kl(out.logprobs.cpu().double(), batch.old_logprobs[part].double()).sum()
        for _ in range(idle):
            self._scores(batch, rows[:1], with_policy=True)
        if self.group is not None:
            self.group.sum_([total])
        return total.item() / len(rows)

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """The figures of the whole minibatch; its gradient is put into the parameters."""
        if self.group is None:
            return dict(sums)
        if not self.group.sharded:
            self._sum_gradients(self.group)
        figures = torch.tensor([sums[name] for name in _FIGURES], dtype=torch.float64)
        greatest = torch.tensor([sums["log_ratio_max"]], dtype=torch.float64)
        self.group.sum_([figures])
        self.group.max_(greatest)
        return dict(zip(_FIGURES, figures.tolist(), strict=True)) | {"log_ratio_max": greatest.item()}

    def _sum_gradients(self, group: Group) -> None:
        parameters = [parameter for options in self.optimizer.param_groups for parameter in options["params"]]
        reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        group.max_(reached)  # by some process: with few rows it need not be this one
        moved = [parameter for parameter, known in zip(parameters, reached.tolist(), strict=True) if known]
        for parameter in moved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        group.sum_([parameter.grad for parameter in moved if parameter.grad is not None])

    def _step(self, *, train_policy: bool) -> tuple[float, float]:
        norms = (
            self._clip(self._policy_parameters) if train_policy else 0.0,
            self._clip(self._value_parameters),
        )
        if not np.isfinite(norms).all():
            raise DivergedError(f"a gradient is not finite (norms {norms}); no step was taken. Lower ppo.lr.")
        self.optimizer.step()
        return norms

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _check_first_ratio(self, log_ratio_max: float) -> None:
        if log_ratio_max > math.log1p(FIRST_RATIO_TOLERANCE[self.policy.compute_dtype]):
            raise ExtensionError(
                f"the first minibatch has a probability ratio of {math.exp(log_ratio_max):.4f} or its inverse, "
                f"expected 1: {type(self.policy).__name__} gave the same actions other log-probs a moment ago with "
                "the same weights. Its `evaluate` must answer the same with and without gradients, in batches of any "
                "size, without chance (dropout); where only rounding is to blame, compute in float32"
            )

    def _summary(
        self, batch: PPOBatch, sums: dict[str, float], policy_steps: int, value_steps: int, lr: float
    ) -> UpdateStats:
        def mean(name: str, steps: int) -> float:
            return sums[name] / steps if steps else math.nan  # not looked at is not 0

        rows = len(batch.returns)
        variance = explained_variance(batch.old_values.numpy(), batch.returns.numpy()) if rows else math.nan
        return UpdateStats(
            policy_loss=mean("policy_loss", policy_steps),
            value_loss=mean("value_loss", value_steps),
            entropy=mean("entropy", policy_steps),
            kl=sums["kl"] if policy_steps else math.nan,
            clip_frac=mean("clip_frac", policy_steps),
            grad_norm=mean("grad_norm", policy_steps),
            value_grad_norm=mean("value_grad_norm", value_steps),
            changed_weights=mean("changed", min(policy_steps, 1)),
            value_changed_weights=mean("value_changed", min(value_steps, 1)),
            explained_variance=variance,
            engine_kl=token_kl(batch.old_logprobs.double(), batch.behaviour_logprobs.double()).mean().item(),
            policy_steps=policy_steps,
            value_steps=value_steps,
            lr=lr,
        )


def equal_parts(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Split rows into as few parts of at most `most` as it takes, with sizes that differ by one at most."""
    return rows.tensor_split(math.ceil(len(rows) / most)) if len(rows) else ()
