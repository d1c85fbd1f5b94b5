"""What a measurement on LIBERO-PRO plays: its tasks of the environment's tasks from their stored start states."""

from collections.abc import Collection
from fractions import Fraction

from reachrl.config.env import EnvSection
from reachrl.config.libero import NUM_STORED_STARTS, LiberoConfig
from reachrl.config.libero_pro import KINDS, NOT_HAD, PROTOCOLS, Protocol, check_pro
from reachrl.config.perturbations import PublishedTask
from reachrl.errors import ConfigError
from reachrl.pipeline.conditions import Condition, Conditions, trained_on
from reachrl.pipeline.published import sampled_level, suite_axes
from reachrl.types import Start

_LEVELS = {"lan": "reworded", "object": "other looks", "swap": "other places", "task": "other goal"}


def pro_conditions(env: EnvSection, protocol: Protocol, asked: str | None, share: Fraction, seed: int) -> Conditions:
    """LIBERO-PRO's tasks, those of the environment's suite and tasks, each from all its stored start states.

    Args:
        env: the environment.
        protocol: what is said.
        asked: axes, such as `lan,swap`; None: all.
        share: of the episodes that are played, of each task its part.
        seed: of which are.

    Raises:
        ConfigError: another environment, suite or axis than LIBERO-PRO has, or an edited package.
        MissingExtra: the package is not installed.
    """
    if not isinstance(env, LiberoConfig):
        raise ConfigError(f"--suite pro: LIBERO-PRO perturbs tasks of LIBERO; the policy's env.kind is {env.kind}")
    kinds = suite_axes(asked, "LIBERO-PRO", KINDS, NOT_HAD)
    check_pro(env.suite)
    axes = []
    for kind in kinds:
        variant = str(PublishedTask(PROTOCOLS[protocol], kind))
        episodes = {
            task: [Start(task, "eval", index, variant) for index in range(env.num_eval_starts)] for task in env.tasks
        }
        level = sampled_level(episodes, share, seed, kind, _LEVELS[kind])
        axes.append(Condition(axis=kind, what=KINDS[kind], levels=(level,)))
    return Conditions(
        name=f"LIBERO-PRO, {env.suite}, {protocol} protocol",
        axes=tuple(axes),
        caveats=tuple(_caveats(env, kinds, protocol, share)),
    )


def _caveats(env: LiberoConfig, kinds: Collection[str], protocol: Protocol, share: Fraction) -> list[str]:
    said = []
    if protocol == "upstream":
        said.append(
            "upstream protocol: every episode is told the base task's sentence, with lan and task as well; for "
            "comparison with figures measured by the benchmark's functions"
        )
    else:
        said.append("corrected protocol: with lan and task the policy is told the sentence in the task's own file")
    if "task" in kinds:
        said.append("task asks for another goal than any that was trained: 0 is expected of every policy")
    said.append("every axis has start states of its own: the unperturbed episode of the same number begins elsewhere")
    if share < 1:
        said.append(f"a sample of {share} of the episodes, by axis and base task")
    if env.num_eval_starts < NUM_STORED_STARTS:
        said.append(f"the first {env.num_eval_starts} of {NUM_STORED_STARTS} stored start states (env.num_eval_starts)")
    return [*said, *trained_on(env, env.randomise.axes)]
