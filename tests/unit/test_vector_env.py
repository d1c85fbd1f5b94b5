"""The vector environment against single environments stepped by hand, and against workers that break."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_env import FaultyConfig

from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError, ExtensionError, MissingExtra, WorkerError
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.types import Start

N = 3
CONFIG = ReachConfig(max_steps=6)


def start(index: int, task: str = "red-square") -> Start:
    return Start(task, "train", index)


def some_starts(first: int) -> list[Start]:
    return [start(first + n, CONFIG.tasks[n % len(CONFIG.tasks)]) for n in range(N)]


@pytest.fixture(scope="module")
def healthy() -> Iterator[VectorEnv]:
    with VectorEnv(CONFIG, N) as envs:
        yield envs


class ByHand:
    """The same rows, stepped one by one in this process."""

    def __init__(self, starts: list[Start]):
        self.envs = [ReachEnv(CONFIG) for _ in starts]
        self.images = [e.reset(options={"start": s})[0]["image"] for e, s in zip(self.envs, starts, strict=True)]

    def expert(self) -> np.ndarray:
        return np.stack([env.expert_action() for env in self.envs])

    def step(self, actions: np.ndarray, next_starts: list[Start]):
        rows = []
        for n, env in enumerate(self.envs):
            observation, _, terminated, truncated, info = env.step(actions[n])
            self.images[n] = observation["image"]
            if terminated or truncated:
                self.images[n] = env.reset(options={"start": next_starts[n]})[0]["image"]
            rows.append((info["success"], terminated, truncated, observation["image"], observation["ee_state"]))
        return rows


def test_it_equals_environments_stepped_by_hand_through_successes_and_time_limits(healthy: VectorEnv):
    rng = np.random.default_rng(0)
    by_hand = ByHand(some_starts(0))
    seen = healthy.reset(some_starts(0), some_starts(10))
    assert np.array_equal(seen.images, by_hand.images)
    ended = {"success": 0, "truncated": 0}
    for t in range(30):
        upcoming = some_starts(10 + 3 * t)
        actions = by_hand.expert()
        actions[0] = rng.uniform(-1, 1, 4)  # this row mostly runs into the time limit
        step = healthy.step(actions, upcoming)
        for n, (success, terminated, truncated, final_image, ee_state) in enumerate(by_hand.step(actions, upcoming)):
            assert (step.success[n], step.terminated[n], step.truncated[n]) == (success, terminated, truncated)
            assert np.array_equal(step.ee_state[n], ee_state)  # after the action, before any reset
            if terminated or truncated:
                assert np.array_equal(step.final_images[n], final_image)
                assert step.observation.instructions[n] == healthy.instruction(upcoming[n].task)
                assert not np.array_equal(step.final_images[n], step.observation.images[n])
            ended["success"] += success
            ended["truncated"] += truncated
        assert np.array_equal(step.observation.images, by_hand.images)
        assert step.valid.all()
        assert not (step.terminated & step.truncated).any()
    assert ended["success"] > 5 and ended["truncated"] > 1


def test_replayed_actions_lead_to_the_interrupted_episode(healthy: VectorEnv):
    rng = np.random.default_rng(1)
    starts, upcoming = some_starts(40), some_starts(50)
    actions = rng.uniform(-0.2, 0.2, (6, N, 4)).astype(np.float32)
    healthy.reset(starts, upcoming)
    whole = [healthy.step(actions[t], upcoming) for t in range(6)]
    healthy.reset(upcoming, upcoming)
    healthy.step(actions[5], upcoming)

    # Rows are resumed at different ages: row n after n + 1 decisions.
    seen = healthy.replay(starts, [actions[: n + 1, n] for n in range(N)])
    for n in range(N):
        assert np.array_equal(seen.images[n], whole[n].observation.images[n])
    resumed = healthy.step(np.stack([actions[n + 1, n] for n in range(N)]), upcoming)
    for n in range(N):
        assert np.array_equal(resumed.observation.images[n], whole[n + 1].observation.images[n])
        assert np.array_equal(resumed.ee_state[n], whole[n + 1].ee_state[n])
        assert resumed.truncated[n] == whole[n + 1].truncated[n]  # the step counter is resumed as well


def test_returned_arrays_survive_later_steps(healthy: VectorEnv):
    seen = healthy.reset(some_starts(0), some_starts(3))
    step = healthy.step(np.full((N, 4), 0.5, np.float32), some_starts(3))
    kept = [a.copy() for a in (seen.images, step.observation.images, step.final_images, step.ee_state)]
    for _ in range(7):
        healthy.step(np.full((N, 4), -0.5, np.float32), some_starts(6))
    now = (seen.images, step.observation.images, step.final_images, step.ee_state)
    assert all(np.array_equal(a, b) for a, b in zip(kept, now, strict=True))


def test_workers_leave_ctrl_c_to_their_parent(healthy: VectorEnv):
    healthy.reset(some_starts(0), some_starts(3))
    for worker in healthy._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert healthy.step(np.zeros((N, 4), np.float32), some_starts(3)).valid.all()


def test_wrong_arguments_are_named_before_anything_is_sent(healthy: VectorEnv):
    healthy.reset(some_starts(0), some_starts(0))
    with pytest.raises(ValueError, match="no-such-task"):
        healthy.step(np.zeros((N, 4), np.float32), [start(0, "no-such-task")] * N)
    with pytest.raises(ValueError, match="index=200"):
        healthy.reset([start(200)] * N, some_starts(0))
    with pytest.raises(ValueError, match="expected 3 starts, got 2"):
        healthy.reset(some_starts(0)[:2], some_starts(0))
    with pytest.raises(ConfigError, match=r"\[3, 4\], got \[3, 7\]"):
        healthy.step(np.zeros((N, 7), np.float32), some_starts(0))
    assert healthy.step(np.zeros((N, 4), np.float32), some_starts(0)).valid.all()


def test_numbers_that_are_not_finite_are_refused_with_their_place(
    healthy: VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy.reset(some_starts(0), some_starts(3))
    actions = np.zeros((N, 4), np.float32)
    actions[1, 2] = np.nan
    with pytest.raises(ExtensionError, match=r"environment 1 .*'green-square', train start 1, step 0\): the policy's"):
        healthy.step(actions, some_starts(3))
    healthy.step(np.zeros((N, 4), np.float32), some_starts(3))
    gather = healthy._gather

    def spoilt(*args):
        replies = gather(*args)
        healthy._arrays.ee_state[2, 0] = np.inf
        return replies

    monkeypatch.setattr(healthy, "_gather", spoilt)
    with pytest.raises(
        ExtensionError, match=r"environment 2 .*'blue-square', train start 2, step 1\): ee_state.*\(inf,"
    ):
        healthy.step(np.zeros((N, 4), np.float32), some_starts(3))


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
        assert envs.step(still, upcoming).valid.all()
        step = envs.step(still, upcoming)
        assert step.valid.tolist() == [True, False, True]
        assert not step.success[1] and not step.terminated[1] and not step.truncated[1]
        assert envs.lost_episodes == 1
        assert [worker.pid == pid for worker, pid in zip(envs._workers, pids, strict=True)] == [True, False, True]
        assert not Path(f"/proc/{pids[1]}").exists()
        # The row shows the first frame of its next start, and goes on from there.
        by_hand.step(still, upcoming)
        by_hand.images[1] = by_hand.envs[1].reset(options={"start": upcoming[1]})[0]["image"]
        assert np.array_equal(step.observation.images, by_hand.images)
        step = envs.step(still, upcoming)
        by_hand.step(still, upcoming)
        assert step.valid.all()
        assert np.array_equal(step.observation.images, by_hand.images)


def test_a_worker_that_is_always_lost_is_an_error_that_says_where():
    with VectorEnv(FaultyConfig(fault="exit"), 2) as envs:
        starts = [start(3), start(11, "blue-square")]
        envs.reset(starts, starts)
        with pytest.raises(WorkerError) as caught:
            for _ in range(20):
                envs.step(np.zeros((2, 4), np.float32), starts)
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


def test_frames_of_another_size_than_configured_are_refused():
    with pytest.raises(WorkerError, match=r"frames are \(32, 32, 3\), but env.image_size promises \(24, 24, 3\)"):
        VectorEnv(FaultyConfig(fault="wrong size"), 1)


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
                envs.step(np.zeros((2, 4), np.float32), starts)
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
