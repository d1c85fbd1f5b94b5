"""The process that has imported everything and forks: see `forked.py`."""

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from forked import FORKS, children_are_forked, listen

IMPORTED = (
    *("torch", "torch._dynamo", "numpy", "av", "PIL.Image", "transformers.models.llama.modeling_llama"),
    *("tensorboard.summary.writer.event_file_writer", "tensorboard.compat.proto.event_pb2", "reachrl.cli.app"),
    *("reachrl.pipeline", "reachrl.loop", "reachrl.backends.local", "reachrl.policies.openvla.policy"),
    *("reachrl.policies.openvla.storage", "reachrl.rewards.process.reward", "reachrl.algorithms.ppo"),
    *("reachrl.curriculum.success_rate", "reachrl.testing.envs", "reachrl.report.report"),
    *("reachrl.backends.data_parallel", "reachrl.algorithms.grpo", "peft.tuners.lora"),
    *("reachrl.envs.vector", "reachrl.envs.worker"),
)  # neither pyarrow, which starts a thread, nor Ray, which reads its settings when it is imported


def serve(folder: str, listener: socket.socket, owner: socket.socket) -> None:
    """Fork for each request until the owner's end of its connection is closed."""
    running: dict[int, socket.socket] = {}
    bound: dict[socket.socket, int] = {}  # end with those who asked for them
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([listener, woken, owner, *bound], [], [])
        if owner in ready:
            shutil.rmtree(folder, ignore_errors=True)
            return
        if woken in ready:
            woken.recv(4096)
            report_ended(running, bound)
        for asking in bound.keys() & set(ready):
            os.kill(bound.pop(asking), signal.SIGKILL)
        if listener in ready:
            asking, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(asking, 8, 64)
            if not size:
                continue
            request = json.loads(asking.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                become(request, files)
            for file in files:
                os.close(file)
            running[pid] = asking
            if "parent" in request:
                bound[asking] = pid
            asking.sendall(pid.to_bytes(8, "big"))


def report_ended(running: dict[int, socket.socket], bound: dict[socket.socket, int]) -> None:
    """Tell who waits for them the codes of commands that have ended."""
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with running.pop(pid) as waiting:
                bound.pop(waiting, None)
                try:
                    waiting.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                except BrokenPipeError:
                    pass  # nobody waits for it


def become(request: dict, files: list[int]) -> None:
    """Go on as the program in this fork; does not return."""
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]
    os.closerange(0, 512)
    os.open(os.devnull, os.O_RDONLY)
    for file, target in zip(high, request["files"], strict=True):
        os.dup2(file, target)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if "parent" in request:
        if request["session"] == os.getsid(0):
            os.setpgid(0, request["group"])
        else:
            os.setsid()
        os.getppid = lambda: request["parent"]
    if request.get("family"):
        found_family()
    importlib.import_module("reachrl.child").subprocess = children_are_forked()
    if "code" not in request:
        os.execvp = lambda _, args: run(*shlex.split(args[2])[2:])  # bash -c "exec PYTHON FILE ARGUMENTS"
    code = 1
    try:
        run(request["program"], *request["arguments"], code=request.get("code"))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        finish(code)


def run(program: str, *arguments: str, code: str | None = None) -> None:
    """What an interpreter does with its command line."""
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    is_file = program.endswith(".py")
    sys.path[:] = dict.fromkeys([str(Path(program).parent) if is_file else os.getcwd(), *places, *sys.path[1:]])
    sys.argv = [program, *arguments]
    if code is not None:
        exec(code, {"__name__": "__main__"})
    elif is_file:
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def found_family() -> None:
    """Fork a process of which the further processes of this one will be forks: they are its descendants."""
    folder = tempfile.mkdtemp(prefix="forks-")
    os.environ[FORKS] = folder
    listener = listen(folder)
    alive, theirs = socket.socketpair()
    if not os.fork():
        alive.close()
        serve(folder, listener, theirs)
        os._exit(0)
    listener.close()
    theirs.close()
    sys.executable = f"{folder}/python"
    atexit.register(alive.close)  # until then it is kept


def finish(code: int) -> None:
    """End as an interpreter does, without what belongs to the process that forks."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose threads"
    gc.freeze()  # what is shared stays unwritten
    gc.enable()
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), socket.socket(fileno=int(sys.argv[3])))
