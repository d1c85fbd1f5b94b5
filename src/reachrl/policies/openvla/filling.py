"""Weights on disk into a policy that was built from what the folder says."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reachrl.config.policy import PrismaticConfig
from reachrl.errors import CheckpointError
from reachrl.policies.lora import files as lora_files
from reachrl.policies.lora import four_bit
from reachrl.policies.lora.files import VALUE_FILE
from reachrl.policies.lora.foreign import take_adapters
from reachrl.policies.lora.merging import merge_into
from reachrl.policies.openvla.names import HEAD, LAYERS, TARGETS, VALUE, adapter_sets, canonical_key
from reachrl.policies.openvla.network import PrismaticNetwork
from reachrl.policies.openvla.official import is_dead, is_official, ties_embeddings
from reachrl.policies.storage.saved import CONFIG_FILE, SavedPolicy, compare_architectures, load_head
from reachrl.policies.storage.weights import check_shapes, copy_weights, read_shapes
from reachrl.run.manifest import verify_if_sealed


def fill(policy: PrismaticNetwork, saved: SavedPolicy[PrismaticConfig], device: torch.device) -> None:
    """Read the weights into a policy that was built without storage (on the meta device), straight onto `device`.

    Whole weights are read as they are; adapters are read with their base. A policy configured without adapters gets
    them folded into its weights; one configured with adapters on whole weights gets fresh ones.

    Args:
        policy: built from `saved`.
        saved: see `storage.read`.
        device: where the weights are to live.

    Raises:
        CheckpointError: a file is missing or truncated, or the weights are of another architecture.
    """
    config, folder = policy.config, saved.folder
    if not saved.is_adapter:
        _fill_whole(policy, folder, device, ())
        if config.lora is not None:
            policy.add_adapters(saved.base)
        return
    verify_if_sealed(saved.whole)
    _fill_whole(policy, saved.whole, device, saved.beside)
    lora_files.check_base(folder, saved.whole)
    if config.lora is None:
        merge_into(policy, folder, canonical_key, skipped=lambda key: is_dead(key, config))
    elif saved.ours:
        policy.add_adapters(saved.base)
        lora_files.load(policy, folder, adapter_sets(config))
    else:
        policy.add_adapters(saved.base)
        take_adapters(policy, folder, config.lora, TARGETS, canonical_key, skipped=lambda key: is_dead(key, config))
        policy.reset_critic()
    if saved.ours and saved.config.critic == config.critic:
        load_head(policy.value_head, folder / VALUE_FILE, VALUE)


def refill(policy: PrismaticNetwork, saved: SavedPolicy[PrismaticConfig]) -> None:
    """Read the weights of a policy that was saved by one of the same architecture, adapters on the base that is here.

    Raises:
        CheckpointError: a file is missing or truncated, or the folder holds another architecture.
    """
    folder, config = saved.folder, policy.config
    compare_architectures(saved.config.architecture(), policy.architecture(), folder, set())
    if config.lora is None:
        own = {key: tuple(value.shape) for key, value in policy.state_dict().items()}
        check_shapes(own, read_shapes(folder, canonical_key), folder)
        copy_weights(policy, folder, canonical_key)
    else:
        lora_files.check_base(folder, saved.whole)
        lora_files.load(policy, folder, adapter_sets(config))
        load_head(policy.value_head, folder / VALUE_FILE, VALUE)


def _fill_whole(policy: PrismaticNetwork, folder: Path, device: torch.device, beside: Sequence[Path]) -> None:
    """Give the policy storage, the weights of a folder without adapters, and what lies beside them or in `beside`."""
    official, config = is_official(folder), policy.config
    family = policy.family(config)
    if official:
        family.check(folder, beside)
    tied = official and ties_embeddings(folder)
    absent = (VALUE, "critic.", *family.companions, *((HEAD,) if tied else ()))
    check_shapes(
        {key: tuple(value.shape) for key, value in policy.state_dict().items()},
        read_shapes(folder, canonical_key),
        folder,
        skipped=(lambda key: is_dead(key, config)) if official else (lambda key: False),
        optional=(lambda key: key.startswith(absent)) if official else (lambda key: False),
    )
    take = {}
    if config.four_bit:  # before there is storage: the whole never lies in memory
        take = four_bit.make_room(policy, LAYERS, device, getattr(torch, config.dtype), policy.compute_dtype)
    policy.to_empty(device=device)
    for module in policy.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.__init__(module.config)  # its frequencies are computed, not stored
            module.to(device)
    copy_weights(policy, folder, canonical_key, take)
    if tied:
        _tie(policy, folder)
    if official:
        policy.fill_companions([*beside, folder])
        policy.value_head.reset()
        policy.reset_critic()


@torch.no_grad()
def _tie(policy: PrismaticNetwork, folder: Path) -> None:
    """Give the head the rows of the embedding, which it shares by the configuration; from here on they are two."""
    words, head = policy.language_model.model.embed_tokens.weight, policy.language_model.lm_head.weight
    if HEAD not in read_shapes(folder, canonical_key):
        head.copy_(words)
    elif not torch.equal(head, words):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: text_config.tie_word_embeddings is true, but the weights hold a {HEAD} that is "
            "not the embedding; set it to false if the head was trained by itself"
        )
