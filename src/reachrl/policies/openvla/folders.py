"""Folders in OpenVLA's layout or of our own policies of this kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.folders import Inspection, PolicyFolders, Verification
from reachrl.policies.lora.files import base_name, is_adapter
from reachrl.policies.openvla.description import describe
from reachrl.policies.openvla.export import export_adapter, export_merged
from reachrl.policies.openvla.inspection import inspect_folder
from reachrl.policies.openvla.official import is_official
from reachrl.policies.openvla.official_export import export_official
from reachrl.policies.openvla.oft import oft_signal
from reachrl.policies.openvla.verify import verify
from reachrl.policies.storage.saved import CONFIG_FILE


class OpenVLAFolders(PolicyFolders):
    """Official checkpoints, adapters of other tools, and what ReachRL wrote."""

    def why_not(self, folder: Path, kind: str) -> str | None:
        """An adapter of another tool is what its base is, and taken for OpenVLA where the base is not here."""
        try:
            foreign = is_adapter(folder) and not (folder / CONFIG_FILE).is_file()
            if not foreign and not is_official(folder):
                return super().why_not(folder, kind)
            if (signal := oft_signal(folder)) is not None:
                return f"it is an OpenVLA-OFT checkpoint by {signal}"
            return self.why_not(base, kind) if foreign and (base := base_name(folder)).is_dir() else None
        except CheckpointError as error:
            return str(error)

    def inspect(self, folder: Path) -> Inspection:
        """Sizes, layout, statistics and prompt."""
        return describe(inspect_folder(folder))

    def verify(
        self,
        folder: Path,
        recorded: Path,
        *,
        dataset: str | None,
        tower_heads: Sequence[int] | None,
        options: Mapping[str, str] | None = None,
    ) -> Verification:
        """Against OpenVLA's official code."""
        if options:
            raise ConfigError(f"--option {next(iter(options))}: the files of a plain OpenVLA state everything")

        return verify(folder, recorded, dataset=dataset, tower_heads=tower_heads)

    def export(self, folder: Path, out: Path, *, merge: bool, base: Path | None) -> list[str]:
        """Adapters alone, adapters folded into their base, or whole weights in the official layout."""
        if base is not None and is_adapter(folder):
            raise ConfigError(f"--base is for whole weights; the adapters in {folder} name their base themselves")
        if merge:
            done = export_merged(folder, out)
            lines = [
                f"merged checkpoint written to {out}",
                f"read back, each of its {done.check.num_weights} adapted weights is the base's plus the adapters' "
                f"product ({done.check.change:.2g} of their length), rounded once",
            ]
            if done.trained is not None:
                lines.append(
                    "the adapters were trained on a 4-bit base: from that policy the merged one differs by "
                    f"{done.trained:.2g} nats in the mean, as its weights are those that are stored. Evaluate it anew"
                )
            return lines
        if is_adapter(folder):
            export_adapter(folder, out)
            return [f"adapters written to {out}"]
        origin = export_official(folder, out, base=base)
        return [f"official checkpoint written to {out}, with the other files of {origin}; the critic is left out"]
