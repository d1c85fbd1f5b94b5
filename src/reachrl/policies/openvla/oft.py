"""Signs that a folder in OpenVLA's layout holds OpenVLA-OFT, whose weights mean another function, and of which kind."""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reachrl.errors import CheckpointError
from reachrl.policies.lora.files import OFT_FOLDER
from reachrl.policies.openvla.statement import stated
from reachrl.policies.storage.families import INSTEAD
from reachrl.policies.storage.published import published
from reachrl.policies.storage.saved import CONFIG_FILE
from reachrl.policies.storage.weights import read_json

# What its training leaves beside the weights: pickles such as action_head--150000_checkpoint.pt, or what they became.
_PROJECTOR = "proprio_projector--*.pt"
_FILES = ("action_head*", "proprio_projector*", "noisy_action_projector*", "vision_backbone--*")
_OPTIONS = {
    *("use_proprio", "use_film", "use_l1_regression", "use_diffusion", "num_images_in_input"),
    *("num_actions_chunk", "action_chunk_size"),
}
KIND = "openvla_oft"
_NAMED = re.compile(r"(?<![a-z])oft(?![a-z])|openvla_?oft", re.IGNORECASE)
_CODE = ("*.py", "prismatic/**/*.py")
_CHUNK = "NUM_ACTIONS_CHUNK"  # a constant that the code bundled with such a folder imports; it is read, never run
_LARGEST_CODE = 1 << 20  # bytes
# Parts of heads that give no probabilities, as files and as options of config.json, and what each is.
_CONTINUOUS = (
    ("noisy_action_projector*", "use_diffusion", "a diffusion head, which draws actions from noise"),
    ("action_head*", "use_l1_regression", "a regression head (L1), which answers with one action and nothing else"),
)
_FILM = ("vision_backbone--*", "use_film")


def oft_signal(folder: Path) -> str | None:
    """What shows that `folder` is of OpenVLA-OFT, in words; None where nothing does.

    `config.json` does not state it, so folders without a sign exist.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    for pattern in _FILES:
        if found := sorted(path.name for path in folder.glob(pattern)):
            return f"the file {found[0]}"
    if (folder / OFT_FOLDER).is_dir():
        return f"the folder {OFT_FOLDER}"
    for name in (folder.name, folder.resolve().name, *_on_the_hub(folder)):
        if name == OFT_FOLDER or _NAMED.search(name):
            return f"its name, {name}"
    if stated(folder).get("kind") == KIND:
        return f"what an export of ReachRL states in {CONFIG_FILE}"
    raw = _config(folder)
    if options := sorted(key for key in raw if key.lower() in _OPTIONS):
        return f"{options[0]} in config.json"
    for key in ("architectures", "auto_map", "_name_or_path"):
        if _NAMED.search(str(raw.get(key, ""))):
            return f"{key} in config.json"
    if found := [name for pattern in (*_FILES, f"{OFT_FOLDER}/*") for name in files_on_the_hub(folder, pattern)]:
        return f"the file {found[0]} on the hub"
    return next((f"{_CHUNK} in {name}" for name, text in bundled_code(folder).items() if _CHUNK in text), None)


def companion(folders: Sequence[Path]) -> Path | None:
    """The state's projector in the first of `folders` that has one, whatever it holds."""
    return next((path for folder in folders for path in sorted(folder.glob(_PROJECTOR))), None)


def files_on_the_hub(folder: Path, pattern: str) -> list[str]:
    """Files of the repository that a folder is a snapshot of, downloaded or not: pickles never are."""
    return sorted(fnmatch.filter(published(folder).names, pattern))


def bundled_code(folder: Path) -> dict[str, str]:
    """The beginnings of the code that lies beside weights, here or on the hub, by file name: it is read, never run."""
    texts = dict(published(folder).code)
    for path in sorted(found for pattern in _CODE for found in folder.glob(pattern)):
        with path.open("rb") as file:
            texts[path.name] = file.read(_LARGEST_CODE).decode("utf-8", errors="replace")
    return texts


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
            f"attention in both directions; as plain OpenVLA the same weights act wrongly. {_remedy(folder)}"
        )


def _remedy(folder: Path) -> str:
    if (problem := unsupported(folder)) is not None:
        return f"It cannot be trained here either: {problem}"
    return (
        "Set policy.kind=openvla_oft, and policy.chunk_size and policy.dialect to those of the program that trained it "
        "(one that is plain and only named so: load it under another name)"
    )


def unsupported(folder: Path) -> str | None:
    """Why a folder of OpenVLA-OFT cannot be trained by reinforcement, with what exists instead; None: it can.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    raw = _config(folder)
    for pattern, option, head in _CONTINUOUS:
        if (sign := _sign(folder, raw, pattern, option)) is not None:
            return (
                f"by {sign} it has {head}. There are no token probabilities, which every algorithm here takes a ratio "
                f"of. {INSTEAD}; or, from the same weights without that file, train the token head by demonstrations"
            )
    if (sign := _sign(folder, raw, *_FILM)) is not None:
        return (
            f"by {sign} its vision towers are modulated by the instruction (FiLM), which this package does not "
            "compute. Give a checkpoint that was trained with use_film=False"
        )
    return None


def _sign(folder: Path, raw: dict[str, Any], pattern: str, option: str) -> str | None:
    if found := sorted(path.name for path in folder.glob(pattern)):
        return f"the file {found[0]}"
    if found := files_on_the_hub(folder, pattern):
        return f"the file {found[0]} on the hub"
    return f"{option} in config.json" if raw.get(option) is True else None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
