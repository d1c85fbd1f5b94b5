"""An environment with the perturbations around it that need nothing of the simulator."""

from typing import Any

import numpy as np

from reachrl.config.perturbations import GENERAL_AXES, Variant
from reachrl.envs.base import Env, start_option
from reachrl.functional.perturbation import Filter
from reachrl.types import Split, Start


class Perturbed(Env):
    """An environment with noise and delay around it, where a start's variant asks for them.

    Args:
        env: the environment; other variants are its own affair.
    """

    def __init__(self, env: Env) -> None:
        self.env, self.config, self.tasks, self.control_hz = env, env.config, env.tasks, env.control_hz
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._filter: Filter | None = None
        self._steps = 0

    def instruction(self, task: str) -> str:
        """That of the environment."""
        return self.env.instruction(task)

    def num_starts(self, split: Split) -> int:
        """Those of the environment."""
        return self.env.num_starts(split)

    def expert_action(self) -> np.ndarray:
        """That of the environment."""
        return self.env.expert_action()

    def rest_action(self) -> np.ndarray:
        """That of the environment."""
        return self.env.rest_action()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`.

        Raises:
            ValueError: its variant is of an axis that the environment does not have.
        """
        start = (options or {}).get("start")
        self._filter, self._steps = None, 0
        if isinstance(start, Start) and start.variant:
            self._filter = self._checked(start_option(options))
        observation, info = self.env.reset(seed=seed, options=options)
        return self._seen(observation), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carry out what arrives now."""
        self._steps += 1
        if self._filter is None:
            return self.env.step(action)  # pyright: ignore[reportReturnType]
        observation, *rest = self.env.step(self._filter.arriving(action))
        return (self._seen(observation), *rest)  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    def _checked(self, start: Start) -> Filter | None:
        variant, axes = Variant.of(start), {**GENERAL_AXES, **self.config.axes}
        if variant is not None and variant.axis not in axes:
            raise ValueError(f"{start.variant}: {self.config.kind} has no such axis; it has {', '.join(axes)}")
        return Filter.of(start, self.env.rest_action())

    def _seen(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self._filter is None:
            return observation
        return observation | {"images": self._filter.seen(observation["images"], self._steps)}
