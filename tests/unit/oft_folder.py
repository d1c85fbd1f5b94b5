"""The tiny OpenVLA-OFT checkpoint of the recordings in tests/oracle, as folders that real tools leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy

DATA = Path(__file__).parents[1] / "oracle" / "data" / "openvla_oft"
HEADS = (4, 4)
PROPRIO_FILE = "proprio_projector--150000_checkpoint.pt"
WHOLE = {"num_cameras": 2, "state_size": 8}  # of the model with both images and the state


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def recorded() -> dict[str, torch.Tensor]:
    """In- and outputs."""
    return {key: torch.from_numpy(value) for key, value in read("io").items()}


def part(name: str, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """The state dict of a companion, as DistributedDataParallel names it."""
    begin = f"{name}."
    return {
        prefix + key.removeprefix(begin): torch.from_numpy(value)
        for key, value in read("extra").items()
        if key.startswith(begin)
    }


def write_oft(folder: Path, *, state: bool = False, **changes: object) -> Path:
    """Write the checkpoint; with `state` its projector is beside it, as `torch.save` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    shutil.copy(DATA / "dataset_statistics.json", folder)
    save_file(read("model"), folder / "model.safetensors")
    if state:
        torch.save(part("proprio_projector"), folder / PROPRIO_FILE)
    return folder


def load(folder: Path, **told: Any) -> OpenVLAOFTPolicy:
    """Load it as the program that trained it would have to say."""
    options = {"chunk_size": 8, "dialect": "official", **told}
    return OpenVLAOFTPolicy.load_official(folder, tower_heads=HEADS, **options)
