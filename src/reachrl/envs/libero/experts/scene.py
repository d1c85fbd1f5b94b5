"""What an expert knows of a running LIBERO task: the simulator's own state, by the names in the task file."""

from dataclasses import dataclass

import numpy as np

from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.experts.geometry import Surfaces, subtree
from reachrl.envs.libero.simulation import Simulation

_ROBOT = ("robot0", "gripper0", "mount0")
_NEAR_M = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A drawer's, door's or knob's joint, and how it is to move."""

    hinge: bool
    anchor: np.ndarray  # f64[3], metres
    axis: np.ndarray  # f64[3], of positive motion
    body: int
    distance: float  # to the middle of where it shall be, metres or rad

    @property
    def turn(self) -> float:
        """By how much a hinge with a vertical axis has to turn, counter-clockwise from above: rad."""
        return self.distance * float(np.sign(self.axis[2]))


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
            self._geoms[thing] = self._geoms_of_body(self.domain.obj_body_id[thing])
        return self._geoms[thing]

    def points(self, thing: str) -> np.ndarray:
        """Points on the surface of an object or fixture f64[P 3]."""
        return self._surfaces.points(self.simulation.data, self.geoms(thing))

    def points_of_body(self, body: int) -> np.ndarray:
        """Points on one body and what hangs on it f64[P 3]."""
        return self._surfaces.points(self.simulation.data, self._geoms_of_body(body))

    def joint(self, goal: list[str]) -> Joint:
        """The joint that a predicate is about, and what it wants of it.

        Args:
            goal: such as `open cabinet_top_region` or `turnon stove`.
        """
        word, name = goal
        site = self.domain.object_sites_dict.get(name)
        thing = self.domain.get_object(name if site is None else site.parent_name)
        model, data = self.simulation.model, self.simulation.data
        found = model.joint((thing if site is None else site).joints[0])
        wanted = np.mean(thing.object_properties["articulation"][f"default_{word}_ranges"])
        return Joint(
            hinge=model.jnt_type[found.id] == import_mujoco().mjtJoint.mjJNT_HINGE,
            anchor=data.xanchor[found.id].copy(),
            axis=data.xaxis[found.id].copy(),
            body=int(model.jnt_bodyid[found.id]),
            distance=float(wanted - data.qpos[found.qposadr[0]]),
        )

    def handle(self, joint: Joint) -> np.ndarray:
        """The middle of a drawer's handle, which is what stands out furthest: metres f64[3]."""
        points = self.points_of_body(joint.body)
        out = self._opening(joint)
        furthest = points[points @ out > (points @ out).max() - 0.012]
        return 0.5 * (furthest.min(0) + furthest.max(0))

    def _opening(self, joint: Joint) -> np.ndarray:
        """The direction f64[3] in which a drawer opens: towards the longer part of its joint's range."""
        low, high = self.simulation.model.jnt_range[self.simulation.model.body_jntadr[joint.body]]
        return joint.axis if high > -low else -joint.axis

    def others(self, thing: str) -> np.ndarray:
        """Points on everything but the robot and `thing` f64[Q 3]."""
        return self._points_without(self.geoms(thing))

    def others_than_body(self, body: int) -> np.ndarray:
        """Points on everything but the robot, one body and what hangs on it f64[Q 3]."""
        return self._points_without(self._geoms_of_body(body))

    def everything(self) -> np.ndarray:
        """Points on everything but the robot f64[Q 3]."""
        return self._points_without([])

    def _points_without(self, geoms: list[int]) -> np.ndarray:
        own = set(geoms)
        return self._surfaces.points(self.simulation.data, [geom for geom in self._everything if geom not in own])

    def _geoms_of_body(self, body: int) -> list[int]:
        return self._surfaces.geoms_of(subtree(self.simulation.model, body))

    def origin(self, thing: str) -> np.ndarray:
        """The body's origin, which predicates look at: metres f64[3]."""
        return self.simulation.data.xpos[self.domain.obj_body_id[thing]].copy()

    def is_region(self, name: str) -> bool:
        """Whether `name` is a region (a site) and no object or fixture."""
        return name in self.domain.object_sites_dict

    def is_drawer(self, name: str) -> bool:
        """Whether `name` is a region that moves on a joint."""
        return self.is_region(name) and bool(self.domain.object_sites_dict[name].joints)

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
