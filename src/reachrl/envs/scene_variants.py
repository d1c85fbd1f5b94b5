"""Perturbations of what a MuJoCo scene looks like: cameras, light, colours, textures. Physics reads none of it."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reachrl.config.perturbations import Variant
from reachrl.envs.gl import import_mujoco
from reachrl.types import Start

_COLOUR_WORDS = re.compile(r"\b(red|green|blue|yellow|white|black|brown|grey|gray|orange|pink|purple|silver|golden)\b")
_GEOM_COLOUR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # MuJoCo's default: the material's colour is drawn
_DRAWN_GROUPS = 3  # geom groups 0, 1 and 2 are drawn
_WAVES = 6  # that make up a pattern
_GRID = 256  # points along an edge that a pattern is computed at, at least
_FINEST = 8  # periods of a wave across a texture, at most


class SceneVariants:
    """Changes one model's appearance for an episode, and undoes it for the next.

    Args:
        model: an `MjModel`.
        cameras: those that film; those that hang from nothing that moves can be turned.
        pivot: what fixed cameras are turned about, x y z in metres.
        surroundings: whether a body, by name, belongs to the room or the robot, not to the task.
        hidden_groups: geom groups that are not drawn.
        objects_keep_theirs: colours and textures of what belongs to the task never change; else colours do, where the
            instruction names none, and textures.
        original: makes a model with the textures as they were; needed where those of `model` are gone.
    """

    def __init__(
        self,
        model: Any,
        cameras: Sequence[str],
        pivot: Sequence[float],
        surroundings: Callable[[str], bool],
        hidden_groups: Collection[int] = (),
        *,
        objects_keep_theirs: bool = False,
        original: Callable[[], Any] | None = None,
    ) -> None:
        self.model = model
        self._objects_keep_theirs = objects_keep_theirs
        self._original = original or (lambda: model)
        self._cameras = [model.camera(name).id for name in cameras]
        self._pivot = np.array(pivot)
        self._surroundings = np.array([surroundings(model.body(body).name) for body in model.geom_bodyid])
        self._drawn = ~np.isin(model.geom_group, list(hidden_groups)) & (model.geom_group < _DRAWN_GROUPS)
        light = model.vis.headlight
        self._arrays: dict[str, np.ndarray] = {
            **{name: getattr(model, name) for name in ("cam_pos", "cam_quat", "geom_rgba")},
            **{name: getattr(model, name) for name in ("light_ambient", "light_diffuse", "light_specular")},
            **{f"headlight {name}": getattr(light, name) for name in ("ambient", "diffuse", "specular")},
        }
        self._pristine: dict[str, np.ndarray] = {}  # of the arrays that were ever changed
        self._changed: set[str] = set()
        self._texels: dict[int, np.ndarray] = {}  # of textures that were ever printed on, as they were
        self._printed: list[int] = []

    def undo(self) -> list[int]:
        """Make the scene look as it was made.

        Returns:
            The textures that were others until now.
        """
        for name in self._changed:
            self._arrays[name][:] = self._pristine[name]
        self._changed = set()
        printed, self._printed = self._printed, []
        for texture in printed:
            _texels(self.model, texture)[:] = self._texels[texture]
        return printed

    def apply(self, start: Start, instruction: str) -> list[int]:
        """Make the scene look as the episode's variant says; as it was made, if it says nothing of looks.

        Args:
            start: of the episode.
            instruction: of its task.

        Returns:
            The textures that are others than those of the scene as it was made.
        """
        self.undo()
        variant = Variant.of(start)
        if variant is None:
            return []
        rng = variant.generator(start)
        if variant.axis == "camera":
            self._turn_cameras(np.radians(variant.value) * _sign(rng))
        elif variant.axis == "light":
            self._dim(2.0 ** (variant.value * _sign(rng)))
        elif variant.axis == "colour":
            named = _COLOUR_WORDS.search(instruction) is not None
            self._paint(variant.value, rng, keep_objects=named or self._objects_keep_theirs)
        elif variant.axis == "texture":
            self._print(variant.value, rng)
        return self._printed

    def turn_camera(self, camera: int, rotation: np.ndarray) -> None:
        """Turn a fixed camera with its position about the pivot by a quaternion (w x y z)."""
        mujoco = import_mujoco()
        position, orientation = self._written("cam_pos"), self._written("cam_quat")
        offset, turned = np.zeros(3), np.zeros(4)
        mujoco.mju_rotVecQuat(offset, position[camera] - self._pivot, rotation)
        mujoco.mju_mulQuat(turned, rotation, orientation[camera])
        position[camera], orientation[camera] = self._pivot + offset, turned

    def _turn_cameras(self, angle: float) -> None:
        fixed = [camera for camera in self._cameras if self.model.cam_bodyid[camera] == 0]
        for camera in fixed:
            self.turn_camera(camera, np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]))

    def _dim(self, factor: float) -> None:
        for name in self._arrays:
            if "light" in name:
                self._written(name)[:] *= factor

    def _paint(self, share: float, rng: np.random.Generator, *, keep_objects: bool) -> None:
        model, colours = self.model, self._written("geom_rgba")
        pristine = self._pristine["geom_rgba"]
        looks: dict[tuple[Any, ...], np.ndarray] = {}
        for geom in np.flatnonzero(self._drawn & (pristine[:, 3] > 0)).tolist():
            material, own = int(model.geom_matid[geom]), pristine[geom]
            if material >= 0 and np.allclose(own, _GEOM_COLOUR):
                own = model.mat_rgba[material]
            look = (material, *own.round(3).tolist())
            if look not in looks:
                looks[look] = rng.uniform(0.0, 1.0, 3)
            if self._surroundings[geom] or not keep_objects:
                colours[geom, :3] = (1 - share) * own[:3] + share * looks[look]
                colours[geom, 3] = own[3]

    def _print(self, share: float, rng: np.random.Generator) -> None:
        model, printable = self.model, self._printable()
        patterns = [_Pattern.draw(rng) for _ in range(model.ntex)]
        if not self._texels:
            original = self._original()
            self._texels = {texture: _texels(original, texture).copy() for texture in printable}
        for texture in printable:
            texels = self._texels[texture][..., :3]
            pattern = patterns[texture].pixels(*texels.shape[:2])
            _texels(model, texture)[..., :3] = np.rint((1 - share) * texels + share * pattern)
        self._printed = printable

    def _printable(self) -> list[int]:
        """The textures in colour that something drawn wears and nothing that keeps its own."""
        model, keeps = self.model, ~self._surroundings if self._objects_keep_theirs else np.zeros_like(self._drawn)
        worn, kept = (self._worn(self._drawn & ~keeps), self._worn(self._drawn & keeps))
        return [texture for texture in sorted(worn - kept) if model.tex_nchannel[texture] >= 3]

    def _worn(self, geoms: np.ndarray) -> set[int]:
        """Textures of some geoms, given as bool[G]."""
        materials = self.model.geom_matid[geoms]
        return set(self.model.mat_texid[materials[materials >= 0]].ravel().tolist()) - {-1}

    def _written(self, name: str) -> np.ndarray:
        """An array that is about to be changed."""
        if name not in self._pristine:
            self._pristine[name] = self._arrays[name].copy()
        self._changed.add(name)
        return self._arrays[name]


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _texels(model: Any, texture: int) -> np.ndarray:
    """The pixels of a texture u8[H W C], as the model holds them."""
    height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
    channels, begin = int(model.tex_nchannel[texture]), int(model.tex_adr[texture])
    return model.tex_data[begin : begin + height * width * channels].reshape(height, width, channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    """Patches of two random colours with soft edges."""

    waves: Sequence[tuple[int, int, float]]
    """Periods across a texture, to the right and down, and phase."""
    colours: np.ndarray
    """f64[2 3], 0..255."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Pattern":
        waves = [
            (int(rng.integers(-_FINEST, _FINEST + 1)), int(rng.integers(-_FINEST, _FINEST + 1)), float(phase))
            for phase in rng.uniform(0, 2 * np.pi, _WAVES)
        ]
        return cls(waves=waves, colours=rng.uniform(0, 255, (2, 3)))

    def pixels(self, height: int, width: int) -> np.ndarray:
        """The pattern f64[H W 3]; cube textures lie one face below the other."""
        face = min(height, width)
        coarse = max(1, face // _GRID)
        y, x = np.mgrid[0:height:coarse, 0:width:coarse] / face * 2 * np.pi
        waves = sum(np.sin(right * x + down * y + phase) for right, down, phase in self.waves)
        mix = 1 / (1 + np.exp(-4 * np.asarray(waves)))[..., None]
        pattern = mix * self.colours[0] + (1 - mix) * self.colours[1]
        return pattern.repeat(coarse, axis=0)[:height].repeat(coarse, axis=1)[:, :width]
