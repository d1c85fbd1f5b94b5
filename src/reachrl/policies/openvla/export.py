"""A policy with adapters for other tools: its adapters alone, or a checkpoint that stands on its own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.policies.lora.export import copy_adapter, merge_files, refuse_whole
from reachrl.policies.lora.files import VALUE_FILE, base_of, check_base, is_adapter
from reachrl.policies.lora.merge_check import MergeCheck, check_merged
from reachrl.policies.openvla.family import family_of
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.official import is_official
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.statistics import norm_stats
from reachrl.policies.openvla.storage import read_config
from reachrl.policies.storage.saved import CONFIG_FILE, OUR_STATS, STATS_FILE, TOKENIZER_FILE, write_new
from reachrl.policies.storage.weights import read_json, weight_files
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
    """Copy peft's two files of the actor, and nothing of ours but the manifest.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        CheckpointError: the file of the matrices is missing or damaged.
        StorageError: `out` cannot be written.
    """
    _write(folder, out, lambda aside: copy_adapter(folder, aside, canonical_key))


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
    saved = read_config(folder)
    copy_surroundings(folder, base, out)
    # A saved value head that reads the actor's trunk still fits the merged one.
    shared = (folder / VALUE_FILE).is_file() and saved.critic == "shared"
    values = load_file(folder / VALUE_FILE) if shared else {}
    merge_files(folder, base, out, canonical_key, values)
    check = check_merged(folder, base, out, canonical_key, values)
    trained = None
    if saved.four_bit:
        critic = "shared" if is_official(base) else read_config(base).critic
        # One after the other, and the merged weights as they are stored: in float32 7B would take 30 GB. In bfloat16
        # the arithmetic's own noise is a part of the distance, a small one beside that of rounding to 4 bits.
        build = resolve("policies", saved.kind)
        scores = _scores(build(saved))
        update = {"lora": None, "dataset": None, "critic": critic, "rollout_copy": False, "checkpoint": out}
        trained = (scores - _scores(build(saved.model_copy(update=update)))).abs().mean().item()
    return Merge(check=check, trained=trained)


def copy_surroundings(folder: Path, base: Path, out: Path) -> None:
    """Write configuration, tokenizer and statistics: the base's, but for the statistics of training."""
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.is_file() and path.name not in (*weights, MANIFEST) and path.suffix not in _PICKLES:
            shutil.copyfile(path, out / path.name)
    if is_official(base) and (folder / CONFIG_FILE).is_file():
        for path in family_of(read_config(folder)).kept(base):
            shutil.copyfile(path, out / path.name)
    if (folder / TOKENIZER_FILE).is_file():
        shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    if not (folder / STATS_FILE).is_file():
        return
    stats = read_json(folder / STATS_FILE)
    if not is_official(base):  # our layout knows one set, by one name
        stats = {OUR_STATS: stats.get(OUR_STATS, next(iter(stats.values()), None))}
    elif (folder / VALUE_FILE).is_file() or not is_adapter(folder):  # ours
        stats = {read_config(folder).dataset or OUR_STATS: stats.get(OUR_STATS)}
    files = {STATS_FILE: stats}
    if is_official(base):
        files[CONFIG_FILE] = read_json(base / CONFIG_FILE) | {"norm_stats": norm_stats(base) | stats}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _scores(policy: OpenVLAPolicy) -> Float[Tensor, "B A V"]:
    """Log-probabilities at every action position after fixed tokens, of random frames."""
    rng, first = np.random.default_rng(0), policy.first_action_id
    inputs = policy.noise_inputs(rng, _ROWS)
    ids = torch.from_numpy(rng.integers(first, first + NUM_ACTION_BINS, (_ROWS, policy.num_action_tokens)))
    logits, _ = policy.action_logits(inputs, ids.to(policy.device))
    return logits.float().log_softmax(-1).cpu()
