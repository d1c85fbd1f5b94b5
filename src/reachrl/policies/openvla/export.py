"""A policy with adapters for other tools: its adapters alone, or a checkpoint that stands on its own."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.config.policy import PrismaticConfig
from reachrl.policies.lora.export import copy_adapter, merge_files, refuse_whole
from reachrl.policies.lora.files import VALUE_FILE, base_of, beside, check_base, places
from reachrl.policies.lora.merge_check import MergeCheck, check_merged
from reachrl.policies.openvla.family import family_of
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.official import PREPROCESSOR_FILE, is_official
from reachrl.policies.openvla.oft import KIND as OFT_KIND
from reachrl.policies.openvla.oft import companion, oft_signal
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.statement import FRAMES, stated, statement
from reachrl.policies.openvla.statement import KEY as STATED
from reachrl.policies.openvla.statistics import norm_stats
from reachrl.policies.openvla.storage import read_config
from reachrl.policies.storage.saved import CONFIG_FILE, OUR_STATS, STATS_FILE, TOKENIZER_FILE, write_new
from reachrl.policies.storage.weights import read_json, weight_files, write_json
from reachrl.registry import resolve
from reachrl.run.manifest import MANIFEST, verify_if_sealed

T = TypeVar("T")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ROWS = 4  # frames the merged policy is compared on


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is known of a merged checkpoint."""

    check: MergeCheck
    trained: float | None
    """Mean distance of log-probabilities, in nats, from the policy on a 4-bit base that was trained; None where the
    base was plain."""


def export_adapter(folder: Path, out: Path) -> None:
    """Copy peft's two files of the actor, the statistics, and what else other tools keep beside such adapters.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        CheckpointError: the file of the matrices is missing or damaged.
        StorageError: `out` cannot be written.
    """
    _write(folder, out, lambda aside: _copy(folder, aside))


def export_merged(folder: Path, out: Path) -> Merge:
    """Write the base of `folder` with its adapters folded in, in the base's own layout, and check what was written.

    One file of weights is in memory at a time. Adapters that were trained on a 4-bit base are folded into the base as
    it is stored: the result is near the policy that was trained, not equal; how near is measured.

    Args:
        folder: with adapters, ours or another tool's.
        out: the new folder.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        CheckpointError: files are missing or damaged, or what was written is not what was meant; then nothing is left.
        StorageError: `out` cannot be written.
    """
    return _write(folder, out, lambda aside: _merge(folder, aside))


def _copy(folder: Path, out: Path) -> None:
    copy_adapter(folder, out, canonical_key)
    if (path := beside(folder, STATS_FILE)) is not None:  # what the base has may be another set
        shutil.copyfile(path, out / STATS_FILE)
    if (folder / CONFIG_FILE).is_file():
        for path in family_of(read_config(folder)).kept(places(folder)):
            shutil.copyfile(path, out / path.name)


def _write(folder: Path, out: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write what is made of the adapters in `folder`."""
    refuse_whole(folder)
    verify_if_sealed(folder)
    if (folder / CONFIG_FILE).is_file():
        read_config(folder)  # refuses configurations that disagree: one would be acted by, the other exported
    return write_new(out, fill)


def _merge(folder: Path, out: Path) -> Merge:
    base = base_of(folder)
    check_base(folder, base)
    saved = read_config(folder) if (folder / CONFIG_FILE).is_file() else None  # another tool's say nothing of a policy
    copy_surroundings(folder, base, out)
    # A saved value head that reads the actor's trunk still fits the merged one.
    shared = (folder / VALUE_FILE).is_file() and saved is not None and saved.critic == "shared"
    values = load_file(folder / VALUE_FILE) if shared else {}
    merge_files(folder, base, out, canonical_key, values)
    check = check_merged(folder, base, out, canonical_key, values)
    trained = None
    if saved is not None and saved.four_bit:
        critic = "shared" if is_official(base) else read_config(base).critic
        # One after the other, and the merged weights as they are stored: in float32 7B would take 30 GB. In bfloat16
        # the arithmetic's own noise is a part of the distance, a small one beside that of rounding to 4 bits.
        build = resolve("policies", saved.kind)
        scores = _scores(build(saved))
        update = {"lora": None, "dataset": None, "critic": critic, "rollout_copy": False, "checkpoint": out}
        trained = (scores - _scores(build(saved.model_copy(update=update)))).abs().mean().item()
    return Merge(check=check, trained=trained)


def copy_surroundings(folder: Path, base: Path, out: Path) -> None:
    """Write configuration, tokenizer and statistics: the base's, but for what the training made of them."""
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.is_file() and path.name not in (*weights, MANIFEST) and path.suffix not in _PICKLES:
            shutil.copyfile(path, out / path.name)
    config = read_config(folder) if (folder / CONFIG_FILE).is_file() else None
    if is_official(base):
        around = [*places(folder), base]
        kept = family_of(config).kept(around) if config is not None else [companion(around)]
        for path in filter(None, kept):
            shutil.copyfile(path, out / path.name)
    if (path := beside(folder, TOKENIZER_FILE)) is not None:
        shutil.copyfile(path, out / TOKENIZER_FILE)
    raw = read_json(base / CONFIG_FILE) | _changed(folder, base, config, out)
    if (path := beside(folder, STATS_FILE)) is not None:
        stats = _stats(folder, base, config, read_json(path))
        write_json(out / STATS_FILE, stats)
        if is_official(base):
            raw["norm_stats"] = norm_stats(base) | stats
    write_json(out / CONFIG_FILE, raw)


def _changed(folder: Path, base: Path, config: PrismaticConfig | None, out: Path) -> dict[str, Any]:
    """What the policy in `folder` is and its base does not say, as entries of the base's configuration."""
    if not is_official(base):
        keys = {"resize", *FRAMES, *(family_of(config).unstated if config is not None else ())}
        return {} if config is None else config.model_dump(mode="json", include=keys)
    if config is None:  # of another tool: at least the family stays known
        known = {} if oft_signal(folder) is None else {"kind": OFT_KIND}
        return {STATED: stated(base) | known} if known else {}
    preprocessor = out / PREPROCESSOR_FILE
    if preprocessor.is_file() and "image_resize_strategy" in (frames := read_json(preprocessor)):
        write_json(preprocessor, frames | {"image_resize_strategy": config.resize})
    return statement(config, family_of(config).unstated)


def _stats(folder: Path, base: Path, config: PrismaticConfig | None, stats: dict[str, Any]) -> dict[str, Any]:
    """A folder's statistics under the names by which they are found beside the base's weights."""
    if not is_official(base):  # our layout knows one set, by one name
        return {OUR_STATS: stats.get(OUR_STATS, next(iter(stats.values()), None))}
    if config is None:
        return stats
    return {config.dataset or OUR_STATS: family_of(config).export_stats(stats[OUR_STATS])}


@torch.no_grad()
def _scores(policy: OpenVLAPolicy) -> Float[Tensor, "B A V"]:
    """Log-probabilities at every action position after fixed tokens, of random frames."""
    rng, first = np.random.default_rng(0), policy.first_action_id
    inputs = policy.noise_inputs(rng, _ROWS)
    ids = torch.from_numpy(rng.integers(first, first + NUM_ACTION_BINS, (_ROWS, policy.num_action_tokens)))
    logits, _ = policy.action_logits(inputs, ids.to(policy.device))
    return logits.float().log_softmax(-1).cpu()
