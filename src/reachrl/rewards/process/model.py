"""The progress model: a small convolutional network from (frame, instruction) to P(progress)."""

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reachrl.errors import CheckpointError, ConfigError, StorageError

log = logging.getLogger(__name__)

FORMAT = "reachrl-progress-model-1"
_TEXT_WIDTH = 32
_GRID_WIDTH = 16


def instruction_words(instruction: str) -> list[str]:
    """The lower-case words of an instruction, in order."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


class ProgressModel(nn.Module):
    """Four strided convolutions, modulated by the instruction, and a readout of the 2-D feature grid.

    The instruction is read as a bag of the words known from the fit. One that was not fitted is scored all
    the same and warned about once; one without a single known word is refused.

    Args:
        image_size: side in pixels at which frames are seen; a multiple of 16.
        channels: width of each convolution; multiples of 8.
        hidden: width of the readout.
        instructions: the instructions of the fit; their words are the vocabulary.
    """

    def __init__(self, *, image_size: int, channels: Sequence[int], hidden: int, instructions: Sequence[str]) -> None:
        super().__init__()
        self.image_size = image_size
        self.channels = tuple(channels)
        self.hidden = hidden
        self.instructions = tuple(sorted(set(instructions)))
        self.words = tuple(sorted({word for text in self.instructions for word in instruction_words(text)}))
        self._word_index = {word: index for index, word in enumerate(self.words)}
        self._warned: set[str] = set()

        c1, c2, c3, c4 = self.channels
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, c1, 8, stride=4, padding=2),
                nn.Conv2d(c1, c2, 3, stride=2, padding=1),
                nn.Conv2d(c2, c3, 3, stride=2, padding=1),
                nn.Conv2d(c3, c4, 3, padding=1),
            ]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(8, width) for width in self.channels])
        self.text = nn.Linear(len(self.words), _TEXT_WIDTH)
        self.film = nn.Linear(_TEXT_WIDTH, 2 * sum(self.channels))
        self.squeeze = nn.Conv2d(c4, _GRID_WIDTH, 1)
        self.readout = nn.Linear(_GRID_WIDTH * (image_size // 16) ** 2 + _TEXT_WIDTH, hidden)
        self.head = nn.Linear(hidden, 1)
        nn.init.normal_(self.text.weight)
        nn.init.normal_(self.film.weight, std=0.02)
        nn.init.zeros_(self.film.bias)
        for weight in (module.weight for module in self.modules() if isinstance(module, nn.Conv2d)):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)  # as frames lie in memory

    def encode_instructions(self, instructions: Sequence[str]) -> Float[Tensor, "B V"]:
        """Bags of words, each row of Euclidean length 1.

        Raises:
            ConfigError: an instruction shares no word with the fit.
        """
        bags: dict[str, Tensor] = {}
        for text in instructions:
            if text not in bags:
                bags[text] = self._bag(text)
        return torch.stack([bags[text] for text in instructions]).to(self.head.weight.device)

    def _bag(self, text: str) -> Float[Tensor, "V"]:
        bag = torch.zeros(len(self.words))
        for word in instruction_words(text):
            if word in self._word_index:
                bag[self._word_index[word]] = 1.0
        if not bag.any():
            raise ConfigError(
                f"The reward model knows no word of the instruction '{text}'; it was fitted on "
                f"{list(self.instructions)[:5]}. Fit it on this task too, or use the task reward alone."
            )
        if text not in self.instructions and text not in self._warned:
            self._warned.add(text)
            log.warning("The reward model was not fitted on '%s': its scores for it are extrapolated.", text)
        return bag / bag.norm()

    def forward(self, images: UInt8[Tensor, "B H W 3"], bags: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """Logits of P(progress).

        Args:
            images: raw frames of any size.
            bags: `encode_instructions` of each frame's instruction.
        """
        x = images.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 127.5 - 1.0  # channels-last already
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        text = F.gelu(self.text(bags))
        films = self.film(text).split([2 * width for width in self.channels], dim=-1)
        for conv, norm, film in zip(self.convs, self.norms, films, strict=True):
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            x = F.gelu(norm(conv(x)) * (1.0 + scale) + shift)
        grid = self.squeeze(x).flatten(1)
        return self.head(F.gelu(self.readout(torch.cat([grid, text], dim=-1)))).squeeze(-1)

    @torch.inference_mode()
    def score(
        self, images: UInt8[np.ndarray, "B H W 3"], instructions: Sequence[str], *, batch_size: int = 128
    ) -> Float32[np.ndarray, "B"]:
        """P(progress) of each frame.

        The last batch is padded to `batch_size`, so that a frame's score does not depend on how many others
        were scored with it.

        Args:
            images: raw frames.
            instructions: one for each frame.
            batch_size: frames a forward pass.

        Raises:
            ConfigError: an instruction shares no word with the fit.
        """
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} frames but {len(instructions)} instructions")
        scores = np.empty(len(images), dtype=np.float32)
        for start in range(0, len(images), batch_size):
            frames = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
            bags = self.encode_instructions(instructions[start : start + batch_size])
            missing = batch_size - len(frames)
            frames = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, missing)).to(bags.device)
            probability = torch.sigmoid(self(frames, F.pad(bags, (0, 0, 0, missing))).float())
            scores[start : start + batch_size] = probability[: batch_size - missing].cpu().numpy()
        return scores

    def architecture(self) -> dict[str, Any]:
        """What must be equal for weights to fit."""
        return {
            "format": FORMAT,
            "image_size": self.image_size,
            "channels": list(self.channels),
            "hidden": self.hidden,
            "instructions": list(self.instructions),
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`; the folder appears complete or not at all.

        Raises:
            StorageError: the folder cannot be written.
        """
        aside = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / "config.json").write_text(json.dumps(self.architecture(), indent=2) + "\n")
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(weights, aside / "model.safetensors")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(aside, folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"Cannot write the reward model to {folder}: {error}. Free space or fix rights."
            ) from error

    @classmethod
    def from_pretrained(cls, folder: Path) -> "ProgressModel":
        """Read what `save_pretrained` wrote, in evaluation mode.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """
        remedy = "Point to the `model` folder of a finished reward fit, or fit again."
        try:
            saved = json.loads((folder / "config.json").read_text())
            if not isinstance(saved, dict) or saved.get("format") != FORMAT:
                raise CheckpointError(f"{folder / 'config.json'} is no {FORMAT} description. {remedy}")
            weights = load_file(folder / "model.safetensors")
            model = cls(**{key: value for key, value in saved.items() if key != "format"})
            model.load_state_dict(weights)
        except FileNotFoundError as error:
            raise CheckpointError(f"The reward model file {error.filename or error} is missing. {remedy}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"The reward model in {folder} is damaged or truncated: {error}. {remedy}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The reward model in {folder} has another architecture: {error}. {remedy}"
            ) from error
        broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise CheckpointError(f"The reward model in {folder} holds numbers that are not finite: {broken}. {remedy}")
        return model.eval()
