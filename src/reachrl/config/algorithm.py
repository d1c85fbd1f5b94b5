"""What every algorithm's section declares, and the options that clipped policy gradients share."""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an algorithm needs of the collector and of the learner."""

    values: bool = False
    """State values of every decision and of the frames that follow; without, no critic is computed."""
    whole_episodes: bool = False
    """Rollouts of whole episodes, instead of a fixed number of decisions."""
    group_size: int = 1
    """Consecutive episodes that begin in the same start state; more than 1 of whole episodes only."""
    max_rollouts: int = 1
    """Rollouts in an iteration at most, see `Algorithm.wants_more`."""


class AlgorithmSection(Section):
    """Base of every algorithm's section: what collector, learner and rewards read, whatever its kind."""

    score_batch_size: Annotated[int, Field(ge=1), Affects.FUTURE] = 256
    """Rows per pass without gradients, when a rollout's log-probs and values are scored."""
    train_vision: Annotated[bool, Affects.TRAINING] = False
    """Train the vision towers too; false caches their features once per iteration."""

    @property
    def needs(self) -> Needs:
        """What the algorithm needs; override it."""
        return Needs()

    @property
    def discount(self) -> float:
        """Discount per control step, with which rewards shape potentials."""
        return 1.0

    @property
    def bootstraps_truncated(self) -> bool:
        """Whether the state at a time limit keeps its potential; false treats it as terminal."""
        return True

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss corrects for actions that another distribution than the learner's has drawn."""
        return False


class PolicyGradientSection(AlgorithmSection):
    """Options of a policy gradient with clipped probability ratios."""

    ratio_level: Annotated[Literal["token", "action", "chunk"], Affects.FUTURE] = "action"
    """What one probability ratio covers: a token, the tokens of one action (their log-probs summed), or all tokens of
    a decision. For policies of one action a decision the last two are the same."""
    clip_eps_low: Annotated[Positive, Affects.FUTURE] = 0.2
    """The ratio is clipped below at 1 - clip_eps_low."""
    clip_eps_high: Annotated[Positive, Affects.FUTURE] = 0.28
    """The ratio is clipped above at 1 + clip_eps_high."""
    dual_clip: Annotated[Annotated[float, Field(gt=1)] | None, Affects.FUTURE] = None
    """Bound of the ratio for actions with a negative advantage: their loss is at most this many times the advantage, so
    that an action that the policy has come to prefer since cannot blow up the gradient. 3 is common; none: no bound."""
    epochs: Annotated[int, Field(ge=1), Affects.FUTURE] = 2
    """Passes over each iteration's batch."""
    minibatch_size: Annotated[int, Field(ge=1), Affects.FUTURE] = 256
    """Rows per optimiser step at most: an iteration's rows are split into as few parts as that takes, whose sizes
    differ by one row at most."""
    micro_batch_size: Annotated[int, Field(ge=1), Affects.SPEED] = 256
    """Rows per forward and backward pass at most; gradients add up to those of the minibatch exactly."""
    lr: Annotated[Rate, Affects.FUTURE] = 2e-4
    """Learning rate of the policy (language model, projector and, if trained, vision)."""
    lr_warmup_iterations: Annotated[int, Field(ge=0), Affects.FUTURE] = 0
    """Iterations over which the policy's learning rate rises linearly, from the first that trains it on."""
    lr_schedule: Annotated[Literal["constant", "linear", "cosine", "kl"], Affects.FUTURE] = "constant"
    """How the policy's learning rate changes from one iteration to the next. `linear` and `cosine` fall from `lr` to
    `lr_final * lr` over the run's `num_iterations`. `kl` follows the KL of each update: above twice `desired_kl` the
    rate is divided by 1.5, below half of it multiplied by 1.5, between a hundredth and ten times `lr`."""
    lr_final: Annotated[Unit, Affects.FUTURE] = 0.0
    """With `linear` or `cosine`: the share of `lr` that is left at the end."""
    desired_kl: Annotated[Positive | None, Affects.FUTURE] = None
    """With `lr_schedule=kl`: the KL of an iteration's update to aim at, in nats per action token. None: half of
    `target_kl`, so that an update which that stops lowers the rate, or 0.01 where nothing stops updates."""
    projector_lr: Annotated[Rate | None, Affects.FUTURE] = None
    """Learning rate of the policy's projector; none: `lr`. The schedule scales it too."""
    head_lr: Annotated[Rate | None, Affects.FUTURE] = None
    """Learning rate of the policy's output layer; none: `lr`. The schedule scales it too."""
    weight_decay: Annotated[float, Field(ge=0), Affects.FUTURE] = 0.0
    """AdamW weight decay."""
    adam_eps: Annotated[Positive, Affects.FUTURE] = 1e-5
    """AdamW epsilon."""
    max_grad_norm: Annotated[Positive, Affects.FUTURE] = 1.0
    """Gradient norm clip of the policy's parameters and, separately, of a critic's."""
    entropy_coef: Annotated[float, Field(ge=0), Affects.FUTURE] = 0.0
    """Weight of the entropy bonus (mean over action tokens)."""
    entropy_floor: Annotated[Positive | None, Affects.FUTURE] = None
    """Entropy to hold, in nats per action token: an iteration below it is warned of, and raises the weight of the
    entropy bonus by `entropy_step`; one above lowers it again, down to `entropy_coef`. None switches it off."""
    entropy_step: Annotated[Positive, Affects.FUTURE] = 1e-3
    """See `entropy_floor`."""
    target_kl: Annotated[Positive | None, Affects.FUTURE] = None
    """Stop this iteration's policy updates once they have moved the policy by more: KL in nats per action token,
    measured on 128 random rows of the batch after steps on as many, and after each epoch. None switches it off."""
    importance_cap: Annotated[Positive | None, Affects.FUTURE] = None
    """Truncated importance weight between learner and sampler log-probs; none for one-engine runs."""

    @property
    def kl_to_aim_at(self) -> float:
        """`desired_kl`, or what stands for it."""
        if self.desired_kl is not None:
            return self.desired_kl
        return 0.01 if self.target_kl is None else self.target_kl / 2

    @property
    def corrects_sampler(self) -> bool:
        """By the truncated importance weight."""
        return self.importance_cap is not None
