"""The vector environment against single environments stepped by hand, and against workers that break."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_env import FaultyConfig, TogetherConfig

from reachrl import child
from reachrl.child import Child, signal_name
from reachrl.envs import timeouts, vector
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError, ExtensionError, MissingExtra, WorkerError
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.types import Start

pytestmark = pytest.mark.fresh

N = 3
CONFIG = ReachConfig(max_steps=6)


def start(index: int, task: str = "red-square") -> Start:
    return Start(task, "train", index)


def some_starts(first: int) -> list[Start]:
    return [start(first + n, CONFIG.tasks[n % len(CONFIG.tasks)]) for n in range(N)]


@pytest.fixture(scope="module")
def healthy() -> Iterator[VectorEnv]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReachEnv, "shares_process", False)  # a process for each, of which one may die
        with VectorEnv(CONFIG, N) as envs:
            yield envs


class ByHand:
    """The same rows, stepped one by one in this process."""

    def __init__(self, starts: list[Start]):
        self.envs = [ReachEnv(CONFIG) for _ in starts]
        self.images = [
            e.reset(options={"start": s})[0]["images"]["camera"] for e, s in zip(self.envs, starts, strict=True)
        ]

    def expert(self) -> np.ndarray:
        return np.stack([env.expert_action() for env in self.envs])

    def step(self, actions: np.ndarray, next_starts: list[Start]):
        rows = []
        for n, env in enumerate(self.envs):
            observation, _, terminated, truncated, info = env.step(actions[n])
            self.images[n] = observation["images"]["camera"]
            if terminated or truncated:
                self.images[n] = env.reset(options={"start": next_starts[n]})[0]["images"]["camera"]
            rows.append(
                (info["success"], terminated, truncated, observation["images"]["camera"], observation["ee_state"])
            )
        return rows


def test_it_equals_environments_stepped_by_hand_through_successes_and_time_limits(healthy: VectorEnv):
    rng = np.random.default_rng(0)
    by_hand = ByHand(some_starts(0))
    seen = healthy.reset(some_starts(0), some_starts(10))
    assert np.array_equal(seen.frames, by_hand.images)
    ended = {"success": 0, "truncated": 0}
    for t in range(90):
        upcoming = some_starts((10 + 3 * t) % 190)
        actions = by_hand.expert()
        actions[0] = rng.uniform(-1, 1, 4)  # this row mostly runs into the time limit
        step = healthy.step(actions[:, None], upcoming)
        for n, (success, terminated, truncated, final_image, ee_state) in enumerate(by_hand.step(actions, upcoming)):
            assert (step.success[n], step.terminated[n], step.truncated[n]) == (success, terminated, truncated)
            assert np.array_equal(step.ee_state[n], ee_state)  # after the action, before any reset
            if terminated or truncated:
                assert np.array_equal(step.final_observation.frames[n], final_image)
                assert step.observation.instructions[n] == healthy.instruction(upcoming[n].task)
                assert not np.array_equal(step.final_observation.frames[n], step.observation.frames[n])
            ended["success"] += success
            ended["truncated"] += truncated
        assert np.array_equal(step.observation.frames, by_hand.images)
        assert step.valid.all()
        assert not (step.terminated & step.truncated).any()
    assert ended["success"] > 2 and ended["truncated"] > 1


def test_replayed_actions_lead_to_the_interrupted_episode(healthy: VectorEnv):
    rng = np.random.default_rng(1)
    starts, upcoming = some_starts(40), some_starts(50)
    actions = rng.uniform(-0.2, 0.2, (6, N, 4)).astype(np.float32)
    healthy.reset(starts, upcoming)
    whole = [healthy.step(actions[t, :, None], upcoming) for t in range(6)]
    healthy.reset(upcoming, upcoming)
    healthy.step(actions[5, :, None], upcoming)

    # Rows are resumed at different ages: row n after n + 1 decisions.
    seen = healthy.replay(starts, [actions[: n + 1, n] for n in range(N)])
    for n in range(N):
        assert np.array_equal(seen.frames[n], whole[n].observation.frames[n])
    resumed = healthy.step(np.stack([actions[n + 1, n, None] for n in range(N)]), upcoming)
    for n in range(N):
        assert np.array_equal(resumed.observation.frames[n], whole[n + 1].observation.frames[n])
        assert np.array_equal(resumed.ee_state[n], whole[n + 1].ee_state[n])
        assert resumed.truncated[n] == whole[n + 1].truncated[n]  # the step counter is resumed as well


def test_returned_arrays_survive_later_steps(healthy: VectorEnv):
    seen = healthy.reset(some_starts(0), some_starts(3))
    step = healthy.step(np.full((N, 1, 4), 0.5, np.float32), some_starts(3))
    kept = [a.copy() for a in (seen.frames, step.observation.frames, step.final_observation.frames, step.ee_state)]
    for _ in range(7):
        healthy.step(np.full((N, 1, 4), -0.5, np.float32), some_starts(6))
    now = (seen.frames, step.observation.frames, step.final_observation.frames, step.ee_state)
    assert all(np.array_equal(a, b) for a, b in zip(kept, now, strict=True))


def test_workers_leave_ctrl_c_to_their_parent(healthy: VectorEnv):
    healthy.reset(some_starts(0), some_starts(3))
    for worker in healthy._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert healthy.step(np.zeros((N, 1, 4), np.float32), some_starts(3)).valid.all()


def test_wrong_arguments_are_named_before_anything_is_sent(healthy: VectorEnv):
    healthy.reset(some_starts(0), some_starts(0))
    with pytest.raises(ValueError, match="no-such-task"):
        healthy.step(np.zeros((N, 1, 4), np.float32), [start(0, "no-such-task")] * N)
    with pytest.raises(ValueError, match="index=200"):
        healthy.reset([start(200)] * N, some_starts(0))
    with pytest.raises(ValueError, match="expected 3 starts, got 2"):
        healthy.reset(some_starts(0)[:2], some_starts(0))
    with pytest.raises(ConfigError, match=r"\[3, K, 4\], got \[3, 1, 7\]"):
        healthy.step(np.zeros((N, 1, 7), np.float32), some_starts(0))
    assert healthy.step(np.zeros((N, 1, 4), np.float32), some_starts(0)).valid.all()


def test_numbers_that_are_not_finite_are_refused_with_their_place(
    healthy: VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy.reset(some_starts(0), some_starts(3))
    actions = np.zeros((N, 4), np.float32)
    actions[1, 2] = np.nan
    with pytest.raises(ExtensionError, match=r"environment 1 .*'green-square', train start 1, step 0\): the policy's"):
        healthy.step(actions[:, None], some_starts(3))
    healthy.step(np.zeros((N, 1, 4), np.float32), some_starts(3))
    gather = healthy._gather

    def spoilt(*args):
        replies = gather(*args)
        healthy._arrays.ee_state[2, 0] = np.inf
        return replies

    monkeypatch.setattr(healthy, "_gather", spoilt)
    with pytest.raises(
        ExtensionError, match=r"environment 2 .*'blue-square', train start 2, step 1\): ee_state.*\(inf,"
    ):
        healthy.step(np.zeros((N, 1, 4), np.float32), some_starts(3))


@pytest.mark.parametrize("fault", ["exit", "hang", "raise", "segfault"])
def test_a_lost_worker_costs_one_row_of_one_step(fault: str):
    """Row 1 breaks in its second decision at start 5 and nowhere else; the other rows must not notice."""
    config = FaultyConfig(fault=fault, fault_start=5, worker_timeout_s=1.0)  # pyright: ignore[reportArgumentType]
    starts, upcoming = [start(4), start(5), start(6)], [start(7), start(8), start(9)]
    by_hand = ByHand(starts)
    still = np.zeros((N, 4), np.float32)
    with VectorEnv(config, N) as envs:
        envs.reset(starts, upcoming)
        pids = [worker.pid for worker in envs._workers]
        by_hand.step(still, upcoming)
        assert envs.step(still[:, None], upcoming).valid.all()
        step = envs.step(still[:, None], upcoming)
        assert step.valid.tolist() == [True, False, True]
        assert not step.success[1] and not step.terminated[1] and not step.truncated[1]
        assert envs.lost_episodes == 1
        assert [worker.pid == pid for worker, pid in zip(envs._workers, pids, strict=True)] == [True, False, True]
        assert not Path(f"/proc/{pids[1]}").exists()
        # The row shows the first frame of its next start, and goes on from there.
        by_hand.step(still, upcoming)
        by_hand.images[1] = by_hand.envs[1].reset(options={"start": upcoming[1]})[0]["images"]["camera"]
        assert np.array_equal(step.observation.frames, by_hand.images)
        step = envs.step(still[:, None], upcoming)
        by_hand.step(still, upcoming)
        assert step.valid.all()
        assert np.array_equal(step.observation.frames, by_hand.images)


@pytest.mark.parametrize("fault", ["exit", "raise"])
def test_a_lost_worker_takes_its_other_environments_along(fault: str, monkeypatch: pytest.MonkeyPatch):
    """Rows 0 and 2 share a process, which row 2 ends in its second decision at start 6; row 1 must not notice."""
    monkeypatch.setattr(vector, "available_cores", lambda: 2)
    config = TogetherConfig(max_steps=6, fault=fault, fault_start=6)  # pyright: ignore[reportArgumentType]
    starts, upcoming = [start(4), start(5), start(6)], [start(7), start(8), start(9)]
    by_hand = ByHand(starts)
    rng = np.random.default_rng(0)
    with VectorEnv(config, N) as envs:
        assert len(envs._workers) == 2
        envs.reset(starts, upcoming)
        for t in range(9):
            actions = rng.uniform(-0.2, 0.2, (N, 4)).astype(np.float32)
            step = envs.step(actions[:, None], upcoming)
            rows = by_hand.step(actions, upcoming)
            lost = [0, 2] if t == 1 else []
            for n in lost:
                by_hand.images[n] = by_hand.envs[n].reset(options={"start": upcoming[n]})[0]["images"]["camera"]
            assert step.valid.tolist() == [n not in lost for n in range(N)]
            assert np.array_equal(step.observation.frames, by_hand.images)
            for n in np.flatnonzero(step.valid):
                success, terminated, truncated, _, ee_state = rows[n]
                assert (step.success[n], step.terminated[n], step.truncated[n]) == (success, terminated, truncated)
                assert np.array_equal(step.ee_state[n], ee_state)
        assert envs.lost_episodes == 2


def test_the_environment_that_ends_a_shared_process_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector, "available_cores", lambda: 1)
    config = TogetherConfig(fault="exit", fault_start=6)
    with VectorEnv(config, N) as envs:
        starts = [start(4), start(5), start(6, "blue-square")]
        envs.reset(starts, starts)
        with pytest.raises(WorkerError, match="environment 2 .*'blue-square', train start 6, step 1.*4 times in a row"):
            for _ in range(20):
                envs.step(np.zeros((N, 1, 4), np.float32), starts)


@pytest.mark.parametrize("number", [signal.SIGRTMIN, signal.SIGRTMIN + 3, signal.SIGRTMAX])
def test_a_worker_ended_by_any_signal_is_replaced(healthy: VectorEnv, number: int):
    """Most real-time signals have no name of their own in `signal.Signals`."""
    healthy.reset(some_starts(0), some_starts(3))
    lost = healthy.lost_episodes
    os.kill(healthy._workers[1].pid, number)
    step = healthy.step(np.zeros((N, 1, 4), np.float32), some_starts(3))
    assert step.valid.tolist() == [True, False, True] and healthy.lost_episodes == lost + 1


def test_signals_are_called_by_their_names():
    assert [signal_name(number) for number in (9, 34, 37, 64)] == ["SIGKILL", "SIGRTMIN", "SIGRTMIN+3", "SIGRTMAX"]
    assert signal_name(32) == "signal 32"  # kept back by the C library


def test_a_folder_with_a_colon_in_its_name_is_searched_by_children_too(tmp_path: Path, monkeypatch):
    folder = tmp_path / "2026-11-27T14:05"
    folder.mkdir()
    (folder / "colon_child.py").write_text(
        "import sys\nfrom reachrl.child import pipe_to_parent\npipe_to_parent().send([__name__, sys.path])\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, "", "plug-ins"])
    started = Child("colon_child", {})
    try:
        assert started.pipe.poll(60), started.epitaph()
        name, path = started.pipe.recv()
    finally:
        started.end()
    assert name == "__main__"
    assert path[0] == str(folder) and path[-2:] == [str(folder), str(folder / "plug-ins")]


def test_too_few_open_files_name_the_option_to_lower():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 6, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"open files \(at most \d+.*ulimit -n.*env\.num_envs"):
            VectorEnv(CONFIG, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_processes_name_the_option_to_lower(monkeypatch):
    def fork(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(child, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": fork}))
    with pytest.raises(ConfigError, match=r"reachrl\.envs\.worker.*ulimit -u.*env\.num_envs"):
        VectorEnv(CONFIG, 2)


@pytest.mark.parametrize(
    ("timeout_s", "num_envs", "cores", "seconds"),
    [(60, 1, 8, 120), (60, 8, 8, 120), (60, 64, 8, 960), (60, 16, 2, 960), (300, 4, 8, 300), (300, 16, 2, 2400)],
)
def test_environments_that_share_cores_have_longer_to_start(monkeypatch, timeout_s, num_envs, cores, seconds):
    monkeypatch.setattr(timeouts, "available_cores", lambda: cores)
    assert timeouts.start_timeout(timeout_s, num_envs) == seconds


def test_a_start_that_takes_too_long_names_an_option_that_changes_it(monkeypatch):
    monkeypatch.setattr(timeouts, "_START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(timeouts, "available_cores", lambda: 2)
    words = r"not ready within 0\.05 s.*2 cores; set env\.worker_timeout_s above 0\.05"
    with pytest.raises(WorkerError, match=words) as e:
        VectorEnv(CONFIG.model_copy(update={"num_envs": 1, "worker_timeout_s": 0.01}), 1)
    above = float(re.search(r"above ([\d.]+)", str(e.value))[1])  # type: ignore[index]
    assert timeouts.start_timeout(2 * above, 1) == 2 * timeouts.start_timeout(0.01, 1)


def test_a_worker_that_is_always_lost_is_an_error_that_says_where():
    with VectorEnv(FaultyConfig(fault="exit"), 2) as envs:
        starts = [start(3), start(11, "blue-square")]
        envs.reset(starts, starts)
        with pytest.raises(WorkerError) as caught:
            for _ in range(20):
                envs.step(np.zeros((2, 1, 4), np.float32), starts)
        text = str(caught.value)
    assert "environment 0" in text and "'red-square'" in text and "train start 3" in text and "step 1" in text
    assert "4 times in a row" in text and "exited with code 7" in text and "these were my last words" in text


def test_a_reset_that_always_fails_is_an_error_with_the_workers_words():
    with VectorEnv(FaultyConfig(fault="raise in reset", fault_step=0, fault_start=2), 1) as envs:
        envs.reset([start(0)], [start(0)])
        with pytest.raises(WorkerError, match="(?s)train start 2.*the robot is on fire"):
            envs.reset([start(2)], [start(0)])


def test_a_missing_library_is_reported_as_such_and_not_retried():
    with pytest.raises(MissingExtra, match="^this simulator needs libfoo: apt-get install libfoo$"):
        VectorEnv(FaultyConfig(fault="missing extra"), 2)


def test_frames_of_another_size_than_the_observation_space_promises_are_refused():
    match = r"images camera is uint8\[32, 32, 3\], observation_space promises uint8\[24, 24, 3\]"
    with VectorEnv(FaultyConfig(fault="wrong size"), 1) as envs, pytest.raises(ExtensionError, match=match):
        envs.reset([start(0)], [start(0)])


def test_unknown_toy_task_is_a_configuration_error():
    with pytest.raises(ConfigError, match="'red-sqare'; did you mean red-square"):
        ReachConfig(tasks=("red-sqare",))
    with pytest.raises(ConfigError, match="more than once"):
        ReachConfig(tasks=("red-square", "red-square"))


def running(pids: list[int]) -> list[int]:
    """Those that have neither ended nor become zombies."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            alive.append(pid)
    return alive


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_workers_go_with_their_parent_and_never_import_its_script(blow: signal.Signals, tmp_path: Path):
    """The script imports torch and has no main guard: a multiprocessing child would run it again."""
    script = tmp_path / "train_script.py"
    script.write_text(
        textwrap.dedent(
            """
            import time, torch
            import numpy as np
            from reachrl.envs.vector import VectorEnv
            from reachrl.testing.envs import ReachConfig
            from reachrl.types import Start

            envs = VectorEnv(ReachConfig(), 2)
            starts = [Start("red-square", "train", 0)] * 2
            envs.reset(starts, starts)
            print(*(worker.pid for worker in envs._workers), flush=True)
            while True:
                envs.step(np.zeros((2, 1, 4), np.float32), starts)
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    try:
        assert len(running(pids)) == 2
        assert not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        if blow == signal.SIGINT:
            os.killpg(parent.pid, blow)  # as a terminal does: to the workers as well
        else:
            parent.send_signal(blow)
        _, errors = parent.communicate(timeout=20)
        if blow == signal.SIGINT:
            assert errors.count("KeyboardInterrupt") == 1 and errors.count("Traceback") == 1
        deadline = time.monotonic() + 10
        while running(pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(pids)
    finally:
        parent.kill()
        for pid in running(pids):
            os.kill(pid, signal.SIGKILL)
