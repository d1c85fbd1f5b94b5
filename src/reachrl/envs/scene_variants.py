"""Perturbations of what a MuJoCo scene looks like: cameras, light, colours, textures. Physics reads none of it."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from reachrl.config.perturbations import Variant
from reachrl.envs.gl import import_mujoco
from reachrl.types import Start

_COLOUR_WORDS = re.compile(r"\b(red|green|blue|yellow|white|black|brown|grey|gray|orange|pink|purple|silver|golden)\b")
_GEOM_COLOUR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # MuJoCo's default: the material's colour is drawn
_DRAWN_GROUPS = 3  # geom groups 0, 1 and 2 are drawn
_WAVES = 6  # that make up a pattern
_FINEST = 8  # periods of a wave across a texture, at most


class SceneVariants:
    """Changes one model's appearance for an episode, and undoes it for the next.

    Args:
        model: an `MjModel`.
        cameras: those that film; those that hang from nothing that moves can be turned.
        pivot: what fixed cameras are turned about, x y z in metres.
        surroundings: whether a body, by name, belongs to the room or the robot, not to the task.
        hidden_groups: geom groups that are not drawn.
    """

    def __init__(
        self,
        model: Any,
        cameras: Sequence[str],
        pivot: Sequence[float],
        surroundings: Callable[[str], bool],
        hidden_groups: Collection[int] = (),
    ) -> None:
        self.model = model
        self._cameras = [model.camera(name).id for name in cameras]
        self._pivot = np.array(pivot)
        self._surroundings = np.array([surroundings(model.body(body).name) for body in model.geom_bodyid])
        self._drawn = ~np.isin(model.geom_group, list(hidden_groups)) & (model.geom_group < _DRAWN_GROUPS)
        light = model.vis.headlight
        self._arrays: dict[str, np.ndarray] = {
            **{name: getattr(model, name) for name in ("cam_pos", "cam_quat", "geom_rgba", "tex_data")},
            **{name: getattr(model, name) for name in ("light_ambient", "light_diffuse", "light_specular")},
            **{f"headlight {name}": getattr(light, name) for name in ("ambient", "diffuse", "specular")},
        }
        self._pristine: dict[str, np.ndarray] = {}  # of the arrays that were ever changed
        self._changed: set[str] = set()

    def apply(self, start: Start, instruction: str) -> bool:
        """Make the scene look as the episode's variant says; as it was made, if it says nothing of looks.

        Args:
            start: of the episode.
            instruction: of its task.

        Returns:
            Whether textures are others than those of the scene as it was made.
        """
        for name in self._changed:
            self._arrays[name][:] = self._pristine[name]
        self._changed = set()
        variant = Variant.of(start)
        if variant is None:
            return False
        rng = variant.generator(start)
        if variant.axis == "camera":
            self._turn_cameras(np.radians(variant.value) * _sign(rng))
        elif variant.axis == "light":
            self._dim(2.0 ** (variant.value * _sign(rng)))
        elif variant.axis == "colour":
            self._paint(variant.value, rng, keep_objects=_COLOUR_WORDS.search(instruction) is not None)
        elif variant.axis == "texture":
            self._print(variant.value, rng)
        return variant.axis == "texture"

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
        mujoco, model, data = import_mujoco(), self.model, self._written("tex_data")
        for texture in range(model.ntex):
            height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
            channels, begin = int(model.tex_nchannel[texture]), int(model.tex_adr[texture])
            pattern = share * _pattern(height, width, rng)
            if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_SKYBOX or channels < 3:
                continue
            texels = data[begin : begin + height * width * channels].reshape(height, width, channels)
            texels[..., :3] = np.rint((1 - share) * texels[..., :3] + pattern)

    def _written(self, name: str) -> np.ndarray:
        """An array that is about to be changed."""
        if name not in self._pristine:
            self._pristine[name] = self._arrays[name].copy()
        self._changed.add(name)
        return self._arrays[name]


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _pattern(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of two random colours f64[H W 3], 0..255, with soft edges; cube textures lie one face below the other."""
    face = min(height, width)
    y, x = np.mgrid[0:height, 0:width] / face * 2 * np.pi
    waves = sum(
        np.sin(rng.integers(-_FINEST, _FINEST + 1) * x + rng.integers(-_FINEST, _FINEST + 1) * y + phase)
        for phase in rng.uniform(0, 2 * np.pi, _WAVES)
    )
    mix = 1 / (1 + np.exp(-4 * np.asarray(waves)))[..., None]
    one, other = rng.uniform(0, 255, (2, 3))
    return mix * one + (1 - mix) * other
