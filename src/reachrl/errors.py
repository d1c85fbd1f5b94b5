"""The errors a user can meet, each with the exit code the command line returns.

Every message says what was wrong, where, what was expected and what to do. An `assert` elsewhere in
the package marks our own mistake instead.
"""


class ReachRLError(Exception):
    """Base of every error that is shown to a user without a traceback."""

    exit_code = 1


class ConfigError(ReachRLError):
    """A configuration key, value, preset, task, command line argument or function argument is wrong."""

    exit_code = 2


class MissingExtra(ReachRLError):
    """An optional dependency or a system library is not installed."""

    exit_code = 3


class ExtensionError(ReachRLError):
    """A plug-in could not be imported or breaks its contract."""

    exit_code = 4


class WorkerError(ReachRLError):
    """An environment worker died, hung or raised; names env, task, start and step."""

    exit_code = 5


class LearnerLostError(WorkerError):
    """A process that trains died or hung; the run can go on from its last checkpoint."""


class CheckpointError(ReachRLError):
    """A checkpoint is missing, truncated or belongs to another architecture."""

    exit_code = 6


class DivergedError(ReachRLError):
    """A loss, gradient or weight is not finite; raised before anything is saved."""

    exit_code = 7


class StopTraining(Exception):
    """Raised by a callback to end training with a checkpoint, and by the stage `train` when one has ended it."""


class StorageError(ReachRLError):
    """A file could not be written (full disk, permissions) or a stored one is damaged; earlier files are intact."""

    exit_code = 8
