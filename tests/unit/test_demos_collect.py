"""Collecting: clean actions recorded while noisy ones run, and a result independent of workers and interruptions."""

import errno
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from gymnasium import spaces

from reachrl.config.base import Section
from reachrl.config.demos import DemosSection
from reachrl.config.env import EnvSection
from reachrl.demos import collect
from reachrl.demos.collect import collect_demos, shard_name
from reachrl.demos.expert import Attempt, noise_generator, run_attempt
from reachrl.demos.shard import ShardWriter
from reachrl.demos.store import META_FILE
from reachrl.envs.base import Env, observed, start_option
from reachrl.errors import ConfigError, ExtensionError, StorageError, WorkerError
from reachrl.types import Split, Start


class PointConfig(EnvSection):
    kind: Literal["test_demos_collect:PointEnv"] = "test_demos_collect:PointEnv"
    tasks: tuple[str, ...] = ("near", "far")
    image_size: int = 16
    max_steps: int = 6
    num_train_starts: int = 40
    worker_timeout_s: float = 30.0


class PointEnv(Env):
    """A point that must be brought to the origin; the expert overshoots its action space on purpose.

    Task `never` cannot succeed, `crash` kills its process on start 2, `raise` raises there, `hang` sleeps; nobody can
    demonstrate `dance`.
    Starts whose index is a multiple of 3 fail always, so the kept starts are known: 1, 2, 4, 5, 7, ...
    """

    Config: ClassVar[type[Section]] = PointConfig
    tasks = ("near", "far", "never", "crash", "raise", "hang", "dance")

    def __init__(self, config: PointConfig) -> None:
        self.config = config
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = observed(["camera"], 16)
        self.executed: list[np.ndarray] = []

    def instruction(self, task: str) -> str:
        return f"go {task}"

    def num_starts(self, split: Split) -> int:
        return self.config.num_train_starts if split == "train" else 5

    def _observe(self) -> dict[str, np.ndarray]:
        image = np.zeros((16, 16, 3), np.uint8)
        image[..., 0] = (np.arange(16) * 7 + 40 * self.position[0]).astype(np.int64) % 256
        image[..., 1] = int(abs(self.position[1]) * 60) % 256
        return {"images": {"camera": image}, "ee_state": np.array([*self.position, 0.0, 1.0], np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.start = start_option(options)
        assert self.start.split == "train", "demonstrations must never see an evaluation start"
        rng = np.random.default_rng([zlib.crc32(self.start.task.encode()), self.start.index])
        self.position = rng.uniform(1.0, 2.0, 2).astype(np.float32)
        self.steps, self.executed = 0, []
        return self._observe(), {}

    def expert_action(self) -> np.ndarray:
        if self.start.task == "dance":
            raise NotImplementedError
        return -3.0 * self.position

    def step(self, action: np.ndarray):
        if self.start.index == 2 and self.start.task == "crash":
            os._exit(9)
        if self.start.index == 2 and self.start.task == "raise":
            raise RuntimeError("the gripper fell off")
        if self.start.task == "hang":
            if "POINT_ENV_PID_FILE" in os.environ:
                Path(os.environ["POINT_ENV_PID_FILE"]).write_text(str(os.getpid()))
            time.sleep(60)
        assert self.action_space.contains(action)
        self.executed.append(action.copy())
        self.position = self.position + action
        self.steps += 1
        success = self.steps >= 4 and self.start.index % 3 != 0 and self.start.task != "never"
        return self._observe(), float(success), success, not success and self.steps >= 6, {"success": success}


def same(a: Any, b: Any) -> bool:
    """Bit equality of two trajectories."""
    assert list(a.images) == list(b.images) == ["camera"]
    facts = ("start", "instruction", "success", "source")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frames", "actions", "ee_state")) and all(
        getattr(a, n) == getattr(b, n) for n in facts
    )


DEMOS = DemosSection(episodes_per_task=5, action_noise=0.3, workers=1)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory):
    """One collection by a single worker, to which others are compared."""
    folder = tmp_path_factory.mktemp("demos")
    return collect_demos(PointConfig(), DEMOS, folder, seed=7)


def test_what_does_not_fit_the_policy_is_told_before_the_first_attempt(tmp_path) -> None:
    described, progress = [], []

    def check(shown):
        described.append({key: shown[key] for key in ("action_dim", "cameras", "state_size")})
        raise ConfigError("not for this policy")

    with pytest.raises(ConfigError, match="not for this policy"):
        collect_demos(PointConfig(), DEMOS, tmp_path, seed=7, on_progress=progress.append, check=check)
    env = PointEnv(PointConfig())
    assert described == [{"action_dim": len(env.action_space.low), "cameras": ["camera"], "state_size": None}]
    assert not progress


def test_a_plug_ins_actions_and_cameras_are_compared_with_the_policys() -> None:
    from reachrl.config.loading import load_config
    from reachrl.pipeline.warm_start import _check_fit

    shown = {"action_dim": 4, "cameras": ["front"], "state_size": None}
    _check_fit(load_config("toy"), shown)
    with pytest.raises(ConfigError, match=r"have 2 numbers, and each takes one token: set policy.num_action_tokens=2"):
        _check_fit(load_config("toy"), {**shown, "action_dim": 2})
    oft = load_config("metaworld_oft")  # two cameras and a state of 4 numbers
    with pytest.raises(ConfigError, match=r"policy.kind=openvla_oft looks at 2 cameras, and there is 1 \(front\)"):
        _check_fit(oft, {**shown, "state_size": oft.policy.state_size})
    with pytest.raises(ConfigError, match="takes a state of . numbers, and there is no state"):
        _check_fit(oft, {**shown, "cameras": ["front", "wrist"]})


def test_clean_action_is_recorded_while_the_noisy_one_runs() -> None:
    env, start = PointEnv(PointConfig()), Start("near", "train", 1)
    trajectory = run_attempt(env, start, DEMOS, noise_generator(7, Attempt("near", 1)))
    positions = trajectory.ee_state[:, :2]
    # Independent of the collector: the expert's formula, and what moved the point.
    np.testing.assert_array_equal(trajectory.actions, np.clip(-3.0 * positions[:-1], -1, 1))
    np.testing.assert_allclose(np.diff(positions, axis=0), env.executed, atol=1e-6)
    noise = np.array(env.executed) - trajectory.actions
    assert np.abs(noise).max() > 0.05
    assert len(trajectory.frames) == len(trajectory.actions) + 1


@pytest.mark.parametrize("what", ["expert", "pose"])
def test_numbers_that_are_not_finite_are_refused_with_start_and_step(monkeypatch, what) -> None:
    env = PointEnv(PointConfig())
    honest, observe = env.expert_action, env._observe
    if what == "expert":
        monkeypatch.setattr(env, "expert_action", lambda: honest() * (np.nan if len(env.executed) == 2 else 1.0))
    else:
        pose = {False: np.zeros(4, np.float32), True: np.array([0, np.inf, 0, 0], np.float32)}
        monkeypatch.setattr(env, "_observe", lambda: observe() | {"ee_state": pose[len(env.executed) == 3]})
    with pytest.raises(
        ExtensionError, match=r"task 'near', train start 1, step 2: .* is \[.*(nan|inf).*\]; expected fin"
    ):
        run_attempt(env, Start("near", "train", 1), DemosSection(), np.random.default_rng(0))


def test_noise_has_the_asked_strength_and_share() -> None:
    class Still(PointEnv):
        def expert_action(self) -> np.ndarray:
            return np.zeros(2, np.float32)

    noise = []
    config = DemosSection(action_noise=0.1, noise_probability=0.25)
    env = Still(PointConfig())
    for number in range(300):
        run_attempt(env, Start("near", "train", 0), config, noise_generator(0, Attempt("near", number)))
        noise += env.executed
    moved = np.any(np.array(noise) != 0, axis=1)
    assert abs(moved.mean() - 0.25) < 0.04
    assert abs(np.array(noise)[moved].std() - 0.1) < 0.01


def test_kept_are_the_lowest_starts_that_succeed(collected) -> None:
    assert [t.start.index for t in collected] == [1, 2, 4, 5, 7] * 2
    assert {t.start.split for t in collected} == {"train"}
    assert collected.meta["tasks"] == {"near": 5, "far": 5}


def test_workers_do_not_change_the_data(collected, tmp_path) -> None:
    progress = []
    config = DEMOS.model_copy(update={"workers": 3})
    other = collect_demos(PointConfig(), config, tmp_path, seed=7, on_progress=progress.append)
    assert all(same(a, b) for a, b in zip(collected, other, strict=True))
    assert progress[-1].total_kept == progress[-1].total == 10


def test_seed_changes_the_data(collected, tmp_path) -> None:
    other = collect_demos(PointConfig(tasks=("near",)), DEMOS, tmp_path, seed=8)
    assert not any(np.array_equal(a.frames, b.frames) for a, b in zip(collected, other, strict=False))


def test_finished_tasks_are_kept_after_an_interruption(collected, tmp_path) -> None:
    def stop(progress) -> None:
        if progress.task == "far" and progress.kept == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_demos(PointConfig(), DEMOS, tmp_path, seed=7, on_progress=stop)
    assert (tmp_path / shard_name("near")).exists()
    assert not (tmp_path / shard_name("far")).exists()
    assert not (tmp_path / META_FILE).exists()
    before = (tmp_path / shard_name("near")).stat().st_mtime_ns
    seen = []
    store = collect_demos(PointConfig(), DEMOS, tmp_path, seed=7, on_progress=lambda p: seen.append(p.task))
    assert set(seen) == {"far"}
    assert (tmp_path / shard_name("near")).stat().st_mtime_ns == before
    assert all(same(a, b) for a, b in zip(collected, store, strict=True))
    assert not list(tmp_path.glob("*.partial"))


def test_a_complete_store_is_only_opened(collected, monkeypatch) -> None:
    monkeypatch.setattr(collect, "Collection", None)
    again = collect_demos(PointConfig(), DEMOS, collected.folder, seed=7)
    assert again.meta == collected.meta


def test_other_options_are_refused(collected) -> None:
    with pytest.raises(ConfigError, match="collected with other"):
        collect_demos(PointConfig(), DEMOS, collected.folder, seed=8)


def test_failing_expert_is_named_with_its_count(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"'never': the scripted expert succeeded in 0 of 15 attempts, 5 "):
        collect_demos(PointConfig(tasks=("never",)), DEMOS, tmp_path, seed=7)


def test_without_noise_no_start_is_tried_twice(tmp_path) -> None:
    config = DEMOS.model_copy(update={"action_noise": 0.0})
    with pytest.raises(ConfigError, match="4 of 6 attempts"):
        collect_demos(PointConfig(tasks=("near",), num_train_starts=6), config, tmp_path, seed=7)


def test_starts_are_visited_again_with_other_noise(tmp_path) -> None:
    store = collect_demos(PointConfig(tasks=("near",), num_train_starts=3), DEMOS, tmp_path, seed=7)
    first, second, third, *_ = store
    assert [t.start.index for t in store] == [1, 2, 1, 2, 1]
    assert np.array_equal(first.frames[0], third.frames[0])
    assert not np.array_equal(first.frames[1], third.frames[1])
    assert second.start != third.start


def test_dead_worker_names_task_and_start(tmp_path) -> None:
    with pytest.raises(WorkerError, match=r"in task 'crash', train start 2, after step 0, .*exited with code 9"):
        collect_demos(PointConfig(tasks=("near", "crash")), DEMOS, tmp_path, seed=7)
    assert (tmp_path / shard_name("near")).exists()


def test_raising_worker_is_quoted(tmp_path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)task 'raise', train start 2.*the gripper fell off"):
        collect_demos(PointConfig(tasks=("raise",)), DEMOS, tmp_path, seed=7)


def test_a_simulator_without_an_expert_is_told_with_a_way_out(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"PointEnv has no scripted expert for task 'dance'.*policy\.checkpoint"):
        collect_demos(PointConfig(tasks=("dance",)), DEMOS, tmp_path, seed=7)


def test_silent_worker_meets_its_deadline(tmp_path) -> None:
    with pytest.raises(WorkerError, match="task 'hang', train start 0, after step 0, hangs"):
        collect_demos(PointConfig(tasks=("hang",), worker_timeout_s=0.5), DEMOS, tmp_path, seed=7)


def test_unknown_task_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'tidy'"):
        collect_demos(PointConfig(tasks=("tidy",)), DEMOS, tmp_path, seed=7)


def test_full_disk_keeps_finished_tasks(tmp_path, monkeypatch) -> None:
    write = ShardWriter.write

    def full(self, episode):
        if self.path.name == shard_name("far") and self.num_trajectories == 2:
            file, _ = self._opened
            file.write_table = lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space"))
        write(self, episode)

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        collect_demos(PointConfig(), DEMOS, tmp_path, seed=7)
    assert [p.name for p in tmp_path.iterdir()] == [shard_name("near")]
    monkeypatch.undo()
    assert len(collect_demos(PointConfig(), DEMOS, tmp_path, seed=7)) == 10


def test_workers_leave_with_their_parent(tmp_path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "from pathlib import Path\n"
        "from reachrl.demos.collect import collect_demos\n"
        "from test_demos_collect import DEMOS, PointConfig\n"
        "if __name__ == '__main__':\n"
        f"    collect_demos(PointConfig(tasks=('hang',)), DEMOS, Path({str(tmp_path / 'demos')!r}), seed=7)\n"
    )
    (tmp_path / "main.py").write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "POINT_ENV_PID_FILE": str(pid_file)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment)
    try:
        _wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    worker = int(pid_file.read_text())
    _wait_until(lambda: not _runs(worker))


def _wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_never_import_torch() -> None:
    code = "import sys, reachrl.demos.expert, reachrl.demos.collect; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
