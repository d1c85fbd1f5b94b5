"""ReachRL: improve a vision-language-action policy with online reinforcement learning."""

from reachrl import threads

__version__ = "0.1.0"

threads.bound_spinning()  # before anything loads an OpenMP runtime
