"""The kits on the plug-ins of cameras, chunks and many worlds, and what each kit catches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batched_worlds import NEAR, SPEED, Sliders, SlidersConfig
from two_cameras import ChunkConfig, ChunkPolicy

from reachrl.errors import ExtensionError
from reachrl.testing.conformance_batch import check_batch
from reachrl.testing.conformance_policy import check_policy
from reachrl.types import Start


def solve(start: Start) -> np.ndarray:
    """Steps to the left until the slider is nearer than 0.1 to the end."""
    worlds, count = Sliders(SlidersConfig(), 1), 0
    worlds.begin(np.array([0]), [start])
    x = worlds.x[0]
    while abs(x) >= 0.1:
        x, count = x - SPEED, count + 1
    return np.array([[-1, 0, 0, 0]] * count, np.float32)


def test_many_worlds_keep_the_contract():
    check_batch(Sliders(SlidersConfig(), 3), solve=solve)


class Drifts(Sliders):
    """What was run before shows."""

    def begin(self, rows, starts):
        super().begin(rows, starts)
        self.count = getattr(self, "count", 0) + 1
        self.x[rows] += 1e-3 * self.count


class MovesAll(Sliders):
    """Those that have ended move on."""

    def act(self, actions, running):
        super().act(actions, np.ones_like(running))


class Late(Sliders):
    """Says that it succeeded one control step later."""

    def look(self):
        now, seen = self.x.copy(), super().look()
        late = getattr(self, "before", now)
        self.before = now
        return replace(seen, success=np.abs(late - self.goal) < NEAR)


class SeesNeighbours(Sliders):
    def act(self, actions, running):
        super().act(actions, running)
        self.x = self.x + 1e-2 * running * np.arange(len(self.x))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Drifts, "a chunk leads where its actions lead one by one"),
        (SeesNeighbours, "depends neither on its row"),
        (MovesAll, "stays as it ended while other rows go on"),
        (Late, "a chunk stops at success: "),
    ],
)
def test_the_kit_names_what_a_simulator_breaks(broken, message):
    with pytest.raises(ExtensionError, match=message):
        check_batch(broken(SlidersConfig(), 3), solve=solve)


def test_two_cameras_a_state_and_chunks_keep_the_contract():
    torch.manual_seed(0)
    worlds = Sliders(SlidersConfig(), 5)
    starts = [Start(worlds.tasks[n % 2], "train", n) for n in range(5)]
    check_policy(ChunkPolicy(ChunkConfig()), worlds.reset(starts, starts))
