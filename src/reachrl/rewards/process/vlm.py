"""A vision-language model as a reward model: the odds of the answers 1 and 0 to "is the task done"."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from reachrl.config.reward_model import VLMRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.base import CONFIG_FILE, REMEDY, RewardModel
from reachrl.rewards.process.pretrained import checkpoint_folder
from reachrl.rewards.process.vlm_checkpoint import SUPPORTED, VLMCheckpoint, read_adapters, read_base, read_checkpoint
from reachrl.rewards.process.vlm_inputs import Prompts
from reachrl.run.stored_weights import check_finite

FORMAT = "reachrl-vlm-reward-1"
WEIGHTS_FOLDER = "vlm"  # its config.json is the checkpoint's, so it cannot lie beside ours
ADAPTER_FILE = "adapter_model.safetensors"
_WANTED = f"a checkpoint of {SUPPORTED} in the Hugging Face layout"
_PEFT_PREFIX = "base_model.model."  # peft's name of the module that was adapted


class VLMRewardModel(RewardModel):
    """Shows frames to a vision-language model, asks whether the task is completed, and compares the two answers.

    The logit is that of the answer yes minus that of the answer no at the place where the assistant answers, so
    that its sigmoid is the softmax over the two, and the binary cross-entropy of a fit is the cross-entropy of the
    answer. Only this place and these two rows of the output layer are computed, in float32: a bfloat16 logit
    would be rounded to an eighth. An instruction that was not fitted is read all the same; the model knows language.

    What a fit trains are low-rank adapters on the linear maps of the language model, or, at rank 0, the whole
    language model; the vision tower and its projector stay as they are.

    Args:
        base: a checkpoint.
        adapters: sizes and places of the adapters; None: all of the language model is trained.
        prompt: the question, with `{instruction}` in it.
        answers: the one that means yes and the one that means no, a single token each.
        image_size: side in pixels at which a Qwen model sees frames, rounded to whole tokens.
        num_frames: frames of a clip; they come before the question, oldest first.
        frame_stride: decisions between two of them.
        shift: added to every logit.

    Raises:
        ConfigError: an answer is not a single token, or both are the same.
        CheckpointError: tokenizer, chat template and model do not belong together.

    Source: Lu et al. 2025, VLA-RL (arXiv 2505.18719), section 3.3: a fine-tuned vision-language model and next-token
    prediction; the question and the answers are those of its first public code.
    """

    Config: ClassVar[type[VLMRewardModelConfig]] = VLMRewardModelConfig

    def __init__(
        self,
        base: VLMCheckpoint,
        adapters: LoraConfig | None,
        *,
        prompt: str,
        answers: tuple[str, str],
        image_size: int,
        num_frames: int = 1,
        frame_stride: int = 1,
        shift: float = 0.0,
    ) -> None:
        super().__init__(num_frames=num_frames, frame_stride=frame_stride)
        self.base, self.adapters, self.shift, self.image_size = base, adapters, shift, image_size
        self.vlm = base.vlm
        self.family = base.family(base.vlm, base.processor, image_size)
        self.prompts = Prompts(base.tokenizer, self.family, question=prompt, answers=answers, num_frames=num_frames)
        self.vlm.requires_grad_(False)
        if adapters is None:
            self.vlm.get_submodule(self.family.language_model).requires_grad_(True)
            self.vlm.lm_head.requires_grad_(True)
        else:
            with warnings.catch_warnings():  # peft wonders at the tied embedding, which is not adapted
                warnings.simplefilter("ignore")
                inject_adapter_in_model(adapters, self.vlm)
            for parameter in self._adapter_tensors().values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)  # also those that were read: a refit goes on with them

    @classmethod
    def check(cls, config: VLMRewardModelConfig) -> None:
        """Refuse a configuration without a checkpoint."""
        checkpoint_folder(config.checkpoint, _WANTED)

    @classmethod
    def for_fit(cls, config: VLMRewardModelConfig, instructions: Sequence[str]) -> Self:
        """The configured checkpoint with new adapters that change nothing yet.

        Raises:
            ConfigError: no checkpoint is set, it is of another family, or an answer is not a single token.
            CheckpointError: the checkpoint cannot be read.
        """
        folder = checkpoint_folder(config.checkpoint, _WANTED)
        # Small steps of an optimiser would be lost in bfloat16 weights; adapters are float32 whatever they lie on.
        base = read_checkpoint(folder, folder, dtype=torch.float32 if config.lora_rank == 0 else "auto")
        adapters = None
        if config.lora_rank > 0:
            adapters = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  (peft divides it)
                target_modules=rf"{base.family.language_model}\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
                base_model_name_or_path=str(folder),
                inference_mode=True,  # what other readers of the saved adapters are meant to do with them
            )
        return cls(
            base,
            adapters,
            prompt=config.prompt,
            answers=config.answers,
            image_size=config.image_size,
            num_frames=config.num_frames,
            frame_stride=config.frame_stride,
        )

    def logits(self, clips: UInt8[np.ndarray, "B F H W 3"], instructions: Sequence[str]) -> Float[Tensor, "B"]:
        """Logit of yes minus logit of no, f32.

        Raises:
            ConfigError: an instruction holds the token that stands for a frame.
        """
        head = self.vlm.lm_head.weight
        inputs = {key: value.to(head.device) for key, value in self.prompts.batch(instructions).items()}
        inputs |= self.family.frames(clips, head.device)
        last = self.vlm.model(**inputs, use_cache=False).last_hidden_state[:, -1]
        yes, no = head[list(self.prompts.answer_ids)].float()
        return last.float() @ (yes - no) + self.shift

    def shift_logits(self, by: float) -> None:
        """Add `by` to every logit from now on."""
        self.shift += by

    def _adapter_tensors(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' matrices under the names of peft's files."""
        return {
            _PEFT_PREFIX + name.replace(".default.", "."): parameter
            for name, parameter in self.vlm.named_parameters()
            if ".lora_" in name
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the folder `vlm`: the adapters or the whole model, and the files of tokenizer and image processor."""
        place = folder / WEIGHTS_FOLDER
        place.mkdir()
        self.base.tokenizer.save_pretrained(place)
        self.base.processor.save_pretrained(place)
        if self.adapters is None:
            self.vlm.save_pretrained(place)
        else:
            self.adapters.save_pretrained(str(place))
            matrices = {name: tensor.detach().cpu().contiguous() for name, tensor in self._adapter_tensors().items()}
            save_file(matrices, place / ADAPTER_FILE, metadata={"format": "pt"})
        return {
            "format": FORMAT,
            "adapters": self.adapters is not None,
            "base_fingerprint": self.base.fingerprint,
            "prompt": self.prompts.question,
            "answers": list(self.prompts.answers),
            "answer_ids": list(self.prompts.answer_ids),
            "image_size": self.image_size,
            "num_frames": self.num_frames,
            "frame_stride": self.frame_stride,
            "shift": self.shift,
        }

    @classmethod
    def read(cls, folder: Path, saved: dict[str, Any]) -> Self:
        """Read what `write` wrote; adapters need the checkpoint that they were fitted on where it was.

        Raises:
            CheckpointError: a file is missing or damaged, the checkpoint below the adapters is another one, or the
                tokenizer does not hold the answers as the tokens that were fitted.
        """
        if saved.get("format") != FORMAT:
            raise CheckpointError(f"{folder / CONFIG_FILE} is no {FORMAT} description. {REMEDY}")
        place = folder / WEIGHTS_FOLDER
        adapters = read_adapters(place) if saved.get("adapters") else None
        try:
            if adapters is None:
                base = read_checkpoint(place, place, dtype="auto")
            else:
                base = read_base(place, adapters, fitted_on=str(saved["base_fingerprint"]))
            model = cls(
                base,
                adapters,
                prompt=str(saved["prompt"]),
                answers=(str(saved["answers"][0]), str(saved["answers"][1])),
                image_size=int(saved["image_size"]),
                num_frames=int(saved["num_frames"]),
                frame_stride=int(saved["frame_stride"]),
                shift=float(saved["shift"]),
            )
            wanted = [int(token) for token in saved["answer_ids"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error!r}. {REMEDY}") from error
        except ConfigError as error:
            raise CheckpointError(f"The reward model in {folder} and its tokenizer do not agree: {error}") from error
        for answer, token, fitted in zip(model.prompts.answers, model.prompts.answer_ids, wanted, strict=True):
            if token != fitted:
                raise CheckpointError(
                    f"{folder / CONFIG_FILE}: the answer {answer!r} was fitted as token {fitted}, but the tokenizer in "
                    f"{place} holds it as token {token}. Put that tokenizer's own files back. {REMEDY}"
                )
        if adapters is not None:
            model._load_adapters(place)
        return model

    @torch.no_grad()
    def _load_adapters(self, place: Path) -> None:
        try:
            stored, own = load_file(place / ADAPTER_FILE), self._adapter_tensors()
        except FileNotFoundError as error:
            raise CheckpointError(f"The reward model file {place / ADAPTER_FILE} is missing. {REMEDY}") from error
        except Exception as error:  # safetensors' own error is not a subclass of anything else
            raise CheckpointError(f"{place / ADAPTER_FILE} is damaged or truncated: {error}. {REMEDY}") from error
        differing = sorted(
            name
            for name in stored.keys() | own.keys()
            if name not in stored or name not in own or stored[name].shape != own[name].shape
        )
        if differing:
            raise CheckpointError(
                f"The adapters in {place} are of another architecture than their base: {len(differing)} matrices "
                f"differ, such as {differing[0]}. {REMEDY}"
            )
        for name, parameter in own.items():
            check_finite(stored[name], name, place / ADAPTER_FILE)
            parameter.copy_(stored[name])
