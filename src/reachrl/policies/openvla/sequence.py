"""The sequence of a row: `[BOS][patches][padding][rest of the prompt][action tokens]`."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import LlamaModel

from reachrl.policies.openvla.inputs import OpenVLAInputs


def pad(rows: Sequence[Sequence[int]], length: int, filler: int) -> tuple[Int64[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Token rows filled up on the right to `length`, or to the longest of them, and which tokens are real."""
    length = max(length, *map(len, rows)) if rows else length
    ids = np.full((len(rows), length), filler, np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in rows])
    mask = np.arange(length)[None] < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask)


def arrange(
    model: LlamaModel,
    patches: Float[Tensor, "B P E"],
    inputs: OpenVLAInputs,
    token_ids: Int64[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B S E"], Bool[Tensor, "B S"]]:
    """Embed rows, whatever padding their prompts come with, and say which positions are real.

    Every row's first action position is at the same index.
    """
    ids, mask = inputs.prompt_ids, inputs.prompt_mask
    first = mask & (mask.long().cumsum(1) == 1)
    # BOS, then padding, then text; stable, so that tokens keep their order
    order = (mask.long() * 2 - first.long() * 3 + 1).argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    if mask.device.type == "cpu":  # padding that all rows share costs time; elsewhere fixed shapes are worth more
        used = mask.any(0)
        ids, mask = ids[:, used], mask[:, used]
    if token_ids is not None:
        ids = torch.cat([ids, token_ids], 1)
        mask = torch.cat([mask, torch.ones_like(token_ids, dtype=torch.bool)], 1)
    text = model.embed_tokens(ids)
    seen = torch.ones(patches.shape[:2], dtype=torch.bool, device=mask.device)
    embeds = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
    return embeds, torch.cat([mask[:, :1], seen, mask[:, 1:]], 1)
