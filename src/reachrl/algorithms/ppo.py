"""PPO: epochs over minibatches, exact gradient accumulation, KL stop, critic-only warm-up."""

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reachrl.algorithms.base import Group, PPOBatch, UpdateStats
from reachrl.config.ppo import PPOConfig
from reachrl.errors import DivergedError
from reachrl.functional.ppo import importance_weights, policy_loss, value_loss
from reachrl.functional.stats import explained_variance
from reachrl.policies.base import Policy
from reachrl.streams import Stream, generator

# How far the very first ratio may be from 1: rounding in another batch shape, nothing more.
FIRST_RATIO_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.3, torch.float16: 0.1}

_FIGURES = ("policy_loss", "entropy", "approx_kl", "clip_frac", "value_loss")  # means over rows; ratio_max beside them


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
        if not config.train_vision:
            policy.freeze(["vision"])
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._policy_parameters, "lr": config.lr},
                {"params": self._value_parameters, "lr": config.value_lr},
            ],
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )

    def update(self, batch: PPOBatch, *, iteration: int, train_policy: bool) -> UpdateStats:
        """Train on one iteration's batch.

        Args:
            batch: the iteration's decisions.
            iteration: number of the iteration (shuffling and learning-rate warm-up).
            train_policy: false during critic warm-up.

        Raises:
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
        """
        lr = self._set_lr(iteration)
        advantages = self._normalized(batch.advantages)
        self._train_only_critic(not train_policy)
        sums: dict[str, float] = defaultdict(float)
        policy_steps = value_steps = 0
        stopped = False
        for epoch in range(self.config.epochs):
            for rows in self._minibatches(len(advantages), iteration, epoch):
                stats = self._backward(batch, advantages, rows, train_policy=train_policy and not stopped)
                if train_policy and policy_steps == 0 and not stopped:
                    self._check_first_ratio(stats["ratio_max"])
                target = self.config.target_kl
                if train_policy and not stopped and target is not None and stats["approx_kl"] > target:
                    stopped = True  # what is left of the epoch trains the critic alone
                    self._train_only_critic(True)
                    self.optimizer.zero_grad(set_to_none=True)
                    sums["approx_kl_last"] = stats["approx_kl"]
                    continue
                norms = self._step(train_policy=train_policy and not stopped)
                value_steps += 1
                sums["value_loss"] += stats["value_loss"]
                sums["value_grad_norm"] += norms[1]
                if train_policy and not stopped:
                    policy_steps += 1
                    sums["grad_norm"] += norms[0]
                    sums["approx_kl_last"] = stats["approx_kl"]
                    for name in ("policy_loss", "entropy", "clip_frac"):
                        sums[name] += stats[name]
            if stopped:
                break
        self._train_only_critic(False)
        return self._summary(batch, sums, policy_steps, value_steps, lr)

    def _set_lr(self, iteration: int) -> float:
        ramp = self.config.lr_warmup_iterations
        first = self.config.warmup_iterations
        factor = min(1.0, (max(iteration - first, 0) + 1) / (ramp + 1)) if ramp else 1.0
        self.optimizer.param_groups[0]["lr"] = self.config.lr * factor
        return self.config.lr * factor

    def _normalized(self, advantages: Tensor) -> Tensor:
        # Over the whole batch of the iteration: per micro-batch would make memory settings part of the algorithm.
        if not self.config.normalize_advantages or len(advantages) < 2:
            return advantages
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def _minibatches(self, num_rows: int, iteration: int, epoch: int) -> list[Tensor]:
        order = generator(self.seed, Stream.MINIBATCHES, iteration, epoch).permutation(num_rows)
        return list(torch.from_numpy(order).split(self.config.minibatch_size))

    def _train_only_critic(self, only: bool) -> None:
        for parameter in self._policy_parameters:
            parameter.requires_grad_(not only)

    def _backward(self, batch: PPOBatch, advantages: Tensor, rows: Tensor, *, train_policy: bool) -> dict[str, float]:
        """Accumulate the minibatch's mean-loss gradient over micro-batches; returns row means."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        mine = rows if batch.own is None else rows[batch.own[rows]]
        micros = mine.split(config.micro_batch_size) if len(mine) else ()
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
                sums["approx_kl"] += share * ratio_stats["approx_kl"].item()
                sums["clip_frac"] += share * ratio_stats["clip_frac"].item()
                sums["ratio_max"] = max(sums["ratio_max"], ratio_stats["ratio_max"].item())
            else:
                values = self.policy.values(inputs)
            error = value_loss(values, old_values, returns, kind=config.value_loss, clip=config.value_clip).mean()
            sums["value_loss"] += share * error.item()
            ((loss + config.value_coef * error) * (share * scale)).backward()
        for _ in range(idle):
            self._pass_for_nothing(batch, rows[:1], train_policy=train_policy)
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

    def _pass_for_nothing(self, batch: PPOBatch, row: Tensor, *, train_policy: bool) -> None:
        """Keep the others company: weights are gathered and gradients of zero are summed."""
        inputs = batch.inputs(row)
        if train_policy:
            ids = batch.action_ids[row].to(self.policy.device)
            out = self.policy.evaluate(inputs, ids, temperature=self.config.temperature)
            total = out.logprobs.sum() + out.entropy.sum() + out.values.sum()
        else:
            total = self.policy.values(inputs).sum()
        (total * 0).backward()

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """The figures of the whole minibatch; its gradient is put into the parameters."""
        if self.group is None:
            return dict(sums)
        if not self.group.sharded:
            self._sum_gradients(self.group)
        figures = torch.tensor([sums[name] for name in _FIGURES], dtype=torch.float64)
        greatest = torch.tensor([sums["ratio_max"]], dtype=torch.float64)
        self.group.sum_([figures])
        self.group.max_(greatest)
        return dict(zip(_FIGURES, figures.tolist(), strict=True)) | {"ratio_max": greatest.item()}

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

    def _check_first_ratio(self, ratio_max: float) -> None:
        assert ratio_max < 1 + FIRST_RATIO_TOLERANCE[self.policy.compute_dtype], (
            f"the first minibatch's ratio is {ratio_max:.4f}, not 1: old log-probs were scored by other weights, "
            "another temperature or other inputs"
        )

    def _summary(
        self, batch: PPOBatch, sums: dict[str, float], policy_steps: int, value_steps: int, lr: float
    ) -> UpdateStats:
        def of_policy(name: str) -> float:
            return sums[name] / policy_steps if policy_steps else math.nan  # not looked at is not 0

        gap = (batch.old_logprobs - batch.behaviour_logprobs).sum(-1).double()
        return UpdateStats(
            policy_loss=of_policy("policy_loss"),
            value_loss=sums["value_loss"] / max(value_steps, 1),
            entropy=of_policy("entropy"),
            approx_kl=sums.get("approx_kl_last", math.nan),
            clip_frac=of_policy("clip_frac"),
            grad_norm=of_policy("grad_norm"),
            value_grad_norm=sums["value_grad_norm"] / max(value_steps, 1),
            explained_variance=explained_variance(batch.old_values.numpy(), batch.returns.numpy()),
            engine_kl=float((gap.exp() - 1 - gap).mean()),
            policy_steps=policy_steps,
            value_steps=value_steps,
            lr=lr,
        )
