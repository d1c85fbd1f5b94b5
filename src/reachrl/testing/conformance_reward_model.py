"""Checks that a reward model keeps the contract of `reachrl.rewards.process.base.RewardModel`, for plug-in authors.

from reachrl.testing.conformance_reward_model import check_reward_model
check_reward_model(my_model, ["open the drawer", "close the window"], tmp_path / "model")
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reachrl.errors import ExtensionError
from reachrl.registry import trust
from reachrl.rewards.process.base import RewardModel, load_reward_model


def check_reward_model(
    model: RewardModel,
    instructions: Sequence[str],
    folder: Path,
    *,
    image_size: int = 32,
    batch_size: int = 4,
    tolerance: float = 1e-4,
) -> None:
    """Try a reward model out on made-up frames.

    Args:
        model: any weights, in evaluation mode; it is left as it was.
        instructions: at least two that it can read, best of different lengths.
        folder: where it is saved and read back.
        image_size: side of the frames in pixels.
        batch_size: clips a forward pass.
        tolerance: allowed between a row in a batch and the same row alone, in log-odds.

    Raises:
        ExtensionError: the first promise that is broken.
    """
    draw = np.random.default_rng(0)
    clips = draw.integers(0, 256, (6, model.num_frames, image_size, image_size, 3), dtype=np.uint8)
    texts = [instructions[i % len(instructions)] for i in range(len(clips))]
    with torch.no_grad():
        logits = model.logits(clips, texts)
        _require(logits.shape == (6,) and logits.is_floating_point(), "logits are one float for each clip")
        _require(bool(torch.isfinite(logits).all()), "logits are finite")
        alone = torch.cat([model.logits(clips[i : i + 1], texts[i : i + 1]) for i in range(6)])
        _require(_close(logits, alone, tolerance), "a clip's logit does not depend on the others of its batch")
        model.shift_logits(0.5)
        shifted = model.logits(clips, texts)
        model.shift_logits(-0.5)
        _require(_close(shifted, logits + 0.5, tolerance), "shift_logits adds to every logit")
        _require(_close(model.logits(clips, texts), logits, tolerance), "shifting back brings the logits back")
    scores = model.score(clips, texts, batch_size=batch_size)
    _require(scores.dtype == np.float32 and scores.shape == (6,), "score is f32, one for each clip")
    expected = torch.sigmoid(logits.float()).cpu().numpy()
    _require(bool(np.allclose(scores, expected, atol=tolerance)), "score is the sigmoid of the logit")
    _require(any(parameter.requires_grad for parameter in model.parameters()), "something can be trained")
    _require(model.logits(clips[:2], texts[:2]).requires_grad, "logits can be differentiated")
    model.save_pretrained(folder)
    trust(model.kind())  # the caller passes the model and so trusts its code
    again = load_reward_model(folder)
    _require(type(again) is type(model), f"the saved folder names the kind of its class, here {model.kind()!r}")
    _require(not again.training, "a model that was read is in evaluation mode")
    _require(
        bool(np.allclose(again.score(clips, texts, batch_size=batch_size), scores, atol=tolerance)),
        "a model that was saved and read gives the same scores",
    )


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(one.float(), other.float(), atol=tolerance, rtol=tolerance)


def _require(kept: bool, promise: str) -> None:
    if not kept:
        raise ExtensionError(f"reward model contract: {promise}.")
