"""Any `transformers` model that gives a frame, or a frame and a text, a score or class logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from reachrl.config.named_code import LIBRARY
from reachrl.config.reward_model import TransformersRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError, ReachRLError
from reachrl.registry import is_trusted, untrusted
from reachrl.rewards.process.base import CONFIG_FILE, REMEDY, RewardModel, trust_remedy
from reachrl.rewards.process.pretrained import checkpoint_folder, import_class, read_part, read_weights
from reachrl.tokenizer_state import forget_calls

FORMAT = "reachrl-transformers-reward-1"
_WANTED = "any model of `transformers` with logits, and its processor"
WEIGHTS_FOLDER = "checkpoint"  # its config.json is the checkpoint's, so it cannot lie beside ours


class TransformersRewardModel(RewardModel):
    """Passes frames and prompts through a checkpoint's own processor and reads log-odds from its `logits`.

    A single logit is the log-odds of progress itself; of several, those of the class `positive` against all
    others together. An instruction that was not fitted is read all the same, as far as the checkpoint's text
    goes. Frames are shown one at a time.

    Args:
        model: a model of `transformers` whose output has `logits`.
        processor: turns `images` and `text` into the model's inputs.
        model_class: import string of the class that read it.
        processor_class: import string of the class that read the processor.
        prompt: the text that goes with a frame, with `{instruction}` in it; empty: the model takes frames only.
        positive: the class that means progress.
        shift: added to every logit.
    """

    Config: ClassVar[type[TransformersRewardModelConfig]] = TransformersRewardModelConfig

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        model_class: str,
        processor_class: str,
        prompt: str,
        positive: int,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.model_class, self.processor_class = model_class, processor_class
        self.prompt, self.positive, self.shift = prompt, positive, shift

    @classmethod
    def check(cls, config: TransformersRewardModelConfig) -> None:
        """Refuse a configuration without a checkpoint."""
        checkpoint_folder(config.checkpoint, _WANTED)

    @classmethod
    def for_fit(cls, config: TransformersRewardModelConfig, instructions: Sequence[str]) -> Self:
        """The configured checkpoint as it is; it is tried on one grey frame, so that what does not fit is told now.

        Raises:
            ConfigError: no checkpoint is set, an import string is wrong, several frames are wanted, or model,
                processor, prompt and `positive` do not go together.
            CheckpointError: the checkpoint cannot be read, or lacks weights and is not going to be fitted.
            MissingExtra: model or processor need a package that is not installed.
        """
        if config.num_frames > 1:
            raise ConfigError(
                f"reward_model.num_frames is {config.num_frames}, but kind 'transformers' shows its model one frame at "
                "a time; set it to 1, or use kind 'vlm' or 'small'."
            )
        folder = checkpoint_folder(config.checkpoint, _WANTED)
        fitted = config.steps > 0 or config.refit_every > 0
        model = cls._read_checkpoint(
            folder,
            # Small steps of an optimiser would be lost in bfloat16 weights.
            dtype=torch.float32 if fitted else "auto",
            new_head=config.steps > 0,
            model_class=config.model_class,
            processor_class=config.processor_class,
            prompt=config.prompt,
            positive=config.positive,
        )
        model._try([*instructions, "the task"][0])
        return model

    @torch.no_grad()
    def _try(self, instruction: str) -> None:
        try:
            self.eval().logits(np.full((1, 1, 64, 64, 3), 127, np.uint8), [instruction])
        except (ReachRLError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # anyone's model: what it raises for inputs that are not its own is its own choice
            raise ConfigError(
                f"{type(self.model).__name__} does not take what {type(self.processor).__name__} makes of "
                f"{self._taken} ({type(error).__name__}: {error}). Correct reward_model.model_class, "
                "reward_model.processor_class or reward_model.prompt (empty: frames only)."
            ) from error

    @property
    def _taken(self) -> str:
        return "frames and text" if self.prompt else "frames without a text"

    @classmethod
    def _read_checkpoint(
        cls,
        folder: Path,
        *,
        dtype: str | torch.dtype,
        new_head: bool,
        model_class: str,
        processor_class: str,
        **rest: Any,
    ) -> Self:
        processor_type = import_class(processor_class, "reward_model.processor_class")
        model_type = import_class(model_class, "reward_model.model_class")
        model = read_weights(model_type, folder, dtype=dtype, new_head=new_head)
        processor = read_part(processor_type.from_pretrained, folder, trust_remote_code=False)
        forget_calls(processor)
        return cls(
            model,
            processor,
            model_class=model_class,
            processor_class=processor_class,
            **rest,
        )

    def logits(self, clips: UInt8[np.ndarray, "B 1 H W 3"], instructions: Sequence[str]) -> Float[Tensor, "B"]:
        """Log-odds of progress, f32.

        Raises:
            ConfigError: the processor does not take frames and prompts, the output has no logits for each frame, or
                `positive` is none of its classes.
        """
        weight = next(self.model.parameters())
        inputs = {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in self._inputs(clips[:, 0], instructions).items()
            if isinstance(value, Tensor)
        }
        output = self.model(**inputs)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"reward_model.model_class {self.model_class!r} gives {', '.join(output)}, but no `logits`; choose the "
                "class of this checkpoint with a head on it, such as 'transformers:AutoModelForImageClassification'."
            )
        return self._log_odds(logits.float(), len(clips)) + self.shift

    def _inputs(self, frames: UInt8[np.ndarray, "B H W 3"], instructions: Sequence[str]) -> dict[str, Any]:
        options: dict[str, Any] = {"images": [Image.fromarray(frame) for frame in frames], "return_tensors": "pt"}
        if self.prompt:
            options["text"] = [self.prompt.replace("{instruction}", text) for text in instructions]
            options["padding"] = True
        try:
            return dict(self.processor(**options))
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"reward_model.processor_class: {type(self.processor).__name__} does not take {self._taken} "
                f"({type(error).__name__}: {error}). Set `reward_model.prompt` to '' for a model that looks at frames "
                "only, and to a text with {instruction} for one that reads too."
            ) from error

    def _log_odds(self, logits: Float[Tensor, "..."], num: int) -> Float[Tensor, "B"]:
        if logits.ndim == 1:
            logits = logits[:, None]
        if logits.ndim != 2 or len(logits) != num:
            raise ConfigError(
                f"reward_model.model_class {self.model_class!r} gives logits of shape {list(logits.shape)} for {num} "
                f"frames, expected [{num}], [{num}, 1] or [{num}, classes]; choose a class that scores whole images."
            )
        if self.positive >= logits.shape[1]:
            raise ConfigError(
                f"reward_model.positive is {self.positive}, but the model has {logits.shape[1]} logits, numbered from "
                "0; give the number of the one that means progress."
            )
        chosen = logits[:, self.positive]
        if logits.shape[1] == 1:
            return chosen
        others = torch.cat([logits[:, : self.positive], logits[:, self.positive + 1 :]], dim=1)
        return chosen - others.logsumexp(dim=1)

    def shift_logits(self, by: float) -> None:
        """Add `by` to every logit from now on."""
        self.shift += by

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the whole model and its processor to `checkpoint`, in the Hugging Face layout."""
        self.model.save_pretrained(folder / WEIGHTS_FOLDER)  # pyright: ignore[reportCallIssue]
        self.processor.save_pretrained(folder / WEIGHTS_FOLDER)
        return {
            "format": FORMAT,
            "model_class": self.model_class,
            "processor_class": self.processor_class,
            "prompt": self.prompt,
            "positive": self.positive,
            "shift": self.shift,
        }

    @classmethod
    def read(cls, folder: Path, saved: dict[str, Any]) -> Self:
        """Read what `write` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: a class that it names is not installed here, or is neither of `transformers` nor named by the
                user.
        """
        if saved.get("format") != FORMAT:
            raise CheckpointError(f"{folder / CONFIG_FILE} is no {FORMAT} description. {REMEDY}")
        try:
            options = {
                "model_class": str(saved["model_class"]),
                "processor_class": str(saved["processor_class"]),
                "prompt": str(saved["prompt"]),
                "positive": int(saved["positive"]),
                "shift": float(saved["shift"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error!r}. {REMEDY}") from error
        for option in ("model_class", "processor_class"):
            target, where = options[option], f"{folder / CONFIG_FILE}: {option}"
            if not target.startswith(LIBRARY) and not is_trusted(target):
                raise untrusted(target, where=where, remedy=trust_remedy(option, target))
        return cls._read_checkpoint(folder / WEIGHTS_FOLDER, dtype="auto", new_head=False, **options)
