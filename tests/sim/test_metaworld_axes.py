"""Meta-World's perturbations: the camera where it should be, pictures without physics, starts beyond the edge."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from reachrl.config.env import MetaworldConfig
from reachrl.envs.base import Perturbed
from reachrl.envs.metaworld import MetaworldEnv
from reachrl.types import Start

TASKS = ("drawer-close", "bin-picking")
PIVOT = np.array([0.0, 0.65, 0.1])


@pytest.fixture(scope="module")
def env():
    made = MetaworldEnv(MetaworldConfig(tasks=TASKS, image_size=48, cameras=("corner2", "gripperPOV")))
    yield Perturbed(made)
    made.close()


def begun(env, variant, task="drawer-close", index=0):
    observation, _ = env.reset(options={"start": Start(task, "eval", index, variant)})
    return observation, env.env._task.sim


def test_the_camera_is_turned_by_the_stated_angle_about_the_workspace(env):
    _, sim = begun(env, "")
    camera, hand = sim.model.camera("corner2").id, sim.model.camera("gripperPOV").id
    position, axes = sim.data.cam_xpos[camera].copy(), sim.data.cam_xmat[camera].reshape(3, 3).copy()
    wrist = sim.data.cam_xmat[hand].copy()
    signs = set()
    for draw in range(6):
        _, sim = begun(env, f"camera=20#{draw}" if draw else "camera=20")
        turned = sim.data.cam_xmat[camera].reshape(3, 3) @ axes.T
        angle = np.degrees(Rotation.from_matrix(turned).as_rotvec())
        np.testing.assert_allclose(np.abs(angle), [0, 0, 20], atol=1e-6)
        expected = PIVOT + Rotation.from_euler("z", angle[2], degrees=True).apply(position - PIVOT)
        np.testing.assert_allclose(sim.data.cam_xpos[camera], expected, atol=1e-9)
        np.testing.assert_array_equal(sim.data.cam_xmat[hand], wrist)  # it hangs from the hand
        signs.add(np.sign(angle[2]))
    assert signs == {-1.0, 1.0}


def test_milder_levels_turn_the_same_way(env):
    _, sim = begun(env, "")
    camera = sim.model.camera("corner2").id
    axes, angles = sim.data.cam_xmat[camera].reshape(3, 3).copy(), []
    for level in (5, 10, 20):
        _, sim = begun(env, f"camera={level}")
        angles.append(np.degrees(Rotation.from_matrix(sim.data.cam_xmat[camera].reshape(3, 3) @ axes.T).as_rotvec()[2]))
    np.testing.assert_allclose(np.array(angles) * np.sign(angles[0]), [5, 10, 20], atol=1e-6)


def test_looks_change_pixels_and_no_state(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 4)).astype(np.float32)

    def episode(variant):
        observation, sim = begun(env, variant)
        frames = [observation["images"]["corner2"]]
        for action in actions:
            observation, *_ = env.step(action)
            frames.append(observation["images"]["corner2"])
        return np.stack(frames).astype(int), sim.data.qpos.copy(), sim.data.qvel.copy(), observation["state"]

    plain = episode("")
    for variant in ("light=2", "colour=1", "texture=1", "camera=20", "noise=40", "language=1"):
        frames, *state = episode(variant)
        for found, expected in zip(state, plain[1:], strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=variant)
        assert (np.abs(frames - plain[0]).mean() > 5) == (variant != "language=1"), variant
        np.testing.assert_array_equal(begun(env, "")[0]["images"]["corner2"], plain[0][0], err_msg=f"after {variant}")


def test_a_stop_of_light_doubles_or_halves_every_lamp(env):
    _, sim = begun(env, "")
    lamps = sim.model.light_diffuse.copy(), sim.model.vis.headlight.ambient.copy()
    factors = set()
    for draw in range(1, 7):
        _, sim = begun(env, f"light=1#{draw}")
        factor = sim.model.light_diffuse / lamps[0]
        np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-6)
        np.testing.assert_allclose(sim.model.vis.headlight.ambient, lamps[1] * factor[0, 0], rtol=1e-6)
        factors.add(round(float(factor[0, 0]), 6))
    assert factors == {0.5, 2.0}


def test_a_bin_that_the_instruction_calls_red_stays_red(env):
    _, sim = begun(env, "", "bin-picking")
    colours = sim.model.geom_rgba.copy()
    moved = [i for i in range(sim.model.ngeom) if "bin" in sim.model.body(sim.model.geom_bodyid[i]).name]
    arm = [i for i in range(sim.model.ngeom) if sim.model.body(sim.model.geom_bodyid[i]).name == "right_l2"]
    _, sim = begun(env, "colour=1", "bin-picking")
    assert moved and (sim.model.geom_rgba[moved] == colours[moved]).all()
    assert arm and (sim.model.geom_rgba[arm] != colours[arm]).any()
    _, sim = begun(env, "", "bin-picking")
    assert (sim.model.geom_rgba == colours).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_start_lies_beyond_one_edge_by_its_share(env, task):
    _, sim = begun(env, "", task)
    space = sim._random_reset_space
    extent = space.high - space.low
    made = env.env._made[task][0]
    for index in range(4):
        inside = made.start("eval", index)
        outside = env.env._start_vector(made, Start(task, "eval", index, "start=0.2"))
        (axis,) = np.flatnonzero(inside != outside)
        beyond = np.maximum(space.low - outside, outside - space.high)[axis]
        assert beyond == pytest.approx(0.2 * extent[axis])


def test_the_expert_still_solves_what_lies_beyond(env):
    solved = 0
    for index in range(3):
        begun(env, "start=0.4", index=index)
        for _ in range(30):
            _, _, success, truncated, _ = env.step(env.expert_action())
            if success or truncated:
                break
        solved += success
    assert solved == 3
