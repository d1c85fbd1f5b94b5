"""LIBERO as language tasks seen through named cameras, with sparse success and numbered starts."""

from typing import Any

import gymnasium as gym
import numpy as np

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_pro import pro_kind
from reachrl.config.libero_tasks import instruction
from reachrl.config.perturbations import Variant
from reachrl.envs.base import Env, check_start, observed, start_option
from reachrl.envs.libero.assets import check_assets, find_assets
from reachrl.envs.libero.distractors import with_distractors
from reachrl.envs.libero.experts.expert import Expert
from reachrl.envs.libero.faithful_simulation import FaithfulSimulation
from reachrl.envs.libero.fast_simulation import FastSimulation
from reachrl.envs.libero.installation import TaskFiles, check_alone, check_suite, check_versions
from reachrl.envs.libero.plus import PlusEpisode
from reachrl.envs.libero.pro import pro_files
from reachrl.envs.libero.simulation import Perturbation
from reachrl.envs.libero.starts import Starts
from reachrl.envs.render import Renderer
from reachrl.envs.render_device import check_rendering

_SETTLING_STEPS = 10  # objects are released a little above the table; published evaluations wait as long
_STREWN = "distractors"  # the axis whose episodes have more things in the scene
_DO_NOTHING = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


class LiberoEnv(Env):
    """The tasks of one suite in one process, each simulator made when first needed.

    Actions are f32[7] in [-1, 1]: hand displacement x y z (times 5 cm), rotation about x y z (times 0.5 rad), gripper
    (-1 opens, 1 closes; with `gripper=openvla` 1 opens and 0 closes). One decision lasts 50 ms of simulated time. The
    state is hand position (3, m), hand orientation (3, axis times angle in rad) and the joints of both fingers (2, m).
    """

    Config = LiberoConfig
    metadata = {"render_modes": []}
    control_hz = 20.0

    def __init__(self, config: LiberoConfig):
        self.config = config
        self.tasks = config.tasks
        low = np.full(7, -1.0, np.float32)
        low[6] = 0.0 if config.gripper == "openvla" else -1.0
        self.action_space = gym.spaces.Box(low, np.ones(7, np.float32), dtype=np.float32)
        self.observation_space = observed(config.cameras, config.image_size, state_size=8)
        self._assets = find_assets(config.assets)
        self._renderer = Renderer(config.image_size) if config.simulation == "fast" else None
        self._made: dict[tuple[str, str], Starts] = {}  # by task and axis, where that has scenes of its own
        self._starts: Starts | None = None
        self._plus: PlusEpisode | None = None
        self._expert: Expert | None = None
        self._steps = 0
        self._over = True

    @classmethod
    def prepare(cls, config: LiberoConfig) -> None:
        """Check that all is installed, frames can be drawn and assets are the benchmark's, before workers start."""
        check_versions()
        check_alone()
        check_rendering()
        check_suite(config.suite)
        check_assets(find_assets(config.assets))

    @classmethod
    def caveats(cls, config: LiberoConfig) -> tuple[str, ...]:
        """All known differences to published success rates."""
        said = {
            "trained on evaluation starts (env.split=paper)": config.split == "paper",
            "fast simulation: frames differ a little from the benchmark's (env.simulation=fast)": (
                config.simulation == "fast"
            ),
        }
        return tuple(caveat for caveat, holds in said.items() if holds)

    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""
        return instruction(task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`; nothing here is random, so `seed` changes nothing."""
        start = start_option(options)
        check_start(self, start)
        self._plus = PlusEpisode.of(self.config.suite, start)
        variant, perturbation = Variant.of(start), None
        strewn = variant is not None and variant.axis == _STREWN
        if self._plus is not None:
            perturbation = self._plus.perturbation()
        elif variant is not None:
            perturbation = Perturbation(distractors=start) if strewn else Perturbation(looks=start)
        self._starts = self.task_starts(start.task, _STREWN if strewn else pro_kind(start))
        self._starts.begin(start.split, start.index, perturbation)
        for _ in range(_SETTLING_STEPS):
            self._starts.simulation.step(_DO_NOTHING)
        self._expert = None
        self._steps = 0
        self._over = False
        return self._observe(self._starts), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carry out `action` f32[7] for 50 ms."""
        if self._starts is None or self._over:
            raise RuntimeError("the episode is over: call reset first")
        action = np.asarray(action, np.float32)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, got {action!r}")
        success = self._starts.simulation.step(self._in_simulator_convention(action))
        self._steps += 1
        truncated = not success and self._steps >= self.config.max_steps
        self._over = success or truncated
        return self._observe(self._starts), float(success), success, truncated, {"success": success}

    def _in_simulator_convention(self, action: np.ndarray) -> np.ndarray:
        """The action f64[7] clipped, its gripper -1 to open and 1 to close."""
        clipped = np.clip(action, self.action_space.low, self.action_space.high).astype(np.float64)
        if self.config.gripper == "openvla":
            clipped[6] = simulator_gripper(clipped[6])
        return clipped

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action f32[7]; it reads the simulator's state and what it did before in this episode.

        What it can do: `reachrl.envs.libero.experts`; in front of what it cannot do it waits.
        """
        if self._starts is None:
            raise RuntimeError("call reset first")
        if self._expert is None:
            self._expert = Expert(self._starts.simulation)
        action = np.clip(self._expert.action(), -1.0, 1.0)
        if self.config.gripper == "openvla":
            action[6] = 0.5 * (1.0 - action[6])
        return action.astype(np.float32)

    def rest_action(self) -> np.ndarray:
        """No movement with an open gripper f32[7], as published evaluations wait."""
        action = _DO_NOTHING.astype(np.float32)
        if self.config.gripper == "openvla":
            action[6] = 1.0
        return action

    def close(self) -> None:
        """Free the GL contexts."""
        self._forget(list(self._made))
        if self._renderer is not None:
            self._renderer.close()

    def task_starts(self, task: str, perturbed: str = "") -> Starts:
        """The task's simulation and its numbered starts, made when first asked for.

        Args:
            task: its name.
            perturbed: axis of LIBERO-PRO, whose tasks have definitions and start states of their own, or `distractors`.
        """
        key, config = (task, perturbed), self.config
        if key not in self._made:
            if perturbed == _STREWN:
                files = with_distractors(TaskFiles.of(config.suite, task), self._assets)
            elif perturbed:
                files = pro_files(config.suite, perturbed, task, self._assets)
            else:
                files = TaskFiles.of(config.suite, task)
            if self._renderer is None:
                self._forget(list(self._made))  # upstream's tasks take a gigabyte each: one at a time
                simulation = FaithfulSimulation(files, self._assets, config.image_size, config.cameras)
            else:
                # Four for each of the suite's own are too many.
                self._forget([made for made in self._made if made[1] not in ("", _STREWN)])
                simulation = FastSimulation(files, self._assets, config.mesh_faces, self._renderer, config.cameras)
            self._made[key] = Starts(files, simulation, stored_for_training=config.split == "paper")
        return self._made[key]

    def _forget(self, made: list[tuple[str, str]]) -> None:
        for key in made:
            self._made.pop(key).simulation.close()

    def _observe(self, starts: Starts) -> dict[str, Any]:
        simulation = starts.simulation
        images = {camera: simulation.frame(camera) for camera in self.config.cameras}
        if self._plus is not None:
            images = {camera: self._plus.seen(camera, frame, self._steps) for camera, frame in images.items()}
        return {"images": images, "ee_state": simulation.ee_state(), "state": simulation.state()}


def simulator_gripper(openvla: float) -> float:
    """The simulator's number (-1 opens, 1 closes) for that of published checkpoints (1 opens, 0 closes)."""
    return -float(np.sign(2 * openvla - 1))
