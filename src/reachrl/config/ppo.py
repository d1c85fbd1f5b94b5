"""Options of PPO: advantages, ratio and clip, epochs, critic warm-up."""

from typing import Annotated, Literal

from pydantic import Field

from reachrl.config.base import Section

Positive = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(ge=0, le=1)]


class PPOConfig(Section):
    """Proximal policy optimisation of an autoregressive policy."""

    kind: Literal["ppo"] = "ppo"
    """Which algorithm."""
    gamma: Unit = 0.97
    """Discount per decision."""
    gae_lambda: Unit = 0.95
    """Exponential weight of generalised advantage estimation."""
    bootstrap_truncated: bool = True
    """Use the value of the true final frame at a time limit; false treats a time limit as failure."""
    normalize_advantages: bool = True
    """Subtract the mean and divide by the standard deviation over the whole batch of the iteration."""
    ratio_level: Literal["action", "token"] = "action"
    """One probability ratio per action (token log-probs summed) or one per token."""
    clip_eps_low: Positive = 0.2
    """The ratio is clipped below at 1 - clip_eps_low."""
    clip_eps_high: Positive = 0.28
    """The ratio is clipped above at 1 + clip_eps_high."""
    temperature: Positive = 1.0
    """Sampling temperature of the rollout, the same in the loss."""
    epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over each iteration's batch."""
    minibatch_size: Annotated[int, Field(ge=1)] = 256
    """Rows per optimiser step."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 256
    """Rows per forward and backward pass; gradients add up to those of the minibatch exactly."""
    score_batch_size: Annotated[int, Field(ge=1)] = 256
    """Rows per pass without gradients, when a rollout's log-probs and values are scored."""
    lr: Positive = 2e-4
    """Learning rate of the policy (language model, projector and, if trained, vision)."""
    value_lr: Positive = 1e-3
    """Learning rate of the value head (and of the separate critic)."""
    lr_warmup_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations, counted from `warmup_iterations` on, over which the policy's learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    adam_eps: Positive = 1e-5
    """AdamW epsilon."""
    max_grad_norm: Positive = 1.0
    """Gradient norm clip of the policy's parameters and, separately, of the critic's."""
    value_coef: Positive = 0.5
    """Weight of the value loss against the policy's, where both move a shared trunk. A critic that is separate or
    detached feels it through its gradient clip only: AdamW does not see the scale of a loss."""
    value_loss: Literal["mse", "huber"] = "huber"
    """Squared error halved, or Huber with delta 1."""
    value_clip: Positive | None = None
    """Clip the change of a value against the old one (the larger loss counts); none switches it off."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus (mean over action tokens)."""
    target_kl: Positive | None = None
    """Stop this iteration's policy updates once approx_kl exceeds it; none switches it off."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 2
    """First iterations that train the critic only."""
    warmup_explained_variance: Annotated[float, Field(lt=1)] | None = None
    """Stay in warm-up until the critic explains this share of the returns' variance (none: iterations only)."""
    warmup_max_iterations: Annotated[int, Field(ge=0)] = 10
    """Warm-up by explained variance ends at the latest here."""
    train_vision: bool = False
    """Train the vision towers too; false caches their features once per iteration."""
    importance_cap: Positive | None = None
    """Truncated importance weight between learner and sampler log-probs; none for one-engine runs."""
    engine_kl_alarm: Positive = 0.01
    """Warn when the sampler's and the learner's log-probs of the same actions part by more (nats per action)."""
