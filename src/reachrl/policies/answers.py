"""What a policy takes and returns: model-ready rows, answers in token slots, teacher-forced scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class PolicyInputs:
    """Model-ready rows, as a policy's `encode` makes them: what is in them only the policy knows.

    Derive a frozen dataclass whose fields are tensors with one row for each of `B` decisions, or None. Override
    `concat` where parts differ in more than their number of rows, as prompts padded to different lengths do.
    """

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PolicyInputs":
        return type(self)(**{name: None if each is None else change(each) for name, each in self._tensors().items()})

    def __len__(self) -> int:
        return next(len(each) for each in self._tensors().values() if each is not None)

    def rows(self, index: Int64[Tensor, "b"]) -> "PolicyInputs":
        """The rows `index`, in that order."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "PolicyInputs":
        """The same rows on another device."""
        return self._map(lambda tensor: tensor.to(device))

    @classmethod
    def concat(cls, parts: Sequence[Any]) -> "PolicyInputs":
        """The rows of all `parts`, one part after the other."""
        columns = {name: [each._tensors()[name] for each in parts] for name in parts[0]._tensors()}
        return cls(
            **{
                name: None if column[0] is None else torch.cat([each for each in column if each is not None])
                for name, column in columns.items()
            }
        )


Noise = Callable[[int], Float[Tensor, "B V"]]
"""Standard Gumbel noise of a token position, one number for each of the `num_choices` tokens it is chosen from.

The decoder asks for each position once, in ascending order, and need not ask for those behind the answers' ends.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSample:
    """The policy's answers to `B` rows, each in `A` token slots (`Policy.num_action_tokens`).

    `token_mask` says which slots hold a token that the policy chose: one at least in every row. The other slots hold
    token id 0 and log-prob 0. `token_ids` are vocabulary ids (31744..31999 for OpenVLA); `logprobs` are those of the
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
        """Answers that fill every slot and always stand for an action, as those of one token a dimension do."""
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        malformed = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
        return cls(token_ids=token_ids, token_mask=mask, logprobs=logprobs, values=values, malformed=malformed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Teacher-forced scores of given tokens, differentiable; what stands outside the mask is not read."""

    logprobs: Float[Tensor, "B A"]
    entropy: Float[Tensor, "B A"]
    values: Float[Tensor, "B"] | None  # None: not requested
