"""Our Meta-World against the stock one: same physics, same pictures, no memory, held-out starts apart."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reachrl.config.env import EVAL_POOL, MetaworldConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.envs import vector
from reachrl.envs.gl import import_mujoco
from reachrl.envs.metaworld import MetaworldEnv
from reachrl.envs.metaworld_task import MetaworldTask
from reachrl.envs.scene import build_scene
from reachrl.envs.vector import VectorEnv
from reachrl.testing.conformance_env import check_env
from reachrl.types import Split, Start

pytestmark = pytest.mark.filterwarnings("ignore:Constant")  # experts ask for more than the action range
mujoco = import_mujoco()

TASKS = (
    "drawer-open",
    "door-open",
    "lever-pull",
    "pick-place",
    "basketball",
    "hammer",
    "plate-slide",
    "peg-insert-side",
)
UNCHANGED = ("body_mass", "body_inertia", "body_ipos", "body_iquat", "dof_invweight0", "dof_damping", "eq_data")


@pytest.fixture(scope="module")
def env() -> Iterator[MetaworldEnv]:
    env = MetaworldEnv(MetaworldConfig(tasks=TASKS))
    yield env
    env.close()


def stock(task: str, vector: np.ndarray) -> tuple[Any, np.ndarray]:
    """A fresh simulator as Meta-World makes it, goal visible to the expert, reset to `vector`."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    sim = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    sim._partially_observable = False
    sim.__dict__.pop("sawyer_observation_space", None)
    sim._set_task_called = True
    sim._last_rand_vec = vector.copy()
    return sim, sim.reset()[0]


@pytest.mark.parametrize("task", TASKS)
def test_states_and_outcomes_equal_the_stock_simulators_to_the_last_bit(task: str, env: MetaworldEnv):
    """An expert's episode in both, after another episode has run in ours."""
    from metaworld.policies import ENV_POLICY_MAP

    env.reset(options={"start": Start(task, "train", 1)})
    for _ in range(3):
        env.step(np.array([0.5, -1, -1, 1], np.float32))
    env.reset(options={"start": Start(task, "train", 0)})
    ours = env._task
    assert ours is not None
    theirs, observation = stock(task, env.start_vector(task, "train", 0))
    policy = ENV_POLICY_MAP[f"{task}-v3"]()
    terminated = truncated = False
    while not (terminated or truncated):
        assert np.array_equal(ours.sim.data.qpos, theirs.data.qpos)
        assert np.array_equal(ours._observation, observation)
        action = np.clip(policy.get_action(observation), -1, 1).astype(np.float32)
        assert np.array_equal(env.expert_action(), action)
        success = False
        for _ in range(5):
            observation, _, _, _, info = theirs.step(action)
            success = success or info["success"] == 1
            if success:
                break
        _, _, terminated, truncated, _ = env.step(action)
        assert terminated == success
    assert np.array_equal(ours.sim.data.qpos, theirs.data.qpos)


def test_only_drawn_triangles_change():
    """Masses, colliding shapes and named frames of every scene are those of the stock file."""
    for task in ("drawer-open", "door-open", "hammer"):
        xml = Path(MetaworldTask(task, 200).sim.fullpath)
        theirs, ours = mujoco.MjModel.from_xml_path(str(xml)), build_scene(xml, 200)
        for name in UNCHANGED:
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        ours_colliding, theirs_colliding = colliding(ours), colliding(theirs)
        assert len(theirs_colliding) > 5
        assert ours_colliding == theirs_colliding
        drawn = [ours.mesh_facenum[ours.geom_dataid[i]] for i in meshes(ours) if ours.geom_group[i] < 3]
        assert sum(drawn) < 10_000 < 60_000 < sum(theirs.mesh_facenum[theirs.geom_dataid[i]] for i in meshes(theirs))


def meshes(model: Any) -> list[int]:
    return [i for i in range(model.ngeom) if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_MESH]


def colliding(model: Any) -> list[tuple[Any, ...]]:
    """What the collision detector sees of each geom, in order."""
    seen = []
    for i in range(model.ngeom):
        if not (model.geom_contype[i] or model.geom_conaffinity[i]):
            continue
        shape = b""
        if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[i]
            first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            shape = model.mesh_vert[first : first + count].tobytes()
        size = model.geom_size[i].copy()
        if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_PLANE:
            size[2] = 0.0  # the spacing of the grid that is drawn
        place = [getattr(model, f"geom_{k}")[i] for k in ("pos", "quat", "friction", "contype", "conaffinity")]
        seen.append(
            (
                model.geom_bodyid[i],
                model.geom_type[i],
                hash(shape),
                size.tobytes(),
                *(np.asarray(p).tobytes() for p in place),
            )
        )
    return seen


FRESH = """
import sys
sys.path.insert(0, {folder!r})
from test_metaworld import trace
from reachrl.config.env import MetaworldConfig
from reachrl.envs.metaworld import MetaworldEnv
print(trace(MetaworldEnv(MetaworldConfig(tasks=({task!r},))), {task!r}))
"""


def trace(env: MetaworldEnv, task: str) -> str:
    """A digest of all frames and states of a short episode."""
    rng = np.random.default_rng(3)
    observation, _ = env.reset(options={"start": Start(task, "eval", 7)})
    digest = hashlib.sha256(observation["images"]["corner2"].tobytes())
    for _ in range(6):
        observation, *_ = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        assert env._task is not None
        for seen in (
            observation["images"]["corner2"],
            observation["ee_state"],
            env._task.sim.data.qpos,
            env._task.sim.data.qvel,
        ):
            digest.update(seen.tobytes())
    return digest.hexdigest()


def test_frames_and_states_equal_a_fresh_process_whatever_was_drawn_before(env: MetaworldEnv):
    """Several scenes share this process's GL context, and environments their meshes; each gets its own picture."""
    second = MetaworldEnv(MetaworldConfig(tasks=("coffee-button", *TASKS)))
    tasks = ("drawer-open", "hammer")
    fresh = {}
    for task in tasks:
        code = FRESH.format(folder=str(Path(__file__).parent), task=task)
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        fresh[task] = output.stdout.strip()
        assert len(fresh[task]) == 64, output.stderr
    assert fresh[tasks[0]] != fresh[tasks[1]]
    for task in (*tasks, "pick-place", *reversed(tasks), "basketball", *tasks):
        digest = trace(env, task)
        assert task not in fresh or digest == fresh[task], task
        assert trace(second, task) == digest, task
    second.close()
    assert trace(env, tasks[0]) == fresh[tasks[0]]


def test_frames_look_like_mujocos_own(env: MetaworldEnv):
    """Same state, stock meshes, MuJoCo's renderer: the mean pixel differs by little, another start by more."""
    size = env.config.image_size
    for task in ("drawer-open", "hammer", "pick-place"):
        frame = env.reset(options={"start": Start(task, "train", 0)})[0]["images"]["corner2"]
        sim = env._task.sim  # pyright: ignore[reportOptionalMemberAccess]
        script = STOCK_FRAME.format(xml=sim.fullpath, size=size)
        state = {"qpos": sim.data.qpos, "body_pos": sim.model.body_pos, "site_pos": sim.model.site_pos}
        text = repr({k: v.tolist() for k, v in state.items()})
        output = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr
        theirs = np.array(bytearray.fromhex(output.stdout.strip()), np.int16).reshape(size, size, 3)
        assert np.abs(frame - theirs).mean() < 2.5
        upside_down = np.abs(frame - theirs[::-1]).mean(), np.abs(frame - theirs[:, ::-1]).mean()
        assert min(upside_down) > 20.0


STOCK_FRAME = """
import ast, os, sys
from reachrl.envs.gl import import_mujoco
mujoco = import_mujoco()
import numpy as np
state = ast.literal_eval(sys.stdin.read())
model = mujoco.MjModel.from_xml_path({xml!r})
model.vis.quality.offsamples = 0
model.light_castshadow[:] = 0
model.mat_reflectance[:] = 0
model.body_pos[:], model.site_pos[:] = state["body_pos"], state["site_pos"]
model.camera("corner2").pos[:] = [0.75, 0.075, 0.7]
data = mujoco.MjData(model)
data.qpos[:] = state["qpos"]
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, {size}, {size})
renderer.update_scene(data, camera="corner2")
sys.stdout.write(np.ascontiguousarray(renderer.render()[::-1, ::-1]).tobytes().hex())
sys.stdout.flush()
os._exit(0)
"""


def test_it_keeps_the_contract():
    env = MetaworldEnv(
        MetaworldConfig(
            tasks=("window-open", "window-close", "reach"),
        )
    )
    check_env(env, expert=True, expert_episodes=2)
    env.close()


def test_the_default_tasks_experts_succeed_with_held_decisions():
    config = MetaworldConfig()
    env = MetaworldEnv(config)
    for task in config.tasks:
        for index in range(3):
            env.reset(options={"start": Start(task, "train", index)})
            terminated = truncated = False
            progress = [0.0]
            while not (terminated or truncated):
                _, _, terminated, truncated, info = env.step(env.expert_action())
                progress.append(info["progress"])
            assert terminated, (task, index)
            # An expert's way from start to success is progress, though not at every decision.
            assert progress[-1] > 0.4 and progress[-1] > 0.8 * max(progress), (task, index, progress)
    env.close()


@pytest.mark.parametrize("task", (*TASKS, "window-close", "stick-push"))
def test_training_starts_keep_away_from_every_evaluation_start(task: str):
    """Brute force over all pairs, in the start space that Meta-World declares."""
    made = MetaworldTask(task, 200)
    space = made.sim._random_reset_space
    train, validation, held_out = (np.stack([made.start(split, i) for i in range(n)]) for split, n in SPLIT_SIZES)
    train = np.concatenate([train, validation])
    extent = space.high - space.low
    free = extent > 0.005
    gap = 0.25 * EVAL_POOL ** (-1 / free.sum())
    difference = (train[:, None, free] - held_out[None, :, free]) / extent[free]
    assert np.sqrt((difference**2).sum(-1)).min() >= gap > 0.002
    both = np.concatenate([train, held_out])
    assert len(np.unique(both, axis=0)) == len(both)
    assert (both >= space.low).all() and (both <= space.high).all()
    spread = (both[:, free].max(0) - both[:, free].min(0)) / extent[free]
    assert (spread > 0.8).all()  # the whole space is used


SPLIT_SIZES: tuple[tuple[Split, int], ...] = (
    ("train", 200),
    ("validation", 50),
    ("eval", EVAL_POOL),
)


def test_evaluation_starts_are_the_ones_published():
    """Numbers of evaluation starts never change: success rates of different versions stay comparable."""
    made = MetaworldTask("drawer-open", 400)
    assert made.start("eval", 0).tolist() == [RECORDED_X, 0.9, 0.0]
    other = MetaworldTask("drawer-close", 400)
    assert other.start("eval", 0)[0] != RECORDED_X


RECORDED_X = 0.05441270442714727


def test_asking_for_start_vectors_does_not_disturb_a_running_episode(env: MetaworldEnv):
    undisturbed = trace(env, "pick-place")
    rng = np.random.default_rng(3)
    observation, _ = env.reset(options={"start": Start("pick-place", "eval", 7)})
    digest = hashlib.sha256(observation["images"]["corner2"].tobytes())
    for t in range(6):
        env.start_vector("pick-place", "train", 150 + t)  # not yet drawn: the simulator is asked
        observation, *_ = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        assert env._task is not None
        for seen in (
            observation["images"]["corner2"],
            observation["ee_state"],
            env._task.sim.data.qpos,
            env._task.sim.data.qvel,
        ):
            digest.update(seen.tobytes())
    assert digest.hexdigest() == undisturbed


def test_the_time_limit_truncates_and_meta_worlds_own_never_shows():
    env = MetaworldEnv(MetaworldConfig(tasks=("reach",), max_steps=11, action_repeat=50))  # 550 > 500 steps
    env.reset(options={"start": Start("reach", "train", 0)})
    ends = [env.step(np.array([0, -1, 1, 0], np.float32))[2:4] for _ in range(11)]
    assert ends == [(False, False)] * 10 + [(False, True)]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(4, np.float32))
    env.close()


def test_success_in_the_middle_of_a_held_decision_counts(env: MetaworldEnv, monkeypatch: pytest.MonkeyPatch):
    env.reset(options={"start": Start("hammer", "train", 0)})
    outcomes = iter([False, True, False, False, False])
    monkeypatch.setattr(env._task, "step", lambda action: next(outcomes))
    _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_success_at_the_time_limit_is_success(monkeypatch: pytest.MonkeyPatch):
    env = MetaworldEnv(MetaworldConfig(tasks=("reach",), max_steps=1))
    for success in (True, False):
        env.reset(options={"start": Start("reach", "train", 0)})
        monkeypatch.setattr(env._task, "step", lambda action, success=success: success)
        assert env.step(np.zeros(4, np.float32))[2:4] == (success, not success)
    env.close()


def test_bad_actions_are_refused(env: MetaworldEnv):
    env.reset(options={"start": Start("hammer", "train", 0)})
    for bad in (np.full(4, np.nan), np.zeros(7)):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(bad)


@pytest.mark.parametrize("cores", [1, 2])
def test_workers_show_what_one_process_shows(cores: int, env: MetaworldEnv, monkeypatch: pytest.MonkeyPatch):
    """The vector environment over real simulators, one task after the other; on one core both are in one process."""
    monkeypatch.setattr(vector, "available_cores", lambda: cores)
    config = MetaworldConfig(tasks=TASKS[:3], max_steps=3)
    single = MetaworldEnv(config)
    starts = [Start(TASKS[n], "train", n) for n in (0, 1)]
    upcoming = [Start(TASKS[n], "train", 5) for n in (1, 2)]
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4)).astype(np.float32)
    with VectorEnv(config, 2) as envs:
        assert len(envs._workers) == cores
        envs.reset(starts, upcoming)
        steps = [envs.step(action[:, None], upcoming) for action in actions]
    assert steps[-1].truncated.all()
    for n in (0, 1):
        single.reset(options={"start": starts[n]})
        for t in range(3):
            observation, *_ = single.step(actions[t, n])
            shown = steps[t].observation.frames if t < 2 else steps[t].final_observation.frames
            assert np.array_equal(shown[n], observation["images"]["corner2"])
            assert np.array_equal(steps[t].ee_state[n], observation["ee_state"])
        assert np.array_equal(
            steps[2].observation.frames[n], single.reset(options={"start": upcoming[n]})[0]["images"]["corner2"]
        )
    single.close()


def test_all_50_tasks_can_be_made_seen_and_acted_in():
    env = MetaworldEnv(MetaworldConfig(tasks=tuple(INSTRUCTIONS), image_size=48))
    frames = set()
    for task in INSTRUCTIONS:
        image = env.reset(options={"start": Start(task, "train", 0)})[0]["images"]["corner2"]
        assert image.std() > 10
        observation, *_ = env.step(env.expert_action())
        assert not np.array_equal(observation["images"]["corner2"], image)
        frames.add(image.tobytes())
    assert len(frames) == 50
    env.close()
