"""Options of PPO: advantages, critic, critic warm-up."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from reachrl.config.algorithm import Needs, PolicyGradientSection, Positive, Rate, Unit
from reachrl.config.marks import Affects


class PPOConfig(PolicyGradientSection):
    """Proximal policy optimisation of an autoregressive policy."""

    kind: Annotated[Literal["ppo"], Affects.TRAINING] = "ppo"
    """Which algorithm."""
    gamma: Annotated[Unit, Affects.FUTURE] = 0.97
    """Discount per control step: a decision that lasts several is discounted once for each."""
    gae_lambda: Annotated[Unit, Affects.FUTURE] = 0.95
    """Exponential weight of generalised advantage estimation."""
    bootstrap_truncated: Annotated[bool, Affects.FUTURE] = True
    """Use the value of the true final frame at a time limit; false treats a time limit as failure."""
    normalize_advantages: Annotated[bool, Affects.FUTURE] = True
    """Subtract the mean and divide by the standard deviation over the whole batch of the iteration."""
    value_lr: Annotated[Rate, Affects.FUTURE] = 1e-3
    """Learning rate of the value head (and of the separate critic)."""
    value_coef: Annotated[Positive, Affects.FUTURE] = 0.5
    """Weight of the value loss against the policy's, where both move a shared trunk. A critic that is separate or
    detached feels it through its gradient clip only: AdamW does not see the scale of a loss."""
    value_loss: Annotated[Literal["mse", "huber"], Affects.FUTURE] = "huber"
    """Squared error halved, or Huber with delta 1."""
    value_epochs: Annotated[Annotated[int, Field(ge=1)] | None, Affects.FUTURE] = None
    """Passes of the critic over each iteration's batch, `epochs` at least, even where `target_kl` stops the policy.
    None: as many as the policy makes, the one in which it is stopped to its end."""
    value_clip: Annotated[Positive | None, Affects.FUTURE] = None
    """Clip the change of a value against the old one (the larger loss counts); none switches it off."""
    warmup_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 2
    """First iterations that train the critic only."""
    warmup_explained_variance: Annotated[Annotated[float, Field(lt=1)] | None, Affects.FUTURE] = None
    """Stay in warm-up until the critic explains this share of the returns' variance (none: iterations only)."""
    warmup_max_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 10
    """Warm-up by explained variance ends at the latest here."""

    @model_validator(mode="after")
    def _the_critic_trains_as_long_as_the_policy(self) -> Self:
        if self.value_epochs is not None and self.value_epochs < self.epochs:
            raise ValueError(
                f"value_epochs={self.value_epochs} are fewer than epochs={self.epochs}: the critic trains along in "
                "each pass of the policy; raise value_epochs"
            )
        return self

    @property
    def needs(self) -> Needs:
        """A critic's values."""
        return Needs(values=True)

    @property
    def discount(self) -> float:
        """`gamma`."""
        return self.gamma

    @property
    def bootstraps_truncated(self) -> bool:
        """As advantages do."""
        return self.bootstrap_truncated
