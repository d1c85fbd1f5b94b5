"""Trajectories stored in other formats, read as `reachrl.types.Trajectory` one at a time."""

from reachrl.demos.readers.end_effector import StateColumns
from reachrl.demos.readers.read import read_trajectories

__all__ = ["StateColumns", "read_trajectories"]
