"""A policy on disk, read as a value before it is built."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from reachrl.config.policy import PrismaticConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.lora.deltas import check_agreement
from reachrl.policies.lora.files import VALUE_FILE, base_name, base_of, beside, is_adapter, places
from reachrl.policies.openvla.family import OPENVLA, Family, check_kind, stored_section
from reachrl.policies.openvla.names import adapter_sets
from reachrl.policies.openvla.official import is_official, official_config, problems_of
from reachrl.policies.openvla.statement import FRAMES
from reachrl.policies.openvla.statistics import dataset_of, norm_stats
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.saved import (
    CONFIG_FILE,
    STATS_FILE,
    TOKENIZER_FILE,
    SavedPolicy,
    compare_architectures,
    read_stats,
)
from reachrl.policies.storage.weights import read_json
from reachrl.policies.trained_on import TrainedOn
from reachrl.run.manifest import verify_if_sealed

logger = logging.getLogger(__name__)

PIXEL_STATISTICS = ("image_mean", "image_std")
# The critic is ours: an official checkpoint has none and its configuration does not mention it. Its pixel statistics
# are taken over, not compared.
NOT_OFFICIAL = {"critic", "value_hidden_size", "num_action_tokens", *PIXEL_STATISTICS}


def read(
    folder: Path,
    *,
    tower_heads: Sequence[int] | None = None,
    dataset: str | None = None,
    family: Family = OPENVLA,
) -> SavedPolicy[PrismaticConfig]:
    """Everything of a policy but its weights, official or ours, whole or adapters.

    Args:
        folder: on this machine, or `owner/name` on the hub.
        tower_heads: see `official_config`.
        dataset: the action statistics of an official checkpoint to use, when it holds several.
        family: what it is read as.

    Raises:
        CheckpointError: a file is missing, damaged, altered after it was written, or of a policy we cannot build.
    """
    given, folder = Path(folder), locate(Path(folder))
    verify_if_sealed(folder)
    config = _config(folder, tower_heads, dataset, family).model_copy(update={"checkpoint": given})
    family = family.of(config)
    adapter = is_adapter(folder)
    whole = base_of(folder) if adapter else folder
    base = base_name(folder) if adapter else given.resolve() if given.is_dir() else given
    return SavedPolicy(
        folder=folder,
        config=config,
        whole=whole,
        beside=places(folder) if adapter else (),
        is_adapter=adapter,
        ours=_is_ours(folder),
        stats=_stats(folder, dataset, family),
        stats_name=config.dataset if _is_ours(folder) else dataset_of(_with_stats(folder), dataset),
        state_stats=_state_stats(folder, dataset, family),
        trained_on=TrainedOn.read(folder),
        tokenizer=beside(folder, TOKENIZER_FILE) or beside(whole, TOKENIZER_FILE),
        base=base,
        origin=origin_of(base, whole),
    )


def read_config(
    folder: Path,
    tower_heads: Sequence[int] | None = None,
    family: Family | None = None,
) -> PrismaticConfig:
    """The configuration of a checkpoint alone, official or ours, with `checkpoint` set to what was given.

    Args:
        folder: on this machine, or `owner/name` on the hub.
        tower_heads: see `official_config`.
        family: what it is read as; None: a policy of ours as what it says, others as plain OpenVLA.

    Raises:
        CheckpointError: a file is missing, damaged, or of a policy we cannot build.
    """
    config = _config(locate(Path(folder)), tower_heads, None, family)
    return config.model_copy(update={"checkpoint": Path(folder)})


def _config(
    folder: Path,
    tower_heads: Sequence[int] | None,
    dataset: str | None,
    family: Family | None,
    around: Sequence[Path] = (),
) -> PrismaticConfig:
    if is_adapter(folder) and not (folder / CONFIG_FILE).is_file():  # of another tool: only its base knows
        (family or OPENVLA).check(folder)
        return _config(base_of(folder), tower_heads, dataset, family, places(folder))
    if family is not None:
        check_kind(folder, family.section)
    if is_official(folder):
        known = (family or OPENVLA).informed(folder)
        known.check(folder, around)
        return official_config(folder, tower_heads, dataset, section=known.section, given=known.given)
    try:
        raw = read_json(folder / CONFIG_FILE)
        config = (family.section if family else stored_section(raw)).model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes no policy of this version: {problems_of(error)}"
        ) from error
    if is_adapter(folder):
        check_agreement(folder, adapter_sets(config))
    return config


def _is_ours(folder: Path) -> bool:
    return (folder / VALUE_FILE).is_file() if is_adapter(folder) else not is_official(folder)


def _stats(folder: Path, dataset: str | None, family: Family) -> ActionStats | tuple[str, ...]:
    """The action statistics that hold in a folder; several sets without a name are left for later."""
    folder = _with_stats(folder)
    if _is_ours(folder):
        return read_stats(folder)
    name = dataset_of(folder, dataset)
    return tuple(sorted(norm_stats(folder))) if name is None else family.action_stats(folder, name)


def _state_stats(folder: Path, dataset: str | None, family: Family) -> ActionStats | None:
    """The statistics of the robot's state in the same set, where the policy sees it."""
    folder = _with_stats(folder)
    if _is_ours(folder):
        return read_stats(folder, "proprio") if family.sees_state else None
    name = dataset_of(folder, dataset)
    return None if name is None else family.state_stats(folder, name)


def _with_stats(folder: Path) -> Path:
    """The folder itself, or the base of another tool's adapters that came without statistics."""
    if is_adapter(folder) and not _is_ours(folder) and beside(folder, STATS_FILE) is None:
        return _with_stats(base_of(folder))
    return folder


def origin_of(name: Path, whole: Path) -> Path | None:
    """The official checkpoint that whole weights, official or ours, began as; None where they began as random ones.

    Args:
        name: what the weights were asked for by: a folder, or `owner/name` on the hub.
        whole: their folder on this machine.
    """
    if is_official(whole):
        return whole.resolve() if name.is_dir() else name
    origin = read_json(whole / CONFIG_FILE).get("checkpoint")
    return None if origin is None else Path(str(origin))


# --- what is stored beside what is configured --------------------------------------------------------------------


def read_for(config: PrismaticConfig, family: Family = OPENVLA) -> SavedPolicy[PrismaticConfig]:
    """What `config.checkpoint` names, which no file says everything of.

    Args:
        config: with a checkpoint.
        family: what it is read as.

    Raises:
        CheckpointError: see `read`.
    """
    assert config.checkpoint is not None
    heads = [tower.num_heads if isinstance(tower, ViTTowerConfig) else 1 for tower in config.towers]
    return read(config.checkpoint, tower_heads=heads, dataset=config.dataset, family=family)


def agreed(config: PrismaticConfig, saved: SavedPolicy[PrismaticConfig]) -> PrismaticConfig:
    """The configuration to build a policy by: as configured, with frames normalised as the weights were trained.

    Raises:
        CheckpointError: the folder holds another architecture than is configured.
    """
    stored, folder, official = saved.config, saved.folder, is_official(saved.whole)
    ignored = set(NOT_OFFICIAL) if official else set()
    for key in ("resize", *FRAMES):
        if key in stored.model_fields_set and (trained := getattr(stored, key)) != getattr(config, key):
            logger.warning(
                "%s was trained on frames made by policy.%s=%s, configured is %s",
                folder, key, str(trained).lower(), str(getattr(config, key)).lower(),
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
    compare_architectures(stored.architecture(), config.architecture(), folder, ignored)
    if official and set(PIXEL_STATISTICS) <= stored.model_fields_set:
        return _with_pixel_statistics(config, stored, folder)
    return config


def _with_pixel_statistics(config: PrismaticConfig, stored: PrismaticConfig, folder: Path) -> PrismaticConfig:
    trained = {name: getattr(stored, name) for name in PIXEL_STATISTICS}
    if all(getattr(config, name) == value for name, value in trained.items()):
        return config
    logger.warning(
        "%s was trained on pixels normalised by %s: these are used in place of those configured, %s",
        folder, trained, {name: getattr(config, name) for name in trained},
    )  # fmt: skip
    return config.model_copy(update=trained)
