"""This process among those that `torchrun` started: which it is, by the environment variables, and how it ends."""

import atexit
import os
import sys
from typing import NoReturn


def rank() -> int:
    """Number of this process; 0 leads, and is alone without `torchrun`."""
    return int(os.environ.get("RANK") or "0")


def size() -> int:
    """How many processes there are; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def local_rank() -> int | None:
    """Number of this process, and so of its GPU, on this machine; none without `torchrun`."""
    number = os.environ.get("LOCAL_RANK")
    return int(number) if number else None


def leave(exit_code: int) -> NoReturn:
    """End this process; among others, without taking the interpreter down.

    Gloo's threads may still hold a tensor that was exchanged last. One let go of while the interpreter goes down aborts
    the process (pytorch/pytorch#179291), and `torchrun` then reports a finished run as failed.
    """
    if size() == 1:
        sys.exit(exit_code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
