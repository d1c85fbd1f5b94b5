"""Transfer of weights through Ray's object store."""

from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from reachrl.backends.weights import PackedWeights
from reachrl.errors import LearnerLostError


def fetched(weights: PackedWeights) -> PackedWeights:
    """Weights with their buckets fetched into this process.

    Raises:
        LearnerLostError: the learner that stored them is gone.
    """
    references: list[Any] = list(weights.buckets)
    try:
        return replace(weights, buckets=tuple(ray.get(references)))
    except ObjectLostError as error:
        lost = f"weights version {weights.version} were lost with the learner that sent them"
        raise LearnerLostError(lost) from error
