"""Files of a fine-tuning: a checkpoint to resume from, the best weights so far, and the result."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from reachrl.config.demos import SFTSection
from reachrl.config.marks import Affects, affecting, marks
from reachrl.demos.store import TrajectoryStore
from reachrl.errors import CheckpointError
from reachrl.policies.base import Policy
from reachrl.run.atomic import recover_tree, replace_folder_atomic, write_json_atomic
from reachrl.run.manifest import is_sealed, seal, verify
from reachrl.run.optimizer_state import load_optimizer, save_optimizer

logger = logging.getLogger(__name__)


class SFTFolder:
    """`checkpoint/` and `best_N/` while a fine-tuning runs; `policy/` and `sft.json` once it has ended.

    Args:
        folder: where they are.
        identity: what decides the numbers, see `identity_of`; a folder of another identity is refused.
        config: the options, of which some may change at a resumption.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], config: SFTSection) -> None:
        self.folder, self.identity = folder, identity
        self.best: dict[str, Any] | None = None  # step and held-out figures of the best weights so far
        self._changeable = {key for key, mark in marks(config).items() if Affects.FUTURE in mark}
        self._resumable_best: dict[str, Any] | None = None  # the checkpoint's, which a resumed training begins with

    def save_checkpoint(self, policy: Policy, optimizer: Optimizer, step: int) -> None:
        """Write `checkpoint/`: weights, optimiser and position, complete or absent."""

        def write(aside: Path) -> None:
            policy.save_pretrained(aside / "policy")
            save_optimizer(optimizer, aside / "optimizer.safetensors")
            write_json_atomic(aside / "state.json", {"identity": self.identity, "step": step, "best": self.best})
            seal(aside)

        replace_folder_atomic(self.folder / "checkpoint", write)
        self._resumable_best = self.best
        self._drop_outdated_bests()

    def save_best(self, policy: Policy, best: dict[str, Any]) -> None:
        """Keep weights that are better than all before, with their `step` and figures."""
        self.best = best
        self._drop_outdated_bests()
        replace_folder_atomic(self._best_folder(best), policy.save_pretrained)

    def restore_best(self, policy: Policy) -> None:
        """Read the best weights back."""
        assert self.best is not None
        policy.restore(self._best_folder(self.best))

    def resume(self, policy: Policy, optimizer: Optimizer) -> int:
        """Read `checkpoint/` back if there is one.

        Returns:
            The number of steps done.

        Raises:
            CheckpointError: it is damaged, or of a fine-tuning with other options.
        """
        if self.folder.exists():
            recover_tree(self.folder)  # puts back what a crash between two renames left aside
        checkpoint = self.folder / "checkpoint"
        if not checkpoint.exists():
            return 0
        if is_sealed(checkpoint):  # those of earlier versions are not
            verify(checkpoint, remedy=f"delete {self.folder} to start again", nested=False)
        state = self._read_state(checkpoint / "state.json", self._changeable)
        policy.restore(checkpoint / "policy")
        load_optimizer(optimizer, checkpoint / "optimizer.safetensors")
        self.best = self._resumable_best = state["best"]
        return state["step"]

    def result(self, policy: Policy) -> dict[str, Any] | None:
        """The result of a fine-tuning that has ended, its weights loaded; None when there is still work to do.

        Raises:
            CheckpointError: it is damaged, or of a fine-tuning with other options.
        """
        path = self.folder / "sft.json"
        if not path.exists():
            return None
        state = self._read_state(path, set())
        policy.restore(self.folder / "policy")
        policy.eval()
        return state["result"]

    def finish(self, policy: Policy, result: dict[str, Any]) -> None:
        """Write the policy and, last, the result; checkpoint and best weights are deleted."""
        replace_folder_atomic(self.folder / "policy", policy.save_pretrained)
        write_json_atomic(self.folder / "sft.json", {"identity": self.identity, "result": result})
        for folder in (self.folder / "checkpoint", *self.folder.glob("best_*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _best_folder(self, best: dict[str, Any]) -> Path:
        """Where the best weights of a step lie: one folder a step, as a resumed training may not find them again."""
        return self.folder / f"best_{best['step']:06d}"

    def _drop_outdated_bests(self) -> None:
        """Delete all best weights but the newest and those of the checkpoint, so that never more than two lie there."""
        needed = [self._best_folder(best) for best in (self.best, self._resumable_best) if best is not None]
        for folder in set(self.folder.glob("best_*")).difference(needed):
            shutil.rmtree(folder, ignore_errors=True)

    def _read_state(self, path: Path, changeable: set[str]) -> dict[str, Any]:
        """The state in a file of a training with the same options, those in `changeable` aside."""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            stored = state["identity"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: missing or damaged ({error}); delete {self.folder} to start again."
            ) from error
        compared = {*stored, *self.identity} - changeable
        if different := sorted(key for key in compared if stored.get(key) != self.identity.get(key)):
            key = different[0]
            raise CheckpointError(
                f"{path}: a fine-tuning with {key}={stored.get(key)!r} was begun here, now it is "
                f"{self.identity.get(key)!r}. Use the same options, another folder, or delete {self.folder}."
            )
        return state


def identity_of(policy: Policy, store: TrajectoryStore, config: SFTSection, seed: int) -> dict[str, Any]:
    """What decides the numbers of a training; compared before anything is resumed or taken for finished."""
    data = hashlib.sha256(json.dumps(store.meta, sort_keys=True).encode()).hexdigest()[:16]
    architecture = json.loads(json.dumps(policy.architecture()))
    return {
        **affecting(config, Affects.WARM_START, fixed=False),
        "seed": seed,
        "store": data,
        "architecture": architecture,
    }
