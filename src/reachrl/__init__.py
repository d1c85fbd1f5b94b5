"""ReachRL: improve a vision-language-action policy with online reinforcement learning."""

__version__ = "0.1.0"
