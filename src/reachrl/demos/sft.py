"""Supervised fine-tuning: next-token loss of the action tokens, best weights by held-out loss, exact resumption."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.optim import AdamW

from reachrl.config.demos import SFTSection
from reachrl.demos.augment import augment
from reachrl.demos.schedule import batch_rows, learning_rate, total_steps
from reachrl.demos.sft_folder import SFTFolder, identity_of
from reachrl.demos.split import heldout_trajectories
from reachrl.demos.store import TrajectoryStore, Transitions
from reachrl.errors import ConfigError, DivergedError
from reachrl.fitting import adamw
from reachrl.functional.action_stats import ActionStats
from reachrl.functional.ppo import evened
from reachrl.policies.base import Policy
from reachrl.run.weight_change import ALARM, WeightSample
from reachrl.streams import Stream, generator, sequence
from reachrl.types import Observation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutScore:
    """The policy on trajectories it was not trained on."""

    loss: float  # mean negative log-likelihood of an action token, nats
    token_accuracy: float  # share of greedily decoded tokens equal to the expert's
    action_error: float  # mean |decoded - expert| in the environment's units


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTResult:
    """How the fine-tuning ended; the numbers are those of the weights kept."""

    best_step: int
    best_heldout_loss: float  # nan when nothing was held out: the last weights are kept
    token_accuracy: float
    action_error: float
    steps: int
    train_rows: int
    heldout_rows: int


def train_sft(
    policy: Policy,
    store_folder: Path,
    config: SFTSection,
    *,
    seed: int,
    folder: Path,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_start: Callable[[int, int], None] | None = None,
) -> SFTResult:
    """Fit the policy to the expert's action tokens; ends with the best held-out weights in `policy`.

    Writes `folder/policy/` (by `save_pretrained`) and, last of all, `folder/sft.json`. A training cut short goes on
    from its last checkpoint with the numbers it would have had; one that is finished is only loaded.

    Args:
        policy: what to train; its action statistics are set from the store.
        store_folder: a complete trajectory store.
        config: the options.
        seed: decides the held-out split, the order of the data and the augmentation.
        folder: where to write.
        on_step: called after each step with `kind`, `step`, `train_loss`, `lr`, `grad_norm`, and after an evaluation
            `changed_weights`, `heldout_loss`, `token_accuracy`, `action_error`. Steps since the last checkpoint
            come again on resumption.
        on_start: called once before the first step with the steps already done and the steps in all.

    Raises:
        ConfigError: the policy takes cameras or a state that the demonstrations do not hold.
        DivergedError: a loss or gradient is not finite; nothing is saved after the last good checkpoint.
        CheckpointError: `folder` holds a training with other options, or a damaged checkpoint.
        StorageError: the store is incomplete or damaged, or the disk is full.
    """
    store = TrajectoryStore(store_folder)
    policy.check_shown(store.meta["cameras"], store.meta["state_size"])
    stats = store.action_stats()
    policy.set_action_stats(stats.q01, stats.q99, stats.mask)
    training = _Training(policy, store, config, seed, Path(folder))
    if (result := training.finished()) is not None:
        return result
    training.resume()
    if on_start is not None:
        on_start(training.step, training.steps)
    while training.step < training.steps:
        record = training.train_step()
        if on_step is not None:
            on_step(record)
    return training.finish()


class _Training:
    """One fine-tuning: data in memory, optimiser, the best weights so far, checkpoints."""

    def __init__(self, policy: Policy, store: TrajectoryStore, config: SFTSection, seed: int, folder: Path) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.folder = SFTFolder(folder, identity_of(policy, store, config, seed), config)
        self.data: Transitions = store.load()
        policy.note_training(self.data.instructions, self.data.images)
        heldout = heldout_trajectories(self.data.starts, fraction=config.heldout_fraction, seed=seed)
        is_heldout = heldout[self.data.trajectory_ids]
        self.train_rows = np.flatnonzero(~is_heldout)
        rows = np.flatnonzero(is_heldout)
        chosen = generator(seed, Stream.SFT_HELDOUT).permutation(len(rows))[: config.heldout_rows]
        self.heldout_rows = rows[np.sort(chosen)]
        if len(self.train_rows) == 0:
            raise ConfigError(f"{store.folder}: no step to train on; collect at least one demonstration per task.")
        self.steps = total_steps(config, len(self.train_rows))
        if policy.state_size is not None and self.data.state is not None:
            states = ActionStats.of_actions(self.data.state)
            policy.set_state_stats(states.q01, states.q99, states.mask)
        with torch.no_grad():
            self.actions = self.data.chunks(policy.num_actions)
            self.token_ids, self.token_mask = (each.cpu() for each in policy.encode_actions(self.actions))
        self.optimizer = _optimizer(policy, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step = 0

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """One optimiser step, with the evaluation and the checkpoint due after it."""
        began = time.perf_counter()
        lr = learning_rate(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # For dropout, if the policy has any.
            torch.manual_seed(int(sequence(self.seed, Stream.SFT_DROPOUT, self.step).generate_state(1)[0]))
            loss, grad_norm = self._backward()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"sft step {self.step}: loss {loss}, gradient norm {grad_norm}; both must be finite. Nothing was saved "
                f"after the last checkpoint. Lower sft.lr (now {self.config.lr}) or raise sft.warmup_steps."
            )
        weights = WeightSample(self.parameters) if self._evaluates_after(self.step + 1) else None
        self.optimizer.step()
        self.step += 1
        record = {"kind": "sft", "step": self.step, "train_loss": loss, "lr": lr, "grad_norm": grad_norm}
        if weights is not None:
            record["changed_weights"] = weights.changed(self.optimizer)
            self._warn_of_lost_steps(record["changed_weights"], lr)
        record["seconds/step"] = time.perf_counter() - began
        if len(self.heldout_rows) and self._evaluates_after(self.step):
            record |= self._evaluate()
        if self.step % self.config.checkpoint_every == 0 and self.step < self.steps:
            self.folder.save_checkpoint(self.policy, self.optimizer, self.step)
        return record

    def _evaluates_after(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.steps

    def _warn_of_lost_steps(self, changed: float, lr: float) -> None:
        if changed < ALARM and lr > 0.1 * self.config.lr:  # at the end of the schedule steps may be that small
            logger.warning(
                "sft step %d changed %.0f %% of the weights that had a gradient; the rest was rounded away. Raise "
                "sft.lr, or hold the weights in float32", self.step, 100 * changed,
            )  # fmt: skip

    def _backward(self) -> tuple[float, float]:
        """Gradients of the mean loss over one minibatch, clipped; returns the loss and the norm before clipping."""
        self.policy.train()
        rows = batch_rows(self.train_rows, self.step, self.config.batch_size, self.seed)
        rng = generator(self.seed, Stream.SFT_AUGMENTATION, self.step)
        images = {camera: augment(seen[rows], self.config, rng) for camera, seen in self.data.images.items()}
        observation = self._observation(rows, images)
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.micro_batch_size or len(rows)
        total = 0.0
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            inputs = self.policy.encode(observation.rows(part))
            targets, mask = self._targets(rows[part])
            # The mean over the tokens of the whole minibatch, whatever the size of the parts.
            logprobs = self.policy.evaluate(inputs, targets, mask).logprobs.where(mask, 0)
            loss = -logprobs.sum() / int(self.token_mask[rows].sum())
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        return total, norm.item()

    def _targets(self, rows: Int64[np.ndarray, "B"]) -> tuple[Tensor, Tensor]:
        return self.token_ids[rows].to(self.policy.device), self.token_mask[rows].to(self.policy.device)

    def _observation(self, rows: Int64[np.ndarray, "B"], images: dict[str, np.ndarray]) -> Observation:
        instructions = tuple(self.data.instructions[i] for i in self.data.instruction_ids[rows])
        state = None if self.data.state is None else self.data.state[rows]
        return Observation(images=images, instructions=instructions, state=state)

    # -- held-out evaluation --------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        score = self.score(self.heldout_rows)
        if not math.isfinite(score.loss):
            raise DivergedError(f"sft step {self.step}: held-out loss {score.loss} is not finite. Lower sft.lr.")
        if self.folder.best is None or score.loss < self.folder.best["loss"]:
            self.folder.save_best(self.policy, {"step": self.step, **asdict(score)})
        return {"heldout_loss": score.loss, "token_accuracy": score.token_accuracy, "action_error": score.action_error}

    @torch.no_grad()
    def score(self, rows: Int64[np.ndarray, "R"]) -> HeldoutScore:
        """Score the policy on given rows, frames as they are."""
        self.policy.eval()
        size = self.config.micro_batch_size or self.config.batch_size
        nll, right, error = 0.0, 0.0, 0.0
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            images = {camera: seen[part] for camera, seen in self.data.images.items()}
            inputs = self.policy.cache(self.policy.encode(self._observation(part, images)))  # asked twice
            targets, mask = self._targets(part)
            logprobs = self.policy.evaluate(inputs, targets, mask).logprobs.double()
            nll -= evened(logprobs, mask).mean(dim=1).sum().item()
            greedy = self.policy.act(inputs)
            right += evened((greedy.token_ids == targets).double(), mask).mean(dim=1).sum().item()
            differences = np.abs(self.policy.actions(greedy) - self.actions[part])
            error += float(differences.reshape(len(part), -1).mean(axis=1).sum())
        count = len(rows)
        return HeldoutScore(loss=nll / count, token_accuracy=right / count, action_error=error / count)

    # -- on disk --------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from `checkpoint/` if there is one."""
        self.step = self.folder.resume(self.policy, self.optimizer)
        if self.step:
            logger.info("sft: resumed at step %d of %d", self.step, self.steps)

    def finished(self) -> SFTResult | None:
        """The result of a training that had ended, its weights loaded; None when there is still work to do."""
        result = self.folder.result(self.policy)
        if result is None:
            return None
        loss = result["best_heldout_loss"]
        return SFTResult(**{**result, "best_heldout_loss": math.nan if loss is None else loss})

    def finish(self) -> SFTResult:
        """Put the best weights into the policy, save it, and drop the checkpoints."""
        if (best := self.folder.best) is not None:
            self.folder.restore_best(self.policy)
        else:
            score = self.score(self.train_rows[: self.config.heldout_rows])
            best = {"step": self.step, **asdict(score), "loss": math.nan}
        result = SFTResult(
            best_step=best["step"],
            best_heldout_loss=best["loss"],
            token_accuracy=best["token_accuracy"],
            action_error=best["action_error"],
            steps=self.steps,
            train_rows=len(self.train_rows),
            heldout_rows=len(self.heldout_rows),
        )
        self.folder.finish(self.policy, asdict(result))
        return result


def _optimizer(policy: Policy, config: SFTSection) -> AdamW:
    """AdamW over everything but the value head, which no action token's loss reaches."""
    groups = policy.parameter_groups()
    parameters = [p for role in ("vision", "trunk") for p in groups.get(role, []) if p.requires_grad]
    return adamw(parameters, lr=config.lr, weight_decay=config.weight_decay, model=type(policy).__name__)
