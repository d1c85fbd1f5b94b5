"""A toy environment that breaks on request; imported by the workers of `test_vector_env.py`."""

import os
import sys
import time
from typing import Any, Literal

import numpy as np

from reachrl.envs.base import observed
from reachrl.errors import MissingExtra
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.types import Start


class FaultyConfig(ReachConfig):
    kind: str = "faulty_env:FaultyEnv"  # pyright: ignore[reportIncompatibleVariableOverride]
    fault: Literal["exit", "segfault", "raise", "hang", "raise in reset", "missing extra", "wrong size"] = "raise"
    fault_start: int = -1  # -1: every start
    fault_step: int = 1


class FaultyEnv(ReachEnv):
    Config = FaultyConfig
    shares_process = False

    def __init__(self, config: FaultyConfig):
        if config.fault == "missing extra":
            raise MissingExtra("this simulator needs libfoo: apt-get install libfoo")
        super().__init__(config.model_copy(update={"image_size": 32}) if config.fault == "wrong size" else config)
        if config.fault == "wrong size":
            self.observation_space = observed(["camera"], config.image_size)
        self.faults = config
        self.start = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        start: Start = (options or {})["start"]
        self.start = start.index
        if self.faults.fault == "raise in reset" and self._due(0):
            raise OSError("the robot is on fire")
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        if self._due(self._steps):
            fault = self.faults.fault
            if fault == "exit":
                sys.stderr.write("these were my last words\n")
                sys.stderr.flush()
                os._exit(7)
            if fault == "segfault":
                os.kill(os.getpid(), 11)
            if fault == "hang":
                time.sleep(1000)
            if fault == "raise":
                raise OSError("the robot is on fire")
        return super().step(action)

    def _due(self, step: int) -> bool:
        return self.faults.fault_start in (-1, self.start) and step == self.faults.fault_step


class TogetherConfig(FaultyConfig):
    kind: str = "faulty_env:Together"  # pyright: ignore[reportIncompatibleVariableOverride]


class Together(FaultyEnv):
    """Several of them live in one process."""

    Config = TogetherConfig
    shares_process = True
