"""A tiny environment with the full contract: a dot that moves to the square of the named colour and holds it."""

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from pydantic import Field, field_validator

from reachrl.config.env import EnvSection
from reachrl.config.marks import Affects
from reachrl.envs.base import Env, check_start, observed, start_key, start_option
from reachrl.errors import ConfigError

COLORS = {
    "red-square": (220, 50, 50),
    "green-square": (50, 200, 70),
    "blue-square": (60, 90, 230),
    "yellow-square": (220, 210, 60),
}
_BACKGROUND = 25
_SPEED = 0.06  # m per decision at full action
_GRIP_SPEED = 0.25  # opening per decision at full effort
_CORNERS = np.array([[0.2, 0.2], [0.8, 0.8], [0.2, 0.8], [0.8, 0.2]])  # m: about where each square lies
_JITTER = 0.1  # m by which a start moves a square at most, in x and in y
_CLOSED = 0.5  # opening of the gripper below which it holds
_DOT = {True: (255, 255, 255), False: (150, 100, 160)}  # its colour by whether it holds


class ReachConfig(EnvSection):
    """A dot and coloured squares in a unit square; steps take microseconds."""

    action_dim: ClassVar[int | None] = 4

    kind: Literal["reach_toy"] = "reach_toy"

    tasks: tuple[str, ...] = Field(default=("red-square", "green-square", "blue-square"), min_length=1)

    image_size: int = Field(default=24, ge=8, le=1024)

    max_steps: int = Field(default=15, ge=1)

    num_envs: int = Field(default=4, ge=1)

    radius: Annotated[float, Affects.EPISODE] = Field(default=0.1, gt=0, le=0.2)
    """Distance to the square's centre that counts as reached, in metres."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in COLORS:
                close = get_close_matches(task, COLORS, n=1, cutoff=0.5) or list(COLORS)
                raise ConfigError(f"env.tasks: reach_toy has no task {task!r}; did you mean {' or '.join(close)}?")
        return tasks


class ReachEnv(Env):
    """A square of each colour lies in its corner; the instruction says which one to move the dot to and hold.

    Actions are f32[4] in [-1, 1]: displacement x y z and gripper effort (positive closes). The dot is white while it
    holds, violet while its gripper is open; height is shown in `ee_state` only. Success is nearness in x and y with
    the gripper at least half closed. An imitator of the expert, which closes on arrival, often arrives open: there is
    something to learn online.
    """

    Config = ReachConfig
    metadata = {"render_modes": []}
    shares_process = True  # it owns nothing but a few numbers

    def __init__(self, config: ReachConfig):
        self.config = config
        self.tasks = config.tasks
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = observed(["camera"], config.image_size)
        self._state = np.zeros(4)  # x y z in 0..1, gripper opening
        self._squares = np.zeros((len(COLORS), 2))
        self._target = 0
        self._first_distance = 1.0
        self._steps = 0
        self._over = True

    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""
        return f"move to the {task.replace('-', ' ')}"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`; nothing here is random, so `seed` changes nothing."""
        start = start_option(options)
        check_start(self, start)
        rng = np.random.default_rng(start_key(start))
        self._state = np.array([*rng.uniform(0.35, 0.65, 2), 0.5, 0.5])
        self._squares = _CORNERS + rng.uniform(-_JITTER, _JITTER, _CORNERS.shape)
        self._target = list(COLORS).index(start.task)
        self._steps = 0
        self._over = False
        self._first_distance = float(np.linalg.norm(self._to_target()))
        return self._observe(), {"success": False, "progress": 0.0}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the dot by `action` f32[4]."""
        if self._over:
            raise RuntimeError("the episode is over: call reset first")
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, got {action!r}")
        action = np.clip(action, -1.0, 1.0).astype(np.float64)
        self._state = np.clip(self._state + action * [_SPEED, _SPEED, _SPEED, -_GRIP_SPEED], 0.0, 1.0)
        distance = float(np.linalg.norm(self._to_target()))
        success = distance < self.config.radius and self._holds()
        self._steps += 1
        truncated = not success and self._steps >= self.config.max_steps
        self._over = success or truncated
        info = {"success": success, "progress": max(0.0, 1.0 - distance / self._first_distance)}
        return self._observe(), float(success), success, truncated, info

    def expert_action(self) -> np.ndarray:
        """Straight to the target at full speed, opening the gripper far from it and closing it near it; f32[4]."""
        offset = self._to_target()
        closing = 1.0 - np.linalg.norm(offset) / (3 * _SPEED)
        grip = max(closing, np.tanh(closing))  # never at its limit for long, as no gripper should be
        return np.array([*np.clip(offset / _SPEED, -1, 1), 0.0, grip], np.float32)

    def _to_target(self) -> np.ndarray:
        return self._squares[self._target] - self._state[:2]

    def _holds(self) -> bool:
        return bool(self._state[3] < _CLOSED)

    def _observe(self) -> dict[str, Any]:
        size = self.config.image_size
        image = np.full((size, size, 3), _BACKGROUND, np.uint8)
        for place, color in zip(self._squares, COLORS.values(), strict=True):
            self._draw(image, place, 0.07, color)
        self._draw(image, self._state[:2], 0.06, _DOT[self._holds()])
        return {"images": {"camera": image}, "ee_state": self._state.astype(np.float32)}

    def _draw(self, image: np.ndarray, place: np.ndarray, half: float, color: tuple[int, int, int]) -> None:
        size = self.config.image_size
        x, y = place[0] * size, (1.0 - place[1]) * size
        reach = max(half * size, 0.5)
        columns = slice(max(0, round(x - reach)), min(size, round(x + reach)))
        rows = slice(max(0, round(y - reach)), min(size, round(y + reach)))
        image[rows, columns] = color
