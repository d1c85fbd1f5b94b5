"""Adapters as others use them: peft's two files alone, or folded into a checkpoint that stands on its own."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reachrl.config.policy import NUM_ACTION_BINS
from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.lora import adapters, peft_merge
from reachrl.policies.lora.adapter_files import deltas
from reachrl.policies.lora.adapters import VALUE_FILE
from reachrl.policies.lora.merging import Effect, folded
from reachrl.policies.openvla.checkpoint import (
    CONFIG_FILE,
    OUR_STATS,
    STATS_FILE,
    TOKENIZER_FILE,
    read_config,
)
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.official import is_dead, is_official, norm_stats
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import normalise_pixels
from reachrl.policies.storage.weights import read_json, weight_files
from reachrl.run.atomic import replace_folder_atomic
from reachrl.run.manifest import MANIFEST, seal, verify_if_sealed

T = TypeVar("T")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ROWS = 4  # frames the merged policy is compared on
_EXACT = 1e-4  # mean difference, in nats, that float32 sums in another order explain
_TIES = 0.1  # share of rounding's own effect: such sums let a few weights fall on the other side


@dataclass(frozen=True, slots=True)
class Comparison:
    """A merged checkpoint against its base with the adapters put on by peft, on the same frames and action tokens.

    Both are computed in float32 on the base as stored: a merge is right or wrong whatever the adapters were trained on.
    Differences are means over log-probabilities, in nats.
    """

    difference: float  # from peft's own merge, rounded once to the types of the stored weights
    tolerance: float  # of the difference
    rounding: float  # what rounding the merged weights changes; 0 where they are stored in float32
    effect: float  # of the adapters
    same_tokens: float  # share of greedy tokens that are those of the base with adapters
    trained: float | None  # distance from the 4-bit policy that was trained; None where the base was plain


def export_adapter(folder: Path, out: Path) -> None:
    """Copy peft's two files of the actor, and nothing of ours but the manifest.

    Raises:
        ConfigError: `folder` holds no adapters, or `out` exists.
        CheckpointError: the file of the matrices is missing or damaged.
        StorageError: `out` cannot be written.
    """

    def fill(aside: Path) -> None:
        deltas(folder)  # refuses what would not act under the adapter's name
        for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
            shutil.copyfile(folder / name, aside / name)

    _write_whole(folder, out, fill)


def export_merged(folder: Path, out: Path) -> Comparison:
    """Write the base of `folder` with its adapters folded in, in the base's own layout, and compare the two.

    One file of weights is in memory at a time while writing, one policy in float32 while comparing. Adapters that were
    trained on a 4-bit base are folded into the base as it is stored: the result is near the policy that was trained,
    not equal.

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
    copy_surroundings(folder, base, out)
    comparison = compare(folder, out, _merge_files(folder, base, out))
    if not comparison.difference <= comparison.tolerance:
        raise CheckpointError(
            f"merging {folder} gives log-probabilities {comparison.difference:.3g} nats in the mean from those of "
            f"peft, more than rounding explains ({comparison.tolerance:.3g}; the adapters' own effect is "
            f"{comparison.effect:.3g}). Nothing was written; merge with peft's merge_and_unload, and report this"
        )
    return comparison


def _write_whole(folder: Path, out: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write what is made of the adapters in `folder`."""
    if not adapters.is_adapter(folder):
        raise ConfigError(
            f"{folder} holds no adapters ({adapters.CONFIG_FILE} is missing): there is nothing to merge; without "
            "--merge its weights are written in the official layout"
        )
    verify_if_sealed(folder)
    if (folder / CONFIG_FILE).is_file():
        read_config(folder)  # refuses configurations that disagree: one would be acted by, the other exported
    return write_new(out, fill)


def write_new(out: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write a folder beside `out` that takes its name at the end, or vanishes.

    Raises:
        ConfigError: `out` exists.
        StorageError: it cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")

    def fill_and_seal(aside: Path) -> T:
        result = fill(aside)
        seal(aside)
        return result

    return replace_folder_atomic(out, fill_and_seal)


def copy_surroundings(folder: Path, base: Path, out: Path) -> None:
    """Write configuration, tokenizer and statistics: the base's, but for the statistics of training."""
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.is_file() and path.name not in (*weights, MANIFEST) and path.suffix not in _PICKLES:
            shutil.copyfile(path, out / path.name)
    if (folder / TOKENIZER_FILE).is_file():
        shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    if not (folder / STATS_FILE).is_file():
        return
    stats = read_json(folder / STATS_FILE)
    if not is_official(base):  # our layout knows one set, by one name
        stats = {OUR_STATS: stats.get(OUR_STATS, next(iter(stats.values()), None))}
    elif (folder / VALUE_FILE).is_file() or not adapters.is_adapter(folder):  # ours
        stats = {read_config(folder).dataset or OUR_STATS: stats.get(OUR_STATS)}
    files = {STATS_FILE: stats}
    if is_official(base):
        files[CONFIG_FILE] = read_json(base / CONFIG_FILE) | {"norm_stats": norm_stats(base) | stats}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _merge_files(folder: Path, base: Path, out: Path) -> dict[str, torch.dtype]:
    """Write the base's files with the adapters folded in; the types of the weights that changed, by name."""
    left, kinds, effect = deltas(folder), {}, Effect(folder)
    values = load_file(folder / VALUE_FILE) if (folder / VALUE_FILE).is_file() and _shares_trunk(folder) else {}
    for path in weight_files(base):
        state = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                weight = file.get_tensor(name)
                if (known := canonical_key(name)) in left:
                    kinds[known] = weight.dtype
                    before, delta = weight, left.pop(known)
                    weight = folded(folder, known, before, delta)
                    effect.count(before, weight, delta)
                state[name] = values.get(name, weight)
            metadata = file.metadata()
        save_file(state, out / path.name, metadata)
    if left:
        raise CheckpointError(f"{folder} adapts weights that {base} does not have: {', '.join(sorted(left)[:6])}")
    effect.check()
    return kinds


def _shares_trunk(folder: Path) -> bool:
    """Whether the saved value head reads the actor's trunk: then it still fits the merged one."""
    return read_config(folder).critic == "shared"


def compare(folder: Path, other: Path, kinds: Mapping[str, torch.dtype]) -> Comparison:
    """Log-probabilities of fixed actions by the adapters in `folder`, by the whole weights in `other`, by the base.

    Args:
        folder: with adapters.
        other: the merged checkpoint.
        kinds: the types of its merged weights, by name.
    """
    base = adapters.base_of(folder)
    saved = read_config(folder).model_copy(update={"decoder": "own", "rollout_copy": False})
    trained = _scores(OpenVLAPolicy(saved))[0] if saved.four_bit else None
    critic = "shared" if is_official(base) else read_config(base).critic
    # In 16 bits the arithmetic's own noise would hide a wrong merge.
    whole = saved.model_copy(
        update={"lora": None, "dataset": None, "critic": critic, "dtype": "float32", "compute_dtype": None}
    )
    theirs, chosen = _scores(OpenVLAPolicy(whole.model_copy(update={"checkpoint": other})))
    policy = OpenVLAPolicy(whole.model_copy(update={"checkpoint": base}))
    before, _ = _scores(policy)
    peft_merge.attach(policy, folder, skipped=lambda key: is_dead(key, saved))
    exact, tokens = _scores(policy)
    expected = exact
    if any(kind.itemsize < 4 for kind in kinds.values()):
        peft_merge.fold(policy, kinds)
        expected, _ = _scores(policy)
    rounding = _apart(expected, exact)
    return Comparison(
        difference=_apart(theirs, expected),
        tolerance=_EXACT + _TIES * rounding,
        rounding=rounding,
        effect=_apart(exact, before),
        same_tokens=(chosen == tokens).float().mean().item(),
        trained=_apart(theirs, trained) if trained is not None else None,
    )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().mean().item()


@torch.no_grad()
def _scores(policy: OpenVLAPolicy) -> tuple[Float[Tensor, "B A V"], Int64[Tensor, "B A"]]:
    """Log-probabilities at every action position after fixed tokens, and the greedy tokens, of random frames."""
    rng, config, first = np.random.default_rng(0), policy.config, policy.first_action_id
    images = rng.integers(0, 256, (_ROWS, config.image_size, config.image_size, 3), dtype=np.uint8)
    # Words by number: a tokenizer may lie beside the adapters, beside the base or nowhere.
    prompts = rng.integers(0, first, (_ROWS, config.prompt_length))
    prompts[:, 0] = config.language_model.bos_token_id
    inputs = OpenVLAInputs(
        prompt_ids=torch.from_numpy(prompts).to(policy.device),
        prompt_mask=torch.ones(prompts.shape, dtype=torch.bool, device=policy.device),
        pixel_values=normalise_pixels(images, config.image_mean, config.image_std, policy.device),
    )
    ids = torch.from_numpy(rng.integers(first, first + NUM_ACTION_BINS, (_ROWS, policy.num_action_tokens)))
    logits, _ = policy.action_logits(inputs, ids.to(policy.device))
    tokens = policy.act(inputs, with_values=False).action_ids
    return logits.float().log_softmax(-1).cpu(), tokens.cpu()
