"""Options of the rollouts that every algorithm learns from."""

from typing import Annotated

from pydantic import Field

from reachrl.config.base import Section
from reachrl.config.marks import Affects


class RolloutSection(Section):
    """How much is collected in an iteration, and from which distribution."""

    num_steps: Annotated[int, Field(ge=1), Affects.TRAINING | Affects.FUTURE] = 120
    """Decisions per environment and iteration. For algorithms that learn from whole episodes: as many episodes are
    played to their ends as surely fit (`num_steps` divided by the decisions of the longest episode, rounded down)."""
    temperature: Annotated[float, Field(gt=0), Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = 1.0
    """Sampling temperature of the rollout and the loss, and of the episodes that the reward model is fitted to."""
    engine_kl_alarm: Annotated[float, Field(gt=0), Affects.TRAINING | Affects.FUTURE] = 0.0025
    """Warn when the learner's policy is further from the sampler's (KL in nats per action token)."""
