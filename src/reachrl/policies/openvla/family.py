"""What parts the families of policies that are stored in OpenVLA's layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.openvla.oft import refuse_oft
from reachrl.policies.openvla.statement import FRAMES, stated
from reachrl.policies.openvla.statistics import official_stats
from reachrl.policies.storage.families import other_family
from reachrl.policies.storage.saved import CONFIG_FILE
from reachrl.policies.storage.weights import read_json
from reachrl.registry import BUILTINS, resolve, section_class


@dataclass(frozen=True, slots=True)
class Family:
    """Plain OpenVLA: its section, and what is refused and read of a folder in the official layout."""

    section: ClassVar[type[PrismaticConfig]] = OpenVLAConfig
    companions: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of weights that an official folder keeps in files of their own."""
    unstated: ClassVar[tuple[str, ...]] = (*FRAMES, "vocabulary")
    """Options that the official layout has no place for; our exports state them."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the user has stated of an official checkpoint, by key: no file states it."""

    def of(self, config: PrismaticConfig) -> "Family":
        """The same, with what a configuration states."""
        return self

    def informed(self, folder: Path) -> "Family":
        """The same, with what an official folder of ours states and the user does not.

        Raises:
            CheckpointError: `config.json` is damaged.
        """
        found = stated(folder)
        return replace(self, given={key: found[key] for key in self.unstated if key in found} | dict(self.given))

    @property
    def sees_state(self) -> bool:
        """Whether the policy sees the robot's state."""
        return False

    def check(self, folder: Path, beside: Sequence[Path] = ()) -> None:
        """Refuse an official folder, whole or adapters, that is of another family, or contradicts what the user states.

        Args:
            folder: on this machine.
            beside: of whole weights under another tool's adapters, the folders of what belongs to the adapters.

        Raises:
            CheckpointError: says by which sign.
        """
        refuse_oft(folder)

    def action_stats(self, folder: Path, dataset: str) -> ActionStats:
        """The action statistics of one data set of an official folder.

        Raises:
            CheckpointError: `dataset` is not among them, or its entry is damaged.
        """
        return official_stats(folder, dataset)

    def state_stats(self, folder: Path, dataset: str) -> ActionStats | None:
        """Those of the robot's state; None where the policy does not see it.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        return None

    def kept(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """Files beside weights in the first of `folders` that has them, which an export copies, pickles among them."""
        return ()

    def export_stats(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A policy's statistics, by `action` and `proprio`, as an official folder has them."""
        return dict(entry)

    def write_companions(self, folder: Path, base: Path, out: Path) -> None:
        """Write what an official folder keeps beside its weights.

        Args:
            folder: whole weights of ours.
            base: the official checkpoint that they began as.
            out: where to.
        """


OPENVLA = Family()


def check_kind(folder: Path, section: type[PrismaticConfig]) -> None:
    """Refuse a folder whose configuration says that it is of another family, by name.

    Raises:
        CheckpointError: says by which sign, and what to set instead.
    """
    path = folder / CONFIG_FILE
    if path.is_file() and (problem := other_family(read_json(path), section.model_fields["kind"].default)) is not None:
        raise CheckpointError(f"{folder}: {problem}")


def stored_section(raw: Mapping[str, Any]) -> type[PrismaticConfig]:
    """The section of a policy of ours, by the kind that its configuration states; plain OpenVLA's where it is none."""
    kind = raw.get("kind")
    found = section_class("policies", str(kind)) if kind in BUILTINS["policies"] else OpenVLAConfig
    return found if issubclass(found, PrismaticConfig) else OpenVLAConfig


def family_of(config: PrismaticConfig) -> Family:
    """What an official checkpoint is read as, given what a configuration states of it."""
    return resolve("policies", config.kind).family(config)
