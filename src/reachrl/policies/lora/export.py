"""Export of adapters: peft's two files alone, or merged into the files of their base."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.lora.deltas import deltas
from reachrl.policies.lora.files import CONFIG_FILE, WEIGHTS_FILE, is_adapter
from reachrl.policies.lora.merging import Effect, folded
from reachrl.policies.storage.weights import weight_files


def refuse_whole(folder: Path) -> None:
    """Check that a folder has adapters.

    Raises:
        ConfigError: it holds whole weights.
    """
    if not is_adapter(folder):
        raise ConfigError(
            f"{folder} holds no adapters ({CONFIG_FILE} is missing): there is nothing to merge; without "
            "--merge its weights are written in the official layout"
        )


def copy_adapter(folder: Path, out: Path, name_of: Callable[[str], str]) -> None:
    """Copy peft's two files of the actor.

    Args:
        folder: with adapters.
        out: an existing folder.
        name_of: the policy's name of a weight by the name it is stored under.

    Raises:
        CheckpointError: they are missing or damaged, or would change nothing.
    """
    deltas(folder, name_of)  # refuses what would not act under the adapter's name
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / name, out / name)


def merge_files(
    folder: Path, base: Path, out: Path, name_of: Callable[[str], str], replaced: Mapping[str, Tensor]
) -> None:
    """Write the base's files with merged adapters, one file in memory at a time.

    Args:
        folder: with adapters.
        base: the folder of the whole weights.
        out: an existing folder.
        name_of: the policy's name of a weight by the name it is stored under.
        replaced: weights to write instead of the base's, by the names they are stored under there.

    Raises:
        CheckpointError: an adapter fits no weight of the base, or all of them change nothing.
    """
    left, effect = deltas(folder, name_of), Effect(folder)
    for path in weight_files(base):
        state = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                weight = file.get_tensor(name)
                if (known := name_of(name)) in left:
                    before, delta = weight, left.pop(known)
                    weight = folded(folder, known, before, delta)
                    effect.count(before, weight, delta)
                state[name] = replaced.get(name, weight)
            metadata = file.metadata()
        save_file(state, out / path.name, metadata)
    if left:
        raise CheckpointError(f"{folder} adapts weights that {base} does not have: {', '.join(sorted(left)[:6])}")
    effect.check()
