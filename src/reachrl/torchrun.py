"""Which of the processes that `torchrun` started this one is, by the environment variables that it sets."""

import os


def rank() -> int:
    """Number of this process; 0 leads, and is alone without `torchrun`."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes there are; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """Number of this process, and so of its GPU, on this machine; none without `torchrun`."""
    number = os.environ.get("LOCAL_RANK")
    return None if number is None else int(number)
