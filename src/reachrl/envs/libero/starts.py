"""Numbered start states of one LIBERO task: the stored ones, and drawn ones that keep away from them."""

from typing import Any

import numpy as np

from reachrl.config.libero import NUM_STORED_STARTS
from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.installation import TaskFiles
from reachrl.envs.libero.simulation import Perturbation, Simulation
from reachrl.errors import ConfigError
from reachrl.streams import Stream, sequence
from reachrl.types import Split

_MAX_DRAWS = 1000


class Starts:
    """Begins the numbered episodes of one task.

    A drawn start is upstream's reset with a seed of its own. Those that put the objects within `gap` of where a stored
    start has them are drawn again: evaluation never meets what was trained on or chosen by. Validation starts are
    drawn, too, also where training uses the stored ones.

    Args:
        files: of the task.
        simulation: where episodes begin.
        stored_for_training: train on the stored starts, as published trainers do.

    Raises:
        ConfigError: the stored states do not fit the task as it is defined now.
    """

    def __init__(self, files: TaskFiles, simulation: Simulation, *, stored_for_training: bool):
        self.task, self.simulation, self.stored_for_training = files.name, simulation, stored_for_training
        self.stored = files.starts
        model = simulation.model
        own = None if simulation.distractors is None else simulation.distractors.own()
        self._own = (np.ones(model.nq, bool), np.ones(model.nv, bool)) if own is None else own
        self._check_size(self.stored, NUM_STORED_STARTS)
        self._columns = _object_columns(model, self._own[0])
        self._seeds: dict[tuple[Split, int], int] = {}
        self._stored_positions = stored = self.positions(self.stored[:, 1:])
        apart = np.linalg.norm(stored[:, None] - stored[None], axis=-1)
        np.fill_diagonal(apart, np.inf)
        # Stored starts are themselves only millimetres apart in some suites, so no fixed distance would do.
        self.gap = 0.5 * float(np.median(apart.min(axis=1)))

    def _check_size(self, states: np.ndarray, *many: int) -> None:
        needed = (*many, 1 + sum(map(int, map(np.sum, self._own))))
        if states.shape != needed:
            raise ConfigError(
                f"{self.task}: its stored start states are {list(states.shape)}, but the task file describes a scene "
                f"that needs {list(needed)}: the file was edited, or the versions do not belong together; install "
                "LIBERO again"
            )

    def positions(self, qpos: np.ndarray) -> np.ndarray:
        """Where the movable objects stand on the table: metres f64[... 2 K] from joint positions f64[... nq]."""
        return qpos[..., self._columns]

    def distance(self, qpos: np.ndarray) -> float:
        """How far objects in `qpos` f64[nq] are from the nearest stored start: metres, all objects together."""
        return float(np.linalg.norm(self._stored_positions - self.positions(qpos), axis=-1).min())

    def begin(self, split: Split, index: int, perturbation: Perturbation | None = None) -> None:
        """Put the simulation at start `index` of `split`, perhaps perturbed.

        What is not stored (where cabinets and stoves stand) is drawn with the start's number as seed.
        """
        key = (split, index)
        if perturbation is not None and perturbation.layout is not None:
            self._check_size(perturbation.layout.state)
        if split == "eval" or (split == "train" and self.stored_for_training):
            self.simulation.reset(index, self.stored[index], perturbation)
            return
        if key not in self._seeds:
            self._seeds[key] = self._draw(split, index)
            if perturbation is None:
                return
        self.simulation.reset(self._seeds[key], None, perturbation)

    def _draw(self, split: Split, index: int) -> int:
        stream = Stream.LIBERO_VALIDATION_STARTS if split == "validation" else Stream.LIBERO_STARTS
        for attempt in range(_MAX_DRAWS):
            seed = int(sequence(0, stream, self.task, index, attempt).generate_state(1)[0])
            self.simulation.reset(seed, None)
            if self.distance(self.simulation.data.qpos) >= self.gap:
                return seed
        raise RuntimeError(
            f"no start at a distance of {self.gap} m from the stored ones found for {self.task} {split} {index}"
        )


def _object_columns(model: Any, own: np.ndarray) -> np.ndarray:
    """Indices into the joint positions of x and y of everything that lies loose; distractors lie behind all of it."""
    free = (model.jnt_type == import_mujoco().mjtJoint.mjJNT_FREE) & own[model.jnt_qposadr]
    return (model.jnt_qposadr[free][:, None] + np.arange(2)).ravel()
