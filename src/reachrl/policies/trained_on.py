"""Record of a policy's training data, stored beside its weights, and comparison of other inputs with it."""

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from reachrl.errors import CheckpointError

TRAINED_ON_FILE = "trained_on.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOn:
    """Instructions, frame sizes and cameras of all training data, demonstrations and rollouts alike."""

    instructions: frozenset[str]
    sizes: frozenset[tuple[int, int]]  # (height, width) in pixels, of any camera
    cameras: tuple[str, ...] = ()  # in the order of the first training data; (): unknown

    @classmethod
    def of(cls, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> "TrainedOn":
        """Record instructions and frames u8[... H W 3]."""
        sizes = frozenset((int(frames.shape[-3]), int(frames.shape[-2])) for frames in images.values())
        return cls(instructions=frozenset(instructions), sizes=sizes, cameras=tuple(images))

    def joined(self, other: "TrainedOn") -> "TrainedOn":
        """Return the union of two records; the order of cameras is that of the first."""
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
        """Read `trained_on.json`; None if there is none, as in checkpoints of other tools.

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

    def unfamiliar(
        self,
        instructions: Iterable[str],
        images: Mapping[str, np.ndarray],
        *,
        num_cameras: int,
        prompt: Callable[[str], str],
    ) -> Iterator[tuple[Hashable, str]]:
        """Find instructions, frame sizes and orders of cameras that are not those of the training data.

        Unknown camera names are not reported: they may be other names of the same cameras.

        Args:
            instructions: the tasks in words.
            images: frames u8[... H W 3] by camera, in the order in which the policy reads them.
            num_cameras: how many of them it reads.
            prompt: text prompt of an instruction; equal prompts are the same task.

        Yields:
            A key, by which the warning is logged once, and the message.
        """
        strange = set(instructions) - self.instructions
        if strange:
            asked = {prompt(instruction) for instruction in self.instructions}
            for instruction in sorted(each for each in strange if prompt(each) not in asked):
                close = get_close_matches(instruction, sorted(self.instructions), n=1)
                hint = f"the nearest it knows is {close[0]!r}" if close else f"it knows {_some(self.instructions)}"
                yield (
                    instruction,
                    f"the policy was never trained on the instruction {instruction!r}; {hint}. Expect little of it "
                    "there",
                )
        looked_at = list(images)[:num_cameras]
        if _exchanged(looked_at, images, self.cameras):
            yield (
                ("cameras", *looked_at),
                f"the policy looks at the cameras {', '.join(looked_at)} in this order, it was trained on "
                f"{', '.join(self.cameras[:num_cameras])}: it takes one camera for another. Give them in the order of "
                "training (env.cameras, or the order of the images of predict)",
            )
        for camera, frames in images.items():
            height, width = frames.shape[-3:-1]
            if (height, width) not in self.sizes:
                sizes = ", ".join(f"{h} x {w}" for h, w in sorted(self.sizes))
                yield (
                    (camera, height, width),
                    f"camera {camera!r} gives frames of {height} x {width} pixels, the policy was trained on {sizes}: "
                    "they are resized, but details and proportions may not be those it learned from",
                )


def _exchanged(looked_at: Sequence[str], shown: Collection[str], trained: Sequence[str]) -> bool:
    """Return whether the names of two cameras show that they are exchanged."""
    pairs = zip(looked_at, trained, strict=False)
    return any(camera != known and (known in shown or camera in trained) for camera, known in pairs)


def _some(instructions: Iterable[str], count: int = 3) -> str:
    found = sorted(instructions)
    more = f" and {len(found) - count} others" if len(found) > count else ""
    return ", ".join(map(repr, found[:count])) + more
