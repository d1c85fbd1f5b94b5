"""The interface of reward models: (frames, instruction) to P(progress), saved as a folder that names its kind."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn

from reachrl.config.reward_model import RewardModelSection
from reachrl.errors import CheckpointError
from reachrl.registry import check_stored, resolve
from reachrl.run.atomic import replace_folder_atomic, write_json_atomic
from reachrl.run.manifest import seal, verify_if_sealed

CONFIG_FILE = "config.json"
REMEDY = "Point to the `model` folder of a finished reward fit, or fit again."


class RewardModel(nn.Module, ABC):
    """Predicts task progress from the last frames of an episode and its instruction.

    A clip is `num_frames` frames of one episode, oldest first; the score belongs to the newest. Rows of a batch
    never influence one another. The parameters with `requires_grad` are what a fit trains.

    Args:
        num_frames: frames of a clip.
        frame_stride: decisions between two of them.
    """

    Config: ClassVar[type[RewardModelSection]]

    def __init__(self, *, num_frames: int = 1, frame_stride: int = 1) -> None:
        super().__init__()
        self.num_frames, self.frame_stride = num_frames, frame_stride

    @classmethod
    def check(cls, config: Any) -> None:
        """Check early, before anything costly, that the files `for_fit` needs exist.

        Raises:
            ReachRLError: what is missing and where it was expected.
        """

    @classmethod
    @abstractmethod
    def for_fit(cls, config: Any, instructions: Sequence[str]) -> Self:
        """A model about to be fitted, its initial weights drawn from torch's global generator.

        Args:
            config: an instance of `cls.Config`.
            instructions: the instructions of the data.
        """

    @abstractmethod
    def logits(self, clips: UInt8[np.ndarray, "B F H W 3"], instructions: Sequence[str]) -> Float[Tensor, "B"]:
        """Log-odds of progress, differentiable where gradients are enabled.

        Raises:
            ConfigError: an instruction that the model cannot read.
        """

    @abstractmethod
    def shift_logits(self, by: float) -> None:
        """Add `by` to every logit from now on; a fit on reweighted data corrects its prior with it."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Write the weights into an empty folder; returns what `read` needs beside them, JSON-ready."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, saved: dict[str, Any]) -> Self:
        """The model whose `write` left `folder` and returned `saved`, in evaluation mode.

        Raises:
            CheckpointError: a file is missing, damaged or of another architecture.
        """

    @torch.no_grad()
    def score(
        self,
        images: UInt8[np.ndarray, "B H W 3"] | UInt8[np.ndarray, "B F H W 3"],
        instructions: Sequence[str],
        *,
        batch_size: int = 128,
    ) -> Float32[np.ndarray, "B"]:
        """P(progress) of each frame or clip.

        The last batch is padded to `batch_size`, so that a score does not depend on how many others were
        computed with it.

        Args:
            images: raw frames, or clips.
            instructions: one for each.
            batch_size: clips a forward pass.

        Raises:
            ConfigError: an instruction that the model cannot read.
        """
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} frames but {len(instructions)} instructions")
        clips = images[:, None] if images.ndim == 4 else images
        if clips.shape[1] != self.num_frames:
            raise ValueError(f"clips of {clips.shape[1]} frames for a reward model that looks at {self.num_frames}")
        scores = np.empty(len(clips), dtype=np.float32)
        for start in range(0, len(clips), batch_size):
            rows = slice(start, start + batch_size)
            missing = batch_size - len(clips[rows])
            padding = np.zeros((missing, *clips.shape[1:]), np.uint8)
            batch = np.concatenate([clips[rows], padding]) if missing else clips[rows]
            texts = [*instructions[rows], *[instructions[start]] * missing]
            probability = torch.sigmoid(self.logits(batch, texts).float())
            scores[rows] = probability[: batch_size - missing].cpu().numpy()
        return scores

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and `config.json`; the folder appears complete or not at all.

        Raises:
            StorageError: the folder cannot be written.
        """

        def fill(aside: Path) -> None:
            saved = self.write(aside)
            write_json_atomic(aside / CONFIG_FILE, {"kind": self.kind()} | saved)
            seal(aside)

        replace_folder_atomic(folder, fill)

    @classmethod
    def kind(cls) -> str:
        """How the configuration names this class: its own default `kind`."""
        return cls.Config.model_fields["kind"].default

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read what `save_pretrained` wrote, in evaluation mode.

        Raises:
            CheckpointError: a file is missing, damaged or of another architecture.
        """
        return cls.read(folder, _saved_config(folder)).eval()


def load_reward_model(folder: Path) -> RewardModel:
    """The reward model of whatever kind that lies in `folder`.

    Raises:
        CheckpointError: no reward model lies there, or it is damaged.
        ConfigError: its kind is not known here, or names code that the user has not named.
    """
    saved = _saved_config(folder)
    kind, file = saved["kind"], Path(folder) / CONFIG_FILE
    check_stored("reward_models", kind, where=f"{file}: kind", remedy=trust_remedy("kind", kind))
    return resolve("reward_models", kind).read(folder, saved).eval()


def trust_remedy(option: str, target: str) -> str:
    """How a user names code that a reward model's folder asks for."""
    return f"reward_model.{option}={target} after the preset, or --trust-kind {target} with `reachrl reward inspect`"


def _saved_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"The reward model file {path} is missing. {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The reward model in {folder} is damaged or truncated: {error}. {REMEDY}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("kind"), str):
        raise CheckpointError(f"{path} describes no reward model: it names no `kind`. {REMEDY}")
    verify_if_sealed(Path(folder))
    return saved


def clip_frames(newest: Int64[np.ndarray, "T"], *, num_frames: int, frame_stride: int) -> Int64[np.ndarray, "T F"]:
    """Which frames of one episode its clips consist of, oldest first; the first frame stands in for earlier ones.

    Args:
        newest: the last frame of each clip.
        num_frames: F.
        frame_stride: decisions between two frames of a clip.
    """
    back = np.arange(num_frames - 1, -1, -1) * frame_stride
    return np.maximum(newest[:, None] - back, 0)
