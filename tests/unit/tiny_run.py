"""A run of the toy environment in seconds, stage by stage in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.pipeline import STAGES, run_stage

OVERRIDES = (
    *(
        "env.num_envs=2",
        "env.max_steps=4",
        "rollout.num_steps=4",
        "num_iterations=3",
        "checkpoint_every=2",
        "num_threads=1",
    ),
    *(
        "sft.epochs=0",
        "reward.kind=task",
        "algorithm.lr=2e-4",
        "algorithm.lr_warmup_iterations=0",
        "algorithm.minibatch_size=8",
        "algorithm.micro_batch_size=8",
        "algorithm.warmup_iterations=1",
    ),
    *("eval.num_starts=1", "eval.num_videos=0"),
)


class Lines:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def stage(self, *_: Any, **__: Any) -> Iterator["Lines"]:
        yield self

    def advance(self, *_: Any, **__: Any) -> None:
        """Nothing to show."""

    def log(self, text: str) -> None:
        """Keep the line."""
        self.lines.append(text)


def tiny_config(*overrides: str) -> TrainConfig:
    """The toy preset, so small that an iteration takes a fraction of a second; no demonstrations, the task's reward."""
    return load_config("toy", [*OVERRIDES, *overrides])


def play(config: TrainConfig, run: Path, *stages: str) -> list[str]:
    """Run stages (all of them if none is named) and return what they said."""
    display = Lines()
    for stage in stages or STAGES:
        run_stage(stage, config, run, display)
    return display.lines


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The training records without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if not key.startswith("seconds/")}
        for record in records
        if record["kind"] == "train"
    ]
