"""Policies: new ones, saved ones, and the devices they are computed on."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from reachrl import torchrun
from reachrl.config.marks import Affects, marks
from reachrl.config.train import TrainConfig
from reachrl.errors import CheckpointError, ConfigError, ExtensionError
from reachrl.policies.base import Policy
from reachrl.policies.folders import kind_of
from reachrl.policies.storage.hub import locate
from reachrl.registry import build, check_stored, resolve
from reachrl.run.checkpoint import latest_checkpoint
from reachrl.run.cores import available_cores


def device_of(config: TrainConfig) -> torch.device:
    """The device that `config.device` stands for on this machine.

    Raises:
        ConfigError: it is not here.
    """
    return find_device(config.device)


def find_device(name: str) -> torch.device:
    """The device that a name stands for on this machine; `auto` is the first GPU if there is one.

    Raises:
        ConfigError: it is not here, or PyTorch knows no such name.
    """
    present = torch.cuda.device_count()
    if name == "auto" and not present:
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and device.index is None and (number := torchrun.local_rank()) is not None:
        device = torch.device("cuda", number)  # one of torchrun's processes on each
    if device.type == "cuda" and (device.index or 0) >= present:
        raise ConfigError(f"device={name}: PyTorch sees {present} CUDA devices here; set device=auto or cpu")
    return device


def limit_threads(config: TrainConfig) -> None:
    """Let PyTorch compute in `config.num_threads` threads, or in no more than this process has cores.

    PyTorch counts the cores that it is bound to, not its container's quota: threads beyond it wait for each other.
    """
    torch.set_num_threads(config.num_threads or min(torch.get_num_threads(), available_cores()))


def new_policy(config: TrainConfig) -> Policy:
    """The configured policy with the seed's initial weights, or its checkpoint's."""
    torch.manual_seed(config.seed)
    with torch.device(device_of(config)):
        policy: Policy = build("policies", config.policy)
    if policy.num_actions != (said := getattr(config.policy, "num_actions", 1)):
        raise ExtensionError(
            f"{type(policy).__name__} answers with num_actions={policy.num_actions} actions, its section "
            f"{type(config.policy).__name__} says {said}: give the section a key or a property `num_actions` that "
            "agrees"
        )
    return policy


def saved_policy(config: TrainConfig, folder: Path, device: torch.device | None = None, **options: Any) -> Policy:
    """The policy saved in `folder`, of the configured class; on `device` instead of the configured one if given.

    Args:
        config: says which class, and where.
        folder: written by `save_pretrained`.
        device: None: the configured one.
        options: keys of the policy's section that replace the stored ones.

    Raises:
        CheckpointError: a file is missing, damaged, or of another architecture.
    """
    kind: str = config.policy.kind  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device(device_of(config) if device is None else device):
        return resolve("policies", kind).from_pretrained(folder, **options)


def warm_policy(config: TrainConfig, folder: Path, device: torch.device | None = None) -> Policy:
    """The policy saved in `folder` as training begins from it, computed as the configuration says now.

    A critic with a trunk of its own has seen none of a warm start that trained the actor: it begins anew. Where the
    warm start kept the policy as it is, it goes on.
    """
    changeable = Affects.TRAINING | Affects.FUTURE
    options = {
        key: getattr(config.policy, key)
        for key, mark in marks(config.policy).items()
        if "." not in key and changeable in mark
    }
    policy = saved_policy(config, folder, device, **options).eval()
    if config.fine_tunes:
        torch.manual_seed(config.seed)  # of a value head that begins anew
        policy.reset_critic()
    return policy


def load_policy(source: Path | str, *, device: torch.device | str = "auto", dataset: str | None = None) -> Policy:
    """Read a policy to act with.

    Args:
        source: a saved policy; a run folder (its trained policy) or one of its `checkpoints/step_N`; adapters; an
            official OpenVLA checkpoint, as a folder or as `owner/name` on the Hugging Face hub.
        device: such as `cpu` or `cuda:1`; `auto` is the first GPU if there is one.
        dataset: of an official checkpoint with several sets of action statistics: the one for your robot.

    Returns:
        The policy, ready for `policy.predict`.

    Raises:
        CheckpointError: nothing there is a policy, or a file is missing, damaged or of another architecture.
        ConfigError: no such device, or the policy is of a class that only a stored file names.
    """
    folder = policy_folder(Path(os.path.expanduser(source)))
    options = {} if dataset is None else {"dataset": dataset}
    with torch.device(find_device(str(device))):
        return resolve("policies", _kind(folder)).from_pretrained(folder, **options).eval()


def policy_folder(source: Path) -> Path:
    """The folder of the policy in a run folder, a training checkpoint or `checkpoints/best`; others as they are.

    Raises:
        CheckpointError: a run whose training has not finished.
    """
    # What training writes beside a policy: its state, or the validation that chose these weights.
    if (source / "policy").is_dir() and any((source / name).is_file() for name in ("state.json", "validation.json")):
        return source / "policy"
    if not (source / "stages.json").is_file():
        return source
    if (source / "policy").is_dir():
        return source / "policy"
    latest = latest_checkpoint(source / "checkpoints")
    remedy = "train first" if latest is None else f"load its last checkpoint, {latest}, or finish it"
    raise CheckpointError(f"{source}: training has not finished in this run, so it has no policy/ yet; {remedy}")


def _kind(folder: Path) -> str:
    """The kind of a saved policy: what the configuration of the run around it says, else what recognises the folder."""
    run = next((each for each in folder.absolute().parents[:3] if (each / "stages.json").is_file()), None)
    if run is None or not (run / "config.json").is_file():
        return kind_of(locate(folder))
    try:
        kind = str(json.loads((run / "config.json").read_text(encoding="utf-8"))["policy"]["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / 'config.json'} does not say of which kind the policy is: {error!r}") from error
    check_stored(
        "policies", kind, where=str(run / "config.json"), remedy="import its class and call from_pretrained(folder)"
    )
    return kind
