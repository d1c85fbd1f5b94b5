"""Calls to other processes: an answer, an error, or the name of who is gone; never an endless wait."""

import os
import signal
import sys
import time

import pytest

ray = pytest.importorskip("ray")

from forked import python_is_forked  # noqa: E402
from reachrl.backends.cluster.backend import reservation  # noqa: E402
from reachrl.backends.cluster.calls import Lost, Remote, insist  # noqa: E402
from reachrl.config.backend import RayBackendConfig  # noqa: E402
from reachrl.errors import DivergedError, WorkerError  # noqa: E402


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def echo(self, value):
        return value

    def diverge(self):
        raise DivergedError("a loss is not finite")

    def stumble(self):
        raise ZeroDivisionError("no error of ours")

    def sleep(self, seconds):
        time.sleep(seconds)
        return "woke"


@pytest.fixture(scope="module")
def spawn():
    search_path = os.pathsep.join(map(os.path.abspath, sys.path))  # the workers import this file
    with python_is_forked():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": search_path}},
        )
    kept = []

    def make(name="worker 3"):
        remote = Remote(name, ray.remote(Worker).options(num_cpus=0).remote(), 120.0)
        kept.append(remote)
        remote.call("pid")
        return remote

    yield make
    for remote in kept:
        remote.kill()
    ray.shutdown()


def test_answers_and_errors_come_back(spawn):
    worker = spawn()
    assert worker.call("echo", {"a": 1}) == {"a": 1}
    with pytest.raises(DivergedError, match="a loss is not finite"):  # as it was raised there
        worker.call("diverge")
    with pytest.raises(ZeroDivisionError, match="no error of ours"):
        worker.call("stumble")


def test_a_killed_process_is_named(spawn):
    worker = spawn()
    pid = worker.call("pid")
    call = worker.begin("sleep", 60)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(Lost, match="worker 3 died during 'sleep'"):
        call.result()
    assert time.monotonic() - began < 20


def test_a_stopped_process_is_given_up_at_the_deadline_and_can_be_ended(spawn):
    worker = spawn()
    pid = worker.call("pid")
    worker.deadline_s = 1.5
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Lost, match=r"worker 3 did not finish 'echo' within 1\.5 s"):
        worker.call("echo", 1)
    assert 1.4 < time.monotonic() - began < 10
    worker.kill()
    for _ in range(300):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail("a stopped process is still there")


def test_the_process_that_died_is_named_among_concurrent_calls(spawn):
    leader, follower = spawn("learner 0"), spawn("learner 1")
    pid = follower.call("pid")
    following = follower.begin("sleep", 60)
    call = leader.begin("sleep", 60)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Lost) as lost:
        call.result(concurrent=[following])
    assert lost.value.name == "learner 1"
    # A call that sees the broken connection first does not hide who broke it.
    other = spawn("learner 1")
    pid, following = other.call("pid"), other.begin("sleep", 60)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Lost) as lost:
        spawn("learner 0").begin("stumble").result(concurrent=[following])
    assert lost.value.name == "learner 1"
    ended = spawn("learner 1").begin("echo", 1)
    with pytest.raises(Lost, match="learner 1 ended 'echo' before its time"):
        spawn("learner 0").begin("sleep", 60).result(concurrent=[ended])


def test_what_is_reserved():
    split = RayBackendConfig(learners=2, actors=3, reward_workers=1, cpus_per_actor=4)
    cpus = [bundle["CPU"] for bundle in reservation(split, gpus=False, evaluator=False)]
    assert cpus == [1, 1, 4, 4, 4, 1]
    assert [bundle["GPU"] for bundle in reservation(split, gpus=True, evaluator=True)] == [1] * 7
    pairs = RayBackendConfig(learners=2, actors=2, placement="colocated", cpus_per_actor=4)
    assert reservation(pairs, gpus=True, evaluator=False) == [{"CPU": 5, "GPU": 1}] * 2


def test_a_lost_call_is_sent_again_so_often_and_no_oftener():
    class Fake:
        def __init__(self, outcome):
            self.outcome = outcome

        def result(self):
            if self.outcome is None:
                raise Lost("actor 2", "died")
            return self.outcome

    sent = []

    def again(outcomes):
        queue = iter(outcomes)

        def send():
            sent.append(1)
            return Fake(next(queue))

        return send

    assert insist(Fake(None), again([None, "done"]), max_losses=2) == "done" and len(sent) == 2
    with pytest.raises(WorkerError, match="actor 2 was lost 3 times in a row"):
        insist(Fake(None), again([None, None, "late"]), max_losses=2)
    assert len(sent) == 4
    with pytest.raises(WorkerError):
        insist(Fake(None), again([]), max_losses=0)
