"""Options of the algorithms that compare episodes of one start: GRPO and leave-one-out."""

from typing import Annotated, Literal

from pydantic import Field

from reachrl.config.algorithm import Needs, PolicyGradientSection
from reachrl.config.marks import Affects


class GroupSection(PolicyGradientSection):
    """What GRPO and leave-one-out share."""

    group_size: Annotated[int, Field(ge=2), Affects.TRAINING | Affects.FUTURE] = 8
    """Episodes of one task and start that are compared with one another; their noise differs."""
    returns: Annotated[Literal["sum", "success"], Affects.FUTURE] = "sum"
    """What an episode is worth: the undiscounted sum of its rewards (with `reward.kind=task` that is its success), or
    its success alone, whatever the reward."""
    length_weight: Annotated[Literal["decision", "episode"], Affects.FUTURE] = "decision"
    """`decision`: every decision weighs alike, as in DAPO and, up to a constant factor, Dr. GRPO. `episode`: every
    episode weighs alike, as in GRPO's own objective, which favours short successes and long failures."""
    max_rollouts: Annotated[int, Field(ge=1), Affects.FUTURE] = 2
    """Rollouts in an iteration at most. Groups whose episodes are all worth the same teach nothing and are left out;
    while fewer groups are left than one rollout has, another is collected."""

    @property
    def needs(self) -> Needs:
        """Groups of whole episodes; no critic."""
        return Needs(whole_episodes=True, group_size=self.group_size, max_rollouts=self.max_rollouts)


class GRPOConfig(GroupSection):
    """Group relative policy optimisation: an episode against the mean of its group."""

    kind: Annotated[Literal["grpo"], Affects.TRAINING] = "grpo"
    """Which algorithm."""
    divide_by_std: Annotated[bool, Affects.FUTURE] = True
    """Divide advantages by the standard deviation of their group; false is Dr. GRPO, which does not prefer groups that
    nearly always succeed or fail."""


class RLOOConfig(GroupSection):
    """REINFORCE leave-one-out: an episode against the mean of the others of its group."""

    kind: Annotated[Literal["rloo"], Affects.TRAINING] = "rloo"
    """Which algorithm."""
