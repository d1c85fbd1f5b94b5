"""How many environments each actor gets: in proportion to how fast it steps them."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate


def proportional_shares(total: int, seconds_per_env: Sequence[float]) -> list[int]:
    """Environments for each actor so that the slowest is done as early as possible.

    Args:
        total: environments to share out, at least one for each actor.
        seconds_per_env: what one step of one environment takes, by actor.

    Returns:
        One count per actor; they sum to `total` and none is 0.
    """
    count = len(seconds_per_env)
    assert total >= count > 0 and min(seconds_per_env) > 0
    shares = [1] * count
    # Each further one goes where it is done first: for a maximum of sums, dealing out greedily is optimal.
    done = [(2 * seconds, number) for number, seconds in enumerate(seconds_per_env)]
    heapify(done)
    for _ in range(total - count):
        when, number = heappop(done)
        shares[number] += 1
        heappush(done, (when + seconds_per_env[number], number))
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
