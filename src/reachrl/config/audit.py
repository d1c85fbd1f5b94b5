"""Options of the audit: when the dense reward and true success are said to have parted."""

from typing import Annotated

from pydantic import Field

from reachrl.config.base import Section
from reachrl.config.marks import Affects


class AuditSection(Section):
    """Watches, during RL, whether the dense reward still goes with success; it changes no number of the training."""

    window: Annotated[int, Affects.FUTURE] = Field(default=200, ge=20)
    """Episodes, the most recent ones, over which figures are taken."""

    min_episodes: Annotated[int, Affects.FUTURE] = Field(default=20, ge=2)
    """Successes and failures that the window must hold, each, before anything is said."""

    correlation: Annotated[float, Affects.FUTURE] = Field(default=0.0, ge=-1, le=1)
    """Warn when the correlation of an episode's success with what it earned, or with the progress score of its last
    frame, falls below this."""

    drift: Annotated[float, Affects.FUTURE] = Field(default=0.2, gt=0, le=1)
    """Warn when failures score this much more, on the mean, than the first ones of the run did."""

    num_videos: Annotated[int, Affects.SPEED] = Field(default=3, ge=0)
    """Failed episodes that are filmed at a warning: those that the dense reward liked best."""
