"""Inspection, verification and export of saved policies; each kind of policy implements its own."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.storage.hub import locate
from reachrl.policies.storage.saved import CONFIG_FILE
from reachrl.policies.storage.weights import StoredTensor, read_headers, read_json
from reachrl.registry import BUILTINS, kinds, resolve

POLICY = "policy"  # what run folders, checkpoints and stages call the folder of their policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored part of a model."""

    name: str
    sizes: str = ""  # in words
    num_weights: int
    num_unread: int = 0  # of these, how many no forward pass reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Description of a policy folder, from its small files and the headers of its weights."""

    folder: Path
    facts: dict[str, str]  # in the order they are shown
    parts: tuple[Part, ...] = ()
    numbers: dict[str, int] = field(default_factory=dict)  # that memory holds, by purpose
    base: Path | None = None  # of adapters: the folder of their base, if it is on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Comparison of one recorded tensor with ours."""

    name: str
    difference: float  # the largest absolute one; of an exact tensor, how many numbers differ
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether the tensors must be equal."""
        return self.tolerance == 0

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All comparisons that a recording allows; a proof only if none is missing."""

    checks: tuple[Check, ...]
    missing: tuple[str, ...]  # outputs of the function that were not recorded, or not with what they need
    ignored: tuple[str, ...]  # recorded tensors that nothing was compared with

    @property
    def passed(self) -> bool:
        """Whether every output was compared and agrees."""
        return not self.missing and all(check.passed for check in self.checks)


class PolicyFolders:
    """Operations on saved policies of one kind; the defaults hold for any kind."""

    def why_not(self, folder: Path, kind: str) -> str | None:
        """Return why `folder` holds no policy of this `kind`; None: it holds one.

        The default reads `kind` in `config.json`.
        """
        try:
            found = read_json(folder / CONFIG_FILE).get("kind")
        except CheckpointError as error:
            return str(error)
        return None if found == kind else f"{folder / CONFIG_FILE}: kind = {found!r}, expected {kind!r}"

    def inspect(self, folder: Path) -> Inspection:
        """Describe a folder without reading weights.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        tensors = read_headers(folder, str)
        counts: Counter[str] = Counter()
        for name, tensor in tensors.items():
            counts[name.partition(".")[0]] += tensor.numel
        return Inspection(
            folder=folder,
            facts={
                "kind": str(read_json(folder / CONFIG_FILE).get("kind")),
                "stored as": dtypes_in_words(count_dtypes(tensors.values())),
            },
            parts=tuple(Part(name=name, num_weights=count) for name, count in counts.items()),
            numbers={"weights": sum(counts.values())},
        )

    def verify(
        self,
        folder: Path,
        recorded: Path,
        *,
        dataset: str | None,
        tower_heads: Sequence[int] | None,
        options: Mapping[str, str] | None = None,
    ) -> Verification:
        """Recompute recorded outputs of the official code.

        Args:
            folder: on this machine.
            recorded: a safetensors file with in- and outputs.
            dataset: the action statistics of the recorded actions, when the checkpoint holds several.
            tower_heads: attention heads of each vision tower, where no file states them.
            options: of the policy's section, where no file states them.

        Raises:
            CheckpointError: the checkpoint or the recording cannot be read, or they do not fit.
            ConfigError: there is nothing official to compare with.
        """
        raise ConfigError(f"{folder}: there is no official code that this kind of policy could be compared with")

    def export(self, folder: Path, out: Path, *, merge: bool, base: Path | None) -> list[str]:
        """Write a policy for other tools; return lines that describe what was written.

        Args:
            folder: a saved policy.
            out: the new folder.
            merge: whether adapters are folded into their base.
            base: a foreign checkpoint of the same architecture, for whole weights.

        Raises:
            ConfigError: it cannot be exported so, or `out` exists.
            CheckpointError: a file is missing or damaged, or what was written is not what was meant.
            StorageError: `out` cannot be written.
        """
        raise ConfigError(f"{folder}: this kind of policy has no other layout to be exported in; copy the folder")


def count_dtypes(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """Count weights by stored data type, the most frequent first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel
    return dict(counts.most_common())


def dtypes_in_words(counts: Mapping[str, int]) -> str:
    """Format the stored data types, with counts if there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({number:,} weights)" for name, number in counts.items())


def kind_of(folder: Path) -> str:
    """Return the kind of the policy in a folder.

    Raises:
        CheckpointError: none that is built in or installed; says why for each, or where in the folder a policy is.
    """
    if (folder / POLICY / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} is a run's, a checkpoint's or a stage's folder: give {folder / POLICY}")
    reasons = {}
    for kind in sorted(kinds("policies"), key=lambda kind: kind not in BUILTINS["policies"]):
        why = _folders(kind).why_not(folder, kind)
        if why is None:
            return kind
        reasons[kind] = why
    if len(set(reasons.values())) == 1:
        raise CheckpointError(next(iter(reasons.values())))
    whys = "; ".join(f"not {kind}: {why}" for kind, why in reasons.items())
    raise CheckpointError(f"{folder} holds no policy of a known kind. {whys}")


def folders_of(checkpoint: Path) -> tuple[Path, PolicyFolders]:
    """Return a checkpoint's local folder and the operations of its kind.

    Args:
        checkpoint: a folder, or `owner/name` on the hub, which is downloaded first.

    Raises:
        CheckpointError: it is no policy of a known kind.
    """
    folder = locate(checkpoint)
    return folder, _folders(kind_of(folder))


def _folders(kind: str) -> PolicyFolders:
    """Return the operations registered for a kind, or the defaults."""
    return resolve("policy_folders", kind)() if kind in kinds("policy_folders") else PolicyFolders()
