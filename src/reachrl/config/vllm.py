"""Options of decoding with vLLM, and which policies it can decode."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from reachrl.config.base import Section

if TYPE_CHECKING:
    from reachrl.config.policy import OpenVLAConfig


class VllmConfig(Section):
    """A vLLM engine beside the policy, run by the Python of an environment of its own."""

    python: Path | None = None
    """The interpreter of the environment that vLLM and timm are installed in, as `/opt/vllm/bin/python`; on every
    machine that acts."""
    max_batch: int = Field(default=64, gt=0)
    """Rows the engine decodes at once; more wait their turn. Its cache of keys and values is made for so many."""
    max_prompt: int = Field(default=96, gt=0)
    """Longest prompt in tokens, without the image; a longer one is an error. The cache grows with it."""
    eager: bool = False
    """Neither compile nor capture graphs in the engine: a faster start, slower decoding on a GPU."""
    start_s: float = Field(default=600.0, gt=0)
    """Seconds the engine may take to start."""
    deadline_s: float = Field(default=300.0, gt=0)
    """Seconds the engine may take to decode a batch or to take in a piece of the weights, before it is given up."""


def refusal(policy: "OpenVLAConfig", released: "OpenVLAConfig") -> str | None:
    """Why vLLM cannot decode this policy, or None if it can.

    Args:
        policy: with `decoder="vllm"`.
        released: the model vLLM was written for; sizes of its language model do not matter.
    """
    if policy.vllm.python is None:
        return (
            'policy.decoder="vllm" runs vLLM with a Python of its own: set policy.vllm.python to the interpreter of '
            "the environment it is installed in"
        )
    if policy.vocabulary != "actions":
        return f'policy.decoder="vllm" samples action tokens only, but policy.vocabulary={policy.vocabulary!r}'
    if policy.rollout_copy:
        return 'policy.rollout_copy makes weights for the own decoder, which policy.decoder="vllm" never reads'
    for name in ("towers", "image_size", "projector_expansion"):
        if getattr(policy, name) != getattr(released, name):
            return (
                f"vLLM knows OpenVLA with the released vision towers at {released.image_size} px only; "
                f'policy.{name} differs from theirs. Set policy.decoder="own"'
            )
    for name in ("image_mean", "image_std"):
        if getattr(policy, name) != getattr(released, name):
            return (
                f"vLLM normalises frames with policy.{name}={getattr(released, name)} whatever a checkpoint says; this "
                f'policy has {getattr(policy, name)} and would see other pixels. Set policy.decoder="own"'
            )
    return None
