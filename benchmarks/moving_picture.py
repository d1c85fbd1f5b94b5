"""The README's moving picture: the first held-out starts of each task, played before and after RL.

    python benchmarks/moving_picture.py runs/quickstart --out docs/pictures/quickstart.webp

Left the warm start, right the trained policy, with sampled actions; a row is a task, a column a start. Nothing is
chosen by its outcome.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import reachrl
from reachrl.config.loading import validate
from reachrl.config.train import TrainConfig
from reachrl.envs.vector import VectorEnv
from reachrl.evaluation import evaluate
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.configuration import read_config
from reachrl.types import Start

LABEL, TITLE, GAP, BORDER = 108, 24, 16, 3
BACKGROUND, INK, WAITING = (255, 255, 255), (51, 65, 85), (203, 213, 225)
SUCCESS, FAILURE = (16, 185, 129), (239, 68, 68)
LIMIT = 3_000_000


def play(policy: Path, config: TrainConfig, envs: VectorEnv, columns: int) -> list[PlayedEpisode]:
    """The first `columns` held-out starts of each task, task by task, with their frames."""
    starts = [Start(task, "eval", index) for task in config.env.tasks for index in range(columns)]
    result = evaluate(
        reachrl.load_policy(policy), envs, starts, mode="sampled", config=config.eval, record=lambda start: True
    )
    found = {episode.start: episode for episode in result.episodes}
    return [found[start] for start in starts]


def tile(episode: PlayedEpisode, moment: int, size: int) -> Image.Image:
    """A frame with a border that tells the outcome once the episode has ended."""
    frames = episode.frames()
    over = moment >= len(frames) - 1
    colour = WAITING if not over else SUCCESS if episode.success else FAILURE
    framed = Image.new("RGB", (size, size), colour)
    inside = size - 2 * BORDER
    frame = Image.fromarray(np.asarray(frames[min(moment, len(frames) - 1)]))
    framed.paste(frame.resize((inside, inside), Image.Resampling.LANCZOS), (BORDER, BORDER))
    return framed


def compose(blocks: dict[str, list[PlayedEpisode]], moment: int, columns: int, size: int) -> Image.Image:
    """One picture: a block for each policy, a row for each task."""
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    rows = len(next(iter(blocks.values()))) // columns
    width = LABEL + len(blocks) * columns * size + (len(blocks) - 1) * GAP
    canvas = Image.new("RGB", (width, TITLE + rows * size), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for place, (name, episodes) in enumerate(blocks.items()):
        left = LABEL + place * (columns * size + GAP)
        done = sum(episode.success and moment >= episode.num_steps for episode in episodes)
        draw.text((left + 2, 4), f"{name}: {done} of {len(episodes)} succeeded", fill=INK, font=bold)
        for number, episode in enumerate(episodes):
            top = TITLE + number // columns * size
            canvas.paste(tile(episode, moment, size), (left + number % columns * size, top))
            if place == 0 and number % columns == 0:
                draw.text((2, top + size // 2 - 7), episode.start.task, fill=INK, font=font)
    return canvas


def main() -> None:
    """Play, compose and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=6, help="start states of each task")
    parser.add_argument("--size", type=int, default=58, help="pixels of a frame's side")
    parser.add_argument("--every", type=int, default=2, help="keep every so manyth moment")
    arguments = parser.parse_args()
    config = validate(read_config(arguments.run), where=str(arguments.run))
    with VectorEnv(config.env, config.env.num_envs) as envs:
        blocks = {
            name: play(arguments.run / folder, config, envs, arguments.columns)
            for name, folder in {"Before RL": "sft/policy", "After RL": "policy"}.items()
        }
    length = max(len(episode.frames()) for episodes in blocks.values() for episode in episodes)
    moments = [*range(0, length - 1, arguments.every), *[length - 1] * 12]  # the end stands for a while
    first, *others = [compose(blocks, moment, arguments.columns, arguments.size) for moment in moments]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    first.save(arguments.out, save_all=True, append_images=others, duration=120, loop=0, quality=70, method=4)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(moments)} frames, {first.width} x {first.height}, {size / 1e6:.2f} MB")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB: take a smaller --size or a larger --every")


if __name__ == "__main__":
    main()
