"""The tiny official checkpoint of the recordings in tests/oracle, as a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "oracle" / "data" / "openvla"
HEADS = (4, 4)


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def write_official(folder: Path, rename: Callable[[str], str] = lambda key: key, **changes: object) -> Path:
    """Write configuration and weights; `changes` go into the configuration, `rename` over the weights' names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file({rename(key): value for key, value in read("model").items()}, folder / "model.safetensors")
    return folder


def to_native(key: str) -> str:
    """Prismatic's own name of an official weight, as its modules call it."""
    for official, native in (
        ("vision_backbone.featurizer.", "vision_backbone.dino_featurizer."),
        ("vision_backbone.fused_featurizer.", "vision_backbone.siglip_featurizer."),
        ("projector.fc1.", "projector.projector.0."),
        ("projector.fc2.", "projector.projector.2."),
        ("projector.fc3.", "projector.projector.4."),
        ("language_model.", "llm_backbone.llm."),
    ):
        key = key.replace(official, native)
    return key.replace("ls1.scale_factor", "ls1.gamma").replace("ls2.scale_factor", "ls2.gamma")
