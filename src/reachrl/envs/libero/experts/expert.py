"""The scripted expert of a LIBERO task: reads the goal from the task file and reaches its predicates in turn."""

import logging
from collections.abc import Iterator

import numpy as np

from reachrl.envs.libero.experts.articulate import reach_state
from reachrl.envs.libero.experts.hand import Actions, Hand
from reachrl.envs.libero.experts.pick_place import NotDone, drag, is_dish, pick, place
from reachrl.envs.libero.experts.scene import Scene
from reachrl.envs.libero.simulation import Simulation

logger = logging.getLogger(__name__)

_ROUNDS = 4  # of going through what is not yet done
_ORDER = ("open", "turnon", "on", "in", "close", "turnoff")  # a drawer is closed when things are in it


class Expert:
    """Acts from the beginning of one episode to its end.

    Args:
        simulation: at the beginning of an episode.
    """

    def __init__(self, simulation: Simulation):
        self.scene, self.hand = Scene(simulation), Hand(simulation)
        self._script: Iterator[np.ndarray] = self._reach_goals()

    def action(self) -> np.ndarray:
        """The next action f64[7] in the simulator's convention."""
        return next(self._script)

    def _reach_goals(self) -> Actions:
        for _ in range(_ROUNDS):
            for goal in sorted(self.scene.goals, key=lambda goal: _ORDER.index(goal[0])):
                if self.scene.holds(goal):
                    continue
                try:
                    yield from self._reach(goal)
                except NotDone as problem:
                    logger.debug("%s: %s", goal, problem)
                    yield from self.hand.open()
                yield from self.hand.hold(2)
        while True:  # nothing more is known to try
            yield from self.hand.hold(1)

    def _reach(self, goal: list[str]) -> Actions:
        predicate, *names = goal
        if predicate in ("on", "in"):
            thing, target = names
            opened = ["open", target]
            if self.scene.is_drawer(target) and not self.scene.holds(opened):
                yield from reach_state(self.scene, self.hand, opened)
            if is_dish(self.scene, thing):
                yield from drag(self.scene, self.hand, thing, target)
            else:
                yield from pick(self.scene, self.hand, thing)
                yield from place(self.scene, self.hand, thing, target)
        else:
            yield from reach_state(self.scene, self.hand, goal)
