"""Signs that a folder in OpenVLA's layout holds OpenVLA-OFT, whose weights mean another function."""

import re
from pathlib import Path

from reachrl.errors import CheckpointError
from reachrl.policies.storage.weights import read_json

# What its training leaves beside the weights: pickles such as action_head--150000_checkpoint.pt, or what they became.
_FILES = ("action_head*", "proprio_projector*", "noisy_action_projector*", "vision_backbone--*")
_FOLDER = "lora_adapter"
_OPTIONS = {
    *("use_proprio", "use_film", "use_l1_regression", "use_diffusion", "num_images_in_input"),
    *("num_actions_chunk", "action_chunk_size"),
}
_NAMED = re.compile(r"(?<![a-z])oft(?![a-z])|openvla_?oft", re.IGNORECASE)
_CODE = ("*.py", "prismatic/**/*.py")
_CHUNK = "NUM_ACTIONS_CHUNK"  # a constant that the code bundled with such a folder imports; it is read, never run
_LARGEST_CODE = 1 << 20  # bytes


def oft_signal(folder: Path) -> str | None:
    """What shows that `folder` is of OpenVLA-OFT, in words; None where nothing does.

    `config.json` does not state it, so folders without a sign exist.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    for pattern in _FILES:
        if found := sorted(path.name for path in folder.glob(pattern)):
            return f"the file {found[0]}"
    if (folder / _FOLDER).is_dir():
        return f"the folder {_FOLDER}"
    for name in (folder.name, folder.resolve().name, *_on_the_hub(folder)):
        if name == _FOLDER or _NAMED.search(name):
            return f"its name, {name}"
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if options := sorted(key for key in raw if key.lower() in _OPTIONS):
        return f"{options[0]} in config.json"
    for key in ("architectures", "auto_map", "_name_or_path"):
        if _NAMED.search(str(raw.get(key, ""))):
            return f"{key} in config.json"
    for path in sorted(found for pattern in _CODE for found in folder.glob(pattern)):
        with path.open("rb") as file:
            if _CHUNK.encode() in file.read(_LARGEST_CODE):
                return f"{_CHUNK} in {path.name}"
    return None


def _on_the_hub(folder: Path) -> list[str]:
    """The model's name where the folder is a snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT."""
    return [folder.parent.parent.name] if folder.parent.name == "snapshots" else []


def refuse_oft(folder: Path) -> None:
    """Refuse a folder that would load as plain OpenVLA and act wrongly without a word.

    Raises:
        CheckpointError: naming the sign that was found.
    """
    if (signal := oft_signal(folder)) is not None:
        raise CheckpointError(
            f"{folder} is an OpenVLA-OFT checkpoint by {signal}: it predicts chunks of actions in one pass with "
            "attention in both directions, which this package does not compute; as plain OpenVLA the same weights "
            "act wrongly. Give a plain OpenVLA checkpoint (one that is plain and only named so: under another name)"
        )
