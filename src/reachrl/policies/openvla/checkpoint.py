"""A policy on disk: weights, configuration, tokenizer and action statistics, complete or absent."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reachrl.config.policy import OpenVLAConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.lora import adapters, four_bit
from reachrl.policies.lora.adapter_files import check_agreement
from reachrl.policies.lora.adapters import VALUE_FILE
from reachrl.policies.lora.merging import merge_into
from reachrl.policies.openvla.official import (
    CONFIG_FILE,
    HEAD,
    STATS_FILE,
    dataset_of,
    is_dead,
    is_official,
    norm_stats,
    official_config,
    official_stats,
    problems_of,
    ties_embeddings,
)
from reachrl.policies.openvla.oft import refuse_oft
from reachrl.policies.openvla.tokenizer import PromptTokenizer
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.weights import SINGLE_FILE, check_shapes, copy_weights, read_json, read_shapes
from reachrl.run.atomic import replace_folder_atomic
from reachrl.run.manifest import seal, verify_if_sealed
from reachrl.run.stored_weights import check_finite

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from reachrl.policies.openvla.policy import OpenVLAPolicy

TOKENIZER_FILE = "tokenizer.json"
OUR_STATS = "reachrl"
PIXEL_STATISTICS = ("image_mean", "image_std")
# The critic is ours: an official checkpoint has none and its configuration does not mention it. Its pixel statistics
# are taken over, not compared.
NOT_OFFICIAL = {"critic", "value_hidden_size", "num_action_tokens", *PIXEL_STATISTICS}
_VALUE = "value_head."


def save(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Write the policy aside and rename it into place; an earlier one in `folder` stays until then.

    Raises:
        StorageError: the disk is full or the folder cannot be written; what was there before is intact.
    """

    def fill(aside: Path) -> None:
        _write(policy, aside)
        seal(aside)

    replace_folder_atomic(Path(folder), fill)


def _write(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Whole weights; or, on a frozen base, the adapters and the value head alone."""
    config = policy.config
    # What the weights began as, for an export in its layout; reading puts the folder itself in its place.
    update: dict[str, Path | None] = {"checkpoint": policy.origin}
    if config.lora is None:
        _save_state(policy.state_dict(), folder / SINGLE_FILE)
    else:
        assert policy.base is not None
        update["checkpoint"] = policy.base
        adapters.save(policy, config.lora, folder, base=policy.base, critic=config.critic == "adapter")
        _save_state(policy.value_head.state_dict(prefix=_VALUE), folder / VALUE_FILE)
    text = config.model_copy(update=update).model_dump_json(indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    stats = policy.action_stats
    action = {"q01": stats.q01.tolist(), "q99": stats.q99.tolist(), "mask": stats.mask.tolist()}
    (folder / STATS_FILE).write_text(json.dumps({OUR_STATS: {"action": action}}, indent=2) + "\n", encoding="utf-8")
    if policy.tokenizer is not None:
        policy.tokenizer.save(folder / TOKENIZER_FILE)


def _save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(weights, path, metadata={"format": "pt"})


def read_config(folder: Path, tower_heads: Sequence[int] | None = None, dataset: str | None = None) -> OpenVLAConfig:
    """The configuration of a checkpoint, official or ours, with `checkpoint` set to what was given.

    Args:
        folder: on this machine, or `owner/name` on the hub.
        tower_heads: see `official_config`.
        dataset: see `official_config`.

    Raises:
        CheckpointError: a file is missing, damaged, or of a policy we cannot build.
    """
    given, folder = Path(folder), locate(Path(folder))
    if adapters.is_adapter(folder) and not (folder / CONFIG_FILE).is_file():  # of another tool: only its base knows
        refuse_oft(folder)
        config = read_config(adapters.base_of(folder), tower_heads, dataset)
    elif is_official(folder):
        refuse_oft(folder)
        config = official_config(folder, tower_heads, dataset)
    else:
        try:
            config = OpenVLAConfig.model_validate(read_json(folder / CONFIG_FILE))
        except ValidationError as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} describes no policy of this version: {problems_of(error)}"
            ) from error
        if adapters.is_adapter(folder):
            check_agreement(folder, config)
    return config.model_copy(update={"checkpoint": given})


def load_into(policy: "OpenVLAPolicy", folder: Path, device: torch.device) -> None:
    """Fill a policy that was built without storage (on the meta device) from `folder`, straight onto `device`.

    Whole weights are read as they are; adapters are read with their base. A policy configured without adapters gets
    them folded into its weights; one configured with adapters on whole weights gets fresh ones.

    Raises:
        CheckpointError: a file is missing or truncated, or the folder holds another architecture.
    """
    given, config = Path(folder), policy.config
    folder = locate(given)
    verify_if_sealed(folder)
    _check_architecture(policy, folder)
    whole = adapters.base_name(folder) if adapters.is_adapter(folder) else given
    policy.origin = origin_of(whole)
    if not adapters.is_adapter(folder):
        _load_whole(policy, folder, device)
        _load_tokenizer(policy, folder)
        _load_stats(policy, folder)
        if config.lora is not None:
            policy.add_adapters(given.resolve() if given.is_dir() else given)
        return
    base, ours = adapters.base_of(folder), (folder / VALUE_FILE).is_file()
    verify_if_sealed(base)
    _load_whole(policy, base, device)
    adapters.check_base(folder, base)
    if config.lora is None:
        merge_into(policy, folder, skipped=lambda key: is_dead(key, config))
    elif ours:
        policy.add_adapters(adapters.base_name(folder))
        adapters.load(policy, folder, critic=config.critic == "adapter")
    else:
        raise CheckpointError(
            f"{folder} holds adapters of another tool, and policy.lora would put new ones on top: fold them in first "
            f"with  reachrl export {folder} --merge --out MERGED  and set policy.checkpoint=MERGED"
        )
    if ours and read_config(folder).critic == config.critic:
        _load_value_head(policy, folder)
    _load_tokenizer(policy, folder)
    _load_tokenizer(policy, base)  # where the adapters came without one
    _load_stats(policy, folder)


def origin_of(whole: Path) -> Path | None:
    """The official checkpoint that whole weights, official or ours, began as; None where they began as random ones."""
    folder = locate(whole)
    if is_official(folder):
        return folder.resolve() if whole.is_dir() else whole
    origin = read_json(folder / CONFIG_FILE).get("checkpoint")
    return None if origin is None else Path(str(origin))


def restore(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Read what `save` wrote back into a policy of the same architecture, without building a second one.

    Raises:
        CheckpointError: a file is missing or truncated, or the folder holds another architecture.
    """
    folder, config = Path(folder), policy.config
    verify_if_sealed(folder)
    stored = type(policy).architecture_of(read_config(folder))
    compare_architectures(stored, policy.architecture(), folder, set())
    if config.lora is None:
        own = {key: tuple(value.shape) for key, value in policy.state_dict().items()}
        check_shapes(own, read_shapes(folder), folder)
        copy_weights(policy, folder)
    else:
        adapters.check_base(folder, adapters.base_of(folder))
        adapters.load(policy, folder, critic=config.critic == "adapter")
        _load_value_head(policy, folder)
    _load_tokenizer(policy, folder)
    _load_stats(policy, folder)


def _check_architecture(policy: "OpenVLAPolicy", folder: Path) -> None:
    config = policy.config
    heads = [tower.num_heads if isinstance(tower, ViTTowerConfig) else 1 for tower in config.towers]
    stored = read_config(folder, heads)
    whole = adapters.base_of(folder) if adapters.is_adapter(folder) else folder
    ignored = set(NOT_OFFICIAL) if is_official(whole) else set()
    if stored.resize != config.resize:
        logger.warning(
            "%s was trained on frames made square by policy.resize=%s, configured is %s",
            folder, stored.resize, config.resize,
        )  # fmt: skip
    if stored.lora is None or config.lora is None:  # adapters begin as nothing, and can be folded in
        ignored |= {"lora"}
    wanted = "plain" if config.lora is None else config.lora.base
    if stored.lora is not None and stored.lora.base != wanted:
        ignored |= {"lora.base"}  # the same matrices, beside weights that are not quite the same
        logger.warning(
            "the adapters in %s were trained with policy.lora.base=%s, and are put on a base held as %s: the policy is "
            "not exactly the one that was trained", folder, stored.lora.base, wanted,
        )  # fmt: skip
    if "adapter" in (stored.critic, config.critic):
        ignored |= {"critic"}
    compare_architectures(type(policy).architecture_of(stored), policy.architecture(), folder, ignored)
    if is_official(whole) and set(PIXEL_STATISTICS) <= stored.model_fields_set:
        _adopt_pixel_statistics(policy, stored, folder)


def _adopt_pixel_statistics(policy: "OpenVLAPolicy", stored: OpenVLAConfig, folder: Path) -> None:
    """Normalise frames by the statistics the weights were trained with, whatever is configured."""
    config = policy.config
    trained = {name: getattr(stored, name) for name in PIXEL_STATISTICS}
    if all(getattr(config, name) == value for name, value in trained.items()):
        return
    logger.warning(
        "%s was trained on pixels normalised by %s: these are used in place of those configured, %s",
        folder, trained, {name: getattr(config, name) for name in trained},
    )  # fmt: skip
    policy.config = config.model_copy(update=trained)


def _load_whole(policy: "OpenVLAPolicy", folder: Path, device: torch.device) -> None:
    """Give the policy storage and the weights of a folder without adapters."""
    official, config = is_official(folder), policy.config
    if official:
        refuse_oft(folder)
    tied = official and ties_embeddings(folder)
    absent = (_VALUE, "critic.", *((HEAD,) if tied else ()))
    check_shapes(
        {key: tuple(value.shape) for key, value in policy.state_dict().items()},
        read_shapes(folder),
        folder,
        skipped=(lambda key: is_dead(key, config)) if official else (lambda key: False),
        optional=(lambda key: key.startswith(absent)) if official else (lambda key: False),
    )
    take = {}
    if config.four_bit:  # before there is storage: the whole never lies in memory
        take = four_bit.make_room(policy, device, getattr(torch, config.dtype), policy.compute_dtype)
    policy.to_empty(device=device)
    for module in policy.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.__init__(module.config)  # its frequencies are computed, not stored
            module.to(device)
    copy_weights(policy, folder, take)
    if tied:
        _tie(policy, folder)
    if official:
        policy.value_head.reset()
        policy.reset_critic()


@torch.no_grad()
def _tie(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Give the head the rows of the embedding, which it shares by the configuration; from here on they are two."""
    words, head = policy.language_model.model.embed_tokens.weight, policy.language_model.lm_head.weight
    if HEAD not in read_shapes(folder):
        head.copy_(words)
    elif not torch.equal(head, words):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: text_config.tie_word_embeddings is true, but the weights hold a {HEAD} that is "
            "not the embedding; set it to false if the head was trained by itself"
        )


def _load_value_head(policy: "OpenVLAPolicy", folder: Path) -> None:
    try:
        state = load_file(folder / VALUE_FILE)
        for name, tensor in state.items():
            check_finite(tensor, name, folder / VALUE_FILE)
        policy.value_head.load_state_dict({key.removeprefix(_VALUE): tensor for key, tensor in state.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / VALUE_FILE} is missing, truncated or of another size: {error}") from error


def _load_stats(policy: "OpenVLAPolicy", folder: Path) -> None:
    """The action statistics that hold in a folder; several sets without a name are left for later."""
    adapter = adapters.is_adapter(folder)
    ours = (folder / VALUE_FILE).is_file() if adapter else not is_official(folder)
    if adapter and not ours and not (folder / STATS_FILE).is_file():
        _load_stats(policy, adapters.base_of(folder))
        return
    name = OUR_STATS if ours else dataset_of(folder, policy.config.dataset)
    if name is None:
        policy.leave_action_stats_open(tuple(sorted(norm_stats(folder))))
        return
    stats = _read_stats(folder) if ours else official_stats(folder, name)
    policy.set_action_stats(stats.q01, stats.q99, stats.mask)


def _load_tokenizer(policy: "OpenVLAPolicy", folder: Path) -> None:
    if policy.tokenizer is None and (folder / TOKENIZER_FILE).is_file():
        policy.tokenizer = PromptTokenizer.from_file(folder / TOKENIZER_FILE, policy.config.language_model)


def _read_stats(folder: Path) -> ActionStats:
    try:
        action = read_json(folder / STATS_FILE)[OUR_STATS]["action"]
        return ActionStats.create(action["q01"], action["q99"], action["mask"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATS_FILE} holds no action statistics: {error!r}") from error


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for key, item in items for k, v in _flatten(item, f"{path}.{key}" if path else str(key)).items()}


def compare_architectures(stored: dict[str, Any], expected: dict[str, Any], folder: Path, ignored: set[str]) -> None:
    """Compare two architectures field by field.

    Raises:
        CheckpointError: naming every field that differs.
    """
    have, want = (
        {key: value for key, value in _flatten(all_of).items() if not {key, key.partition(".")[0]} & ignored}
        for all_of in (stored, expected)
    )
    different = [
        f"{key} (checkpoint {have.get(key)!r}, configured {want.get(key)!r})"
        for key in sorted(have.keys() | want.keys())
        if have.get(key) != want.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{folder} holds a policy of another architecture: {'; '.join(different[:12])}. "
            "Use the policy section the checkpoint was trained with"
        )
