"""How many environments each actor gets: in proportion to how fast it steps them."""

from collections.abc import Sequence
from itertools import accumulate


def proportional_shares(total: int, seconds_per_env: Sequence[float]) -> list[int]:
    """Environments for each actor so that all need about the same time for one step.

    Args:
        total: environments to share out, at least one for each actor.
        seconds_per_env: what one step of one environment takes, by actor.

    Returns:
        One count per actor; they sum to `total` and none is 0. Largest remainders round up.
    """
    count = len(seconds_per_env)
    assert total >= count > 0 and min(seconds_per_env) > 0
    speed = [1 / seconds for seconds in seconds_per_env]
    wanted = [(total - count) * each / sum(speed) for each in speed]  # beyond the one that everyone has
    shares = [1 + int(each) for each in wanted]
    by_remainder = sorted(range(count), key=lambda i: (int(wanted[i]) - wanted[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def step_time(shares: Sequence[int], seconds_per_env: Sequence[float]) -> float:
    """Seconds of one step of all: the slowest actor's."""
    return max(count * seconds for count, seconds in zip(shares, seconds_per_env, strict=True))


def even_shares(total: int, count: int) -> list[int]:
    """Shares for actors of which nothing is known; they differ by one at most."""
    return [(i + 1) * total // count - i * total // count for i in range(count)]


def firsts(shares: Sequence[int]) -> list[int]:
    """Number of the first environment of each share."""
    return [0, *accumulate(shares)][:-1]
