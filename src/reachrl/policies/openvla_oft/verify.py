"""A loaded checkpoint of OpenVLA-OFT against recorded outputs of the program that trained it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.decoding.decode import action_logits
from reachrl.policies.folders import Verification
from reachrl.policies.openvla.official import problems_of
from reachrl.policies.openvla.verify import compare_recorded, one_thread, read_recorded
from reachrl.policies.openvla_oft.inputs import OFTInputs
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy
from reachrl.policies.openvla_oft.proprio import normalise_state
from reachrl.policies.openvla_oft.unstated import UNSTATED

# Float32 kernels differ by some ulps between machines: of hidden states around 4, of logits up to about 30.
TOLERANCES = {"projected": 1e-5, "proprio_token": 1e-5, "hidden": 1e-5, "logits": 5e-5, "tokens": 0.0, "actions": 1e-6}
_NEEDED = {"pixel_values": 4, "input_ids": 2, "attention_mask": 2}
_INPUTS = {*_NEEDED, "prompt_len", "proprio_raw"}


@one_thread()
@torch.no_grad()
def verify(
    folder: Path,
    recorded: Path,
    *,
    dataset: str | None = None,
    tower_heads: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
) -> Verification:
    """Load an official checkpoint in float32 and compute again what was recorded, a prompt at a time.

    Args:
        folder: a checkpoint in the official layout.
        recorded: a safetensors file with `pixel_values` [N, C, S, S] (of several cameras, one after the other on the
            channels), `input_ids` and `attention_mask` [N, L] padded on the right, `proprio_raw` [N, S] of a policy
            with a state; and with `projected` [N, P, E], `proprio_token` [N, E], `hidden` [N, A, E], `logits`
            [N, A, 256], `tokens` [N, A] (greedy) and `actions` [N, H, D] in the environment's units.
        dataset: which statistics `actions` were made with, when the checkpoint holds several.
        tower_heads: attention heads of each tower, for towers other than the released ones.
        options: of the section, that no file states: `chunk_size`, `dialect` and others.

    Raises:
        CheckpointError: the checkpoint or the recording cannot be read, or they do not fit.
        ConfigError: an option is none of those, or has a value of another kind.
    """
    tensors = read_recorded(recorded)
    given = _given(options or {})
    policy = OpenVLAOFTPolicy.load_official(folder, dataset=dataset, tower_heads=tower_heads, **given)
    policy = cast(OpenVLAOFTPolicy, policy)
    ours = _compute(policy, _inputs(policy, tensors, recorded))
    expected = [name for name in TOLERANCES if name != "proprio_token" or policy.config.state_size is not None]
    names = [name for name in expected if name in tensors]
    if not names:
        raise CheckpointError(f"{recorded} holds none of {', '.join(expected)} to compare; it holds {sorted(tensors)}")
    return Verification(
        checks=tuple(compare_recorded(name, ours[name], tensors[name], recorded, TOLERANCES[name]) for name in names),
        missing=tuple(name for name in expected if name not in names),
        ignored=tuple(sorted(tensors.keys() - {*names, *_INPUTS})),
    )


def _given(options: Mapping[str, str]) -> dict[str, Any]:
    if unknown := sorted(options.keys() - set(UNSTATED)):
        raise ConfigError(f"--option {unknown[0]}: expected one of {', '.join(UNSTATED)}, which no file states")
    try:
        read = OpenVLAOFTConfig.model_validate_strings(dict(options))
    except ValidationError as error:
        raise ConfigError(f"--option {problems_of(error)}") from error
    return {key: getattr(read, key) for key in options}


def _inputs(policy: OpenVLAOFTPolicy, tensors: dict[str, Tensor], path: Path) -> OFTInputs:
    config = policy.config
    problems = [f"{name} is missing" for name in _NEEDED if name not in tensors]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {dims} dimensions"
        for name, dims in _NEEDED.items()
        if name in tensors and tensors[name].ndim != dims
    ]
    pixels = [3 * len(config.towers) * config.num_cameras, config.image_size, config.image_size]
    if not problems and list(tensors["pixel_values"].shape)[1:] != pixels:
        problems.append(f"pixel_values are {list(tensors['pixel_values'].shape)}, expected {['N', *pixels]}")
    if not problems and len({len(tensors[name]) for name in _NEEDED}) != 1:
        problems.append("pixel_values, input_ids and attention_mask have different numbers of rows")
    size, state = config.state_size, tensors.get("proprio_raw")
    if size is not None and (state is None or state.ndim != 2 or state.shape[1] != size):
        problems.append(f"proprio_raw is {None if state is None else list(state.shape)}, expected ['N', {size}]")
    if problems:
        raise CheckpointError(f"{path} was not recorded with this model: {'; '.join(problems)}")
    unit = None
    if size is not None and state is not None:
        if policy.state_stats is None:
            raise CheckpointError(f"{config.checkpoint} has several sets of statistics; name one by --dataset")
        unit = torch.from_numpy(normalise_state(state.numpy(), policy.state_stats)).float()
    return OFTInputs(
        prompt_ids=tensors["input_ids"].long(),
        prompt_mask=tensors["attention_mask"].bool(),
        pixel_values=tensors["pixel_values"],
        state=unit,
    )


def _compute(policy: OpenVLAOFTPolicy, inputs: OFTInputs) -> dict[str, Tensor]:
    """Everything the recorded inputs allow, under the recorded names; padding would add in another order."""
    rows = [cast(OFTInputs, inputs.rows(torch.tensor([row]))) for row in range(len(inputs))]
    head = policy.language_model.lm_head.weight[policy.first_action_id :][:NUM_ACTION_BINS]
    hidden = torch.cat([policy.chunk_hidden(row) for row in rows])
    tokens = torch.cat([policy.act(row).token_ids for row in rows])
    ours = {
        "projected": policy.projector(policy.cache(inputs).vision_features),
        "hidden": hidden,
        "logits": action_logits(hidden, head, 1.0),
        "tokens": tokens,
        "actions": torch.from_numpy(policy.action_stats.unnormalise(policy.unit_actions(tokens))),
    }
    if policy.proprio_projector is not None and inputs.state is not None:
        ours["proprio_token"] = policy.proprio_projector(inputs.state)
    return ours
