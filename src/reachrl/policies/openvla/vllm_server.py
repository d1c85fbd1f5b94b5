"""The process that runs vLLM: takes jobs from a socket and answers them, one at a time.

Run as a script by the Python of another environment. It imports nothing of this package and takes and gives no
pickles, so the two environments may hold any versions. The other side imports `send` and `receive` from here.
"""

import json
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

_FOLDERS: list[str] = []
_LENGTHS = struct.Struct("<QQ")  # bytes of the message, bytes of what comes with it


def send(connection: socket.socket, message: dict[str, Any], blob: bytes = b"") -> None:
    """Send a message that JSON can hold, and bytes with it."""
    text = json.dumps(message).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(blob)) + text)
    connection.sendall(blob)


def receive(connection: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Wait for a message and the bytes that come with it.

    Args:
        connection: where it comes from.
        deadline: `time.monotonic()` at which to give up; None waits for ever.

    Raises:
        EOFError: the other side has closed the connection.
        TimeoutError: the deadline has passed.
    """

    def exactly(count: int) -> bytes:
        found = bytearray(count)
        view, have = memoryview(found), 0
        while have < count:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                connection.settimeout(left)
            got = connection.recv_into(view[have:])
            if not got:
                raise EOFError
            have += got
        return bytes(found)

    text, blob = _LENGTHS.unpack(exactly(_LENGTHS.size))
    return json.loads(exactly(text)), exactly(blob)


class Engine:
    """vLLM in this process.

    Args:
        setup: `options` of `vllm.LLM`.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        self._sampling = vllm.SamplingParams
        self.version = vllm.__version__
        # Log-probs of the sampling distribution: the default is the full vocabulary's, at temperature 1.
        self.llm = vllm.LLM(**setup["options"], logprobs_mode="processed_logprobs")

    def reload(self, weights: Iterator[tuple[str, Any]]) -> None:
        """Take new weights, and forget what was computed with the old ones.

        `load_weights` would not do: on a CPU, layers multiply by a packed copy that it leaves as it is.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # The worker drops its encoded images in the reload; a scheduler that keeps images would go on counting on them.
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_mm_cache()

    def decode(self, job: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Decode rows of tokens, each behind its frame.

        Args:
            job: `prompts`, `frames` (of each row, which frame), `shape` of the frames, `temperature` (0: greedy),
                `seeds` (of each row, or None), `allowed` (first id and one past the last), `num_tokens`, `all`
                (log-probs of all allowed tokens, not of the chosen one).
            blob: the frames u8[F H W 3].

        Returns:
            `ids` [B A] and `logprobs` [B A], or [B A allowed].
        """
        import numpy as np

        frames = np.frombuffer(blob, np.uint8).reshape(job["shape"])
        allowed = list(range(*job["allowed"]))
        common = {
            "temperature": job["temperature"], "top_p": 1.0, "top_k": -1, "allowed_token_ids": allowed,
            "min_tokens": job["num_tokens"], "max_tokens": job["num_tokens"], "ignore_eos": True,
            "logprobs": len(allowed) if job["all"] else 0, "detokenize": False,
        }  # fmt: skip
        seeds = job["seeds"] or [None] * len(job["prompts"])
        outputs = self.llm.generate(
            [
                {"prompt_token_ids": ids, "multi_modal_data": {"image": frames[frame]}}
                for ids, frame in zip(job["prompts"], job["frames"], strict=True)
            ],
            [self._sampling(**common, seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        rows = [output.outputs[0] for output in outputs]  # in the order of the prompts
        ids = [list(row.token_ids) for row in rows]
        scores = [
            [
                [step[i].logprob for i in allowed] if job["all"] else step[one].logprob
                for one, step in zip(chosen, row.logprobs, strict=True)
            ]
            for chosen, row in zip(ids, rows, strict=True)
        ]
        return {"ids": ids, "logprobs": scores}


def _incoming(connection: socket.socket) -> Iterator[tuple[str, Any]]:
    """Weights from the files that are announced one after another, until `done`."""
    from safetensors.torch import load_file

    while True:
        job, _ = receive(connection)
        if job["op"] == "done":
            return
        tensors = load_file(job["path"])
        os.unlink(job["path"])
        yield from tensors.items()
        del tensors
        send(connection, {})


def serve(connection: socket.socket) -> None:
    """Answer jobs until the other side closes the connection."""
    engine: Engine | None = None
    while True:
        try:
            job, blob = receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            if job["op"] == "start":
                engine = Engine(job)
                reply: dict[str, Any] = {"version": engine.version}
            elif job["op"] == "weights":
                assert engine is not None
                engine.reload(_incoming(connection))
                reply = {}
            else:
                assert engine is not None
                reply = engine.decode(job, blob)
        except Exception as error:
            kind = "missing" if isinstance(error, ImportError) else "failed"
            reply = {"error": traceback.format_exc(), "kind": kind}
        try:
            send(connection, reply)
        except ConnectionError:
            return


def _end() -> None:
    """Leave nothing behind, also where the parent was killed and could not see to it."""
    for folder in _FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # this process leads a group of its own: the engine's own children end as well


def _end_with_parent(parent: int) -> None:
    # The end of the connection does not tell: other children of the parent may hold it open.
    while os.getppid() == parent:
        time.sleep(1.0)
    _end()


def main() -> None:
    """Entry point: the file descriptor of the connection, the parent's process id, folders to remove at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _FOLDERS.extend(sys.argv[3:])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights need not travel once more
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # everything it needs is in the folder it is given
    }
    serve(socket.socket(fileno=descriptor))
    _end()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's `weights` or `tokenizer` must not pass for somebody's package
    main()
