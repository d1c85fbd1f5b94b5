"""One Meta-World task with numbered starts and no state carried between episodes."""

import hashlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.config.env import EVAL_POOL
from reachrl.envs.base import SPLIT_NUMBER
from reachrl.envs.gl import import_mujoco
from reachrl.envs.scene import load_scene
from reachrl.errors import MissingExtra
from reachrl.types import Split

_MIN_RANGE_M = 0.005  # dimensions of the start space that vary by less make no visible difference
_HAND_DOWN = (1.0, 0.0, 1.0, 0.0)  # the hand's orientation, a quaternion
_LIVE = ("model", "data", "mujoco_renderer")  # attributes that hold the simulation itself


# Those of each task found so far: they cost a simulator's reset each, and all of a process's simulators agree on them.
_STARTS: dict[str, dict[tuple[Split, int], np.ndarray]] = {}


class _Rejected(Exception):
    """The task asked for a second start vector: it does not accept the first."""


class _Lean:
    """Put in front of a Meta-World class: our scene, one given start vector, no time limit of its own."""

    max_path_length = 10**9
    scene_faces = 0
    mujoco: Any = None
    settle_hand = True

    def _initialize_simulation(self: Any) -> tuple[Any, Any]:
        model = load_scene(Path(self.fullpath), self.scene_faces)
        return model, self.mujoco.MjData(model)

    def _reset_hand(self: Any, steps: int = 50) -> None:
        """Meta-World's own, in one call: the pose and the effort are the same at every step."""
        if self.settle_hand:
            self.data.mocap_pos[0] = self.hand_init_pos
            self.data.mocap_quat[0] = _HAND_DOWN
            self.data.ctrl[:] = (-1.0, 1.0)
            self.mujoco.mj_step(self.model, self.data, nstep=steps * self.frame_skip)
        super()._reset_hand(0)  # type: ignore[misc]

    def step(self: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Meta-World's own without unused work: copies, time limits, contact forces."""
        mocap = self.data.mocap_pos
        mocap[0] = np.minimum(np.maximum(mocap[0] + action[:3] * self.action_scale, self.mocap_low), self.mocap_high)
        self.data.mocap_quat[0] = _HAND_DOWN
        self.data.ctrl[:] = (action[3], -action[3])
        self.mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        self.curr_path_length += 1
        for site in self._target_site_config:
            self._set_pos_site(*site)
        self.mujoco.mj_forward(self.model, self.data)
        space = self.sawyer_observation_space
        observation = np.minimum(np.maximum(self._get_obs(), space.low), space.high)
        self._last_stable_obs = observation
        reward, info = self.evaluate_state(observation, action)
        return observation, reward, False, False, info

    def _get_obs(self: Any) -> np.ndarray:
        """Meta-World's own f64[39]: what is seen now, what was seen one step ago, and the goal."""
        observation = np.empty(39)
        observation[36:] = self._get_pos_goal()
        observation[18:36] = self._prev_obs
        self._prev_obs = observation[:18] = self._get_curr_obs_combined_no_goal()
        return observation

    def _get_curr_obs_combined_no_goal(self: Any) -> np.ndarray:
        """Meta-World's own f64[18] without its splitting and stacking, which took a fifth of a decision."""
        observation = np.zeros(18)
        observation[:3] = self.get_endeff_pos()
        opening = np.linalg.norm(self.data.body("rightclaw").xpos - self.data.body("leftclaw").xpos)
        observation[3] = min(opening / 0.1, 1.0)
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        for i in range(len(positions) // 3):
            observation[4 + 7 * i : 7 + 7 * i] = positions[3 * i : 3 * i + 3]
            observation[7 + 7 * i : 11 + 7 * i] = quaternions[4 * i : 4 * i + 4]
        return observation

    def _get_state_rand_vec(self: Any) -> np.ndarray:
        vector, self._last_rand_vec = self._last_rand_vec, None
        if vector is None:
            raise _Rejected
        return vector


class MetaworldTask:
    """One task's simulator, its scripted expert and its numbered start states.

    Args:
        name: Meta-World's name without `-v3`.
        mesh_faces: see `MetaworldConfig`.
    """

    def __init__(self, name: str, mesh_faces: int):
        self._mujoco = import_mujoco()
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise MissingExtra(
                f"Meta-World is not installed ({error}); run  pip install 'reachrl[metaworld]'"
            ) from error
        self.name = name
        base = ALL_V3_ENVIRONMENTS[f"{name}-v3"]
        ours = {"scene_faces": mesh_faces, "mujoco": self._mujoco}
        self.sim: Any = type(f"Lean{base.__name__}", (_Lean, base), ours)()
        self.sim._set_task_called = True
        self.sim._partially_observable = False  # the expert sees the goal; the policy sees only the frame
        self.sim.__dict__.pop("sawyer_observation_space", None)  # computed for a hidden goal
        self._expert = ENV_POLICY_MAP[f"{name}-v3"]()
        self._observation = np.zeros(39)
        self._first_distances = np.ones(2)
        self._pristine = {k: _own_copy(v) for k, v in self.sim.__dict__.items() if k not in _LIVE}
        model = self.sim.model
        self._pristine_model = (model.body_pos.copy(), model.site_pos.copy())
        self._starts = _STARTS.setdefault(name, {})
        self._held_out: np.ndarray | None = None  # normalised vectors of the evaluation starts
        self.scene: str = self.sim.fullpath
        """The file of its scene, which some tasks have in common."""

    # ---- episodes ----

    def reset(self, start: np.ndarray) -> None:
        """Begin the episode with start vector `start`, as a freshly made simulator would.

        Meta-World resets twice: the first pass moves furniture in the model, the second settles the arm in
        that scene. Only the second needs the arm.
        """
        sim = self.sim
        self._place(start)
        self._mujoco.mj_resetData(sim.model, sim.data)
        sim._last_rand_vec = start.copy()
        self._observation = sim.reset_model()
        sim._prev_obs = self._observation[:18].copy()
        self._observation[18:36] = sim._prev_obs
        # Positions for the first frame; dynamics are left to the first step.
        self._mujoco.mj_kinematics(sim.model, sim.data)
        self._mujoco.mj_camlight(sim.model, sim.data)
        self._first_distances = np.maximum(self._distances(), 1e-6)

    def _place(self, start: np.ndarray) -> None:
        """Move furniture and goals for `start` in an otherwise untouched simulator, without settling the arm."""
        sim = self.sim
        for name in set(sim.__dict__) - set(self._pristine) - set(_LIVE):
            del sim.__dict__[name]
        sim.__dict__.update({k: _own_copy(v) for k, v in self._pristine.items()})
        sim.model.body_pos[:], sim.model.site_pos[:] = self._pristine_model
        self._mujoco.mj_resetData(sim.model, sim.data)
        self._mujoco.mj_forward(sim.model, sim.data)
        sim._last_rand_vec = start.copy()
        sim.settle_hand = False
        try:
            sim.reset_model()
        finally:
            sim.settle_hand = True

    def step(self, action: np.ndarray) -> bool:
        """One simulator step with `action` f32[4]; whether the task is now solved."""
        self._observation, _, _, _, info = self.sim.step(action)
        return bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action f32[4], clipped to [-1, 1]."""
        return np.clip(self._expert.get_action(self._observation), -1.0, 1.0).astype(np.float32)

    def ee_state(self) -> np.ndarray:
        """Hand position in metres and gripper opening (0 closed .. 1 open), f32[4]."""
        return self._observation[:4].astype(np.float32)

    def progress(self) -> float:
        """How far along the task is, 0..1: half for bringing the hand to the object, half for the object to its goal.

        Each half is the share of the distance at the start that is gone. Meta-World's own dense reward is no
        measure of progress: it stays at 0 through a whole drawer-close and at 0.1 through most of a coffee-button.
        """
        return float(np.clip(1.0 - self._distances() / self._first_distances, 0.0, 1.0).mean())

    def _distances(self) -> np.ndarray:
        """Hand to object and object to goal in metres, f64[2]; both hand to goal where there is no object to move."""
        hand, goal = self.sim.get_endeff_pos(), self.sim._target_pos[:3]
        if self.name.startswith("reach"):
            return np.full(2, np.linalg.norm(hand - goal))
        thing = self.sim._get_pos_objects()[:3]
        return np.linalg.norm([hand - thing, thing - goal], axis=-1)

    def show_goal(self) -> None:
        """Put the goal markers where the target is: stepping moves some of them away."""
        for site in self.sim._target_site_config:
            self.sim._set_pos_site(*site)

    # ---- starts ----

    def start(self, split: Split, index: int) -> np.ndarray:
        """Start vector `index` of `split` f64[K], inside the task's own start space and accepted by it.

        It depends on the task, the split and the index only. Training and validation starts keep a distance of
        `start_gap()` from every evaluation start.
        """
        key = (split, index)
        if key not in self._starts:
            rng = np.random.default_rng([_stable_hash(self.name), SPLIT_NUMBER[split], index])
            space = self.sim._random_reset_space
            for _ in range(10_000):
                vector = rng.uniform(space.low, space.high)
                if self._accepts(vector) and (split == "eval" or self._distance(vector) >= self.start_gap()):
                    break
            else:
                raise RuntimeError(f"no start vector found for {self.name} {split} {index}")
            self._starts[key] = vector
        return self._starts[key]

    def start_beyond(self, split: Split, index: int, share: float, rng: np.random.Generator) -> np.ndarray:
        """Start vector `index` of `split` f64[K] with one coordinate moved out of the task's own start space.

        Args:
            split: of the start.
            index: its number.
            share: how far beyond the edge the coordinate lies, as a share of the space's extent.
            rng: chooses coordinate and edge; the next one where the task accepts no such start.

        Raises:
            RuntimeError: the task accepts none.
        """
        space = self.sim._random_reset_space
        extent = space.high - space.low
        sides = [(axis, edge) for axis in np.flatnonzero(extent > _MIN_RANGE_M) for edge in (-1, 1)]
        for place in rng.permutation(len(sides)):
            axis, edge = sides[place]
            vector = self.start(split, index).copy()
            vector[axis] = (space.low if edge < 0 else space.high)[axis] + edge * share * extent[axis]
            if self._accepts(vector):
                return vector
        raise RuntimeError(f"{self.name} {split} {index}: no start {share:g} beyond its start space is accepted")

    def normalised(self, vectors: np.ndarray) -> np.ndarray:
        """Start vectors f64[... K] in units of the start space's extent, dimensions that hardly vary left out."""
        space = self.sim._random_reset_space
        extent = space.high - space.low
        free = extent > _MIN_RANGE_M
        return (vectors[..., free] - space.low[free]) / extent[free]

    def start_gap(self) -> float:
        """Least normalised distance of a training or validation start from an evaluation start.

        A quarter of the spacing that `EVAL_POOL` starts would have on a regular grid.
        """
        dimensions = self.normalised(self.sim._random_reset_space.low).size
        return 0.25 * EVAL_POOL ** (-1.0 / dimensions)

    def _distance(self, vector: np.ndarray) -> float:
        if self._held_out is None:
            self._held_out = self.normalised(np.stack([self.start("eval", index) for index in range(EVAL_POOL)]))
        return float(np.linalg.norm(self._held_out - self.normalised(vector), axis=-1).min())

    def _accepts(self, vector: np.ndarray) -> bool:
        """Whether the task accepts the start vector; tried in a copy of the simulation."""
        sim = self.sim
        running, model_state = dict(sim.__dict__), (sim.model.body_pos.copy(), sim.model.site_pos.copy())
        sim.data = self._mujoco.MjData(sim.model)
        try:
            self._place(vector)
        except _Rejected:
            return False
        finally:
            sim.__dict__.clear()
            sim.__dict__.update(running)
            sim.model.body_pos[:], sim.model.site_pos[:] = model_state
        return True


def _own_copy(value: Any) -> Any:
    """A copy of what an episode may change; views of the live simulation stay views."""
    if isinstance(value, np.ndarray):
        return value.copy() if value.base is None else value
    return deepcopy(value) if isinstance(value, (dict, list)) else value


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
