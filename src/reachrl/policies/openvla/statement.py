"""What our exports state in an official `config.json` beyond its own keys: under one key, which other tools ignore."""

from pathlib import Path
from typing import Any

from reachrl.config.policy import PrismaticConfig
from reachrl.errors import CheckpointError
from reachrl.policies.storage.saved import CONFIG_FILE
from reachrl.policies.storage.weights import read_json

KEY = "reachrl"
FRAMES = ("rlds_frames", "center_crop")  # how frames are made, which the official code takes from its command line


def stated(folder: Path) -> dict[str, Any]:
    """What an official folder states of options that no other tool writes down.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    path = folder / CONFIG_FILE
    found = read_json(path).get(KEY, {}) if path.is_file() else {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {KEY} = {found!r}, expected options of a policy by name; remove it")
    return found


def statement(config: PrismaticConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """The entries of an official `config.json` that say how a policy's frames are made and what else it is.

    Args:
        config: the policy's.
        keys: its options that the official layout does not know.
    """
    options = config.model_dump(mode="json", include={"kind", *keys})
    return {"image_resize_strategy": config.resize, KEY: options}
