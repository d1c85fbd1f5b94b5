"""A simulator whose step takes as long as it is told: computing, waiting, or both."""

import time
from typing import Any

import numpy as np
from pydantic import Field

from reachrl.testing.envs import ReachConfig, ReachEnv


class BusyConfig(ReachConfig):
    """`reach_toy` with a cost."""

    kind: str = "busy_env:BusyEnv"  # pyright: ignore[reportIncompatibleVariableOverride]
    compute_s: float = Field(default=0.0, ge=0)
    """CPU seconds of one step."""
    wait_s: float = Field(default=0.0, ge=0)
    """Seconds of one step in which no core is needed, as where the simulator or robot is another machine."""


class BusyEnv(ReachEnv):
    """Computes and waits, then steps."""

    Config = BusyConfig

    def __init__(self, config: BusyConfig):
        super().__init__(config)
        self.busy = config

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        until = time.process_time() + self.busy.compute_s
        while time.process_time() < until:
            pass
        if self.busy.wait_s:
            time.sleep(self.busy.wait_s)
        return super().step(action)
