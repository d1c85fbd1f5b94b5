"""What a user states of an OpenVLA-OFT checkpoint, against the little that its files state."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.errors import CheckpointError
from reachrl.policies.openvla.oft import bundled_code, files_on_the_hub, unsupported
from reachrl.policies.openvla.statement import stated
from reachrl.policies.openvla_oft import companions
from reachrl.policies.storage.weights import read_json

UNSTATED = ("chunk_size", "dialect", "num_cameras", "state_size", "statistics")
_NEEDED = {
    "chunk_size": "actions of an answer: 8 for LIBERO, 25 for ALOHA, 5 for Bridge",
    "dialect": "the program that trained it: official, simplevla_rl, or rlinf (its implement_version: rlinf)",
}
_CHUNK = re.compile(r"NUM_ACTIONS_CHUNK[\"']?\s*[:=]\s*(\d+)")


def refuse_unsupported(folders: Sequence[Path]) -> None:
    """Refuse a checkpoint of OpenVLA-OFT that cannot be trained here.

    Args:
        folders: of its weights, and of what belongs to them.

    Raises:
        CheckpointError: says why, and by which sign.
    """
    for folder in folders:
        if (problem := unsupported(folder)) is not None:
            raise CheckpointError(f"{folder} is an OpenVLA-OFT checkpoint that cannot be trained here: {problem}")


def check_given(folder: Path, config: OpenVLAOFTConfig, beside: Sequence[Path] = ()) -> None:
    """Refuse a folder of OpenVLA-OFT that cannot be trained, or of which something else is said than it states.

    Args:
        folder: official whole weights, on this machine.
        config: with what the user has stated of it.
        beside: of weights under adapters, the folders of what belongs to the adapters.

    Raises:
        CheckpointError: says what, and where it is stated.
    """
    refuse_unsupported([folder])
    if unsaid := [f"policy.{key} ({what})" for key, what in _NEEDED.items() if key not in config.model_fields_set]:
        raise CheckpointError(
            f"no file in {folder} states what its weights were trained for, and the wrong thing would act wrongly "
            f"without a word: set {' and '.join(unsaid)}"
        )
    for problem in _contradictions(folder, config, beside):
        raise CheckpointError(f"{folder}: {problem}")


def _contradictions(folder: Path, config: OpenVLAOFTConfig, beside: Sequence[Path]) -> Iterator[str]:
    raw = {key.lower(): value for key, value in read_json(folder / "config.json").items()}
    found = stated(folder)
    for key in UNSTATED:
        if key in found and getattr(config, key) != found[key]:
            yield (
                f"{key} = {found[key]} by what its export states in config.json, but policy.{key}="
                f"{getattr(config, key)}; set policy.{key}={found[key]}"
            )
    for keys, name, ours in (
        (("num_actions_chunk", "action_chunk_size"), "chunk_size", config.chunk_size),
        (("num_images_in_input",), "num_cameras", config.num_cameras),
    ):
        for key in keys:
            if isinstance(raw.get(key), int) and raw[key] != ours:
                yield f"{key} = {raw[key]} in config.json, but policy.{name}={ours}; set policy.{name}={raw[key]}"
    yield from _dialect(raw, config)
    yield from _state(folder, raw, config, beside)
    numbers = {int(number) for text in bundled_code(folder).values() for number in _CHUNK.findall(text)}
    if numbers and config.chunk_size not in numbers:
        yield (
            f"its bundled code states chunks of {' or '.join(map(str, sorted(numbers)))} actions "
            f"(NUM_ACTIONS_CHUNK), but policy.chunk_size={config.chunk_size}"
        )


def _dialect(raw: dict[str, Any], config: OpenVLAOFTConfig) -> Iterator[str]:
    version = str(raw.get("implement_version", "")).lower()
    if version in ("rlinf", "official") and (version == "rlinf") != (config.dialect == "rlinf"):
        right = "rlinf" if version == "rlinf" else "official, or simplevla_rl"
        yield (
            f"implement_version = {raw['implement_version']!r} in config.json, but policy.dialect={config.dialect}, "
            f"which {'closes' if config.stop else 'does not close'} the sequence with </s>; set policy.dialect={right}"
        )


def _state(folder: Path, raw: dict[str, Any], config: OpenVLAOFTConfig, beside: Sequence[Path]) -> Iterator[str]:
    projector = companions.first([*beside, folder], companions.PROPRIO)
    elsewhere = files_on_the_hub(folder, f"{companions.PROPRIO}--*.pt")
    if config.state_size is None and (projector is not None or elsewhere or raw.get("use_proprio") is True):
        sign = projector.name if projector is not None else next(iter(elsewhere), "use_proprio in config.json")
        yield (
            f"by {sign} the robot's state is a token of its sequence, but policy.state_size is not set; set it to the "
            "numbers of the state (8 for LIBERO, 14 for ALOHA)"
        )
    if config.state_size is not None and projector is None:
        yield (
            f"policy.state_size={config.state_size}, but there is no {companions.PROPRIO}--N_checkpoint.pt beside the "
            "weights, which maps the state to a token; put it there, or leave policy.state_size unset"
        )
