"""A loaded checkpoint against recorded outputs of the official code, tensor by tensor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.errors import CheckpointError
from reachrl.policies.action_tokens import unit_from_tokens
from reachrl.policies.decoding.decode import action_logits
from reachrl.policies.folders import Check, Verification
from reachrl.policies.llama import last_hidden
from reachrl.policies.lora.adapters import rows_of
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy

# Float32 kernels differ by some ulps between machines: of features around 4, of logits up to about 30.
TOLERANCES = {
    "vision_features": 1e-5,
    "projected": 1e-5,
    "action_row_logits": 5e-5,
    "tokens": 0.0,
    "tf_action_logits": 5e-5,
    "actions": 1e-6,
}
_PROMPTS = {"input_ids", "attention_mask"}
_INPUTS = {"pixel_values", *_PROMPTS, "prompt_len"}
_NUM_DIMS = {"pixel_values": 4, "input_ids": 2, "attention_mask": 2, "prompt_len": 1, "tokens": 2}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: several divide sums among themselves, which moves logits of about 30 by up to 1e-4."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@torch.no_grad()
def verify(
    folder: Path, recorded: Path, *, dataset: str | None = None, tower_heads: Sequence[int] | None = None
) -> Verification:
    """Load an official checkpoint in float32 and compute again what was recorded.

    Args:
        folder: a checkpoint in the official layout.
        recorded: a safetensors file with `pixel_values` [N, C, S, S], with `input_ids` and `attention_mask` [N, L]
            padded on the right, and with `vision_features` [N, P, F], `projected` [N, P, E],
            `action_row_logits` [N, L + P, 256], `tokens` [N, A] (greedy), `tf_action_logits` [N, A, 256] over those
            tokens, and `actions` [N, A] in the environment's units.
        dataset: which action statistics `actions` were made with, when the checkpoint holds several.
        tower_heads: attention heads of each tower, for towers other than the released ones.

    Raises:
        CheckpointError: the checkpoint or the recording cannot be read, they do not fit, nothing can be compared, or
            there are actions to compare and several sets of statistics.
    """
    tensors = read_recorded(recorded)
    policy = OpenVLAPolicy.load_official(folder, dataset=dataset, tower_heads=tower_heads)
    _check_inputs(policy, tensors, recorded)
    ours = _compute(policy, tensors)
    names = [name for name in TOLERANCES if name in tensors and name in ours]
    if not names:
        raise CheckpointError(
            f"nothing in {recorded} can be compared: it holds {sorted(tensors)}; expected pixel_values, input_ids and "
            f"attention_mask with any of {', '.join(TOLERANCES)}"
        )
    return Verification(
        checks=tuple(_compare(name, ours[name], tensors, recorded) for name in names),
        missing=tuple(name for name in TOLERANCES if name not in names),
        ignored=tuple(sorted(tensors.keys() - {*names, *_INPUTS})),
    )


def read_recorded(path: Path) -> dict[str, Tensor]:
    """Read recorded tensors by name.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or not a safetensors file: {error}") from error


def _check_inputs(policy: OpenVLAPolicy, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse inputs of another model before they fail somewhere inside it."""
    if wrong := [name for name in _NUM_DIMS.keys() & tensors.keys() if tensors[name].ndim != _NUM_DIMS[name]]:
        found = (f"{name} are {_shape(tensors[name])}, expected {_NUM_DIMS[name]} dimensions" for name in sorted(wrong))
        raise CheckpointError(f"{path} is no recording of a batch: {'; '.join(found)}")
    config, problems = policy.config, []
    pixels = [3 * len(config.towers), config.image_size, config.image_size]
    if "pixel_values" in tensors and _shape(tensors["pixel_values"])[1:] != pixels:
        problems.append(f"pixel_values are {_shape(tensors['pixel_values'])}, expected {['N', *pixels]}")
    vocab_size = config.language_model.vocab_size
    for name in ("input_ids", "tokens"):
        if name in tensors and not ((tensors[name] >= 0) & (tensors[name] < vocab_size)).all():
            problems.append(f"{name} are not all in 0..{vocab_size - 1}")
    if tensors.keys() >= _PROMPTS:
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        if ids.shape != mask.shape:
            problems.append(f"input_ids are {_shape(ids)}, attention_mask {_shape(mask)}, expected ['N', 'L'] twice")
        elif not mask[:, :1].all():
            problems.append("prompts are padded on the left, expected on the right")
    rows = {len(tensors[name]) for name in _NUM_DIMS.keys() & tensors.keys()}
    if len(rows) > 1 or 0 in rows:
        problems.append(f"the inputs have {sorted(rows)} rows, expected one number above 0")
    num_tokens = policy.num_action_tokens
    if "tokens" in tensors and tensors["tokens"].shape[1] != num_tokens:
        problems.append(
            f"tokens are {_shape(tensors['tokens'])}, expected ['N', {num_tokens}] by the action statistics"
        )
    if problems:
        raise CheckpointError(f"{path} was not recorded with this model: {'; '.join(problems)}")


def _compute(policy: OpenVLAPolicy, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything the recorded inputs allow, under the recorded names."""
    if "pixel_values" not in tensors:
        return {}
    features = policy.vision_features(tensors["pixel_values"])
    ours = {"vision_features": features, "projected": policy.projector(features)}
    if tensors.keys() >= _PROMPTS:
        ids, mask = tensors["input_ids"].long(), tensors["attention_mask"].bool()
        inputs = OpenVLAInputs(prompt_ids=ids, prompt_mask=mask, vision_features=features)
        ours["action_row_logits"] = _row_logits(policy, inputs, ours["projected"])
        ours["tokens"] = policy.act(inputs).token_ids
        if "actions" in tensors:
            unit = unit_from_tokens(ours["tokens"].numpy(), policy.config.language_model.vocab_end)
            ours["actions"] = torch.from_numpy(policy.action_stats.unnormalise(unit))
        if "tokens" in tensors:
            ours["tf_action_logits"] = policy.action_logits(inputs, tensors["tokens"].long())[0]
    return ours


def _row_logits(
    policy: OpenVLAPolicy, inputs: OpenVLAInputs, patches: Float[Tensor, "N P E"]
) -> Float[Tensor, "N T 256"]:
    """Logits of the action tokens at every position, computed row by row without padding; zero at padding."""
    llama, first = policy.language_model, policy.first_action_id
    head = rows_of(llama.lm_head, first, NUM_ACTION_BINS)
    real = _real(inputs.prompt_mask, patches.shape[1])
    logits = torch.zeros(*real.shape, NUM_ACTION_BINS)
    for row in range(len(real)):
        text = llama.model.embed_tokens(inputs.prompt_ids[row][inputs.prompt_mask[row]])
        embeds = torch.cat([text[:1], patches[row], text[1:]])[None]
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool)
        logits[row, real[row]] = action_logits(last_hidden(llama.model, embeds, valid, embeds.shape[1]), head, 1.0)[0]
    return logits


def _real(mask: Tensor, num_patches: int) -> Tensor:
    """Which positions of `[BOS][patches][text]` are no padding: bool [N, L + P]."""
    patches = torch.ones(len(mask), num_patches, dtype=torch.bool)
    return torch.cat([mask[:, :1], patches, mask[:, 1:]], 1)


def _compare(name: str, ours: Tensor, tensors: dict[str, Tensor], path: Path) -> Check:
    real = None
    if name == "action_row_logits":  # what the official code computes at padding, nothing reads
        mask = tensors["attention_mask"].bool()
        real = _real(mask, ours.shape[1] - mask.shape[1])
    return compare_recorded(name, ours, tensors[name], path, TOLERANCES[name], read=real)


def compare_recorded(
    name: str, ours: Tensor, theirs: Tensor, path: Path, tolerance: float, *, read: Tensor | None = None
) -> Check:
    """Compare a tensor with the recorded one; with a tolerance of 0 the difference is a count of unequal numbers.

    Args:
        name: of both.
        ours: computed here.
        theirs: recorded.
        path: of the recording, for the message.
        tolerance: largest difference.
        read: the positions that are compared; None: all.

    Raises:
        CheckpointError: their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{path} holds {name} {_shape(theirs)}, expected {_shape(ours)}; is it of this model?")
    apart = (ours.double() - theirs.double()).abs()
    apart = apart if read is None else apart[read]
    difference = apart.max() if tolerance else (apart != 0).sum()
    return Check(name=name, difference=float(difference), tolerance=tolerance)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
