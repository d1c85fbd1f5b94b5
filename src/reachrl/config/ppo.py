"""Options of PPO: advantages, ratio and clip, epochs, critic warm-up."""

from typing import Annotated, Literal

from pydantic import Field

from reachrl.config.base import LARGEST_RATE, Section
from reachrl.config.marks import Affects

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=LARGEST_RATE)]
Unit = Annotated[float, Field(ge=0, le=1)]

# Measuring a KL costs a third of training on as many rows; its standard error is about 4 % of 512 rows, 8 % of 128.
KL_ROWS = 512  # random rows for the KL of the whole update
STOP_ROWS = 128  # random rows for each look whether to stop, which comes when as many or more were trained on


class PPOConfig(Section):
    """Proximal policy optimisation of an autoregressive policy."""

    kind: Annotated[Literal["ppo"], Affects.TRAINING] = "ppo"
    """Which algorithm."""
    gamma: Annotated[Unit, Affects.FUTURE] = 0.97
    """Discount per decision."""
    gae_lambda: Annotated[Unit, Affects.FUTURE] = 0.95
    """Exponential weight of generalised advantage estimation."""
    bootstrap_truncated: Annotated[bool, Affects.FUTURE] = True
    """Use the value of the true final frame at a time limit; false treats a time limit as failure."""
    normalize_advantages: Annotated[bool, Affects.FUTURE] = True
    """Subtract the mean and divide by the standard deviation over the whole batch of the iteration."""
    ratio_level: Annotated[Literal["action", "token"], Affects.FUTURE] = "action"
    """One probability ratio per action (token log-probs summed) or one per token."""
    clip_eps_low: Annotated[Positive, Affects.FUTURE] = 0.2
    """The ratio is clipped below at 1 - clip_eps_low."""
    clip_eps_high: Annotated[Positive, Affects.FUTURE] = 0.28
    """The ratio is clipped above at 1 + clip_eps_high."""
    temperature: Annotated[Positive, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = 1.0
    """Sampling temperature of the rollout and the loss, and of the episodes that the reward model is fitted to."""
    epochs: Annotated[int, Field(ge=1), Affects.FUTURE] = 2
    """Passes over each iteration's batch."""
    minibatch_size: Annotated[int, Field(ge=1), Affects.FUTURE] = 256
    """Rows per optimiser step at most: an iteration's rows are split into as few parts as that takes, whose sizes
    differ by one row at most."""
    micro_batch_size: Annotated[int, Field(ge=1), Affects.SPEED] = 256
    """Rows per forward and backward pass at most; gradients add up to those of the minibatch exactly."""
    score_batch_size: Annotated[int, Field(ge=1), Affects.FUTURE] = 256
    """Rows per pass without gradients, when a rollout's log-probs and values are scored."""
    lr: Annotated[Rate, Affects.FUTURE] = 2e-4
    """Learning rate of the policy (language model, projector and, if trained, vision)."""
    value_lr: Annotated[Rate, Affects.FUTURE] = 1e-3
    """Learning rate of the value head (and of the separate critic)."""
    lr_warmup_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 0
    """Iterations over which the policy's learning rate rises linearly, from the first that trains it on."""
    weight_decay: Annotated[float, Field(ge=0), Affects.FUTURE] = 0.0
    """AdamW weight decay."""
    adam_eps: Annotated[Positive, Affects.FUTURE] = 1e-5
    """AdamW epsilon."""
    max_grad_norm: Annotated[Positive, Affects.FUTURE] = 1.0
    """Gradient norm clip of the policy's parameters and, separately, of the critic's."""
    value_coef: Annotated[Positive, Affects.FUTURE] = 0.5
    """Weight of the value loss against the policy's, where both move a shared trunk. A critic that is separate or
    detached feels it through its gradient clip only: AdamW does not see the scale of a loss."""
    value_loss: Annotated[Literal["mse", "huber"], Affects.FUTURE] = "huber"
    """Squared error halved, or Huber with delta 1."""
    value_clip: Annotated[Positive | None, Affects.FUTURE] = None
    """Clip the change of a value against the old one (the larger loss counts); none switches it off."""
    entropy_coef: Annotated[float, Field(ge=0), Affects.FUTURE] = 0.0
    """Weight of the entropy bonus (mean over action tokens)."""
    target_kl: Annotated[Positive | None, Affects.FUTURE] = None
    """Stop this iteration's policy updates once they have moved the policy by more: KL in nats per action token,
    measured on 128 random rows of the batch after steps on as many, and after each epoch. None switches it off."""
    warmup_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 2
    """First iterations that train the critic only."""
    warmup_explained_variance: Annotated[Annotated[float, Field(lt=1)] | None, Affects.FUTURE] = None
    """Stay in warm-up until the critic explains this share of the returns' variance (none: iterations only)."""
    warmup_max_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 10
    """Warm-up by explained variance ends at the latest here."""
    train_vision: Annotated[bool, Affects.TRAINING] = False
    """Train the vision towers too; false caches their features once per iteration."""
    importance_cap: Annotated[Positive | None, Affects.FUTURE] = None
    """Truncated importance weight between learner and sampler log-probs; none for one-engine runs."""
    engine_kl_alarm: Annotated[Positive, Affects.FUTURE] = 0.0025
    """Warn when the learner's policy is further from the sampler's (KL in nats per action token)."""
