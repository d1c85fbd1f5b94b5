"""Streams of random numbers: one for each use, whatever the keys."""

import itertools

from reachrl.streams import Stream, generator


def test_no_two_uses_share_their_first_numbers():
    """Keys of zeros above all: numpy takes (3, 1) and (3, 1, 0) for the same seed."""
    keys = [key for length in range(3) for key in itertools.product((0, 1, 2), repeat=length)]
    drawn = {
        (seed, stream, key): tuple(generator(seed, stream, *key).integers(2**63, size=2))
        for seed, stream in itertools.product((0, 1, 2), Stream)
        for key in keys
        if len(key) == int(stream) % 2 + 1  # as many parts for every draw of a stream
    }
    assert len(set(drawn.values())) == len(drawn) > 200


def test_the_same_use_gives_the_same_numbers_and_names_are_keys():
    def draw(*key: int | str) -> int:
        return int(generator(7, Stream.EXPERT_NOISE, *key).integers(2**63))

    assert draw("drawer-open", 1) == draw("drawer-open", 1)
    assert len({draw("drawer-open", 1), draw("drawer-close", 1), draw("drawer-open", 2)}) == 3


def test_a_seed_beyond_32_bits_is_a_seed_of_its_own():
    numbers = {int(generator(seed, Stream.CURRICULUM, 0).integers(2**63)) for seed in (5, 5 + 2**32, 5 + 2**40)}
    assert len(numbers) == 3
