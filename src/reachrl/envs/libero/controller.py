"""robosuite's operational-space control of the arm, without what it computes more than once."""

from functools import cache
from typing import Any

import numpy as np

from reachrl.envs.gl import import_mujoco

_NULLSPACE_KP = 10.0


class ArmController:
    """Moves arm and gripper as upstream's controller does, which it reads its constants and its first state from.

    Upstream computes the whole dynamics three times a substep, once it would do. Only its solver's starting point
    differs, so states agree to rounding (1e-8 in joint positions over a hundred steps).

    One peculiarity is kept: upstream's controller looks at the arm when it is reset, before a stored start state is
    set, and uses what it saw then for the goal and the torques of the first substep. An episode's first action is thus
    relative to where the arm was before.

    Source: robosuite 1.4.0, `OperationalSpaceController` and `Robot.control`; Khatib 1987, equations 17 to 24.

    Args:
        domain: upstream's task object.
    """

    def __init__(self, domain: Any):
        from robosuite.utils.control_utils import set_goal_orientation  # pyright: ignore[reportMissingImports]

        self._mujoco, self._turned, self._torques = import_mujoco(), set_goal_orientation, _compiled_torques()
        self._robot = robot = domain.robots[0]
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        model = self._model
        self._substeps = int(domain.control_timestep / domain.model_timestep)
        theirs = robot.controller
        self._site = robot.eef_site_id
        self._arm = np.array(theirs.qvel_index)
        self._arm_qpos = np.array(theirs.qpos_index)
        self._arm_ctrl = np.array(robot._ref_joint_actuator_indexes)
        self._torque_low, self._torque_high = robot.torque_limits
        self._hand_ctrl = np.array(robot._ref_joint_gripper_actuator_indexes)
        low, high = model.actuator_ctrlrange[self._hand_ctrl].T
        self._hand_middle, self._hand_reach = 0.5 * (high + low), 0.5 * (high - low)
        self._hand_speed = robot.gripper.speed
        self._all_jacobian, self._all_mass = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv))
        self._kp, self._kd = np.array(theirs.kp, float), np.array(theirs.kd, float)
        self.reset()

    def reset(self) -> None:
        """Take over what upstream's controller knows after its own reset."""
        self._theirs = self._robot.controller  # a reset makes a new one
        self._goal_rotation = np.array(self._theirs.goal_ori)
        self._hand = np.zeros(2)
        self._stale = True

    def step(self, action: np.ndarray) -> None:
        """Carry out one action f64[7] of the policy: 50 ms."""
        mujoco, model, data = self._mujoco, self._model, self._data
        goal: np.ndarray | None = None
        rest = self._theirs.initial_joint
        hand_step = np.array([-1.0, 1.0]) * self._hand_speed * np.sign(action[6])
        for _ in range(self._substeps):
            mujoco.mj_step1(model, data)
            seen = self._first_seen() if self._stale else self._look()
            self._stale = False
            if goal is None:
                goal = self._new_goal(action, seen)
            bias = data.qfrc_bias[self._arm]
            torques = self._torques(goal, self._goal_rotation, *seen, bias, rest, self._kp, self._kd)
            data.ctrl[self._arm_ctrl] = np.minimum(np.maximum(torques, self._torque_low), self._torque_high)
            self._hand = np.minimum(np.maximum(self._hand + hand_step, -1.0), 1.0)
            data.ctrl[self._hand_ctrl] = self._hand_middle + self._hand_reach * self._hand
            mujoco.mj_step2(model, data)

    def _new_goal(self, action: np.ndarray, seen: tuple[np.ndarray, ...]) -> np.ndarray:
        """Where the hand shall go, in metres f64[3]; its rotation changes only if the action asks for that."""
        delta = self._theirs.scale_action(action[:6])
        position, rotation, *_ = seen
        if delta[3:].any():
            self._goal_rotation = self._turned(delta[3:], rotation)
        return position + delta[:3]

    def _first_seen(self) -> tuple[np.ndarray, ...]:
        """What upstream's controller saw at its reset."""
        theirs = self._theirs
        return (
            *(theirs.ee_pos, theirs.ee_ori_mat, theirs.joint_pos, theirs.joint_vel),
            *(np.ascontiguousarray(theirs.J_full), np.ascontiguousarray(theirs.mass_matrix)),
        )

    def _look(self) -> tuple[np.ndarray, ...]:
        """Position and rotation of the hand, joint positions and velocities, Jacobian and mass matrix of the arm."""
        mujoco, model, data, arm = self._mujoco, self._model, self._data, self._arm
        mujoco.mj_jacSite(model, data, self._all_jacobian[:3], self._all_jacobian[3:], self._site)
        mujoco.mj_fullM(model, self._all_mass, data.qM)
        return (
            *(data.site_xpos[self._site].copy(), data.site_xmat[self._site].reshape(3, 3).copy()),
            *(data.qpos[self._arm_qpos], data.qvel[arm]),
            *(self._all_jacobian.take(arm, axis=1), self._all_mass.take(arm, axis=0).take(arm, axis=1)),
        )


@cache
def _compiled_torques() -> Any:
    """`_torques` as machine code; numba is there because robosuite needs it."""
    import numba  # pyright: ignore[reportMissingImports]

    return numba.njit(cache=True)(_torques)


def _torques(
    goal: np.ndarray,
    goal_rotation: np.ndarray,
    position: np.ndarray,
    rotation: np.ndarray,
    joints: np.ndarray,
    joint_velocity: np.ndarray,
    jacobian: np.ndarray,
    mass: np.ndarray,
    bias: np.ndarray,
    rest: np.ndarray,
    kp: np.ndarray,
    kd: np.ndarray,
) -> np.ndarray:
    """Joint torques f64[7] that pull the hand to the goal like a critically damped spring, and the elbow to its rest.

    Args:
        goal: of the hand, metres f64[3].
        goal_rotation: f64[3 3].
        position: of the hand, metres f64[3].
        rotation: f64[3 3].
        joints: positions f64[7], rad.
        joint_velocity: f64[7], rad/s.
        jacobian: of the hand, position over rotation, f64[6 7].
        mass: matrix of the arm f64[7 7].
        bias: gravity and Coriolis torques f64[7].
        rest: joint positions that the free direction is pulled to f64[7].
        kp: stiffness f64[6].
        kd: damping f64[6].
    """
    velocity = jacobian @ joint_velocity
    turn = np.zeros(3)
    for axis in range(3):
        turn += 0.5 * np.cross(np.ascontiguousarray(rotation[:, axis]), np.ascontiguousarray(goal_rotation[:, axis]))
    inverse_mass = np.linalg.inv(mass)
    mobility = jacobian @ inverse_mass @ np.ascontiguousarray(jacobian.T)
    wrench = np.zeros(6)
    force = kp[:3] * (goal - position) - kd[:3] * velocity[:3]
    torque = kp[3:] * turn - kd[3:] * velocity[3:]
    # Position and rotation are decoupled: each has its own inertia.
    wrench[:3] = np.linalg.solve(np.ascontiguousarray(mobility[:3, :3]), force)
    wrench[3:] = np.linalg.solve(np.ascontiguousarray(mobility[3:, 3:]), torque)
    pose = mass @ (_NULLSPACE_KP * (rest - joints) - 2.0 * np.sqrt(_NULLSPACE_KP) * joint_velocity)
    # The part of `pose` that does not move the hand: N^T pose with N = 1 - M^-1 J^T (J M^-1 J^T)^-1 J.
    held = np.linalg.solve(mobility, jacobian @ (inverse_mass @ pose))
    return np.ascontiguousarray(jacobian.T) @ (wrench - held) + pose + bias
