"""This process among those that `torchrun` started: which it is, by the environment variables, and how it ends."""

import atexit
import os
import sys
from typing import NoReturn

from reachrl.errors import ConfigError

_REMEDY = "`torchrun` sets it: start the processes with `torchrun`, or unset RANK, WORLD_SIZE and LOCAL_RANK"
_MOST = 2**31 - 1


def rank() -> int:
    """Number of this process; 0 leads, and is alone without `torchrun`.

    Raises:
        ConfigError: the variables of `torchrun` are broken.
    """
    return _number("RANK", 0, least=0)


def size() -> int:
    """How many processes there are; 1 without `torchrun`.

    Raises:
        ConfigError: the variables of `torchrun` are broken.
    """
    return _number("WORLD_SIZE", 1, least=1)


def local_rank() -> int | None:
    """Number of this process, and so of its GPU, on this machine; none without `torchrun`.

    Raises:
        ConfigError: the variables of `torchrun` are broken.
    """
    return _number("LOCAL_RANK", 0, least=0) if os.environ.get("LOCAL_RANK", "").strip() else None


def check() -> None:
    """Make sure that the variables of `torchrun` say one thing, so that the processes can find each other.

    Raises:
        ConfigError: one is no number, missing beside the others, or out of range.
    """
    number, processes, here = rank(), size(), local_rank()
    if number >= processes:
        raise ConfigError(f"RANK={number}, but WORLD_SIZE={processes}: ranks go from 0 to {processes - 1}; {_REMEDY}")
    if here is not None and here >= processes:
        raise ConfigError(f"LOCAL_RANK={here}, but WORLD_SIZE={processes}: expected a smaller number; {_REMEDY}")
    if processes == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            raise ConfigError(f"WORLD_SIZE={processes}, but {name} is not set; {_REMEDY}")
    if _number("MASTER_PORT", 0, least=1) > 65535:
        raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']}: expected a port, 1 to 65535; {_REMEDY}")


def _number(name: str, default: int, *, least: int) -> int:
    """The value of a variable; an empty one counts as unset."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= _MOST):
        raise ConfigError(f"{name}={text[:50]!r}: expected a whole number from {least} on; {_REMEDY}")
    return int(text)


def leave(exit_code: int) -> NoReturn:
    """End this process; among others, without taking the interpreter down.

    Gloo's threads may still hold a tensor that was exchanged last. One released during interpreter shutdown aborts
    the process (pytorch/pytorch#179291), and `torchrun` then reports a finished run as failed.
    """
    try:
        alone = size() == 1
    except ConfigError:  # that is what it ends for
        alone = True
    if alone:
        sys.exit(exit_code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
