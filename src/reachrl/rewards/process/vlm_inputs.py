"""Prompts of a vision-language model: the question in its own chat format, up to the position of the answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.vlm_families import VisionFamily


def own_template(folder: Path) -> str | None:
    """The chat template in a file that only processors read, as earlier releases of the checkpoints keep it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds no chat template ({error}); put the checkpoint's own file back."
        ) from error


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: Int64[Tensor, "L"]
    positions: Int64[Tensor, "L P"]


class Prompts:
    """Instructions as token ids up to the place where the answer stands.

    Args:
        tokenizer: the checkpoint's, with a chat template.
        family: how a frame is written.
        question: the user's turn beside the frames, with `{instruction}` in it.
        answers: the one that means yes and the one that means no.
        num_frames: frames of a clip.

    Raises:
        ConfigError: an answer is not a single token in its place, or both are the same.
        CheckpointError: the tokenizer or the chat template does not belong to the model.
    """

    def __init__(
        self, tokenizer: Any, family: VisionFamily, *, question: str, answers: tuple[str, str], num_frames: int
    ) -> None:
        self.tokenizer, self.family, self.question, self.num_frames = tokenizer, family, question, num_frames
        self.answers = answers
        if tokenizer.convert_tokens_to_ids(family.mark) != family.vlm.config.image_token_id:
            raise CheckpointError(
                f"This checkpoint's tokenizer does not read {family.mark} as token "
                f"{family.vlm.config.image_token_id}, which stands for a frame in the model; use the tokenizer's "
                "files that belong to it."
            )
        self._known: dict[str, _Prompt] = {}
        yes, no = (self._split("the task", answer) for answer in answers)
        for answer, (_, ids) in zip(answers, (yes, no), strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ConfigError(
                    f"reward_model.answers: {answer!r} is {len(ids)} tokens in this checkpoint's tokenizer where the "
                    f"assistant answers ({tokenizer.convert_ids_to_tokens(ids)}), expected one that it knows; choose "
                    "another word."
                )
        if yes == no or yes[0] != no[0]:
            raise ConfigError(
                f"reward_model.answers: {answers[0]!r} and {answers[1]!r} cannot be told apart by one token: "
                f"{tokenizer.convert_ids_to_tokens(yes[1])} and {tokenizer.convert_ids_to_tokens(no[1])}. Choose two "
                "words of one token each."
            )
        self.answer_ids: tuple[int, int] = (yes[1][0], no[1][0])

    def batch(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Prompts of different lengths, padded in front so that all end in the last column.

        Returns:
            `input_ids` and `attention_mask` int64 [B, L], and `position_ids` int64 [B, L] or [3, B, L].

        Raises:
            ConfigError: an instruction holds the mark of a frame.
        """
        prompts = [self._prompt(text) for text in instructions]
        mask = [torch.ones_like(prompt.ids) for prompt in prompts]
        positions = _pad_front([prompt.positions for prompt in prompts], 0).permute(2, 0, 1)
        return {
            # Nothing looks at what fills the front, but it must not be the mark of a frame.
            "input_ids": _pad_front([prompt.ids for prompt in prompts], self.answer_ids[0]),
            "attention_mask": _pad_front(mask, 0),
            "position_ids": positions[0] if len(positions) == 1 else positions,
        }

    def _prompt(self, instruction: str) -> _Prompt:
        if instruction not in self._known:
            if self.family.mark in instruction:
                raise ConfigError(
                    f"The instruction {instruction!r} holds {self.family.mark}, which stands for a frame; leave it out."
                )
            ids = torch.tensor(self._split(instruction, self.answers[0])[0])
            self._known[instruction] = _Prompt(ids, self.family.positions(ids, self.num_frames))
        return self._known[instruction]

    def _split(self, instruction: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of the chat before the answer, and those of the answer itself."""
        text = self._chat(instruction, answer)
        found = self.tokenizer(text + answer, add_special_tokens=False, return_offsets_mapping=True)
        # A token may take the space before the answer along, so the answer's tokens are those that reach into it.
        inside = [i for i, (begin, end) in enumerate(found["offset_mapping"]) if max(begin, len(text)) < end]
        first = inside[0] if inside else len(found["input_ids"])
        ids = found["input_ids"]
        return ids[:first], ids[first:]

    def _chat(self, instruction: str, answer: str) -> str:
        """The conversation up to the answer, with every frame's tokens written out."""
        question = self.question.replace("{instruction}", instruction)
        content = [{"type": "image"}] * self.num_frames + [{"type": "text", "text": question}]
        asked = [{"role": "user", "content": content}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        try:
            chat = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template(answered, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise CheckpointError(f"This checkpoint's chat template cannot write a question: {error}") from error
        # Some templates put a space between the prompt for an answer and the answer: the model learnt it there.
        if answer and whole.startswith(chat) and answer in whole[len(chat) :]:
            chat = whole[: whole.index(answer, len(chat))]
        written = chat.count(self.family.mark)
        if written != self.num_frames:
            raise CheckpointError(
                f"This checkpoint's chat template writes {written} frames ({self.family.mark}) where "
                f"{self.num_frames} are shown; use the template that belongs to it."
            )
        return chat.replace(self.family.mark, self.family.frame_text)


def _pad_front(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
