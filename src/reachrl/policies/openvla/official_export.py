"""Whole weights that were trained here, written in OpenVLA's official layout."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from reachrl.config.policy import PrismaticConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.errors import ConfigError
from reachrl.policies.openvla.export import copy_surroundings
from reachrl.policies.openvla.family import family_of
from reachrl.policies.openvla.names import HEAD, canonical_key
from reachrl.policies.openvla.official import is_dead, is_official, ties_embeddings
from reachrl.policies.openvla.storage import (
    NOT_OFFICIAL,
    PIXEL_STATISTICS,
    origin_of,
    read_config,
)
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.saved import CONFIG_FILE, compare_architectures, write_new
from reachrl.policies.storage.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    check_shapes,
    read_json,
    read_shapes,
    weight_files,
    write_json,
)
from reachrl.run.manifest import verify_if_sealed

_CRITIC = ("value_head.", "critic.")


def export_official(folder: Path, out: Path, *, base: Path | None = None) -> Path:
    """Write a policy without adapters as an official checkpoint: its weights, the rest of what they began as.

    From the base come the configuration, the other files and the weights that no forward pass reads; the trained
    weights keep the type they are stored in. The critic is left out: the official layout has none.

    Args:
        folder: a policy with whole weights, written by ReachRL.
        out: the new folder.
        base: an official checkpoint of the same architecture, a folder or `owner/name`; without it the one that the
            policy was begun from.

    Returns:
        The base's folder.

    Raises:
        ConfigError: `folder` is official already, has towers that the layout does not know, or no base is known; or
            `out` exists.
        CheckpointError: a file is missing or damaged, or the base has another architecture.
        StorageError: `out` cannot be written.
    """
    if is_official(folder):
        raise ConfigError(f"{folder} is in the official layout already; copy it")
    verify_if_sealed(folder)
    config = read_config(folder)
    if not all(isinstance(tower, ViTTowerConfig) for tower in config.towers):
        raise ConfigError(
            f"{folder} has convolutional towers (policy.towers), which the official layout does not know; it holds "
            "vision transformers by their names in timm"
        )
    origin = base or origin_of(folder, folder)
    if origin is None:
        raise ConfigError(
            f"{folder} does not say which official checkpoint its weights began as; the official layout names vision "
            "towers that only such a checkpoint states. Name one of the same architecture with --base"
        )
    whole = locate(origin)
    _check_base(config, folder, whole)

    def fill(aside: Path) -> None:
        copy_surroundings(folder, whole, aside)
        _write_config(config, whole, aside)
        _write_weights(config, folder, whole, aside)
        family_of(config).write_companions(folder, whole, aside)

    write_new(out, fill)
    return whole


def _check_base(config: PrismaticConfig, folder: Path, base: Path) -> None:
    if not is_official(base):
        raise ConfigError(f"{base} was written by ReachRL; name a checkpoint in the official layout by --base")
    heads = [tower.num_heads for tower in config.towers if isinstance(tower, ViTTowerConfig)]
    stored = read_config(base, heads, family=family_of(config))
    ignored = NOT_OFFICIAL
    if set(PIXEL_STATISTICS) <= stored.model_fields_set:
        ignored = ignored - set(PIXEL_STATISTICS)
    compare_architectures(stored.architecture(), config.architecture(), base, set(ignored) | {"lora"})
    check_shapes(
        {key: shape for key, shape in read_shapes(folder, canonical_key).items() if not key.startswith(_apart(config))},
        read_shapes(base, canonical_key),
        base,
        skipped=lambda key: is_dead(key, config),
        optional=lambda key: key == HEAD and ties_embeddings(base),
    )


def _apart(config: PrismaticConfig) -> tuple[str, ...]:
    """How names of weights begin that the official layout does not keep among the others."""
    return (*_CRITIC, *family_of(config).companions)


def _write_config(config: PrismaticConfig, base: Path, out: Path) -> None:
    raw: dict[str, Any] = read_json(out / CONFIG_FILE) | {"torch_dtype": config.dtype}
    if ties_embeddings(base):  # trained as two matrices
        raw["text_config"] |= {"tie_word_embeddings": False}
    write_json(out / CONFIG_FILE, raw)


def _write_weights(config: PrismaticConfig, folder: Path, base: Path, out: Path) -> None:
    """Fill the base's files, one in memory at a time, with our weights under official names."""
    places: dict[str, str] = {}
    size = 0
    files = weight_files(base)
    with safe_open(folder / SINGLE_FILE, framework="pt") as ours:
        left = {key for key in ours.keys() if not key.startswith(_apart(config))}  # noqa: SIM118  (not a dictionary)
        for path in files:
            state = {}
            with safe_open(path, framework="pt") as theirs:
                for key in theirs.keys():  # noqa: SIM118
                    name = canonical_key(key)
                    state[name] = theirs.get_tensor(key) if is_dead(name, config) else ours.get_tensor(name)
            left -= state.keys()
            if path == files[-1]:  # a head that the base does not store apart from its embedding
                state |= {name: ours.get_tensor(name) for name in left}
            save_file(state, out / path.name, {"format": "pt"})
            places |= dict.fromkeys(state, path.name)
            size += sum(tensor.nbytes for tensor in state.values())
    if len(files) > 1:
        weight_map = dict(sorted(places.items()))
        write_json(out / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
