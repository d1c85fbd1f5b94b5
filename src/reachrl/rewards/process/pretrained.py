"""Folders in the Hugging Face layout: read from safetensors alone, offline, with errors that say what to do."""

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from reachrl.errors import CheckpointError, ConfigError, MissingExtra
from reachrl.registry import trust
from reachrl.run.stored_weights import check_finite, safetensors_files

log = logging.getLogger(__name__)

Part = TypeVar("Part")


def checkpoint_folder(path: Path | None, wanted: str) -> Path:
    """The folder that `reward_model.checkpoint` names, as an absolute path.

    Args:
        path: the option's value.
        wanted: what has to lie there, for the message.

    Raises:
        ConfigError: the option is not set.
        CheckpointError: there is no such folder.
    """
    if path is None:
        raise ConfigError(
            f"`reward_model.checkpoint` is not set: this kind of reward model starts from {wanted}. Give the folder; "
            "`hf download OWNER/NAME --local-dir FOLDER` makes one from the Hugging Face hub."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"The reward model's checkpoint {path} does not exist or is not a folder; expected {wanted}. "
            "`hf download OWNER/NAME --local-dir FOLDER` makes such a folder from the Hugging Face hub."
        )
    return path.resolve()


def read_part(read: Callable[..., Part], folder: Path, **options: Any) -> Part:
    """Call a `from_pretrained` of `transformers` or `peft` on a folder; nothing is downloaded and no code is run.

    Args:
        read: the class method.
        folder: where the files are.
        options: passed on.

    Raises:
        MissingExtra: it needs a package that is not installed.
        CheckpointError: a file is missing, damaged or not what was expected, or asks for code of its own.
    """
    _refuse_kernels(folder)
    try:
        return read(str(folder), local_files_only=True, **options)
    except ImportError as error:
        raise MissingExtra(f"Reading {folder} needs a package that is not installed: {_first_line(error)}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a damaged JSON file leads to has no common base in these libraries
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f" Its weights are pickles ({', '.join(pickles[:3])}), which are never opened here: a pickle can run any "
            "code. Convert them to safetensors first."
            if pickles and not any(folder.glob("*.safetensors"))
            else ""
        )
        raise CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {_first_line(error)}).{hint} Expected a whole folder "
            "in the Hugging Face layout: config.json, safetensors weights, the tokenizer's and the image processor's "
            "files."
        ) from error


def _refuse_kernels(folder: Path) -> None:
    """A configuration may name a repository of the hub whose code computes attention; it is not asked.

    Raises:
        CheckpointError: it does.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the file's reader reports what is wrong with it
    sections: list[Any] = [config] if isinstance(config, dict) else []
    while sections:
        section = sections.pop()
        values = section.items() if isinstance(section, dict) else enumerate(section)
        for key, value in values:
            if isinstance(value, dict | list):
                sections.append(value)
            if str(key).endswith("_implementation") and "/" in str(value):
                raise CheckpointError(
                    f"{folder / 'config.json'}: {key} is {value!r}, code on the hub that a stored file does not get to "
                    "run. Delete that entry; the installed implementation computes the same."
                )


def read_weights(cls: Any, folder: Path, *, dtype: str | torch.dtype, new_head: bool = False) -> nn.Module:
    """The model in a folder, with every weight of it found there.

    Args:
        cls: a model class or auto class of `transformers`.
        folder: where its config.json and safetensors files are.
        dtype: of the weights; `auto` as they are stored.
        new_head: allow weights that are not there; they are drawn anew, with a warning.

    Raises:
        MissingExtra: the model needs a package that is not installed.
        CheckpointError: a file is missing or damaged, or weights are not there or not finite.
    """
    # For the process: its gradients under a mask are NaN at some lengths (pytorch/pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    safetensors_files(folder)
    model, found = read_part(
        cls.from_pretrained,
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(found["missing_keys"])
    kept = set(missing)
    for name, tensor in model.state_dict().items():
        if name not in kept:
            check_finite(tensor, name, folder)
    if not missing:
        return model
    named = f"{len(missing)} weights, such as {', '.join(missing[:3])}"
    if not new_head:
        raise CheckpointError(
            f"{folder} lacks {named}: it is truncated, or a checkpoint of another kind than {type(model).__name__}. "
            "Random numbers in their place would make random scores."
        )
    log.warning("%s lacks %s: they begin as random numbers.", folder, named)
    return model


def import_class(target: str, option: str) -> Any:
    """What an import string `package.module:Class` names; it is the user's word, see `reachrl.registry.trust`.

    Args:
        target: the string.
        option: where the user wrote it, for the message.

    Raises:
        ConfigError: it is no import string, or names nothing with a `from_pretrained`.
        MissingExtra: the module needs a package that is not installed.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{option} is {target!r}, expected an import string such as 'transformers:AutoProcessor'.")
    trust(target)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{option} is {target!r}, but there is no module {error.name!r}; correct the spelling or install it."
            ) from error
        raise MissingExtra(f"{option}: {target!r} needs the package {error.name!r}: install it.") from error
    except AttributeError as error:
        raise ConfigError(f"{option} is {target!r}, but {module_name} has no {attribute!r}; correct it.") from error
    except ImportError as error:
        raise MissingExtra(f"{option}: {target!r} could not be imported: {_first_line(error)}") from error
    if not callable(getattr(found, "from_pretrained", None)):
        raise ConfigError(
            f"{option} is {target!r}, which has no `from_pretrained`; give a class of `transformers`, such as "
            "'transformers:AutoModelForImageClassification'."
        )
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no further message"
