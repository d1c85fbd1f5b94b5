"""Checkpoints of OpenVLA-OFT in OpenVLA's layout: what is refused of a folder, and its statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.policy import PrismaticConfig
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.lora.files import is_adapter, places
from reachrl.policies.openvla.family import Family
from reachrl.policies.openvla.statement import FRAMES
from reachrl.policies.openvla.statistics import official_stats
from reachrl.policies.openvla_oft.companions import NEW_FILE, PROPRIO, find, first
from reachrl.policies.openvla_oft.unstated import UNSTATED, check_given, refuse_unsupported
from reachrl.policies.storage.weights import SINGLE_FILE

EPSILON = 1e-8  # added to the span of statistics in each program that trains such checkpoints
_ENDS = {"quantiles": ("q01", "q99"), "bounds": ("min", "max")}


@dataclass(frozen=True, slots=True)
class OFTFamily(Family):
    """OpenVLA-OFT with the token head."""

    section: ClassVar[type[PrismaticConfig]] = OpenVLAOFTConfig
    companions: ClassVar[tuple[str, ...]] = (f"{PROPRIO}.",)
    unstated: ClassVar[tuple[str, ...]] = (*FRAMES, *UNSTATED)

    def of(self, config: PrismaticConfig) -> Family:
        """The same, with what a configuration states."""
        return OFTFamily({key: getattr(config, key) for key in UNSTATED if key in config.model_fields_set})

    @property
    def sees_state(self) -> bool:
        """Whether the policy sees the robot's state."""
        return self.given.get("state_size") is not None

    def check(self, folder: Path, beside: Sequence[Path] = ()) -> None:
        """Refuse a folder with another head, or that contradicts what the user states of it.

        Raises:
            CheckpointError: says by which sign.
        """
        if is_adapter(folder):
            refuse_unsupported(places(folder))
        else:
            check_given(folder, OpenVLAOFTConfig.model_validate(dict(self.informed(folder).given)), beside)

    def action_stats(self, folder: Path, dataset: str) -> ActionStats:
        """The action statistics of one data set of an official folder.

        Raises:
            CheckpointError: `dataset` is not among them, or its entry is damaged.
        """
        return self._stats(folder, dataset, "action")

    def state_stats(self, folder: Path, dataset: str) -> ActionStats | None:
        """Those of the robot's state; None where the policy does not see it.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        return self._stats(folder, dataset, "proprio") if self.sees_state else None

    def kept(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """The state's projector, which adapters leave as it is."""
        path = first(folders, PROPRIO) if self.sees_state else None
        return () if path is None else (path,)

    def export_stats(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Under the names by which such statistics are read as well."""
        low, high = self._ends
        return {part: {**found, low: found["q01"], high: found["q99"]} for part, found in entry.items()}

    def write_companions(self, folder: Path, base: Path, out: Path) -> None:
        """Write the trained projector of the state as the official code reads it.

        Args:
            folder: whole weights of ours.
            base: the official checkpoint that they began as.
            out: where to.
        """
        if not self.sees_state:
            return
        prefix = f"{PROPRIO}."
        with safe_open(folder / SINGLE_FILE, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  (not a dictionary)
            state = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        path = find(base, PROPRIO)
        torch.save(state, out / (path.name if path is not None else NEW_FILE))

    @property
    def _ends(self) -> tuple[str, str]:
        return _ENDS[self.given.get("statistics", "quantiles")]

    def _stats(self, folder: Path, dataset: str, part: str) -> ActionStats:
        low, high = self._ends
        return official_stats(folder, dataset, part=part, low=low, high=high)
