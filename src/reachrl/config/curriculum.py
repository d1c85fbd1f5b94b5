"""Options of the task and start-state curriculum."""

from typing import Annotated, Literal

from pydantic import Field

from reachrl.config.base import Section
from reachrl.config.marks import Affects


class UniformConfig(Section):
    """Every (task, start) equally often: the baseline."""

    kind: Annotated[Literal["uniform"], Affects.TRAINING] = "uniform"
    """Which sampler."""


class SuccessRateConfig(Section):
    """Prefer what succeeds about half of the time, where an outcome teaches most."""

    kind: Annotated[Literal["success_rate"], Affects.TRAINING] = "success_rate"
    """Which sampler."""
    weighting: Annotated[Literal["peak", "paper"], Affects.FUTURE] = "peak"
    """`peak`: highest at 50 % success. `paper`: exp((0.5 - s) / temperature), which favours failure."""
    temperature: Annotated[float, Field(gt=0), Affects.FUTURE] = 0.25
    """How sharply the weights prefer: smaller is sharper."""
    floor: Annotated[float, Field(ge=0, le=1), Affects.FUTURE] = 0.3
    """Share of the episodes drawn uniformly, so that no task or start starves."""
    window: Annotated[int, Field(ge=1), Affects.FUTURE] = 60
    """Effective number of a task's recent outcomes that its estimate and those of its starts remember (older ones
    decay)."""
    prior_strength: Annotated[float, Field(gt=0), Affects.FUTURE] = 4.0
    """Pseudo-outcomes that pull a start's estimate to its task's, and a task's to 50 %."""
