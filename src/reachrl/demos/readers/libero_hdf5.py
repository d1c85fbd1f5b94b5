"""LIBERO's demonstration files: HDF5 in robomimic's layout, one task a file.

    /data             attributes of LIBERO's own files: `problem_info` (JSON with `language_instruction`), `env_args`,
                      `macros_image_convention`
    /data/demo_0      actions [T 7], rewards [T], dones [T]
    /data/demo_0/obs  agentview_rgb u8[T H W 3], ee_pos [T 3] or ee_states [T 6], gripper_states [T 2], ...

There are as many frames as actions, a trajectory has one frame more: of T frames all are used, of T actions T - 1.
Which one is left out depends on who wrote the file. LIBERO's script stored what was seen after each action, so the
first action led to the first frame and falls away. Its replay without idle actions, as it was made for OpenVLA,
stored what was seen before each action, so the last one falls away; such files bear no attributes.

The task is the benchmark's task that the file is named after, and its sentence is that of the evaluation. The stored
sentence is the one of the task's BDDL file, which words 29 tasks otherwise ("Open the middle layer of the drawer" for
`open_the_middle_drawer_of_the_cabinet`) and begins with a capital in 5 others.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from reachrl.config.libero_tasks import find_task
from reachrl.config.libero_tasks import instruction as evaluation_sentence
from reachrl.demos.checks import check_finite
from reachrl.demos.damage import unreadable
from reachrl.demos.readers.end_effector import finger_opening
from reachrl.demos.readers.frames import check_size, slug
from reachrl.errors import ConfigError, MissingExtra, StorageError
from reachrl.types import Start, Trajectory

logger = logging.getLogger(__name__)

HDF5_SUFFIXES = (".hdf5", ".h5")
CAMERA = "agentview_rgb"
_SCENE = re.compile(r"^.*SCENE\d*_")  # KITCHEN_SCENE3_turn_on_the_stove: the sentence follows the scene


def read_libero_hdf5(path: Path, *, instruction: str | None = None, camera: str | None = None) -> Iterator[Trajectory]:
    """Read the demonstrations of one LIBERO file, or of all files of a folder, one in memory at a time.

    Frames are stored upside down; they are turned by 180 degrees, as OpenVLA's training and evaluation do, which
    also exchanges left and right. Openings come from the two finger joints. A demonstration without `rewards` and
    `dones` counts as a success. Task and sentence are the evaluation's; a file that is named after no task of LIBERO
    keeps its own sentence, with a warning.

    Args:
        path: a file, or a folder of `.hdf5` files.
        instruction: the sentence to use in place of the stored one.
        camera: the key under `obs`; None: `agentview_rgb`.

    Raises:
        MissingExtra: h5py is not installed.
        StorageError: a file is damaged or locked, lacks frames, actions, positions or finger joints, or holds a number
            that is not finite; names the demonstration and the step.
        ConfigError: there is no such camera, or no instruction in the file.
    """
    h5py = _h5py()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in HDF5_SUFFIXES)
    return (trajectory for file in files for trajectory in _demos(h5py, file, instruction, camera or CAMERA))


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra(f"reading HDF5 needs h5py ({error}); run  pip install 'reachrl[data]'") from error
    return h5py


def _demos(h5py: ModuleType, path: Path, instruction: str | None, camera: str) -> Iterator[Trajectory]:
    with _readable(path):
        file = h5py.File(path, "r")
    with file:
        with _readable(path):
            data = file.get("data")
            if not isinstance(data, h5py.Group):
                raise StorageError(
                    f"{path}: no group /data, found {sorted(file) or 'nothing'}; expected a file of LIBERO's "
                    "demonstrations (robomimic's layout: /data/demo_0/...)."
                )
            attributes = {name: _text(value) for name, value in data.attrs.items()}
            numbers = sorted(int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name))
            if not numbers:
                raise StorageError(f"{path}: /data holds no demo_0, demo_1, ...; found {sorted(data) or 'nothing'}.")
        task, sentence = (slug(instruction), instruction) if instruction else _task(path, attributes)
        for number in numbers:
            with _readable(path):
                demo = data[f"demo_{number}"]
                trajectory = _trajectory(path, demo, Start(task, "train", number), sentence, camera, attributes)
            yield trajectory


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn h5py's exceptions into errors that say what is wrong with the file."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        damage = "truncated or damaged, or no HDF5 file"
        raise unreadable(path, error, remedy="Fetch it again.", damage=damage) from error


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _task(path: Path, attributes: dict[str, Any]) -> tuple[str, str]:
    """The task's name and its sentence."""
    stored = _stored_sentence(path, attributes)
    named, recorded = find_task(path.name), find_task(str(attributes.get("bddl_file_name", "")))
    if named is not None and recorded not in (None, named):
        raise StorageError(
            f"{path}: the file is named after the task {named}, but was recorded in {recorded} (the attribute "
            f"bddl_file_name of /data). Call it {recorded}_demo.hdf5 if that is so, or fetch it again."
        )
    task = named or recorded
    if task is not None:
        sentence = evaluation_sentence(task)
        if stored not in (None, sentence):
            logger.info("%s: the sentence is %r, as in the evaluation; stored was %r", path, sentence, stored)
        return task, sentence
    if stored is not None:
        logger.warning(
            "%s: named after no task of LIBERO's, so its own sentence %r is used; an evaluation may word it otherwise",
            path,
            stored,
        )
        return slug(stored), stored
    if path.stem.endswith("_demo"):
        sentence = _SCENE.sub("", path.stem.removesuffix("_demo")).replace("_", " ").strip()
        return slug(sentence), sentence
    raise ConfigError(
        f"{path}: no sentence found: /data has no attribute problem_info, and the name does not end in _demo. "
        "Give an instruction."
    )


def _stored_sentence(path: Path, attributes: dict[str, Any]) -> str | None:
    """What LIBERO's own files say is to be done, in the words of the task's BDDL file; None in others."""
    if "problem_info" not in attributes:
        return None
    try:
        sentence = json.loads(attributes["problem_info"])["language_instruction"]
        return "".join(sentence).strip().strip('"')
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}: the attribute problem_info of /data holds no language_instruction ({error!r}). "
            "Fetch the file again, or give an instruction."
        ) from error


def _trajectory(
    path: Path, demo: Any, start: Start, instruction: str, camera: str, attributes: dict[str, Any]
) -> Trajectory:
    where = f"{path}, demo_{start.index}"
    obs = demo.get("obs")
    if obs is None or "actions" not in demo:
        raise StorageError(f"{where}: found {sorted(demo)}; expected `actions` and `obs`. Fetch the file again.")
    actions = np.asarray(demo["actions"][()], np.float32)
    images, ee_state = _frames(obs, camera, where, attributes), _ee_state(obs, where)
    if not len(actions) == len(images) == len(ee_state) or len(actions) == 0 or actions.ndim != 2:
        raise StorageError(
            f"{where}: actions {actions.shape}, {len(images)} frames and {len(ee_state)} poses; expected as many of "
            "each, and at least one. Fetch the file again."
        )
    first = 1 if "problem_info" in attributes else 0  # frames were stored after their actions: the first leads nowhere
    actions = actions[first : len(actions) - 1 + first]
    check_finite(actions, "action", where, first_step=first)
    check_finite(ee_state, "ee_state (x, y, z, gripper)", where)
    return Trajectory(
        start=start,
        instruction=instruction,
        actions=actions,
        images={camera: images},
        ee_state=ee_state,
        success=_success(demo, where),
        source="libero",
        control_hz=_control_hz(path, attributes),
    )


def _control_hz(path: Path, attributes: dict[str, Any]) -> float | None:
    """Actions a second, where the file says what its environment was made with."""
    if "env_args" not in attributes:
        return None
    try:
        found = json.loads(attributes["env_args"]).get("env_kwargs", {}).get("control_freq")
        return None if found is None else float(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path}: the attribute env_args of /data holds no usable control_freq ({error!r}). Fetch the file again."
        ) from error


def _success(demo: Any, where: str) -> bool:
    outcomes = [np.asarray(demo[key][-1], np.float64) for key in ("rewards", "dones") if key in demo and len(demo[key])]
    if not np.isfinite(outcomes).all():
        raise StorageError(f"{where}: the last of rewards or dones is not finite; expected numbers.")
    return not outcomes or any(outcome > 0 for outcome in outcomes)


def _frames(obs: Any, camera: str, where: str, attributes: dict[str, Any]) -> UInt8[np.ndarray, "T H W 3"]:
    """The frames of a camera, upright."""
    cameras = sorted(key for key in obs if getattr(obs[key], "ndim", 0) == 4 and obs[key].shape[3] == 3)
    if camera not in cameras:
        raise ConfigError(f"{where}: no camera {camera!r} under obs. There are: {', '.join(cameras) or 'none'}.")
    stored = obs[camera]
    if stored.dtype != np.uint8:
        raise StorageError(f"{where}: {camera} is {stored.dtype}, expected uint8 frames.")
    num_frames, height, width, _ = stored.shape
    check_size(num_frames, height, width, where)
    return np.ascontiguousarray(stored[()][:, _rows(where, attributes), ::-1])


def _rows(where: str, attributes: dict[str, Any]) -> slice:
    """How rows are taken so that the picture is upright; left and right are exchanged besides."""
    # A replay without attributes was drawn with robosuite's default, which is "opengl".
    default = None if "problem_info" in attributes else "opengl"
    convention = attributes.get("macros_image_convention", default)
    if convention not in ("opengl", "opencv"):
        raise StorageError(
            f"{where}: the attribute macros_image_convention of /data is {convention!r}; expected 'opengl' (frames "
            "stored upside down) or 'opencv' (rows in order). Fetch the file again, or write the attribute."
        )
    return slice(None) if convention == "opencv" else slice(None, None, -1)


def _ee_state(obs: Any, where: str) -> Float32[np.ndarray, "T 4"]:
    """Position and opening of every frame."""
    position = next((key for key in ("ee_pos", "ee_states") if key in obs), None)
    if position is None or "gripper_states" not in obs:
        lacking = "positions (ee_pos or ee_states)" if position is None else "finger joints (gripper_states)"
        raise StorageError(
            f"{where}: no {lacking} under obs, found {', '.join(sorted(obs))}. Segments and keyframes need them: "
            "write the file with proprioception."
        )
    xyz, fingers = np.asarray(obs[position][()])[:, :3], np.asarray(obs["gripper_states"][()])
    if xyz.shape != (len(fingers), 3) or fingers.shape[1:] != (2,):
        raise StorageError(
            f"{where}: {position} is {obs[position].shape} and gripper_states {fingers.shape}; expected "
            "[T 3 or 6] and [T 2]."
        )
    return np.column_stack([xyz, finger_opening(fingers)]).astype(np.float32)
