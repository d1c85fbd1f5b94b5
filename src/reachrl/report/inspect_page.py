"""A page that shows what a reward model thinks: its curve over the frames of episodes, and its quality in figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from reachrl.report import plots
from reachrl.report.embed import jpeg_uri
from reachrl.report.pages import drawn, write_page

FRAME = 92  # pixels of a frame in a strip
FRAMES = 11  # of a strip, evenly over the episode
BINS = 20  # of the mean curves over an episode


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedEpisode:
    """One episode with the reward model's scores, as plain arrays."""

    task: str
    about: str  # which start, who acted
    instruction: str
    success: bool | None  # None: unknown
    images: UInt8[np.ndarray, "T+1 H W 3"]
    scores: Float[np.ndarray, "T+1"]
    labels: Float[np.ndarray, "T+1"]  # 0..1; NaN: the frame has none
    order: float | None  # rank correlation of score with time


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One episode as drawn."""

    episode: InspectedEpisode
    facts: str
    picture: str  # data URI of a JPEG
    curve: Any  # SVG that lies over it


def write_inspect_page(
    path: Path,
    episodes: Sequence[InspectedEpisode],
    *,
    quality: dict[str, Any],
    per_task: dict[str, dict[str, Any]],
    model: str,
    notes: Sequence[str],
    most: int,
) -> Path:
    """Write the page: one HTML file that needs no network.

    Args:
        path: the file; its folder is created.
        episodes: what was scored.
        quality: figures over all episodes, as `rewards.process.quality.measure` names them.
        per_task: the same for each task.
        model: what the model is and where it lies.
        notes: sentences about what is not shown or not known.
        most: episodes drawn in each section.

    Raises:
        StorageError: the page cannot be written.
    """
    chosen = choose(episodes, most)
    return write_page(
        path,
        "inspect.html.j2",
        model=model,
        tiles=_tiles(quality),
        calibration=_calibration(quality),
        means=_mean_curves(episodes),
        tasks=[{"task": task} | figures for task, figures in per_task.items()],
        sections=[(title, why, [draw_strip(episode) for episode in found]) for title, why, found in chosen if found],
        notes=notes,
    )


def choose(episodes: Sequence[InspectedEpisode], most: int) -> list[tuple[str, str, list[InspectedEpisode]]]:
    """What is worth a look, each episode once: the mistakes first, then the others as they come.

    Args:
        episodes: what was scored.
        most: how many of each.

    Returns:
        (title, why, episodes) of each section.
    """
    failures = sorted((e for e in episodes if e.success is False), key=lambda e: -float(e.scores.max()))[:most]
    ordered = [e for e in episodes if e.success and e.order is not None]
    successes = sorted(ordered, key=lambda e: e.order or 0.0)[:most]
    shown = {id(episode) for episode in [*failures, *successes]}
    others = [episode for episode in episodes if id(episode) not in shown][:most]
    return [
        ("Failures the model likes most", "highest score of any frame first", failures),
        ("Successes it orders worst", "lowest rank correlation with time first", successes),
        ("Others", "as they are stored", others),
    ]


def draw_strip(episode: InspectedEpisode) -> Strip:
    """The frames of an episode side by side, with the score's curve over them."""
    last = len(episode.images) - 1
    # The middle of each picture stands for its frame, so that the curve passes over what it speaks of.
    shown = np.unique(np.linspace(0, last, min(FRAMES, last + 1)).round().astype(int))
    frames = [Image.fromarray(episode.images[t]).resize((FRAME, FRAME), Image.Resampling.BILINEAR) for t in shown]
    strip = np.concatenate([np.asarray(frame) for frame in frames], axis=1)
    width = FRAME * len(frames)

    def x(t: int) -> float:
        return FRAME / 2 + (width - FRAME) * t / max(1, last)

    def path(numbers: np.ndarray) -> str:
        points = [(x(t), FRAME - 2 - (FRAME - 4) * float(y)) for t, y in enumerate(numbers) if np.isfinite(y)]
        return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points) if points else ""

    facts = [f"last {episode.scores[-1]:.2f}", f"highest {episode.scores.max():.2f}"]
    if episode.order is not None:
        facts.append(f"rank correlation with time {episode.order:.2f}")
    curve = (
        f'<svg viewBox="0 0 {width} {FRAME}" role="img" aria-label="P(progress) over the episode">'
        f'<path class="half" d="M0 {FRAME / 2}H{width}"/><path class="label-curve" d="{path(episode.labels)}"/>'
        f'<path class="halo" d="{path(episode.scores)}"/><path class="score" d="{path(episode.scores)}"/></svg>'
    )
    return Strip(
        episode=episode,
        facts=", ".join(facts),
        picture=jpeg_uri(Image.fromarray(strip), quality=82),
        curve=drawn(curve),
    )


def _tiles(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    figures = [
        ("AUC", "auc", "success against failure, by the last frame; 0.5 is chance"),
        ("rank correlation", "rank_correlation", "of score and time on successes"),
        ("false positives", "false_positive_rate", "failures' frames scored at least one half"),
        ("false alarms", "false_alarm_rate", "failures with any such frame"),
        ("calibration error", "calibration_error", "expected, against the labels"),
    ]
    counts = [(f"{quality['successes']} / {quality['failures']}", "successes / failures", "")]
    return counts + [
        ("–" if quality.get(key) is None else f"{quality[key]:.3f}", name, hint) for name, key, hint in figures
    ]


def _calibration(quality: dict[str, Any]) -> Any:
    bins = quality.get("reliability")
    if not bins:
        return None
    points = [{"p": b["mean_score"], "observed": b["mean_label"], "n": b["n"]} for b in bins]
    return drawn(plots.calibration_chart(points))


def _mean_curves(episodes: Sequence[InspectedEpisode]) -> Any:
    """The mean score over the course of successes and of failures."""
    series = []
    for name, outcome, colour in (("successes", True, "c-after"), ("failures", False, "c-sampled")):
        curves = [
            np.interp(np.linspace(0, 1, BINS), np.linspace(0, 1, len(e.scores)), e.scores)
            for e in episodes
            if e.success is outcome and len(e.scores) > 1
        ]
        if curves:
            points = list(zip((np.linspace(0, 100, BINS)).tolist(), np.mean(curves, axis=0).tolist(), strict=True))
            series.append((name, colour, points))
    if not series:
        return None
    return drawn(plots.panel(series, x_label="% of the episode", zero=True, width=520, height=300))
