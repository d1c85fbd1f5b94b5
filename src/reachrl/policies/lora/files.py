"""Adapters in peft's files, and their base."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reachrl.errors import CheckpointError
from reachrl.policies.lora.adapters import ACTOR, Sets, tensors
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.weights import check_shapes, read_json, weight_files
from reachrl.run.fingerprint import fingerprint, is_of
from reachrl.run.stored_weights import check_finite

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CRITIC_FOLDER = "critic"
OFT_FOLDER = "lora_adapter"  # where OpenVLA-OFT's training writes them; what belongs to them lies in the folder above
VALUE_FILE = "value_head.safetensors"  # beside adapters of ours; other tools have none
_BASE_FILE = "base.json"


def is_adapter(folder: Path) -> bool:
    """Return whether `folder` holds adapters instead of whole weights."""
    return (folder / CONFIG_FILE).is_file()


def places(folder: Path) -> tuple[Path, ...]:
    """Where what belongs to adapters lies: beside them or, of OpenVLA-OFT's, in the folder above."""
    return (folder, folder.parent) if folder.name == OFT_FOLDER and is_adapter(folder) else (folder,)


def beside(folder: Path, name: str) -> Path | None:
    """The file `name` that belongs to a folder, of adapters or whole weights; None where there is none."""
    return next((path for place in places(folder) if (path := place / name).is_file()), None)


def base_name(folder: Path) -> Path:
    """Return the base that the adapters in `folder` name: a folder, or `owner/name` on the hub.

    Raises:
        CheckpointError: they do not say.
    """
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / CONFIG_FILE}: base_model_name_or_path is empty; name the base there")
    if not isinstance(base, str):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r}, expected the base's folder or owner/name; "
            "name the base there"
        )
    return Path(base)


def base_of(folder: Path) -> Path:
    """Return the local folder of the base of the adapters in `folder`.

    Raises:
        CheckpointError: they do not say, or the base is not there or holds adapters itself.
    """
    try:
        base = locate(base_name(folder))
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapters in {folder}: {error}. If it has moved, write its place into "
            f"base_model_name_or_path of {folder / CONFIG_FILE}"
        ) from error
    if is_adapter(base):
        raise CheckpointError(
            f"the base of the adapters in {folder} is {base}, which holds adapters itself; write the folder of whole "
            f"weights into base_model_name_or_path of {folder / CONFIG_FILE}. Adapters become whole weights by  "
            f"reachrl export {base} --merge --out MERGED"
        )
    return base


def place(folder: Path, adapter: str) -> Path:
    """Return the folder of one set in a saved policy."""
    return folder if adapter == ACTOR else folder / CRITIC_FOLDER


def save(policy: nn.Module, sets: Sets, folder: Path, *, base: Path) -> None:
    """Write all sets as standard peft adapters into an existing folder, the critic's into a subfolder.

    Args:
        policy: with adapters.
        sets: what they were made with.
        folder: where to.
        base: the weights the adapters are on, a folder or `owner/name`; their fingerprint is kept.
    """
    for name, described in sets.items():
        own = place(folder, name)
        own.mkdir(exist_ok=True)
        described.base_model_name_or_path = str(base)
        described.inference_mode = True
        described.save_pretrained(str(own))
        state = {key: tensor.cpu().contiguous() for key, tensor in tensors(policy, name).items()}
        save_file(state, own / WEIGHTS_FILE, metadata={"format": "pt"})
    content = {"fingerprint": fingerprint(weight_files(locate(base)))}
    (folder / _BASE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def check_base(folder: Path, weights: Path) -> None:
    """Check that adapters are on the weights that they were trained on; adapters of other tools do not record it.

    Raises:
        CheckpointError: the base has changed since the adapters were saved.
    """
    if not (folder / _BASE_FILE).is_file():
        return
    if not is_of(str(read_json(folder / _BASE_FILE).get("fingerprint")), weight_files(weights)):
        raise CheckpointError(
            f"the adapters in {folder} were trained on other weights than {weights} holds now. Put the base back, or "
            f"write its place into base_model_name_or_path of {folder / CONFIG_FILE}"
        )


@torch.no_grad()
def load(policy: nn.Module, folder: Path, sets: Sets) -> None:
    """Copy saved matrices into the policy's adapters.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters are of another size.
    """
    for name in sets:
        where = place(folder, name)
        stored, own = read_adapter(where), tensors(policy, name)
        check_shapes(
            {key: tuple(tensor.shape) for key, tensor in own.items()},
            {key: tuple(tensor.shape) for key, tensor in stored.items()},
            where,
        )
        for key, tensor in own.items():
            tensor.copy_(stored[key])


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read all matrices of a peft folder, by their names there.

    Raises:
        CheckpointError: the file is missing or damaged, or holds numbers that are not finite.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; adapters are read from safetensors files only") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    for name, tensor in stored.items():
        check_finite(tensor, name, path)
    return stored
