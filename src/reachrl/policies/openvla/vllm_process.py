"""The engine's process as seen from this one: start it, ask it, and know why it did not answer."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

from reachrl.child import signal_name
from reachrl.config.vllm import VllmConfig
from reachrl.errors import ConfigError, MissingExtra, ReachRLError, WorkerError
from reachrl.policies.openvla import vllm_server

logger = logging.getLogger(__name__)

SERVER = Path(vllm_server.__file__)
FILE_BYTES = 2**30
"""Weights travel in files of about so many bytes."""
_LAST_LINES = 25
_SHARED_MEMORY = Path("/dev/shm")
# What would lead another environment's interpreter to this one's packages.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")


class EngineProcess:
    """A child process with a vLLM engine in it. It ends with this object, and with this process however that ends.

    Args:
        config: which Python, and how long it may take.
        gpu: which of the GPUs that this process sees is the engine's; none: as vLLM chooses.

    Raises:
        ConfigError: the interpreter is not there or cannot be run.
    """

    def __init__(self, config: VllmConfig, gpu: int | None = None) -> None:
        assert config.python is not None
        self._config = config
        # For this user's eyes only: what describes the policy, what the engine writes, and the weights on their way.
        self.folder = Path(tempfile.mkdtemp(prefix="reachrl-vllm-"))
        self.weights_folder = self._with_room()
        self._log = self.folder / "engine.log"
        folders = list(dict.fromkeys((self.folder, self.weights_folder)))
        self._connection, theirs = socket.socketpair()
        try:
            with theirs, self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [os.path.expanduser(config.python), SERVER, str(theirs.fileno()), str(os.getpid()), *folders],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is ours to handle
                    env=_environment(gpu),
                )
        except OSError as error:
            self._connection.close()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(
                f"policy.vllm.python={config.python} cannot be run on {socket.gethostname()}: {error.strerror}. It "
                "must be the interpreter of an environment with vLLM"
            ) from error
        self.pid = self._process.pid
        self.close = weakref.finalize(self, _end, self._process, self._connection, folders, os.getpid())

    def _with_room(self) -> Path:
        """Where two files of weights fit: shared memory if there is room, else on disk."""
        if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * FILE_BYTES:
            return Path(tempfile.mkdtemp(prefix="reachrl-vllm-", dir=_SHARED_MEMORY))
        return self.folder

    def start(self, options: dict[str, Any]) -> None:
        """Build the engine.

        Args:
            options: of `vllm.LLM`.

        Raises:
            MissingExtra: vLLM, or what it needs, is not installed there.
            WorkerError: it failed, died or took too long.
        """
        began = time.monotonic()
        answer = self.ask({"op": "start", "options": options}, deadline_s=self._config.start_s, option="start_s")
        logger.info("vLLM %s runs as process %d, %.0f s", answer["version"], self.pid, time.monotonic() - began)

    def ask(
        self,
        job: dict[str, Any],
        blob: bytes = b"",
        *,
        deadline_s: float | None = None,
        option: str = "deadline_s",
    ) -> dict[str, Any]:
        """Send a job and wait for the answer. After any error the engine is closed.

        Args:
            job: what JSON can hold.
            blob: bytes that go with it.
            deadline_s: how long it may take; none: as configured.
            option: what sets that, for the message.

        Raises:
            MissingExtra: a package is missing in the engine's environment.
            WorkerError: the engine failed, died or took too long.
        """
        seconds = self._config.deadline_s if deadline_s is None else deadline_s
        try:
            self._connection.settimeout(seconds)
            deadline = time.monotonic() + seconds
            vllm_server.send(self._connection, job, blob)
            answer, _ = vllm_server.receive(self._connection, deadline)
            if "error" in answer:
                raise self._failed(job, answer)
            return answer
        except TimeoutError as error:
            raise WorkerError(
                f"the vLLM engine (process {self.pid}) gave no answer to {job['op']!r} within {seconds:g} s and was "
                f"ended; a larger policy.vllm.{option} gives it more time.{self._last_words()}"
            ) from error
        except (EOFError, ConnectionError) as error:
            raise WorkerError(
                f"the vLLM engine (process {self.pid}) died at {job['op']!r} {self._how_it_ended()}."
                f"{self._last_words()}"
            ) from error
        except BaseException:  # Ctrl-C too: an answer that nobody took would be taken for the next one's
            self.close()
            raise
        finally:
            if self._process.poll() is not None:
                self.close()

    def tell(self, job: dict[str, Any]) -> None:
        """Send a job that is answered with the next one."""
        self._connection.settimeout(self._config.deadline_s)
        try:
            vllm_server.send(self._connection, job)
        except OSError:
            pass  # the next `ask` will find out, and say why

    def _failed(self, job: dict[str, Any], answer: dict[str, Any]) -> ReachRLError:
        last = answer["error"].strip().splitlines()[-1]
        if answer["kind"] == "missing":
            return MissingExtra(
                f"policy.vllm.python={self._config.python} lacks a package that decoding with vLLM needs: {last}. "
                "Install vLLM and timm there"
            )
        return WorkerError(f"vLLM failed at {job['op']!r}: {last}\n{answer['error'].rstrip()}{self._last_words('')}")

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "(closed its connection)"
        if code >= 0:
            return f"with exit code {code}"
        hint = "; a lack of memory is the usual reason" if -code == signal.SIGKILL else ""
        return f"by signal {signal_name(-code)}{hint}"

    def _last_words(self, otherwise: str = " It wrote nothing.") -> str:
        """The end of what it wrote; before the folder goes."""
        try:
            lines = self._log.read_text(errors="replace", encoding="utf-8").splitlines()[-_LAST_LINES:]
        except OSError:
            lines = []
        self.close()
        return "\nIts last words:\n  " + "\n  ".join(lines) if lines else otherwise


def _environment(gpu: int | None) -> dict[str, str]:
    """Of the engine: ours, but for what leads to our packages, with one GPU."""
    variables = {key: value for key, value in os.environ.items() if key not in _OURS}
    if gpu is not None:
        visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        variables["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    return variables


def _end(process: subprocess.Popen, connection: socket.socket, folders: list[Path], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the process whose engine this is
    connection.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it has nothing to save; its own children are in the group
    except ProcessLookupError:
        pass  # ended already
    process.wait()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
