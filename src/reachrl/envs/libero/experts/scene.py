"""What an expert knows of a running LIBERO task: the simulator's own state, by the names in the task file."""

import numpy as np

from reachrl.envs.libero.experts.geometry import Surfaces, subtree
from reachrl.envs.libero.simulation import Simulation

_ROBOT = ("robot0", "gripper0", "mount0")
_NEAR_M = 0.03


class Scene:
    """Names to places.

    Args:
        simulation: the running task.
    """

    def __init__(self, simulation: Simulation):
        self.simulation, self.domain = simulation, simulation.domain
        model = simulation.model
        self._surfaces = Surfaces(model)
        robot = {body for body in range(model.nbody) if str(model.body(body).name).startswith(_ROBOT)}
        self._everything = self._surfaces.geoms_of(set(range(model.nbody)) - robot)
        self._geoms: dict[str, list[int]] = {}

    @property
    def goals(self) -> list[list[str]]:
        """What must hold at the end: predicates as lists of words."""
        return self.domain.parsed_problem["goal_state"]

    def holds(self, goal: list[str]) -> bool:
        """Whether a predicate is true now."""
        return bool(self.domain._eval_predicate(goal))

    def geoms(self, thing: str) -> list[int]:
        """The colliding geoms of an object or fixture."""
        if thing not in self._geoms:
            bodies = subtree(self.simulation.model, self.domain.obj_body_id[thing])
            self._geoms[thing] = self._surfaces.geoms_of(bodies)
        return self._geoms[thing]

    def points(self, thing: str) -> np.ndarray:
        """Points on the surface of an object or fixture f64[P 3]."""
        return self._surfaces.points(self.simulation.data, self.geoms(thing))

    def others(self, thing: str) -> np.ndarray:
        """Points on everything but the robot and `thing` f64[Q 3]."""
        own = set(self.geoms(thing))
        return self._surfaces.points(self.simulation.data, [geom for geom in self._everything if geom not in own])

    def origin(self, thing: str) -> np.ndarray:
        """The body's origin, which predicates look at: metres f64[3]."""
        return self.simulation.data.xpos[self.domain.obj_body_id[thing]].copy()

    def is_region(self, name: str) -> bool:
        """Whether `name` is a region (a site) and no object or fixture."""
        return name in self.domain.object_sites_dict

    def target(self, name: str) -> np.ndarray:
        """The middle of a region, or the origin of an object: metres f64[3]."""
        if self.is_region(name):
            return np.array(self.domain.sim.data.get_site_xpos(name))
        return self.origin(name)

    def floor(self, thing: str, place: np.ndarray, below: float) -> float:
        """Height of the highest point under `place` f64[2] that is lower than `below`, without `thing`: metres."""
        points = self.others(thing)
        near = points[np.linalg.norm(points[:, :2] - place, axis=1) < _NEAR_M]
        under = near[near[:, 2] < below]
        return float(under[:, 2].max()) if len(under) else float(self.table_height())

    def table_height(self) -> float:
        """Of what everything stands on, metres."""
        return float(self.domain.workspace_offset[2])
