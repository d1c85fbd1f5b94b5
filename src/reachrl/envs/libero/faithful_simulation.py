"""One LIBERO task in upstream's own simulation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.distractors import Distractors, strewn
from reachrl.envs.libero.installation import TaskFiles, import_upstream
from reachrl.envs.libero.simulation import (
    CAMERA,
    Perturbation,
    Simulation,
    axis_angle,
    pristine_arrays,
)
from reachrl.envs.libero.upstream import extended, problem_of
from reachrl.envs.mujoco_memory import release_compilation, release_textures


class _Kept:
    """Put in front of an upstream task class: its scene is compiled, and handed to the renderer, once.

    Upstream composes the same scene at every reset, compiles it and loads its textures anew: half of a reset's time.
    Where the text of the scene is the same the model is kept, without what the last episode wrote into it.
    """

    sim, _xml = None, ""

    def _initialize_sim(self: Any, xml_string: str | None = None) -> None:
        xml = xml_string or self.model.get_xml()
        if xml != self._xml:
            super()._destroy_sim()  # pyright: ignore[reportAttributeAccessIssue]
            super()._initialize_sim(xml)  # pyright: ignore[reportAttributeAccessIssue]
            release_compilation()
            self._xml, self._pristine = xml, pristine_arrays(self.sim.model._model)
            return
        for name, values in self._pristine.items():
            getattr(self.sim.model, name)[:] = values
        self.sim.reset()
        for _ in range(2):  # upstream's new renderer computes it once more, which the solver's next start depends on
            self.sim.forward()
        self.initialize_time(self.control_freq)

    def _destroy_sim(self) -> None:
        """Nothing at a reset: the next one may need it."""

    def close(self) -> None:
        super()._destroy_sim()  # pyright: ignore[reportAttributeAccessIssue]


class FaithfulSimulation(Simulation):
    """Upstream's `OffScreenRenderEnv`: its own stepping and drawing, its scene compiled once.

    Args:
        files: of the task.
        assets: folder with meshes and textures.
        image_size: side of the frames in pixels.
        cameras: what films.
    """

    def __init__(self, files: TaskFiles, assets: Path, image_size: int, cameras: Sequence[str] = (CAMERA,)):
        envs = import_upstream(assets)
        os.environ.pop("LP_PERF", None)  # what software rendering may leave out
        path = str(files.definition)
        problem, base = problem_of(envs, path)
        # Where upstream looks its classes up.
        envs.TASK_MAPPING[problem] = extended(strewn(base, files.distractors), _Kept)
        try:
            self._env = envs.OffScreenRenderEnv(
                bddl_file_name=path,
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=list(cameras),
            )
        finally:
            envs.TASK_MAPPING[problem] = base
        self.domain = self._env.env
        self.distractors = Distractors(self.domain) if files.distractors else None
        release_textures(self.model)
        self._samplers = tuple(self.domain.object_property_initializers)
        self._seen: dict[str, np.ndarray] = {}

    def _reset(self) -> None:
        # Upstream's reset adds its samplers of drawers and knobs to those that are there, so that each reset draws
        # more than the one before. As if the task had just been made: the ones of the constructor and one reset.
        self.domain.object_property_initializers = list(self._samplers)
        self._seen = self._env.reset()

    def _move_regions(self) -> None:
        """Nothing: each reset composes the scene."""

    def reset(self, seed: int, state: np.ndarray | None, perturbation: Perturbation | None = None) -> None:
        """Begin an episode; see `Simulation.reset`."""
        super().reset(seed, state, perturbation)
        if state is not None or perturbation is not None:
            self._env._update_observables(force=True)
            self._seen = self.domain._get_observations()

    def step(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        self._seen, _, solved, _ = self._env.step(action)
        return bool(solved)

    def frame(self, camera: str) -> np.ndarray:
        """The frame upstream drew with the last step."""
        return self._seen[f"{camera}_image"][::-1, ::-1].copy()

    def state(self) -> np.ndarray:
        """The state of the moment that upstream's frames show: the first of the step's physics steps, not the last."""
        x, y, z, w = self._seen["robot0_eef_quat"]
        turned = axis_angle(np.array([w, x, y, z]))
        return np.array([*self._seen["robot0_eef_pos"], *turned, *self._seen["robot0_gripper_qpos"]], np.float32)

    def _original(self) -> Any:
        model = import_mujoco().MjModel.from_xml_string(self.domain._xml)  # textures of the one in use were freed
        release_compilation()
        return model

    def _reload_textures(self, textures: list[int]) -> None:
        drawn = self.domain.sim._render_context_offscreen
        drawn.gl_ctx.make_current()
        for texture in textures:
            import_mujoco().mjr_uploadTexture(self.model, drawn.con, texture)

    def close(self) -> None:
        """Free the GL context."""
        self._env.close()
