"""How a policy is evaluated: on a configuration's own held-out starts, or by a benchmark's published protocol."""

import json
from collections.abc import Sequence
from typing import Literal

from reachrl.config.libero import NUM_STORED_STARTS, LiberoConfig
from reachrl.config.libero_tasks import STEP_LIMITS, SUITES
from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError

Protocol = Literal["heldout", "official"]
PROTOCOLS: tuple[Protocol, ...] = ("heldout", "official")
_OFFICIAL_TEMPERATURES = (0.0, 1.0)  # greedy; actions that are sampled at all are the policy's own


def evaluation_config(
    preset: str, overrides: Sequence[str], *, suite: str | None, protocol: Protocol, cores: int
) -> TrainConfig:
    """The configuration of one evaluation.

    `official` is LIBERO's: all tasks of a suite, its 50 stored start states each, its step limit, its own simulation
    and frames, greedy actions. What belongs to the policy stays open (the size of its frames, the meaning of its
    gripper, sampled actions at temperature 1 instead of greedy ones), and so does how many processes work.

    Args:
        preset: a preset's name, a TOML file or a run's `config.json`.
        overrides: `key=value` changes; they win over the protocol, as far as it lets them.
        suite: which tasks; unset: those of the configuration.
        protocol: see `PROTOCOLS`.
        cores: of this machine; each runs one environment of the official protocol.

    Raises:
        ConfigError: unknown suite or key, or a change that the protocol does not allow.
    """
    said: list[str] = []
    if suite is not None:
        if suite not in SUITES:
            raise ConfigError(f"unknown suite {suite!r}; LIBERO has {', '.join(SUITES)}")
        said += ["env.kind=libero", f"env.suite={suite}"]
    elif protocol == "official":
        suite = _suite_of(load_config(preset, list(overrides)))
    if suite is not None:
        said += [f"env.tasks={json.dumps(SUITES[suite])}", f"env.max_steps={STEP_LIMITS[suite]}"]
    if protocol == "official":
        said += [f"env.num_eval_starts={NUM_STORED_STARTS}", f"eval.num_starts={NUM_STORED_STARTS}"]
        said += ["env.simulation=faithful", "eval.temperatures=[0.0]", f"env.num_envs={cores}"]
    config = load_config(preset, [*said, *overrides])
    if protocol == "official":
        _check_official(config)
    return config


def _suite_of(config: TrainConfig) -> str:
    if not isinstance(config.env, LiberoConfig):
        raise ConfigError(
            f"the official protocol is LIBERO's, but env.kind is {config.env.kind!r}; "  # pyright: ignore
            f"name a suite, --suite {' or '.join(SUITES)}"
        )
    return config.env.suite


def _check_official(config: TrainConfig) -> None:
    env = config.env
    assert isinstance(env, LiberoConfig)
    needed = {
        "env.tasks": (env.tasks, SUITES[env.suite]),
        "env.max_steps": (env.max_steps, STEP_LIMITS[env.suite]),
        "eval.num_starts": (config.eval.num_starts, NUM_STORED_STARTS),
    }
    for key, (found, official) in needed.items():
        if found != official:
            shown = f"all {len(official)} of {env.suite}" if isinstance(official, tuple) else official
            raise ConfigError(f"{key}: the official protocol has {shown}; leave it out, or use --protocol heldout")
    for temperature in config.eval.temperatures:
        if temperature not in _OFFICIAL_TEMPERATURES:
            raise ConfigError(
                f"eval.temperatures: the official protocol has greedy actions (0) or the policy's own (1), not "
                f"{temperature}; leave it out, or use --protocol heldout"
            )
