"""Things of LIBERO's on the table beside a task's own: `distractors`, a robustness axis.

A task's scene with them is compiled once. Those that an episode does not use hover behind the camera, weightless.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.config.libero_tasks import instruction
from reachrl.config.perturbations import Variant
from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.installation import TaskFiles, import_upstream
from reachrl.envs.libero.upstream import CAMERA, extended, seeded
from reachrl.errors import ConfigError
from reachrl.streams import Stream, generator
from reachrl.types import Start

NUM_KINDS = 6  # in a task's scene
_KINDS = (
    "alphabet_soup",
    "bbq_sauce",
    "black_book",
    "butter",
    "chocolate_pudding",
    "cookies",
    "cream_cheese",
    "glazed_rim_porcelain_ramekin",
    "ketchup",
    "macaroni_and_cheese",
    "milk",
    "moka_pot",
    "orange_juice",
    "popcorn",
    "porcelain_mug",
    "red_coffee_mug",
    "salad_dressing",
    "tomato_sauce",
    "white_yellow_mug",
    "yellow_book",
)
_APART_M = 0.03  # least distance from what belongs to the task and from others, beside a distractor's own radius
_FROM_WAY_M = 0.07  # the same from the way between the hand, what it is to take and where that is to go
_TALL_M = 0.2  # as high as a distractor may hide what stands behind it
_LEAST_RADIUS_M = 0.045
_AROUND_M = (0.05, 0.1, 0.15, 0.2, 0.3)  # how far beyond the task's things they lie, tried in turn
_DRAWS = 300
_ABOVE_M, _LEVEL_M = 1.0, 0.06  # where a table is looked for from, and how exactly its height is known
_SEEN_AT_M, _SEEN_SHARE = 0.05, 0.85  # height that the camera is to see, and how much of the picture counts
_MET = 0  # the geom group that rays meet
_RAY = np.array([1, 0, 0, 0, 0, 0], np.uint8)
_BEHIND_M = 10.0  # the camera looks the other way


def with_distractors(files: TaskFiles, assets: Path) -> TaskFiles:
    """A task whose scene has further things, of kinds that share no word with a kind that it has or what is said.

    Args:
        files: of the task.
        assets: folder with meshes and textures.
    """
    envs = import_upstream(assets)
    problem = envs.env_wrapper.BDDLUtils.robosuite_parse_problem(str(files.definition))
    has = [*problem["objects"], *problem["fixtures"]]
    words = {word for kind in has for word in kind.split("_")} | set(instruction(files.name).split())
    kinds = [kind for kind in _KINDS if not words & (set(kind.split("_")) - {"and"})]
    chosen = generator(0, Stream.PERTURBATION, "distractors", files.name).permutation(len(kinds))[:NUM_KINDS]
    return replace(files, distractors={f"distractor_{kinds[n]}": kinds[n] for n in sorted(chosen.tolist())})


def strewn(base: type, distractors: Mapping[str, str]) -> type:
    """Upstream's task class with further things in its scene, by name and kind."""
    return extended(base, _Strewn, distractors=distractors) if distractors else base


class _Strewn:
    """Put in front of an upstream task class: further things, which none of its samplers places."""

    distractors: Mapping[str, str] = {}

    def _load_objects_in_arena(self: Any, mujoco_arena: Any) -> None:
        super()._load_objects_in_arena(mujoco_arena)  # pyright: ignore[reportAttributeAccessIssue]
        from libero.libero.envs.objects import get_object_fn  # pyright: ignore[reportMissingImports]

        for number, (name, kind) in enumerate(self.distractors.items()):
            thing = get_object_fn(kind)(name=name)
            # Within the room, of whose size MuJoCo makes the nearest thing that is drawn, and touching nothing.
            thing.get_obj().set("pos", f"0 0 {2 + 0.3 * number}")
            for body in thing.get_obj().iter("body"):
                body.set("gravcomp", "1")
            self.objects_dict[name] = thing


class Distractors:
    """Places the further things of one simulation.

    Args:
        domain: upstream's task object, of a class made by `strewn`.
    """

    def __init__(self, domain: Any):
        self._domain = domain

    @property
    def _model(self) -> Any:
        return self._domain.sim.model._model

    @property
    def _data(self) -> Any:
        return self._domain.sim.data._data

    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """Which joint positions bool[nq] and velocities bool[nv] are the task's, not a distractor's."""
        positions, velocities = np.ones(self._model.nq, bool), np.ones(self._model.nv, bool)
        for name in self._domain.distractors:
            joint = self._joint(name)
            positions[joint.qposadr[0] : joint.qposadr[0] + 7] = False
            velocities[joint.dofadr[0] : joint.dofadr[0] + 6] = False
        return positions, velocities

    def widened(self, state: np.ndarray) -> np.ndarray:
        """The state f64[K] of this scene, with the task's own things as in one of the scene without distractors."""
        positions, velocities = self.own()
        qpos, qvel, own = self._data.qpos.copy(), np.zeros(self._model.nv), int(positions.sum())
        qpos[positions], qvel[velocities] = state[1 : 1 + own], state[1 + own :]
        return np.concatenate([state[:1], qpos, qvel])

    def place(self, start: Start | None) -> None:
        """Put as many on the table as the episode's variant says; the others out of sight.

        Raises:
            ConfigError: there is no room.
        """
        import_mujoco().mj_kinematics(self._model, self._data)
        import_mujoco().mj_camlight(self._model, self._data)
        variant = None if start is None else Variant.of(start)
        places: dict[str, np.ndarray] = {}
        if start is not None and variant is not None:
            rng = variant.generator(start)
            names = list(self._domain.distractors)
            with self._only_solids():
                for name in [names[n] for n in rng.permutation(len(names))][: int(variant.value)]:
                    places[name] = self._pose(name, self._spot(name, places, rng), int(rng.integers(2**31)))
        for number, name in enumerate(self._domain.distractors):
            joint = self._joint(name)
            position, velocity = joint.qposadr[0], joint.dofadr[0]
            parked = np.array([_BEHIND_M + number, 0.0, 5.0, 1.0, 0.0, 0.0, 0.0])
            self._data.qpos[position : position + 7] = places.get(name, parked)
            self._data.qvel[velocity : velocity + 6] = 0.0
            bodies = self._model.body_rootid == joint.bodyid[0]
            self._model.body_gravcomp[bodies] = 0.0 if name in places else 1.0

    @property
    def _solid(self) -> np.ndarray:
        """Which geoms collide, bool[G]: what is drawn of them differs between the two simulations."""
        return (self._model.geom_contype | self._model.geom_conaffinity) > 0

    @contextmanager
    def _only_solids(self) -> Iterator[None]:
        """While the block runs, rays meet nothing else."""
        groups = self._model.geom_group.copy()
        self._model.geom_group[:] = np.where(self._solid, _MET, 1 - _MET)
        try:
            yield
        finally:
            self._model.geom_group[:] = groups

    def _joint(self, name: str) -> Any:
        return self._model.joint(self._domain.objects_dict[name].joints[-1])

    def _pose(self, name: str, spot: np.ndarray, seed: int) -> np.ndarray:
        """Position and orientation f64[7] at which upstream's own sampler puts a thing down at a place x y."""
        from libero.libero.envs.regions import get_region_samplers  # pyright: ignore[reportMissingImports]

        domain, thing = self._domain, self._domain.objects_dict[name]
        table = next(
            kind for kind, names in domain.parsed_problem["fixtures"].items() if domain.workspace_name in names
        )
        x, y = spot - np.array(domain.workspace_offset)[:2]
        sampler = get_region_samplers(domain.parsed_problem["problem_name"], table)(
            name,
            thing,
            x_ranges=[[x, x]],
            y_ranges=[[y, y]],
            rotation=thing.rotation,
            rotation_axis=thing.rotation_axis,
            reference_pos=domain.workspace_offset,
        )
        sampler.ensure_object_boundary_in_range = False
        with seeded(seed):
            position, orientation, _ = sampler.sample()[name]
        return np.array([*position, *orientation])

    def _spot(self, name: str, placed: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """A place x y on the table with as much room around it as is asked for, or with the most of those drawn."""
        boxes, free = self._boxes(), self._kept_free()
        radius, best, most = self._radius(name), None, -np.inf
        low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
        for around in _AROUND_M:
            for spot in rng.uniform(low - around, high + around, (_DRAWS, 2)):
                others = [np.linalg.norm(spot - pose[:2]) - self._radius(other) for other, pose in placed.items()]
                beside = float(min([_from_boxes(spot, boxes), *others])) - radius
                room = min(beside - _APART_M, _from_pieces(spot, free) - radius - _FROM_WAY_M)
                if beside > 0 and room > most and self._on_table(spot, radius) and self._seen(spot):
                    best, most = spot, room
                    if most >= 0:
                        return best
        if best is None:
            raise ConfigError(
                f"distractors: no room for {len(placed) + 1} on the table of "
                f"{Path(self._domain.bddl_file_name).stem} at this start: take a lower level, or leave the axis out"
            )
        return best

    def _radius(self, name: str) -> float:
        return max(_LEAST_RADIUS_M, float(self._domain.objects_dict[name].horizontal_radius))

    def _boxes(self) -> np.ndarray:
        """What the task's things and furniture cover, as corners f64[N 2 2]: low and high x y of each geom."""
        model, data, domain = self._model, self._data, self._domain
        own = [name for name in domain.obj_body_id if name not in domain.distractors]
        geoms = np.isin(model.body_rootid[model.geom_bodyid], [domain.obj_body_id[name] for name in own]) & self._solid
        turns = data.geom_xmat[geoms].reshape(-1, 3, 3)
        centres = data.geom_xpos[geoms] + np.einsum("nij,nj->ni", turns, model.geom_aabb[geoms, :3])
        halves = np.einsum("nij,nj->ni", np.abs(turns), model.geom_aabb[geoms, 3:])
        return np.stack([centres - halves, centres + halves], axis=1)[..., :2]

    def _kept_free(self) -> np.ndarray:
        """Pieces of the plane f64[N 2 2]: where the hand goes, and what the camera sees past at the task's things."""
        domain, data = self._domain, self._data
        things = []
        for name in domain.obj_of_interest:
            if name in domain.obj_body_id:
                things.append(data.xpos[domain.obj_body_id[name]])
            elif name in domain.object_sites_dict:
                things.append(data.site_xpos[self._model.site(name).id])
        way = [data.site_xpos[domain.robots[0].eef_site_id], *things]
        sights = [data.camera(CAMERA).xpos - thing for thing in things]
        seen_past = [thing + sight * (_TALL_M / sight[2]) for thing, sight in zip(things, sights, strict=True)]
        pieces = [*itertools.pairwise(way), *zip(things, seen_past, strict=True)]
        return np.array(pieces)[..., :2]

    def _on_table(self, spot: np.ndarray, radius: float) -> bool:
        """Whether what lies below a place, and below four points around it, is as high as the table."""
        height = float(self._domain.workspace_offset[2])
        for dx, dy in ((0, 0), (radius, 0), (-radius, 0), (0, radius), (0, -radius)):
            above = np.array([spot[0] + dx, spot[1] + dy, height + _ABOVE_M])
            down, hit = np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32)
            distance = import_mujoco().mj_ray(self._model, self._data, above, down, _RAY, 1, -1, hit)
            if hit[0] < 0 or abs(distance - _ABOVE_M) > _LEVEL_M:
                return False
        return True

    def _seen(self, spot: np.ndarray) -> bool:
        """Whether the fixed camera sees what lies at a place: neither the picture's edge nor a thing hides it."""
        model, camera = self._model, self._data.camera(CAMERA)
        target = np.array([*spot, self._domain.workspace_offset[2] + _SEEN_AT_M])
        right, up, back = (target - camera.xpos) @ camera.xmat.reshape(3, 3)
        edge = np.tan(np.radians(model.camera(CAMERA).fovy[0]) / 2) * _SEEN_SHARE
        if max(abs(right), abs(up)) > -back * edge:
            return False
        ray, hit = target - camera.xpos, np.zeros(1, np.int32)
        distance = import_mujoco().mj_ray(model, self._data, camera.xpos.copy(), ray, _RAY, 1, -1, hit)
        return hit[0] < 0 or distance > 1 - _LEVEL_M


def _from_boxes(spot: np.ndarray, boxes: np.ndarray) -> float:
    """Distance from the nearest of some boxes f64[N 2 2]."""
    return float(np.linalg.norm(np.maximum(np.maximum(boxes[:, 0] - spot, spot - boxes[:, 1]), 0), axis=1).min())


def _from_pieces(spot: np.ndarray, pieces: np.ndarray) -> float:
    """Distance from the nearest of some pieces of the plane f64[N 2 2]."""
    begin, piece = pieces[:, 0], pieces[:, 1] - pieces[:, 0]
    along = np.clip(((spot - begin) * piece).sum(1) / np.maximum((piece**2).sum(1), 1e-12), 0, 1)
    return float(np.linalg.norm(begin + along[:, None] * piece - spot, axis=1).min())
