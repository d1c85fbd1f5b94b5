"""Transfer of trained weights from the learner to the actors: named, ordered, packed, versioned, verified.

Only weights that training changes and acting reads are sent: the trunk (or its adapters alone), and the vision towers
if they are trained. The receiver copies them into its policy, rebuilds its copy for decoding, and scores a fixed batch:
its log-probs must equal the learner's.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reachrl.envs.base import Shown
from reachrl.errors import WorkerError
from reachrl.policies.base import Policy
from reachrl.streams import Stream, generator
from reachrl.types import Observation

BUCKET_BYTES = 64 * 2**20
PROBE_ROWS = 2
# Mean difference of log-probs per action token between the trained policy and its copy for acting.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05, torch.float8_e4m3fn: 0.3}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What one tensor is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors packed one after another into one buffer."""

    tensors: tuple[TensorInfo, ...]
    data: np.ndarray  # u8[bytes]
    checksum: int  # crc32 of the data

    def unpack(self) -> Iterator[tuple[TensorInfo, Tensor]]:
        """The tensors, in order.

        Raises:
            WorkerError: the bytes are not those that were packed.
        """
        if zlib.crc32(self.data.data) != self.checksum:
            raise WorkerError("weights were damaged on their way from the learner; the run can be resumed")
        begin = 0
        for info in self.tensors:
            size = int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize
            raw = self.data[begin : begin + size].copy()  # shared memory is read-only, and this not aligned
            yield info, torch.from_numpy(raw).view(info.dtype).view(info.shape)
            begin += size


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """One version of the weights, with the learner's answer to the fixed batch."""

    version: int
    buckets: tuple[Bucket, ...]
    probe_ids: np.ndarray  # i64[P A]
    probe_mask: np.ndarray  # bool[P A]
    probe_logprobs: np.ndarray  # f32[P A]


def acting_parameters(policy: Policy, *, train_vision: bool) -> list[tuple[str, Tensor]]:
    """Parameters that training changes and acting reads, by name, in alphabetical order: the same on both sides."""
    groups = policy.parameter_groups()
    wanted = {id(p) for p in groups["trunk"] + (groups["vision"] if train_vision else [])}
    return sorted((name, p) for name, p in policy.named_parameters() if id(p) in wanted)


def pack(
    tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES, keep: bool = True
) -> tuple[Bucket, ...]:
    """Pack whole tensors, in order, into buckets of about `bucket_bytes`; a larger tensor gets a bucket of its own.

    Without `keep` nothing is stored: the iteration alone makes the collectives of a sharded group match on every rank.
    """
    buckets: list[Bucket] = []
    infos: list[TensorInfo] = []
    parts: list[np.ndarray] = []

    def close() -> None:
        if parts:
            data = np.concatenate(parts)
            buckets.append(Bucket(tuple(infos), data, zlib.crc32(data.data)))
            infos.clear()
            parts.clear()

    for name, tensor in tensors:
        if not keep:
            continue
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if sum(part.nbytes for part in parts) + raw.nbytes > bucket_bytes:
            close()
        infos.append(TensorInfo(name, tuple(tensor.shape), tensor.dtype))
        parts.append(raw)
    close()
    return tuple(buckets)


@torch.no_grad()
def load_packed(policy: Policy, weights: PackedWeights, *, train_vision: bool) -> None:
    """Copy packed weights into a policy of the same architecture.

    Raises:
        WorkerError: other tensors, or another order, than this policy has; or damaged bytes.
    """
    own = acting_parameters(policy, train_vision=train_vision)
    theirs = [info for bucket in weights.buckets for info in bucket.tensors]
    ours = [TensorInfo(name, tuple(p.shape), p.dtype) for name, p in own]
    if ours != theirs:
        pairs = zip([*ours, None], [*theirs, None], strict=False)
        mine, sent = next((a, b) for a, b in pairs if a != b)
        raise WorkerError(
            f"the learner sends {len(theirs)} tensors, this actor's policy has {len(ours)}; the first difference: "
            f"{sent} sent, {mine} expected. Both must be built from the same `policy` section"
        )
    places = dict(own)
    for bucket in weights.buckets:
        for info, tensor in bucket.unpack():
            places[info.name].copy_(tensor)


def probe_batch(policy: Policy, seed: int, shown: Shown) -> tuple[Observation, np.ndarray]:
    """A fixed batch: noise in the shape of what environments show, and actions f32[P H D] in mid-range."""
    rng = generator(seed, Stream.WEIGHT_PROBE)
    observation = shown.noise(rng, ("pick up the red block",) * PROBE_ROWS)
    shape = (PROBE_ROWS, policy.num_actions, policy.action_dim)
    return observation, rng.uniform(-0.5, 0.5, shape).astype(np.float32)


@torch.no_grad()
def learner_answer(
    policy: Policy, *, seed: int, shown: Shown, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens i64[P A] of the fixed batch, their mask and log-probs f32[P A] as the trained policy scores them."""
    observation, actions = probe_batch(policy, seed, shown)
    ids, mask = policy.encode_actions(actions)
    out = policy.evaluate(policy.encode(observation), ids, mask, temperature=temperature)
    return ids.cpu().numpy(), mask.cpu().numpy(), out.logprobs.float().where(mask, 0).cpu().numpy()


@torch.no_grad()
def actor_gap(policy: Policy, weights: PackedWeights, *, seed: int, shown: Shown, temperature: float) -> float:
    """Mean difference per token between the log-probs of this policy, on the path that acts, and the learner's.

    Raises:
        WorkerError: it is too large for rounding: this policy acts with other weights than the learner has.
    """
    observation, _ = probe_batch(policy, seed, shown)
    ids, mask = (torch.from_numpy(each).to(policy.device) for each in (weights.probe_ids, weights.probe_mask))
    logprobs = policy.acting_logprobs(policy.encode(observation), ids, mask, temperature=temperature)
    gaps = np.abs(logprobs.float().cpu().numpy() - weights.probe_logprobs)
    gap = float(gaps[weights.probe_mask].mean())
    if not gap <= PROBE_TOLERANCE[policy.acting_dtype]:
        raise WorkerError(
            f"after weights version {weights.version} were sent, log-probs of a fixed batch differ by {gap:.4f} a "
            f"token between learner and actor (at most {PROBE_TOLERANCE[policy.acting_dtype]} is rounding): the actor "
            "does not act with the weights that are trained"
        )
    return gap
