"""Folders of OpenVLA-OFT: in OpenVLA's layout, with signs of it, or of our own policies of this kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reachrl.errors import CheckpointError
from reachrl.policies.folders import PolicyFolders, Verification
from reachrl.policies.lora.files import base_name, is_adapter
from reachrl.policies.openvla.folders import OpenVLAFolders
from reachrl.policies.openvla.official import is_official
from reachrl.policies.openvla.oft import oft_signal
from reachrl.policies.openvla_oft.verify import verify
from reachrl.policies.storage.saved import CONFIG_FILE


class OFTFolders(OpenVLAFolders):
    """Those of OpenVLA, told apart by signs: no configuration states the family."""

    def why_not(self, folder: Path, kind: str) -> str | None:
        """An official folder is of this kind where a sign of OpenVLA-OFT is present."""
        try:
            signal = oft_signal(folder)
            if is_adapter(folder) and not (folder / CONFIG_FILE).is_file():
                base = base_name(folder)
                return None if signal is not None or not base.is_dir() else self.why_not(base, kind)
            if not is_official(folder):
                return PolicyFolders.why_not(self, folder, kind)
            return "no sign of OpenVLA-OFT" if signal is None else None
        except CheckpointError as error:
            return str(error)

    def verify(
        self,
        folder: Path,
        recorded: Path,
        *,
        dataset: str | None,
        tower_heads: Sequence[int] | None,
        options: Mapping[str, str] | None = None,
    ) -> Verification:
        """Against OpenVLA-OFT's official code, SimpleVLA-RL or RLinf."""
        return verify(folder, recorded, dataset=dataset, tower_heads=tower_heads, options=options)
