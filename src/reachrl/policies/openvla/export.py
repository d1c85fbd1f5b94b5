"""Adapters as others use them: peft's two files alone, or folded into a checkpoint that stands on its own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.openvla import adapters
from reachrl.policies.openvla.checkpoint import CONFIG_FILE, STATS_FILE, TOKENIZER_FILE, VALUE_FILE, read_config
from reachrl.policies.openvla.merging import deltas, folded
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.official import is_official
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.weights import read_json, weight_files
from reachrl.run.atomic import replace_folder_atomic
from reachrl.types import Observation

T = TypeVar("T")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ROWS = 4  # frames the merged policy is compared on
_EXACT, _ROUNDED = 1e-4, 0.03  # mean differences, in nats, that float32 sums and 16-bit weights explain


@dataclass(frozen=True, slots=True)
class Comparison:
    """A merged checkpoint against its base with adapters, on the same frames and action tokens.

    Both bases are as stored: a merge is right or wrong whatever the adapters were trained on.
    """

    difference: float  # between the two, mean over log-probabilities, nats
    effect: float  # of the adapters, in the same measure
    tolerance: float  # of the difference
    same_tokens: float  # share of greedy tokens that are equal
    trained: float | None  # as `difference`, against the 4-bit policy that was trained; None where the base was plain


def export_adapter(folder: Path, out: Path) -> None:
    """Copy peft's two files of the actor, and nothing of ours.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        StorageError: `out` cannot be written.
    """

    def fill(aside: Path) -> None:
        for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
            shutil.copyfile(folder / name, aside / name)

    _write_whole(folder, out, fill)


def export_merged(folder: Path, out: Path) -> Comparison:
    """Write the base of `folder` with its adapters folded in, in the base's own layout, and compare the two.

    One file of weights is in memory at a time while writing, one policy while comparing. Adapters that were trained on
    a 4-bit base are folded into the base as it is stored: the result is near the policy that was trained, not equal.

    Args:
        folder: with adapters, ours or another tool's.
        out: the new folder.

    Returns:
        How well the two agree.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        CheckpointError: files are missing or damaged, or the two disagree; then nothing is written.
        StorageError: `out` cannot be written.
    """
    return _write_whole(folder, out, lambda aside: _merge(folder, aside))


def _merge(folder: Path, out: Path) -> Comparison:
    base = adapters.base_of(folder)
    adapters.check_base(folder, base)
    _copy_surroundings(folder, base, out)
    rounded = _merge_files(folder, base, out)
    comparison = compare(folder, out, floor=_ROUNDED if rounded else _EXACT)
    if not comparison.difference <= comparison.tolerance:
        raise CheckpointError(
            f"merging {folder} changes log-probabilities by {comparison.difference:.3g} in the mean, more than "
            f"rounding explains ({comparison.tolerance:.3g}; the adapters' own effect is {comparison.effect:.3g}). "
            "Nothing was written"
        )
    return comparison


def _write_whole(folder: Path, out: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write a folder beside `out` that takes its name at the end, or vanishes."""
    if not adapters.is_adapter(folder):
        raise ConfigError(f"{folder} holds no adapters ({adapters.CONFIG_FILE} is missing): nothing to export")
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    return replace_folder_atomic(out, fill)


def _copy_surroundings(folder: Path, base: Path, out: Path) -> None:
    """Configuration, tokenizer and statistics: the base's, but for the statistics the adapters were trained with."""
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.is_file() and path.name not in weights and path.suffix not in _PICKLES:
            shutil.copyfile(path, out / path.name)
    if not (folder / VALUE_FILE).is_file():
        return
    if (folder / TOKENIZER_FILE).is_file():
        shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    shutil.copyfile(folder / STATS_FILE, out / STATS_FILE)
    if is_official(base):
        config = read_json(base / CONFIG_FILE) | {"norm_stats": read_json(folder / STATS_FILE)}
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merge_files(folder: Path, base: Path, out: Path) -> bool:
    """Write the base's files with the adapters folded in; whether weights are rounded to 16 bits in them."""
    left, rounded = deltas(folder), False
    values = load_file(folder / VALUE_FILE) if (folder / VALUE_FILE).is_file() and _shares_trunk(folder) else {}
    for path in weight_files(base):
        state = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                weight = file.get_tensor(name)
                if (known := canonical_key(name)) in left:
                    rounded |= weight.element_size() < 4
                    weight = folded(folder, known, weight, left.pop(known))
                state[name] = values.get(name, weight)
            metadata = file.metadata()
        save_file(state, out / path.name, metadata)
    if left:
        raise CheckpointError(f"{folder} adapts weights that {base} does not have: {', '.join(sorted(left)[:6])}")
    return rounded


def _shares_trunk(folder: Path) -> bool:
    """Whether the saved value head reads the actor's trunk: then it still fits the merged one."""
    return read_config(folder).critic == "shared"


def compare(folder: Path, other: Path, *, floor: float) -> Comparison:
    """Log-probabilities of fixed actions by the adapters in `folder`, by the whole weights in `other`, by the base.

    Args:
        folder: with adapters.
        other: the merged checkpoint.
        floor: mean difference that rounding explains, nats.
    """
    saved, base = read_config(folder), adapters.base_of(folder)
    config = saved
    if saved.lora is not None:
        config = saved.model_copy(update={"lora": saved.lora.model_copy(update={"base": "plain"})})
    whole = {"lora": None, "critic": read_config(base).critic if not is_official(base) else "shared", "dataset": None}
    ours, tokens = _scores(config)
    theirs, others = _scores(config.model_copy(update=whole | {"checkpoint": other}))
    before, _ = _scores(config.model_copy(update=whole | {"checkpoint": base}))
    effect = (ours - before).abs().mean().item()
    trained = (_scores(saved)[0] - theirs).abs().mean().item() if saved.four_bit else None
    return Comparison(
        difference=(ours - theirs).abs().mean().item(),
        effect=effect,
        tolerance=floor + 0.1 * effect,
        same_tokens=(tokens == others).float().mean().item(),
        trained=trained,
    )


@torch.no_grad()
def _scores(config: OpenVLAConfig) -> tuple[Float[Tensor, "B A V"], Tensor]:
    """Log-probabilities at every action position after fixed tokens, and the greedy tokens, of random frames."""
    policy = OpenVLAPolicy(config)
    rng = np.random.default_rng(0)
    size = policy.config.image_size
    images = rng.integers(0, 256, (_ROWS, size, size, 3), dtype=np.uint8)
    ids = rng.integers(0, 256, (_ROWS, policy.num_action_tokens)) + policy.first_action_id
    inputs = policy.encode(Observation(images=images, instructions=("pick up the red block",) * _ROWS))
    logits, _ = policy.action_logits(inputs, torch.from_numpy(ids).to(policy.device))
    return logits.log_softmax(-1).cpu(), policy.act(inputs).action_ids.cpu()
