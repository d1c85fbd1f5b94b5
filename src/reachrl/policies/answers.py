"""Inputs and outputs of a policy: model-ready rows, answers in token slots, teacher-forced scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class PolicyInputs:
    """Model-ready rows that `Policy.encode` returns; opaque to the training loop.

    Derive a frozen dataclass whose fields are tensors with one row per decision, or None. Override `concat` if parts
    differ in more than the number of rows, for example in the padded length of prompts.
    """

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PolicyInputs":
        return type(self)(**{name: None if each is None else change(each) for name, each in self._tensors().items()})

    def __len__(self) -> int:
        return next(len(each) for each in self._tensors().values() if each is not None)

    def rows(self, index: Int64[Tensor, "b"]) -> "PolicyInputs":
        """Select the rows `index`, in that order."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "PolicyInputs":
        """Copy the rows to another device."""
        return self._map(lambda tensor: tensor.to(device))

    @classmethod
    def concat(cls, parts: Sequence[Any]) -> "PolicyInputs":
        """Concatenate the rows of all `parts`."""
        columns = {name: [each._tensors()[name] for each in parts] for name in parts[0]._tensors()}
        return cls(
            **{
                name: None if column[0] is None else torch.cat([each for each in column if each is not None])
                for name, column in columns.items()
            }
        )


Noise = Callable[[int], Float[Tensor, "B V"]]
"""Standard Gumbel noise of one token position, one value for each of the `num_choices` tokens.

A decoder calls it once per position, in ascending order, and may stop where all answers have ended.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSample:
    """The policy's answers to `B` rows, each in `A` token slots (`Policy.num_action_tokens`).

    `token_mask` marks the slots that hold a chosen token, at least one in every row. The other slots hold token id 0
    and log-prob 0. `token_ids` are vocabulary ids (31744..31999 for OpenVLA); `logprobs` are those of the
    sampling distribution (over the policy's `num_choices` tokens, after the temperature); `values` are read at the
    first action position; they may be None where they were not requested. `malformed` rows decode to no action.
    """

    token_ids: Int64[Tensor, "B A"]
    token_mask: Bool[Tensor, "B A"]
    logprobs: Float[Tensor, "B A"]
    values: Float[Tensor, "B"] | None
    malformed: Bool[Tensor, "B"]

    @classmethod
    def full(
        cls, token_ids: Int64[Tensor, "B A"], logprobs: Float[Tensor, "B A"], values: Float[Tensor, "B"] | None
    ) -> "ActionSample":
        """Answers that fill every slot and are never malformed."""
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        malformed = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
        return cls(token_ids=token_ids, token_mask=mask, logprobs=logprobs, values=values, malformed=malformed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Teacher-forced scores of given tokens, differentiable; slots outside the mask are not read."""

    logprobs: Float[Tensor, "B A"]
    entropy: Float[Tensor, "B A"]
    values: Float[Tensor, "B"] | None  # None: not requested
