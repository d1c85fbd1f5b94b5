"""From a `kind` in the configuration to the class it names: built-ins, entry points, import strings.

The tables are import strings, so that looking at a configuration imports neither torch nor a simulator.

A name that is read from a stored file (a run's `config.json`, the folder of a policy or of a reward model) may come
from anybody: it resolves to what is built in or installed, and to what the user has named by a word of their own.
"""

import base64
import importlib
import os
import pickle
import sys
from importlib.metadata import distributions
from typing import Any

from reachrl.errors import ConfigError, ExtensionError, MissingExtra, ReachRLError

# group -> kind -> (class, its configuration section)
BUILTINS: dict[str, dict[str, tuple[str, str]]] = {
    "policies": {
        "openvla": ("reachrl.policies.openvla.policy:OpenVLAPolicy", "reachrl.config.policy:OpenVLAConfig"),
        "openvla_oft": (
            "reachrl.policies.openvla_oft.policy:OpenVLAOFTPolicy",
            "reachrl.config.oft:OpenVLAOFTConfig",
        ),
    },
    "policy_folders": {
        "openvla": ("reachrl.policies.openvla.folders:OpenVLAFolders", "reachrl.config.policy:OpenVLAConfig"),
        "openvla_oft": ("reachrl.policies.openvla_oft.folders:OFTFolders", "reachrl.config.oft:OpenVLAOFTConfig"),
    },
    "envs": {
        "metaworld": ("reachrl.envs.metaworld:MetaworldEnv", "reachrl.config.env:MetaworldConfig"),
        "libero": ("reachrl.envs.libero.env:LiberoEnv", "reachrl.config.libero:LiberoConfig"),
        "reach_toy": ("reachrl.testing.envs:ReachEnv", "reachrl.testing.envs:ReachConfig"),
    },
    "rewards": {
        "task": ("reachrl.rewards.task:TaskReward", "reachrl.config.reward:TaskRewardConfig"),
        "oracle": ("reachrl.rewards.oracle:OracleReward", "reachrl.config.reward:OracleRewardConfig"),
        "process": ("reachrl.rewards.process.reward:ProcessReward", "reachrl.config.reward:ProcessRewardConfig"),
    },
    "reward_models": {
        "small": (
            "reachrl.rewards.process.small:SmallRewardModel",
            "reachrl.config.reward_model:SmallRewardModelConfig",
        ),
        "vlm": ("reachrl.rewards.process.vlm:VLMRewardModel", "reachrl.config.reward_model:VLMRewardModelConfig"),
        "transformers": (
            "reachrl.rewards.process.transformers_model:TransformersRewardModel",
            "reachrl.config.reward_model:TransformersRewardModelConfig",
        ),
    },
    "curricula": {
        "uniform": ("reachrl.curriculum.uniform:UniformSampler", "reachrl.config.curriculum:UniformConfig"),
        "success_rate": (
            "reachrl.curriculum.success_rate:SuccessRateSampler",
            "reachrl.config.curriculum:SuccessRateConfig",
        ),
    },
    "backends": {
        "local": ("reachrl.backends.local:LocalBackend", "reachrl.config.backend:LocalBackendConfig"),
        "ray": ("reachrl.backends.cluster.backend:RayBackend", "reachrl.config.backend:RayBackendConfig"),
    },
    "algorithms": {
        "ppo": ("reachrl.algorithms.ppo:PPO", "reachrl.config.ppo:PPOConfig"),
        "grpo": ("reachrl.algorithms.grpo:GRPO", "reachrl.config.grpo:GRPOConfig"),
        "rloo": ("reachrl.algorithms.grpo:RLOO", "reachrl.config.grpo:RLOOConfig"),
    },
}

# Of this process: import strings that the user has named.
_TRUSTED: set[str] = set()
# Classes by import string `__main__:Class`, in a process that was started by the one whose notebook or script has them.
_RECEIVED: dict[str, Any] = {}
_search_here = False  # whether what the user names is also looked for where the command runs

_EXTRAS = {"ray": "ray"}  # packages whose absence first shows here, and the extra that brings them


def kinds(group: str) -> dict[str, str]:
    """Every known kind of `group` with the import string of its class (built-ins, then entry points)."""
    known = {kind: target for kind, (target, _) in BUILTINS[group].items()}
    # What merely lies where the command runs, such as a download, is not installed.
    here = os.path.realpath(os.curdir)
    path = [folder for folder in sys.path if os.path.realpath(folder or os.curdir) != here]
    for distribution in distributions(path=path):
        for point in distribution.entry_points.select(group=f"reachrl.{group}"):
            known.setdefault(point.name, point.value)
    return known


def search_here() -> None:
    """Also search the working directory for plug-ins that the user names."""
    global _search_here
    _search_here = True


def trust(target: str) -> None:
    """Take note that the user has named `target`, an import string; stored files may then name it too."""
    _TRUSTED.add(target)
    if _search_here and ":" in target:
        try:
            here = os.getcwd()
        except FileNotFoundError:  # deleted meanwhile
            return
        if here not in sys.path:
            sys.path.append(here)


def is_trusted(target: str) -> bool:
    """Whether the user has named `target` in this process."""
    return target in _TRUSTED


def check_stored(group: str, kind: str, *, where: str, remedy: str) -> None:
    """Refuse a kind that a stored file names, unless it is built in, installed, or named by the user.

    Args:
        group: such as `reward_models`.
        kind: as the file has it.
        where: the file, for the message.
        remedy: what the user types to name it, for the message.

    Raises:
        ConfigError: nothing was imported.
    """
    if ":" in kind and kind not in kinds(group) and not is_trusted(kind):
        raise untrusted(kind, where=where, remedy=remedy)


def untrusted(target: str, *, where: str, remedy: str) -> ConfigError:
    """The error for code that only a stored file names."""
    if in_main(target):
        return ConfigError(
            f"{where} names {target!r}, a class that was defined in a notebook or script itself and is not stored with "
            "it. Go on in that notebook or script, or put the class into a file and name it from there: my_file:MyClass"
        )
    return ConfigError(
        f"{where} names {target!r}, which is neither built in nor an installed plug-in. A stored file does not decide "
        f"what code is run; nothing of it was. If you know this code and trust it, name it yourself: {remedy}."
    )


def in_main(target: str) -> bool:
    """Whether an import string names a class of the notebook or script that is run, which no other process imports."""
    return target.startswith("__main__:")


def import_string(cls: type) -> str:
    """`module:Class`, by which a class is named in the configuration.

    Raises:
        ConfigError: it was defined inside a function.
    """
    if "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"{cls.__qualname__} was defined inside a function, where nothing can find it by name; define the class at "
            "the top level of the notebook, script or module"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def send(group: str, kind: str) -> str | None:
    """The class behind `__main__:Class` as text, for `receive` in a process of our own; None where it can be imported.

    Its code travels with everything of the notebook that it uses; imported modules travel as names.

    Raises:
        ConfigError: it holds something that cannot be sent to another process, such as an open file.
    """
    if not in_main(kind):
        return None
    if kind in _RECEIVED:
        raise ConfigError(f"{group}: {kind} came from the process that started this one, which alone can send it on")
    import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

    try:
        return base64.b64encode(cloudpickle.dumps(resolve(group, kind))).decode()  # pyright: ignore[reportUnknownMemberType]
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(
            f"{group}: {kind} runs in processes of its own and uses something that cannot be sent there ({error}). "
            "Make it inside the class, in `__init__` for example, or put the class into a file and name it from there "
            "(my_file:MyClass)"
        ) from error


def receive(kind: str, text: str | None) -> None:
    """Take a class that the process which started this one has sent; None: `kind` is imported as usual."""
    if text is not None:
        # From our own parent, through the pipe that it made: what its user has written there, never a file's.
        _RECEIVED[kind] = pickle.loads(base64.b64decode(text))  # noqa: S301


def _import(target: str, *, group: str, kind: str) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if not attribute or (error.name and f"{module_name}.".startswith(f"{error.name}.")):
            meant = "" if kind == target else f" ({target!r})"
            raise ExtensionError(
                f"{group}: kind {kind!r}{meant}: there is no module {error.name or module_name!r}, neither here "
                f"({os.getcwd()}) nor on PYTHONPATH, nor installed. Correct the name, or run the command in the folder "
                "that the module lies in."
            ) from error
        package = (error.name or "").partition(".")[0]
        how = f"pip install 'reachrl[{_EXTRAS[package]}]'" if package in _EXTRAS else "install it"
        raise MissingExtra(f"{group}: kind {kind!r} needs the package {error.name!r}: {how}.") from error
    except ReachRLError:  # says itself what to do
        raise
    except AttributeError as error:
        if in_main(target) and not hasattr(sys.modules["__main__"], attribute):
            raise ExtensionError(
                f"{group}: there is no class {attribute!r} in the notebook or script that is running: run the cell "
                "that defines it first"
            ) from error
        raise _unimportable(target, group, kind, error) from error
    except Exception as error:  # a plug-in's module runs any code of its author's
        raise _unimportable(target, group, kind, error) from error


def _unimportable(target: str, group: str, kind: str, error: Exception) -> ExtensionError:
    module_name, _, attribute = target.partition(":")
    return ExtensionError(
        f"{group}: kind {kind!r} ({target!r}) could not be imported: {type(error).__name__}: {error}. "
        f"`python -c 'from {module_name} import {attribute}'` shows where; repair it, or choose another kind."
    )


def resolve(group: str, kind: str) -> Any:
    """The class that `kind` names: a built-in, an entry point, or an import string `module:Class`.

    The import string is the user's word, see `trust`; one that was read from a stored file goes through `check_stored`
    first.

    Raises:
        ConfigError: no such kind.
        ExtensionError: the plug-in cannot be imported, whatever its module raised.
        MissingExtra: a package that the kind needs is absent.
    """
    if kind in _RECEIVED:
        return _RECEIVED[kind]
    known = kinds(group)
    if kind in known:
        return _import(known[kind], group=group, kind=kind)
    if ":" in kind:
        trust(kind)
        return _import(kind, group=group, kind=kind)
    raise ConfigError(
        f"{group}: unknown kind {kind!r}. Known kinds: {', '.join(sorted(known))}; "
        "or give an import string such as 'my_lab.sim:MyEnv'."
    )


def section_class(group: str, kind: str) -> Any:
    """The configuration section of `kind`; for a plug-in, the `Config` attribute of its class.

    Raises:
        ConfigError: no such kind.
        ExtensionError: the plug-in has no `Config`.
    """
    if kind in BUILTINS[group]:
        return _import(BUILTINS[group][kind][1], group=group, kind=kind)
    plugin = resolve(group, kind)
    if not hasattr(plugin, "Config"):
        raise ExtensionError(f"{group}: {kind!r} has no `Config` section; add a class attribute `Config`.")
    return plugin.Config


def build(group: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Construct the class that `config.kind` names, as `cls(config, *args, **kwargs)`."""
    return resolve(group, config.kind)(config, *args, **kwargs)
