"""What a checkpoint folder holds, from its small files and the headers of its weights alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reachrl.config.policy import PrismaticConfig
from reachrl.policies.folders import Part, count_dtypes
from reachrl.policies.lora import files as adapters
from reachrl.policies.lora.deltas import rank_and_alpha
from reachrl.policies.openvla.names import TOWERS, canonical_key
from reachrl.policies.openvla.official import (
    KNOWN_HEADS,
    is_dead,
    is_official,
    official_config,
    tower_names,
)
from reachrl.policies.openvla.oft import oft_signal
from reachrl.policies.openvla.statistics import norm_stats, official_stats
from reachrl.policies.openvla.storage import read_config
from reachrl.policies.openvla.tokenizer import PROMPT, PromptTokenizer
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.saved import TOKENIZER_FILE
from reachrl.policies.storage.weights import StoredTensor, read_header, read_headers, read_json

EXAMPLE = "pick up the red block"
_PARTS = {
    **{f"tower {place + 1}": (f"vision_backbone.{tower}.",) for place, tower in enumerate(TOWERS)},
    "projector": ("projector.",),
    "language model": ("language_model.",),
    "critic": ("value_head.", "critic."),
    "other": ("",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A folder with whole weights."""

    folder: Path
    oft_signal: str | None  # what shows that it is OpenVLA-OFT, which is not loaded
    layout: Literal["official", "prismatic", "reachrl"]
    config: PrismaticConfig
    tower_names: tuple[str, ...]  # the official ones; empty for our own checkpoints
    heads_known: bool  # whether the towers' attention heads in `config` are right: no file states them
    parts: tuple[Part, ...]
    dtypes: dict[str, int]  # weights by stored type
    action_dims: dict[str, int]  # action dimensions by set of statistics
    prompt_ids: tuple[int, ...] | None  # of the example; None without a tokenizer

    @property
    def num_weights(self) -> int:
        """All stored numbers."""
        return sum(part.num_weights for part in self.parts)

    @property
    def num_live(self) -> int:
        """The stored numbers that are read."""
        return self.num_weights - sum(part.num_unread for part in self.parts)

    @property
    def sequence_length(self) -> int:
        """Positions of a row while its last action token is decoded."""
        return self.config.num_patches + self.config.prompt_length + self.config.num_action_tokens - 1

    @property
    def num_cached(self) -> int:
        """Numbers in the cache of one row: a key and a value at each position, for each layer and key head."""
        llm = self.config.language_model
        head_dim = llm.hidden_size // llm.num_heads
        return 2 * llm.num_layers * (llm.num_kv_heads or llm.num_heads) * head_dim * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A folder with low-rank adapters in peft's files."""

    folder: Path
    oft_signal: str | None  # what shows that it is of OpenVLA-OFT, which is not loaded
    base: str  # a folder or the name of a model on the hub
    rank: int
    alpha: float
    targets: tuple[str, ...]
    num_weights: int
    dtypes: dict[str, int]


def inspect_folder(folder: Path) -> CheckpointInfo | AdapterInfo:
    """Describe a folder without reading a single weight.

    Args:
        folder: on this machine, or `owner/name` on the hub, which is downloaded first.

    Raises:
        CheckpointError: it is no checkpoint we know, or a file is missing or damaged.
    """
    folder = locate(folder)
    return _inspect_adapter(folder) if adapters.is_adapter(folder) else _inspect_checkpoint(folder)


def prompt_of(instruction: str) -> str:
    """The question that OpenVLA is asked."""
    return PROMPT.format(instruction=instruction.lower())


def _inspect_adapter(folder: Path) -> AdapterInfo:
    raw, tensors = read_json(folder / adapters.CONFIG_FILE), read_header(folder / adapters.WEIGHTS_FILE)
    rank, alpha = rank_and_alpha(raw, folder / adapters.CONFIG_FILE)
    targets = raw.get("target_modules") or ()
    return AdapterInfo(
        folder=folder,
        oft_signal=oft_signal(folder),
        base=str(raw.get("base_model_name_or_path") or "not stated"),
        rank=rank,
        alpha=alpha,
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        num_weights=sum(tensor.numel for tensor in tensors),
        dtypes=count_dtypes(tensors),
    )


def _inspect_checkpoint(folder: Path) -> CheckpointInfo:
    official = is_official(folder)
    names = tuple(tower_names(folder)) if official else ()
    # No file states the heads; for towers that were never released any number does, as nothing is computed here.
    # A folder of OpenVLA-OFT is shown as what it is, where `read_config` would refuse it.
    heads = [KNOWN_HEADS.get(name, 1) for name in names]
    config = official_config(folder, heads) if official else read_config(folder)
    tensors = read_headers(folder, canonical_key)
    native = any(name != tensor.key for name, tensor in tensors.items())
    return CheckpointInfo(
        folder=folder,
        oft_signal=oft_signal(folder) if official else None,
        layout="reachrl" if not official else "prismatic" if native else "official",
        config=config,
        tower_names=names,
        heads_known=all(name in KNOWN_HEADS for name in names),
        parts=_parts(tensors, (lambda key: is_dead(key, config)) if official else (lambda key: False)),
        dtypes=count_dtypes(tensors.values()),
        action_dims=_action_dims(folder),
        prompt_ids=_prompt_ids(folder, config),
    )


def _action_dims(folder: Path) -> dict[str, int]:
    return {name: len(official_stats(folder, name).q01) for name in norm_stats(folder)}


def _prompt_ids(folder: Path, config: PrismaticConfig) -> tuple[int, ...] | None:
    path = folder / TOKENIZER_FILE
    return PromptTokenizer.from_file(path, config.language_model).prompt_ids(EXAMPLE) if path.is_file() else None


def _parts(tensors: dict[str, StoredTensor], unread: Callable[[str], bool]) -> tuple[Part, ...]:
    """Count weights by part, in the order data flows through them."""
    stored, idle = Counter(), Counter()
    for key, tensor in tensors.items():
        name = next(name for name, prefixes in _PARTS.items() if key.startswith(prefixes))
        stored[name] += tensor.numel
        idle[name] += tensor.numel * unread(key)
    return tuple(Part(name=name, num_weights=stored[name], num_unread=idle[name]) for name in _PARTS if stored[name])
