"""Frames per second on one core: our renderer against MuJoCo's own with its defaults, in turns.

    python benchmarks/rendering.py [--task drawer-open] [--size 96]

Both draw the states of one expert episode from the same camera. Each side has its own process, as several
MuJoCo renderers in one process disturb each other; both are pinned to the same core and one of them works
at a time.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from reachrl.config.env import MetaworldConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "0")

CAMERA, CAMERA_POSITION_M = "corner2", (0.75, 0.075, 0.7)


def expert_states(task: str) -> tuple[str, list[dict[str, np.ndarray]]]:
    """The scene file of `task` and the states of an expert's episode."""
    from reachrl.envs.metaworld_task import MetaworldTask

    warnings.simplefilter("ignore")  # experts ask for more than the action range
    made = MetaworldTask(task, MetaworldConfig().mesh_faces)
    made.reset(made.start("train", 0))
    states = []
    for step in range(60):
        if step % 3 == 0:
            sim = made.sim
            states.append({"qpos": sim.data.qpos.copy(), "body_pos": sim.model.body_pos.copy()})
        made.step(made.expert_action())
    return made.sim.fullpath, states


def serve(pipe: Connection, side: str, xml: str, size: int, core: int) -> None:
    """Draw the state that is sent; answer with wall and CPU seconds and the frame."""
    os.sched_setaffinity(0, {core})
    draw, model, data, mujoco = (ours if side == "ours" else theirs)(xml, size)
    while (request := pipe.recv()) is not None:
        data.qpos[:], model.body_pos[:] = request["qpos"], request["body_pos"]
        mujoco.mj_forward(model, data)
        wall, cpu = time.perf_counter(), time.process_time()
        frame = draw()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, frame))
    os._exit(0)


def ours(xml: str, size: int) -> tuple[Any, ...]:
    """What `MetaworldEnv` does for a frame."""
    from pathlib import Path

    from reachrl.envs.gl import import_mujoco
    from reachrl.envs.render import Renderer
    from reachrl.envs.scene import load_scene

    mujoco = import_mujoco()
    model = load_scene(Path(xml), MetaworldConfig().mesh_faces)
    model.camera(CAMERA).pos[:] = CAMERA_POSITION_M
    data = mujoco.MjData(model)
    renderer = Renderer(size)
    number = renderer.add(model, CAMERA)
    return lambda: renderer.render(number, data)[:, ::-1].copy(), model, data, mujoco


def theirs(xml: str, size: int) -> tuple[Any, ...]:
    """The scene as it is on disk, drawn by `mujoco.Renderer` as it comes."""
    from reachrl.envs.gl import import_mujoco

    mujoco = import_mujoco()
    model = mujoco.MjModel.from_xml_path(xml)
    model.camera(CAMERA).pos[:] = CAMERA_POSITION_M
    data = mujoco.MjData(model)
    renderer = mujoco.Renderer(model, size, size)

    def draw() -> np.ndarray:
        renderer.update_scene(data, camera=CAMERA)
        return renderer.render()[::-1, ::-1].copy()

    return draw, model, data, mujoco


def main() -> None:
    """Print frames per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="drawer-open")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    xml, states = expert_states(arguments.task)
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in ("ours", "theirs"):
        pipes[side], far = context.Pipe()
        context.Process(
            target=serve, args=(far, side, xml, arguments.size, arguments.core), name=side, daemon=True
        ).start()
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    differences = []
    for turn in range(arguments.rounds + 1):  # the first is for warming up
        frames = {}
        for side, repeat in (("ours", 10), ("theirs", 1)):  # ours are short: more of them
            spent = []
            for state in states * repeat:
                pipes[side].send(state)
                wall, cpu, frames[side] = pipes[side].recv()
                spent.append((wall, cpu))
            if turn:
                seconds[side].append(tuple(np.mean(spent, axis=0)))
        differences.append(np.abs(frames["ours"].astype(int) - frames["theirs"]).mean())
    for pipe in pipes.values():
        pipe.send(None)
    print(f"{arguments.task}, {arguments.size} px, core {arguments.core}, {arguments.rounds} rounds in turns; ", end="")
    print(f"mean pixel difference {np.mean(differences):.1f} of 255")
    for clock, index in (("wall", 0), ("CPU", 1)):
        rates = {side: [1 / s[index] for s in values] for side, values in seconds.items()}
        ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
        print(
            f"{clock:>4}: ours {statistics.median(rates['ours']):6.1f} frames/s ({min(rates['ours']):.0f}.."
            f"{max(rates['ours']):.0f}), MuJoCo's defaults {statistics.median(rates['theirs']):5.1f} "
            f"({min(rates['theirs']):.1f}..{max(rates['theirs']):.1f}), "
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f}..{max(ratios):.1f})"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
