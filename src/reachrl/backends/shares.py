"""Distribution of environments over actors, and over an actor's groups."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate


def proportional_shares(total: int, seconds_per_env: Sequence[float], *, least: int = 1) -> list[int]:
    """Number of environments for each actor that minimises the time of the slowest.

    Args:
        total: environments to share out.
        seconds_per_env: seconds of one step of one environment, by actor.
        least: minimum for every actor.

    Returns:
        One count per actor; they sum to `total`.
    """
    count = len(seconds_per_env)
    assert total >= count * least > 0 and min(seconds_per_env) > 0
    shares = [least] * count
    # Each further one goes where it is done first: for a maximum of sums, dealing out greedily is optimal.
    done = [((least + 1) * seconds, number) for number, seconds in enumerate(seconds_per_env)]
    heapify(done)
    for _ in range(total - count * least):
        when, number = heappop(done)
        shares[number] += 1
        heappush(done, (when + seconds_per_env[number], number))
    return shares


def step_time(shares: Sequence[int], seconds_per_env: Sequence[float]) -> float:
    """Seconds of one step of all: the slowest actor's."""
    return max(count * seconds for count, seconds in zip(shares, seconds_per_env, strict=True))


def even_shares(total: int, count: int) -> list[int]:
    """Equal shares, which differ by one at most."""
    return [(i + 1) * total // count - i * total // count for i in range(count)]


def firsts(shares: Sequence[int]) -> list[int]:
    """Number of the first environment of each share."""
    return [0, *accumulate(shares)][:-1]
