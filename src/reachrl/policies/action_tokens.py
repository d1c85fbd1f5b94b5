"""Actions as tokens: 256 bins over [-1, 1], the last 256 rows of the vocabulary."""

import numpy as np
from jaxtyping import Float, Int

from reachrl.config.language_model import NUM_ACTION_BINS

_EDGES = np.linspace(-1.0, 1.0, NUM_ACTION_BINS)
_CENTRES = (_EDGES[:-1] + _EDGES[1:]) / 2.0


def tokens_from_unit(actions: Float[np.ndarray, "*B"], vocab_end: int) -> Int[np.ndarray, "*B"]:
    """Map normalised actions to vocabulary ids.

    -1 becomes `vocab_end - 1` and +1 becomes `vocab_end - 256`: larger actions have smaller ids.

    Args:
        actions: normalised to [-1, 1]; values outside are clipped.
        vocab_end: one past the last action token (32000 for OpenVLA).

    Returns:
        Vocabulary ids of the same shape.

    Source: Kim et al. 2024, OpenVLA, section 3.2, and its released `ActionTokenizer`.
    """
    return vocab_end - np.digitize(np.clip(actions, -1.0, 1.0), _EDGES)


def unit_from_tokens(token_ids: Int[np.ndarray, "*B"], vocab_end: int) -> Float[np.ndarray, "*B"]:
    """Map vocabulary ids to the centres of their bins.

    256 tokens share 255 centres: the two lowest ids decode to the same action, as in the release.

    Args:
        token_ids: vocabulary ids.
        vocab_end: one past the last action token.

    Returns:
        f64 normalised actions in (-1, 1).
    """
    return _CENTRES[np.clip(vocab_end - token_ids - 1, 0, NUM_ACTION_BINS - 2)]
