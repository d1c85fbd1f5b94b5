"""Frames of an episode enlarged, with caption, value, process reward and outcome drawn on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (17, 22, 29)
INK = (226, 232, 240)
FAINT = (71, 85, 105)
VALUE_COLOUR = (96, 165, 250)
PROCESS_COLOUR = (251, 176, 64)
SUCCESS_COLOUR = (52, 211, 153)
FAILURE_COLOUR = (248, 113, 113)
BORDER = 4
LINE = 16
CURVES = 54


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:2]


def _scale(curves: Sequence[Sequence[float] | None]) -> tuple[float, float]:
    """Return the range that shows every finite number and zero."""
    numbers = [float(x) for curve in curves if curve is not None for x in curve if np.isfinite(x)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    return (low, high) if high > low else (low, low + 1.0)


def _draw_curve(
    draw: ImageDraw.ImageDraw,
    curve: Sequence[float] | None,
    upto: int,
    box: tuple[int, int, int, int],
    num_frames: int,
    colour: tuple[int, int, int],
) -> None:
    """Draw one curve in its own range up to frame `upto`, the rest of the episode being the future."""
    if curve is None or len(curve) == 0:
        return
    left, top, right, bottom = box
    low, high = _scale([curve])
    points = [
        (
            left + (right - left) * t / max(1, num_frames - 1),
            bottom - (bottom - top) * (float(number) - low) / (high - low),
        )
        for t, number in enumerate(curve[: upto + 1])
        if np.isfinite(number)
    ]
    if len(points) > 1:
        draw.line(points, fill=colour, width=2)
    if points:
        x, y = points[-1]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _readout(name: str, curve: Sequence[float] | None, t: int) -> str:
    """Return "value +0.41", the name alone where the step has no number, nothing where there is no such curve."""
    if curve is None:
        return ""
    return f"{name} {curve[t]:+.2f}" if t < len(curve) and np.isfinite(curve[t]) else name


def draw_overlay(
    frames: UInt8[np.ndarray, "F H W 3"],
    *,
    instruction: str,
    values: Sequence[float] | None,
    process: Sequence[float] | None,
    success: bool,
) -> UInt8[np.ndarray, "F H2 W2 3"]:
    """Draw the instruction, the value and the process reward above every frame, enlarged to 288 pixels at least.

    Args:
        frames: The episode's frames, the true final one last.
        instruction: The caption.
        values: The critic's value at each frame (`F` or `F - 1` numbers), or None if there is no critic.
        process: The process reward of each step (`F - 1` numbers), or None if there is none.
        success: Whether the episode succeeded; the last frame gets a green or red border and says so.

    Returns:
        The drawn frames, with even height and width as video needs.
    """
    num_frames, height, width, _ = frames.shape
    times = max(1, -(-288 // height))
    layout = _Layout.of(width * times, height * times, instruction)
    drawn = np.empty((num_frames, layout.total_height, layout.total_width, 3), np.uint8)
    for t in range(num_frames):
        canvas = Image.new("RGB", (layout.total_width, layout.total_height), BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for i, line in enumerate(layout.caption):
            draw.text((BORDER, 4 + LINE * i), line, fill=INK, font=_font(14))
        verdict = success if t == num_frames - 1 else None
        _draw_frame(canvas, draw, frames[t], layout, verdict)
        _draw_strip(draw, layout, t, num_frames, values, process)
        drawn[t] = np.asarray(canvas)
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the parts of a drawn frame are, in pixels."""

    caption: list[str]
    width: int  # of the enlarged frame
    height: int
    strip: int  # top of the numbers and curves, above the frame: a player's controls cover the lower edge
    top: int  # of the frame's border
    total_width: int
    total_height: int

    @classmethod
    def of(cls, width: int, height: int, instruction: str) -> "_Layout":
        """Lay out a frame enlarged to `width` by `height`; totals are even, as video needs."""
        caption = _wrap(instruction, width, _font(14))
        strip = 8 + LINE * len(caption)
        top = strip + LINE + CURVES
        total_width, total_height = width + 2 * BORDER, top + height + 2 * BORDER
        return cls(
            caption=caption,
            width=width,
            height=height,
            top=top,
            strip=strip,
            total_width=total_width + total_width % 2,
            total_height=total_height + total_height % 2,
        )


def _draw_frame(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    frame: UInt8[np.ndarray, "H W 3"],
    layout: _Layout,
    verdict: bool | None,
) -> None:
    """Paste the enlarged frame; where the verdict is known, add the border and the word."""
    left, top = BORDER, layout.top + BORDER
    enlarged = Image.fromarray(frame).resize((layout.width, layout.height), Image.Resampling.BICUBIC)
    if verdict is None:
        canvas.paste(enlarged, (left, top))
        return
    colour, word = (SUCCESS_COLOUR, "SUCCESS") if verdict else (FAILURE_COLOUR, "FAILED")
    draw.rectangle(
        (0, layout.top, layout.width + 2 * BORDER - 1, layout.top + layout.height + 2 * BORDER - 1), fill=colour
    )
    canvas.paste(enlarged, (left, top))
    draw.rectangle((left, top, left + _font(14).getlength(word) + 12, top + 20), fill=colour)
    draw.text((left + 6, top + 2), word, fill=BACKGROUND, font=_font(14))


def _draw_strip(
    draw: ImageDraw.ImageDraw,
    layout: _Layout,
    t: int,
    num_frames: int,
    values: Sequence[float] | None,
    process: Sequence[float] | None,
) -> None:
    """Write the numbers of step `t` and draw the curves so far."""
    font, y = _font(12), layout.strip + 2
    draw.text((BORDER, y), _readout("value", values, t), fill=VALUE_COLOUR, font=font)
    draw.text((BORDER + layout.width // 3, y), _readout("process", process, t), fill=PROCESS_COLOUR, font=font)
    step = f"step {t}/{num_frames - 1}"
    draw.text((BORDER + layout.width - font.getlength(step), y), step, fill=FAINT, font=font)
    box = (BORDER + 3, layout.strip + LINE + 8, BORDER + layout.width - 4, layout.top - 6)
    draw.line((box[0], box[3], box[2], box[3]), fill=FAINT)
    _draw_curve(draw, process, t, box, num_frames, PROCESS_COLOUR)
    _draw_curve(draw, values, t, box, num_frames, VALUE_COLOUR)
