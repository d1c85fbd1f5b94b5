"""One LIBERO task in a fast simulation that gives the same states as upstream's."""

from bdb import BdbQuit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.libero.controller import ArmController
from reachrl.envs.libero.distractors import Distractors, strewn
from reachrl.envs.libero.installation import TaskFiles, import_upstream
from reachrl.envs.libero.simulation import (
    CAMERA,
    HIDDEN_GROUPS,
    Simulation,
    pristine_arrays,
)
from reachrl.envs.libero.slim import slim_model
from reachrl.envs.libero.upstream import extended, problem_of
from reachrl.envs.render import Renderer


class _Lean:
    """Put in front of an upstream task class: our model of its scene instead of one compiled anew."""

    mesh_faces = 0
    task_name = ""

    def _initialize_sim(self: Any, xml_string: str | None = None) -> None:
        from robosuite.utils.binding_utils import MjSim  # pyright: ignore[reportMissingImports]

        model = slim_model(xml_string or self.model.get_xml(), self.task_name, self.mesh_faces)
        self.pristine = pristine_arrays(model)
        self.sim = MjSim(model)
        self.sim.forward()
        self.initialize_time(self.control_freq)


_GROWING = ("visualization_sites_list", "object_property_initializers")  # each time that upstream composes a scene


class _Zones(list[Any]):
    """Stands for the arena and each body of it, and collects the sites that upstream puts there."""

    def __getattr__(self, body: str) -> "_Zones":
        return self


class FastSimulation(Simulation):
    """The same physics without unused work: no new model at a reset, no observables, one frame a step.

    Args:
        files: of the task.
        assets: folder with meshes and textures.
        mesh_faces: see `LiberoConfig`.
        renderer: draws for all tasks of the process.
        cameras: what films.
    """

    def __init__(
        self,
        files: TaskFiles,
        assets: Path,
        mesh_faces: int,
        renderer: Renderer,
        cameras: Sequence[str] = (CAMERA,),
    ):
        envs = import_upstream(assets)
        from robosuite import load_controller_config  # pyright: ignore[reportMissingImports]

        path = str(files.definition)
        _, base = problem_of(envs, path)
        base = strewn(base, files.distractors)
        self.domain = extended(base, _Lean, mesh_faces=mesh_faces, task_name=files.name)(
            path,
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
            hard_reset=False,
        )
        self.domain.object_property_initializers *= 2  # what a reset of upstream's makes of them
        self.distractors = Distractors(self.domain) if files.distractors else None
        self._renderer = renderer
        self._scenes = {each: renderer.add(self.model, each, hidden_groups=HIDDEN_GROUPS) for each in cameras}
        self._controller = ArmController(self.domain)

    def _reset(self) -> None:
        """What upstream's reset leaves behind, without building the model again."""
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        domain = self.domain
        while True:
            domain.sim.reset()
            for name, values in domain.pristine.items():
                getattr(self.model, name)[:] = values
            domain.sim.forward()
            domain.robots[0].gripper.current_action = np.zeros(1)
            try:
                domain._reset_internal()
                break
            except (RandomizationError, BdbQuit):  # objects did not fit: upstream draws again, or opens a debugger
                continue
        domain.sim.forward()
        domain.visualize(vis_settings=dict.fromkeys(domain._visualizations, False))
        self._controller.reset()

    def _move_regions(self) -> None:
        domain, zones = self.domain, _Zones()
        sites = domain.object_sites_dict
        kept = {name: list(getattr(domain, name)) for name in _GROWING}
        domain._load_sites_in_arena(zones)
        for zone in zones:
            name = zone.get("name")
            sites[name] = domain.object_sites_dict[name]
            site = self.model.site(name)
            site.pos[:], site.size[:] = (np.array(zone.get(key).split(), float) for key in ("pos", "size"))
            self.model.site_sameframe[site.id] = 0  # MuJoCo does not look at the position of one that lay at 0, 0, 0
        domain.object_sites_dict = sites
        domain._setup_placement_initializer(zones)
        for name, values in kept.items():
            setattr(domain, name, values)

    def step(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        self._controller.step(action)
        domain = self.domain
        solved = bool(domain._check_success())
        domain._post_process()
        return solved

    def frame(self, camera: str) -> np.ndarray:
        """Draw the present state."""
        return self._renderer.render(self._scenes[camera], self.data)[::-1, ::-1].copy()

    def _reload_textures(self, textures: list[int]) -> None:
        for number in self._scenes.values():
            self._renderer.reload_textures(number, textures)

    def close(self) -> None:
        """Free what the scene is drawn with; the renderer's GL context belongs to the process."""
        for number in self._scenes.values():
            self._renderer.remove(number)
        self._scenes.clear()
