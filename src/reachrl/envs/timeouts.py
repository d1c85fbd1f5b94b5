"""How long environments may take to start, and what is said of those that take longer."""

from reachrl.config.env import EnvSection
from reachrl.run.cores import available_cores

_START_TIMEOUT_S = 120.0  # importing a simulator and building its scenes, with a core for each worker


def start_timeout(worker_timeout_s: float, num_envs: int) -> float:
    """Timeout in seconds for starting environments; it grows where they share cores.

    Args:
        worker_timeout_s: what the configuration grants a worker for an answer; more than two minutes counts here too.
        num_envs: how many are made at once.
    """
    return max(_START_TIMEOUT_S, worker_timeout_s) * max(1.0, num_envs / available_cores())


def too_late(config: EnvSection, timeout_s: float) -> str:
    """Words for environments that did not become ready within `timeout_s` seconds."""
    return (
        f"it was not ready within {timeout_s:g} s, the limit for {config.num_envs} environments on "
        f"{available_cores()} cores; set env.worker_timeout_s above {max(_START_TIMEOUT_S, config.worker_timeout_s):g} "
        "to raise it, or lower env.num_envs"
    )


def hung(timeout_s: float) -> str:
    """Words for environments that did not answer within `timeout_s` seconds."""
    return f"it did not answer within {timeout_s:g} s (env.worker_timeout_s)"
