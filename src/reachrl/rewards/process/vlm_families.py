"""Families of vision-language models: their pixel inputs, positions and chat format."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

# As the published checkpoints write it; used where a folder brings no template of its own.
_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class VisionFamily(ABC):
    """How checkpoints of one family see frames and where their language model is.

    The pixels are computed here, on the model's device, and equal those of the family's own image processor in
    `transformers`, which is only asked for its figures: it computes on the CPU alone, 2 ms (Qwen) to 11 ms
    (SmolVLM) a frame, and as published enlarges SmolVLM's frames first, which takes 130 ms.

    Args:
        vlm: the loaded checkpoint.
        processor: its image processor; says mean, deviation and the way to resize.
        image_size: the side in pixels that the user asked for.
    """

    language_model: ClassVar[str]  # the name of the module that reads embeddings of text and frames
    mark: ClassVar[str]  # the token in whose place the model puts what it sees
    template: ClassVar[str]
    side: int  # pixels of a frame as the model sees it
    frame_text: str  # what a frame is written as in the chat: a mark for each of its tokens and what is around them

    def __init__(self, vlm: Any, processor: Any, image_size: int) -> None:
        self.vlm, self.processor, self.image_size = vlm, processor, image_size

    @staticmethod
    @abstractmethod
    def processor_class() -> Any:
        """The image processor that runs on PIL alone."""

    @abstractmethod
    def pixels(self, clips: UInt8[Tensor, "B F S S 3"]) -> dict[str, Tensor]:
        """The model's keyword arguments for frames of its size, in the order of the rows and then of their frames."""

    @abstractmethod
    def positions(self, ids: Int64[Tensor, "L"], num_frames: int) -> Int64[Tensor, "L P"]:
        """The positions of one prompt's tokens, in each of the P directions that the model distinguishes."""

    def frames(self, clips: UInt8[np.ndarray, "B F H W 3"], device: torch.device) -> dict[str, Tensor]:
        """Resize frames to the square that the model sees, normalise them and cut them as the model wants them.

        Args:
            clips: raw frames of any size, oldest first.
            device: where the arithmetic is done; the frames travel there as bytes.
        """
        shape = (*clips.shape[:2], self.side, self.side, 3)
        if clips.shape != shape:
            flat = [
                Image.fromarray(frame).resize((self.side, self.side), resample=self.processor.resample)
                for frame in clips.reshape(-1, *clips.shape[2:])
            ]
            clips = np.stack([np.asarray(frame) for frame in flat]).reshape(shape)
        return self.pixels(torch.from_numpy(np.ascontiguousarray(clips)).to(device))

    def normalise(self, pixels: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N 3 S S"]:
        """Bytes as the numbers the tower was trained on."""
        mean, std = (
            torch.tensor(each, device=pixels.device).view(3, 1, 1)
            for each in (self.processor.image_mean, self.processor.image_std)
        )
        return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)


class QwenFamily(VisionFamily):
    """Qwen2-VL and Qwen2.5-VL: patches in blocks, and rotary positions along time, height and width.

    Source: Wang et al. 2024, Qwen2-VL, section 2.1; Bai et al. 2025, Qwen2.5-VL.
    """

    language_model = "model.language_model"
    mark = "<|image_pad|>"
    template = _QWEN_TEMPLATE

    def __init__(self, vlm: Any, processor: Any, image_size: int) -> None:
        super().__init__(vlm, processor, image_size)
        vision = vlm.config.vision_config
        self.patch, self.merge, self.copies = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        block = self.patch * self.merge
        self.side = max(1, round(image_size / block)) * block
        self.frame_text = self.mark * (self.side // block) ** 2

    @staticmethod
    def processor_class() -> Any:
        """The image processor that runs on PIL alone."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil

    def _grid(self, num_frames: int) -> Int64[Tensor, "N 3"]:
        side = self.side // self.patch
        return torch.tensor([[1, side, side]]).expand(num_frames, 3)

    def pixels(self, clips: UInt8[Tensor, "B F S S 3"]) -> dict[str, Tensor]:
        """Patches in the order of the blocks that become one token; a still frame fills all its moments with copies."""
        num, blocks = clips.shape[0] * clips.shape[1], self.side // (self.patch * self.merge)
        cut = clips.reshape(num, *(blocks, self.merge, self.patch) * 2, 3)
        # Block row and column, patch row and column, colour, pixels: while they are bytes, that is cheap.
        patches = cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, self.patch, self.patch)
        moments = self.normalise(patches).unsqueeze(2).expand(-1, -1, self.copies, -1, -1)
        return {"pixel_values": moments.flatten(1), "image_grid_thw": self._grid(num).to(clips.device)}

    def positions(self, ids: Int64[Tensor, "L"], num_frames: int) -> Int64[Tensor, "L 3"]:
        """Time, height and width, as the checkpoint's own class counts them."""
        kinds = (ids == self.vlm.config.image_token_id).int()
        found, _ = self.vlm.model.get_rope_index(ids[None], kinds[None], image_grid_thw=self._grid(num_frames))
        return found[:, 0].T


class SmolFamily(VisionFamily):
    """SmolVLM, of both releases: a tower with one size of frame, whose squares of tokens are shuffled into one.

    A frame is one image at the tower's own size; it is never split into enlarged pieces, which would show nothing
    new of a small frame and take ten times the tokens. The published processor enlarges a frame first to several
    times that size and then reduces it again; here it is resized once.

    Source: Marafioti et al. 2025, SmolVLM, section 2.
    """

    language_model = "model.text_model"
    mark = "<image>"
    template = _SMOL_TEMPLATE

    def __init__(self, vlm: Any, processor: Any, image_size: int) -> None:
        super().__init__(vlm, processor, image_size)
        self.side = vlm.config.vision_config.image_size
        self.frame_text = (
            "<fake_token_around_image><global-img>" + self.mark * vlm.model.image_seq_len + "<fake_token_around_image>"
        )

    @staticmethod
    def processor_class() -> Any:
        """The image processor that runs on PIL alone."""
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        return SmolVLMImageProcessorPil

    def pixels(self, clips: UInt8[Tensor, "B F S S 3"]) -> dict[str, Tensor]:
        """Whole images, colours first."""
        colours_first = clips.permute(0, 1, 4, 2, 3).contiguous()
        return {"pixel_values": self.normalise(colours_first.flatten(0, 1)).view_as(colours_first)}

    def positions(self, ids: Int64[Tensor, "L"], num_frames: int) -> Int64[Tensor, "L 1"]:
        """Counted from the prompt's first token."""
        return torch.arange(len(ids))[:, None]


# By the `model_type` in a checkpoint's config.json; SmolVLM's first release calls itself idefics3.
FAMILIES: dict[str, type[VisionFamily]] = {
    "qwen2_vl": QwenFamily,
    "qwen2_5_vl": QwenFamily,
    "smolvlm": SmolFamily,
    "idefics3": SmolFamily,
}
