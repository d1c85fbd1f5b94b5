"""Imports the installed LIBERO without its prompt and its writes into the user's home; checks its version.

Upstream asks a question on the terminal at its first import, writes a configuration into the home folder, logs to one
file for all users of a machine (which fails for the second) and downloads its assets while it constructs the first
task. None of that happens here.
"""

import os
import pickle
import sys
import tempfile
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.config.libero_tasks import SUITES
from reachrl.envs.gl import import_mujoco
from reachrl.errors import ConfigError, MissingExtra

INSTALL = "pip install 'reachrl[libero]' && pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
INSTALL_AGAIN = "pip install --force-reinstall --no-deps hf-libero==0.1.4"
# Versions whose physics the benchmark's stored start states and our recorded figures belong to.
_NEEDED = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "bddl": "1.0.1"}
_MUJOCO_BELOW = (3, 4)  # from 3.4.0 on a stored libero_spatial state is reported to break; 3.10 changes the API


def check_versions() -> None:
    """Refuse what is not installed or known not to work.

    Raises:
        MissingExtra: a package is missing or of the wrong version; the message says how to install it.
    """
    found = {name: _version(name) for name in (*_NEEDED, "mujoco")}
    missing = [name for name, there in found.items() if there is None]
    if missing:
        raise MissingExtra(f"LIBERO needs {', '.join(missing)}; run  {INSTALL}")
    wrong = [f"{name} {found[name]} (needs {needed})" for name, needed in _NEEDED.items() if found[name] != needed]
    if tuple(int(part) for part in str(found["mujoco"]).split(".")[:2]) >= _MUJOCO_BELOW:
        wrong.append(f"mujoco {found['mujoco']} (needs 3.3; later ones change episodes from stored start states)")
    if wrong:
        raise MissingExtra(f"LIBERO does not give its published episodes with {', '.join(wrong)}; run  {INSTALL}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_folder() -> Path:
    """Where the package `libero.libero` lies, without importing it.

    Raises:
        MissingExtra: it is not installed.
    """
    spec = find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"LIBERO is not installed; run  {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def check_alone() -> None:
    """Refuse a second installation that Python finds under the name `libero`.

    Raises:
        MissingExtra: there is one; which of the two is imported, wholly or in parts, is chance.
    """
    claimants = {name.replace("_", "-") for name in packages_distributions().get("libero", ())} - {"hf-libero"}
    if claimants:
        names = " ".join(sorted(claimants))
        raise MissingExtra(
            f"hf-libero and {names} are both installed as `libero` and overwrite each other's files; "
            f"run  pip uninstall -y {names} && {INSTALL_AGAIN}"
        )
    ours, spec = Path(str(distribution("hf-libero").locate_file("libero"))), find_spec("libero")
    found = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    others = [str(place) for place in found if place.resolve() != ours.resolve()]
    if others:
        raise MissingExtra(
            f"Python imports `libero` from {', '.join(others)} and not from the installed hf-libero in {ours}; "
            "start from another folder, with  env -u PYTHONPATH reachrl ..."
        )


def check_suite(suite: str) -> None:
    """Refuse a suite whose task definitions or stored start states are not there.

    Raises:
        ConfigError: they are not.
        MissingExtra: LIBERO is not installed.
    """
    for part, ending in (("bddl_files", "bddl"), ("init_files", "pruned_init")):
        folder = package_folder() / part / suite
        lacking = [task for task in SUITES[suite] if not (folder / f"{task}.{ending}").is_file()]
        if lacking:
            raise ConfigError(
                f"the suite {suite} is not completely installed: {folder} lacks {len(lacking)} of "
                f"{len(SUITES[suite])} tasks ({lacking[0]}.{ending}); run  {INSTALL_AGAIN}"
            )


def bddl_file(suite: str, task: str) -> Path:
    """The task's definition.

    Raises:
        MissingExtra: LIBERO is not installed.
        ConfigError: the file is gone.
    """
    path = package_folder() / "bddl_files" / suite / f"{task}.bddl"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: LIBERO is not completely installed; run  {INSTALL_AGAIN}")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """What a task is made of."""

    name: str
    """Of the task and, where it is perturbed, its axis."""
    definition: Path
    """Its BDDL file."""
    starts: np.ndarray
    """Stored start states: time, joint positions and velocities, f64[50 K]."""
    distractors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Things in the scene that definition and start states know nothing of: their kinds, by name."""

    @classmethod
    def of(cls, suite: str, task: str) -> "TaskFiles":
        """Those of a task of the benchmark.

        Raises:
            MissingExtra: LIBERO is not installed.
            ConfigError: a file is missing or damaged.
        """
        return cls(name=task, definition=bddl_file(suite, task), starts=stored_starts(suite, task))


@cache
def import_upstream(assets: Path) -> Any:
    """The module `libero.libero.envs`, with `assets` as its assets.

    Raises:
        MissingExtra: something is missing or of the wrong version.
    """
    check_versions()
    import_mujoco()
    quiet = types.ModuleType("robosuite.macros_private")  # what robosuite reads its settings from
    quiet.CONSOLE_LOGGING_LEVEL, quiet.FILE_LOGGING_LEVEL = "ERROR", None  # pyright: ignore[reportAttributeAccessIssue]
    quiet.__all__ = ["CONSOLE_LOGGING_LEVEL", "FILE_LOGGING_LEVEL"]  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("robosuite.macros_private", quiet)
    try:
        libero = _import_without_questions()
        libero._assets_path_cache = str(assets)
        from libero.libero import envs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(f"LIBERO could not be imported ({error}); run  {INSTALL}") from error
    return envs


def _import_without_questions() -> Any:
    """`libero.libero`, which asks unless a configuration file stands where `LIBERO_CONFIG_PATH` points."""
    before = os.environ.get("LIBERO_CONFIG_PATH")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").touch()
        os.environ["LIBERO_CONFIG_PATH"] = folder
        try:
            import libero.libero as libero  # pyright: ignore[reportMissingImports]
        finally:
            os.environ.pop("LIBERO_CONFIG_PATH")
            if before is not None:
                os.environ["LIBERO_CONFIG_PATH"] = before
    paths = libero.get_default_path_dict()
    libero.get_libero_path = paths.__getitem__
    return libero


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles that hold numpy arrays and nothing else."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how old pickles write bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only what an array is made of."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def stored_starts(suite: str, task: str) -> np.ndarray:
    """The start states that come with the benchmark: time, joint positions and velocities, f64[50 K].

    Raises:
        ConfigError: the file is missing, damaged, or holds anything but an array.
    """
    return read_states(package_folder() / "init_files" / suite / f"{task}.pruned_init", INSTALL_AGAIN)


def read_states(path: Path, remedy: str) -> np.ndarray:
    """Start states f64[N K] from a file that `torch.save` wrote; only arrays are read, and torch is not needed.

    Args:
        path: of the file; a single state f64[K] is one of N = 1.
        remedy: command that installs it again.

    Raises:
        ConfigError: the file is missing, damaged, or holds anything but an array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                states = np.atleast_2d(_ArraysOnly(file).load())
    except (OSError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as stored start states ({error}); run  {remedy}") from error
    if states.ndim != 2 or not np.issubdtype(states.dtype, np.floating) or not np.isfinite(states).all():
        raise ConfigError(f"{path} holds {states.dtype}{list(states.shape)}, expected start states as float64[N K]")
    return states.astype(np.float64)
