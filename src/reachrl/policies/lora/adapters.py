"""Low-rank adapters on a frozen base: added by peft, kept in peft's files."""

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reachrl.config.policy import LoRAConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.llama import Contexts
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.weights import check_shapes, read_json, weight_files
from reachrl.run.fingerprint import fingerprint, is_of
from reachrl.run.stored_weights import check_finite

ACTOR, CRITIC = "default", "critic"  # peft's names of the two sets
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CRITIC_FOLDER = "critic"
VALUE_FILE = "value_head.safetensors"  # beside adapters of ours; other tools have none
_BASE_FILE = "base.json"
PREFIX = "base_model.model."
_TARGETS = {
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "projector": ("projector.fc1", "projector.fc2", "projector.fc3"),
    "vision": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}


def add_adapters(policy: nn.Module, config: LoRAConfig, *, critic: bool) -> None:
    """Freeze `policy` and put trainable float32 adapters beside its linear maps; they change nothing yet.

    Args:
        policy: with the official module names.
        config: sizes and places.
        critic: whether a second set is added, for the language model and the projector only.

    Raises:
        ConfigError: a part of the policy has no linear map to adapt.
    """
    for part in config.parts:
        if not any(name.endswith(_TARGETS[part]) for name, _ in policy.named_modules()):
            raise ConfigError(f"policy.lora.parts: {part!r} has no linear maps to adapt in this policy; leave it out")
    policy.requires_grad_(False)
    policy.is_loaded_in_4bit = config.base == "nf4"  # pyright: ignore  (peft asks: its class for 4-bit maps)
    with warnings.catch_warnings():  # peft wonders at a second set
        warnings.simplefilter("ignore")
        for adapter in sets(critic):
            inject_adapter_in_model(peft_config(config, adapter), policy, adapter)
    for name, parameter in policy.named_parameters():
        adapts = ".lora_" in name
        parameter.requires_grad_(adapts or name.startswith("value_head."))
        if adapts:
            parameter.data = parameter.data.float()
    for layer in _layers(policy):
        layer._active_adapter = [ACTOR]
    policy.train(policy.training)  # the new modules too: dropout must not act in a policy that is not being trained


def sets(critic: bool) -> tuple[str, ...]:
    """Peft's names of the sets that there are."""
    return (ACTOR, CRITIC) if critic else (ACTOR,)


def peft_config(config: LoRAConfig, adapter: str) -> LoraConfig:
    """What peft is told of one set."""
    # The towers belong to the actor.
    parts = [part for part in config.parts if adapter == ACTOR or part != "vision"]
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (peft divides it; a fraction is fine)
        lora_dropout=config.dropout,
        target_modules=[target for part in parts for target in _TARGETS[part]],
        bias="none",
    )


def _layers(policy: nn.Module) -> list[LoraLayer]:
    return [module for module in policy.modules() if isinstance(module, LoraLayer)]


def active(policy: nn.Module, adapter: str) -> AbstractContextManager:
    """Compute with the adapters named `adapter` in place of the others."""
    return _active(_layers(policy), adapter)


@contextmanager
def _active(layers: list[LoraLayer], adapter: str) -> Iterator[None]:
    # Not peft's `set_adapter`: that would also say which of them may be trained.
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name


def recomputing(policy: nn.Module) -> Contexts:
    """Makes the contexts of a layer's forward pass and of its repetition: both use the adapters that are active now."""
    layers = _layers(policy)
    adapter = layers[0]._active_adapter[0] if layers else ACTOR
    return lambda: (nullcontext(), _active(layers, adapter))


def parameters(policy: nn.Module, adapter: str, prefixes: tuple[str, ...]) -> list[nn.Parameter]:
    """The matrices of one set in the modules whose names begin with one of `prefixes`."""
    return [p for name, p in policy.named_parameters() if f".{adapter}." in name and name.startswith(prefixes)]


def tensors(policy: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The matrices of one set under the names of peft's files."""
    return {
        PREFIX + name.replace(f".{adapter}.", "."): parameter.detach()
        for name, parameter in policy.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }


@torch.no_grad()
def copy_set(policy: nn.Module, source: str, target: str) -> None:
    """Give the set `target` the matrices that `source` has in the same places."""
    origin = tensors(policy, source)
    for key, tensor in tensors(policy, target).items():
        tensor.copy_(origin[key])


# --- peft's files ------------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds adapters rather than whole weights."""
    return (folder / CONFIG_FILE).is_file()


def base_name(folder: Path) -> Path:
    """What the adapters in `folder` belong on, as they say it: a folder, or `owner/name` on the hub.

    Raises:
        CheckpointError: they do not say.
    """
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / CONFIG_FILE}: base_model_name_or_path is empty; name the base there")
    if not isinstance(base, str):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r}, expected the base's folder or owner/name; "
            "name the base there"
        )
    return Path(base)


def base_of(folder: Path) -> Path:
    """The folder of the weights that the adapters in `folder` belong on.

    Raises:
        CheckpointError: they do not say, or the base is not there or holds adapters itself.
    """
    try:
        base = locate(base_name(folder))
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapters in {folder}: {error}. If it has moved, write its place into "
            f"base_model_name_or_path of {folder / CONFIG_FILE}"
        ) from error
    if is_adapter(base):
        raise CheckpointError(
            f"the base of the adapters in {folder} is {base}, which holds adapters itself; write the folder of whole "
            f"weights into base_model_name_or_path of {folder / CONFIG_FILE}. Adapters become whole weights by  "
            f"reachrl export {base} --merge --out MERGED"
        )
    return base


def place(folder: Path, adapter: str) -> Path:
    """Where in a saved policy one set lies."""
    return folder if adapter == ACTOR else folder / CRITIC_FOLDER


def save(policy: nn.Module, config: LoRAConfig, folder: Path, *, base: Path, critic: bool) -> None:
    """Write both sets as standard peft adapters into an existing folder, the critic's in a folder of its own.

    Args:
        policy: with adapters.
        config: what they were made with.
        folder: where to.
        base: the weights the adapters are on, a folder or `owner/name`; their fingerprint is kept.
        critic: whether there is a second set.
    """
    for name in sets(critic):
        own = place(folder, name)
        own.mkdir(exist_ok=True)
        described = peft_config(config, name)
        described.base_model_name_or_path = str(base)
        described.inference_mode = True
        described.save_pretrained(str(own))
        state = {key: tensor.cpu().contiguous() for key, tensor in tensors(policy, name).items()}
        save_file(state, own / WEIGHTS_FILE, metadata={"format": "pt"})
    content = {"fingerprint": fingerprint(weight_files(locate(base)))}
    (folder / _BASE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def check_base(folder: Path, weights: Path) -> None:
    """Refuse adapters on other weights than they were trained on; foreign adapters do not say.

    Raises:
        CheckpointError: the base has changed since the adapters were saved.
    """
    if not (folder / _BASE_FILE).is_file():
        return
    if not is_of(str(read_json(folder / _BASE_FILE).get("fingerprint")), weight_files(weights)):
        raise CheckpointError(
            f"the adapters in {folder} were trained on other weights than {weights} holds now. Put the base back, or "
            f"write its place into base_model_name_or_path of {folder / CONFIG_FILE}"
        )


@torch.no_grad()
def load(policy: nn.Module, folder: Path, *, critic: bool) -> None:
    """Copy saved matrices into the policy's adapters.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters are of another size.
    """
    for name in sets(critic):
        where = place(folder, name)
        stored, own = read_adapter(where), tensors(policy, name)
        check_shapes(
            {key: tuple(tensor.shape) for key, tensor in own.items()},
            {key: tuple(tensor.shape) for key, tensor in stored.items()},
            where,
        )
        for key, tensor in own.items():
            tensor.copy_(stored[key])


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """All matrices in a peft folder, by their names there.

    Raises:
        CheckpointError: the file is missing or damaged, or holds numbers that are not finite.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; adapters are read from safetensors files only") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    for name, tensor in stored.items():
        check_finite(tensor, name, path)
    return stored
