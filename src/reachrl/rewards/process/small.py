"""The small reward model: a convolutional network from (frames, instruction) to P(progress)."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.base import CONFIG_FILE, REMEDY, RewardModel
from reachrl.run.stored_weights import check_finite

log = logging.getLogger(__name__)

FORMAT = "reachrl-progress-model-1"
_TEXT_WIDTH = 32
_GRID_WIDTH = 16


def instruction_words(instruction: str) -> list[str]:
    """The lower-case words of an instruction, in order."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


class SmallRewardModel(RewardModel):
    """Four strided convolutions, modulated by the instruction, and a readout of the 2-D feature grid.

    The instruction is read as a bag of the words known from the fit. One that was not fitted is scored all
    the same and warned about once; one without a single known word is refused.

    Args:
        image_size: side in pixels at which frames are seen; a multiple of 16.
        channels: width of each convolution; multiples of 8.
        hidden: width of the readout.
        instructions: the instructions of the fit; their words are the vocabulary.
        num_frames: frames of a clip; the first convolution sees them side by side as channels.
        frame_stride: decisions between two of them.
    """

    Config: ClassVar[type[SmallRewardModelConfig]] = SmallRewardModelConfig

    def __init__(
        self,
        *,
        image_size: int,
        channels: Sequence[int],
        hidden: int,
        instructions: Sequence[str],
        num_frames: int = 1,
        frame_stride: int = 1,
    ) -> None:
        super().__init__(num_frames=num_frames, frame_stride=frame_stride)
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
                nn.Conv2d(3 * num_frames, c1, 8, stride=4, padding=2),
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

    @classmethod
    def for_fit(cls, config: SmallRewardModelConfig, instructions: Sequence[str]) -> Self:
        """A model with new weights."""
        return cls(
            image_size=config.image_size,
            channels=config.channels,
            hidden=config.hidden,
            instructions=instructions,
            num_frames=config.num_frames,
            frame_stride=config.frame_stride,
        )

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

    def logits(self, clips: UInt8[np.ndarray, "B F H W 3"], instructions: Sequence[str]) -> Float[Tensor, "B"]:
        """Logits of P(progress).

        Raises:
            ConfigError: an instruction shares no word with the fit.
        """
        bags = self.encode_instructions(instructions)
        return self(torch.from_numpy(np.ascontiguousarray(clips)).to(bags.device), bags)

    def forward(self, clips: UInt8[Tensor, "B F H W 3"], bags: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """Logits of P(progress).

        Args:
            clips: raw frames of any size.
            bags: `encode_instructions` of each clip's instruction.
        """
        # Frames side by side as channels, which stay the fastest dimension in memory.
        side_by_side = clips.permute(0, 2, 3, 1, 4).flatten(3)
        x = side_by_side.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 127.5 - 1.0
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        text = F.gelu(self.text(bags))
        films = self.film(text).split([2 * width for width in self.channels], dim=-1)
        for conv, norm, film in zip(self.convs, self.norms, films, strict=True):
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            x = F.gelu(norm(conv(x)) * (1.0 + scale) + shift)
        grid = self.squeeze(x).flatten(1)
        return self.head(F.gelu(self.readout(torch.cat([grid, text], dim=-1)))).squeeze(-1)

    def shift_logits(self, by: float) -> None:
        """Add `by` to every logit from now on."""
        with torch.no_grad():
            self.head.bias.add_(by)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `model.safetensors`; returns what must be equal for the weights to fit."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        return {
            "format": FORMAT,
            "image_size": self.image_size,
            "channels": list(self.channels),
            "hidden": self.hidden,
            "num_frames": self.num_frames,
            "frame_stride": self.frame_stride,
            "instructions": list(self.instructions),
        }

    @classmethod
    def read(cls, folder: Path, saved: dict[str, Any]) -> "SmallRewardModel":
        """Read what `write` wrote.

        Raises:
            CheckpointError: the file is missing, truncated or of another architecture.
        """
        if saved.get("format") != FORMAT:
            raise CheckpointError(f"{folder / CONFIG_FILE} is no {FORMAT} description. {REMEDY}")
        try:
            weights = load_file(folder / "model.safetensors")
            model = cls(**{key: value for key, value in saved.items() if key not in ("format", "kind")})
            model.load_state_dict(weights)
        except FileNotFoundError as error:
            raise CheckpointError(f"The reward model file {error.filename or error} is missing. {REMEDY}") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The reward model in {folder} is damaged or truncated: {error}. {REMEDY}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The reward model in {folder} has another architecture: {error}. {REMEDY}"
            ) from error
        for name, tensor in weights.items():
            check_finite(tensor, name, folder / "model.safetensors")
        return model
