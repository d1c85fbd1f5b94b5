"""What a policy was trained on, kept beside its weights, and warnings where it meets something else."""

import json
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import at_limits

if TYPE_CHECKING:
    from reachrl.policies.base import Policy

logger = logging.getLogger(__name__)

TRAINED_ON_FILE = "trained_on.json"
MIN_DECISIONS = 30  # fewer say nothing about a mean


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOn:
    """Instructions, frame sizes and cameras of all training data, demonstrations and rollouts alike."""

    instructions: frozenset[str]
    sizes: frozenset[tuple[int, int]]  # (height, width) in pixels, of any camera
    cameras: tuple[str, ...] = ()  # in the order of the first training data; (): unknown

    @classmethod
    def of(cls, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> "TrainedOn":
        """What these instructions and frames u8[... H W 3] are."""
        sizes = frozenset((int(frames.shape[-3]), int(frames.shape[-2])) for frames in images.values())
        return cls(instructions=frozenset(instructions), sizes=sizes, cameras=tuple(images))

    def joined(self, other: "TrainedOn") -> "TrainedOn":
        """Both together; the cameras' order stays that of the first data."""
        return TrainedOn(
            instructions=self.instructions | other.instructions,
            sizes=self.sizes | other.sizes,
            cameras=self.cameras or other.cameras,
        )

    def write(self, folder: Path) -> None:
        """Write `trained_on.json`."""
        found = {
            "instructions": sorted(self.instructions),
            "sizes": sorted(map(list, self.sizes)),
            "cameras": list(self.cameras),
        }
        (folder / TRAINED_ON_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "TrainedOn | None":
        """Read what `write` wrote; None where nothing was written, as for foreign checkpoints.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / TRAINED_ON_FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            sizes = frozenset((int(height), int(width)) for height, width in found["sizes"])
            cameras = tuple(map(str, found.get("cameras", ())))  # files of earlier versions have none
            return cls(instructions=frozenset(map(str, found["instructions"])), sizes=sizes, cameras=cameras)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}; take the policy from another checkpoint") from error


def warn_of_unfamiliar(policy: "Policy", instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
    """Warn once each of an instruction, a frame size or an order of cameras that the policy was never trained on.

    Only what is known is warned of: cameras that have other names than in training may well be the same ones.

    Args:
        policy: what is to act.
        instructions: what it is asked.
        images: frames u8[... H W 3] by camera, in the order in which the policy looks at them.
    """
    known = policy.trained_on
    if known is None:
        return
    strange = set(instructions) - known.instructions
    if strange:
        asked = {policy.prompt(instruction) for instruction in known.instructions}
        for instruction in sorted(each for each in strange if policy.prompt(each) not in asked):
            close = get_close_matches(instruction, sorted(known.instructions), n=1)
            hint = f"the nearest it knows is {close[0]!r}" if close else f"it knows {_some(known.instructions)}"
            _warn_once(
                policy,
                instruction,
                f"the policy was never trained on the instruction {instruction!r}; {hint}. Expect little of it there",
            )
    looked_at = list(images)[: policy.num_cameras]
    if _exchanged(looked_at, images, known.cameras):
        _warn_once(
            policy,
            ("cameras", *looked_at),
            f"the policy looks at the cameras {', '.join(looked_at)} in this order, it was trained on "
            f"{', '.join(known.cameras[: policy.num_cameras])}: it takes one camera for another. Give them in the "
            "order of training (env.cameras, or the order of the images of predict)",
        )
    for camera, frames in images.items():
        height, width = frames.shape[-3:-1]
        if (height, width) not in known.sizes:
            sizes = ", ".join(f"{h} x {w}" for h, w in sorted(known.sizes))
            _warn_once(
                policy,
                (camera, height, width),
                f"camera {camera!r} gives frames of {height} x {width} pixels, the policy was trained on {sizes}: they "
                "are resized, but details and proportions may not be those it learned from",
            )


def warn_of_limits(policy: "Policy", actions: np.ndarray) -> None:
    """Warn once of a policy whose mean action lies at the end of what it can say, in a dimension that it varies.

    Args:
        policy: what chose them.
        actions: f32[N D], one after the other.
    """
    limits = policy.action_limits()
    if limits is None or len(actions) < MIN_DECISIONS:
        return
    if found := at_limits(actions, *limits):
        _warn_once(
            policy,
            "the limits of actions",
            f"over {len(actions)} decisions the mean action lies at its limit in {found}: the policy pushes as far as "
            "it can nearly all the time. Look at the frames, the instruction and the action statistics "
            "(policy.dataset): are they those it was trained with? A policy that has hardly been trained does so too.",
        )


def _exchanged(looked_at: Sequence[str], shown: Collection[str], trained: Sequence[str]) -> bool:
    """Whether a camera stands in the place of another one that it is known, by name, not to be."""
    pairs = zip(looked_at, trained, strict=False)
    return any(camera != known and (known in shown or camera in trained) for camera, known in pairs)


def _some(instructions: Iterable[str], count: int = 3) -> str:
    found = sorted(instructions)
    more = f" and {len(found) - count} others" if len(found) > count else ""
    return ", ".join(map(repr, found[:count])) + more


def _warn_once(policy: "Policy", about: Hashable, text: str) -> None:
    if about not in policy.warned_of:
        policy.warned_of |= {about}
        logger.warning("%s", text)
