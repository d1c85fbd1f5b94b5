"""A small chart: scales, ticks and marks as inline SVG whose colours come from the page's style sheet."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from reachrl.report.formats import plain

Number = float | int | None
Point = tuple[float, Number]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) inside a range.

    Args:
        low: Start of the range.
        high: End of the range, greater than `low`.
        about: How many are wanted.
    """
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def span(numbers: Iterable[Number], *, include: Sequence[float] = ()) -> tuple[float, float]:
    """Return a range that holds every number and `include`, with some air.

    Args:
        numbers: Data; None is skipped.
        include: Numbers that must be visible, such as 0.
    """
    known = [float(x) for x in numbers if x is not None] + list(include)
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if high - low < 1e-12 * max(1.0, abs(high)):
        half = abs(high) * 0.5 or 1.0
        return low - half, high + half
    air = 0.06 * (high - low)
    return (low if low in include else low - air), (high if high in include else high + air)


class Chart:
    """Axes with a linear scale each; marks are added and `render` returns the SVG."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int = 640,
        height: int = 300,
        margin: tuple[int, int, int, int] = (12, 16, 40, 52),
        x_label: str = "",
        y_label: str = "",
        x_format: Callable[[float], str] = plain,
        y_format: Callable[[float], str] = plain,
        y_ticks: bool = True,
        title: str = "",
    ) -> None:
        """Lay out the axes.

        Args:
            x: Range of the horizontal axis.
            y: Range of the vertical axis.
            width: Width of the picture, in CSS pixels at full size.
            height: Height of the picture.
            margin: Space above, right, below and left of the plot.
            x_label: Name of the horizontal axis.
            y_label: Name of the vertical axis.
            x_format: Writes a tick of the horizontal axis.
            y_format: Writes a tick of the vertical axis.
            y_ticks: Whether the vertical axis has ticks and grid lines.
            title: What a screen reader says.
        """
        self._x, self._y, self._width, self._height = x, y, width, height
        self.top, right, below, self.left = margin
        self.right, self.bottom = width - right, height - below
        self._parts: list[str] = []
        self._title = title
        self._axes(x_label, y_label, x_format, y_format, y_ticks)

    def x(self, number: float) -> float:
        """Return the horizontal position of a number."""
        low, high = self._x
        return round(self.left + (self.right - self.left) * (number - low) / (high - low), 2)

    def y(self, number: float) -> float:
        """Return the vertical position of a number."""
        low, high = self._y
        return round(self.bottom - (self.bottom - self.top) * (number - low) / (high - low), 2)

    def _axes(self, x_label: str, y_label: str, x_format: Callable, y_format: Callable, y_ticks: bool) -> None:
        for tick in ticks(*self._y, about=max(3, (self.bottom - self.top) // 45)) if y_ticks else ():
            y = self.y(tick)
            self.add(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y}" y2="{y}"/>')
            self.text(self.left - 7, y + 4, y_format(tick), anchor="end")
        self.add(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        for tick in ticks(*self._x, about=max(3, (self.right - self.left) // 80)):
            self.text(self.x(tick), self.bottom + 16, x_format(tick), anchor="middle")
        if x_label:
            self.text((self.left + self.right) / 2, self._height - 5, x_label, anchor="middle", css="label")
        if y_label:
            self.text(self.left, self.top - 4, y_label, anchor="start", css="label")

    def add(self, part: str) -> None:
        """Add a piece of SVG."""
        self._parts.append(part)

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", css: str = "tick") -> None:
        """Write words at a position in pixels."""
        self.add(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, points: Sequence[Point], colour: str, *, css: str = "line") -> None:
        """Draw a line; it breaks where a number is None."""
        path, pen_down = [], False
        for x, y in points:
            if y is None:
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{self.x(x)} {self.y(y)}")
            pen_down = True
        if path:
            self.add(f'<path class="{css} {colour}" d="{"".join(path)}"/>')

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        """Fill between two lines."""
        there = [f"{self.x(x)} {self.y(y)}" for x, y in zip(xs, high, strict=True)]
        back = [f"{self.x(x)} {self.y(y)}" for x, y in zip(reversed(xs), reversed(low), strict=True)]
        self.add(f'<path class="band {colour}" d="M{"L".join(there + back)}Z"/>')

    def dot(self, x: float, y: float, colour: str, *, radius: float = 4, note: str = "", css: str = "dot") -> None:
        """Draw a dot; `note` is shown when the pointer rests on it."""
        title = f"<title>{escape(note)}</title>" if note else ""
        self.add(f'<circle class="{css} {colour}" cx="{self.x(x)}" cy="{self.y(y)}" r="{radius:.1f}">{title}</circle>')

    def whisker(self, x: float, low: float, high: float, colour: str) -> None:
        """Draw a vertical interval."""
        px, top, bottom = self.x(x), self.y(high), self.y(low)
        d = f"M{px} {bottom}V{top}M{px - 4:.2f} {top}h8M{px - 4:.2f} {bottom}h8"
        self.add(f'<path class="whisker {colour}" d="{d}"/>')

    def row_whisker(self, py: float, low: float, high: float, colour: str) -> None:
        """Draw a horizontal interval at a vertical position in pixels."""
        left, right = self.x(low), self.x(high)
        d = f"M{left} {py}H{right}M{left} {py - 3.5}v7M{right} {py - 3.5}v7"
        self.add(f'<path class="whisker {colour}" d="{d}"/>')

    def rect(
        self, left: float, top: float, width: float, height: float, colour: str, *, note: str = "", opacity: float = 1.0
    ) -> None:
        """Draw a box at a position in pixels."""
        title = f"<title>{escape(note)}</title>" if note else ""
        shade = f' fill-opacity="{opacity:.3g}"' if opacity < 1 else ""
        self.add(
            f'<rect class="box {colour}" x="{left:.1f}" y="{top:.1f}" width="{max(width, 0):.1f}" '
            f'height="{height:.1f}"{shade}>{title}</rect>'
        )

    def render(self) -> str:
        """Return the picture as a part of a page."""
        # Narrow pages scroll sideways: text of 12 pixels shrinks to 11 and no further.
        least = math.ceil(self._width * 11 / 12)
        return f'<div class="scroll">{self._svg(f"max-width:{self._width}px;min-width:{least}px")}</div>'

    def document(self) -> str:
        """Return the picture as a file of its own, on white, for pages that bring no style sheet."""
        style = "<style>text{font:12px sans-serif;fill:#5b6776}.grid{stroke:#e9edf1}.axis{stroke:#dfe4ea}</style>"
        ground = f'<rect width="100%" height="100%" fill="#fff"/>{style}'
        return self._svg(f"max-width:{self._width}px", ground, 'xmlns="http://www.w3.org/2000/svg" ') + "\n"

    def _svg(self, style: str, ground: str = "", namespace: str = "") -> str:
        return (
            f'<svg {namespace}viewBox="0 0 {self._width} {self._height}" role="img" '
            f'aria-label="{escape(self._title)}" style="{style}">{ground}{"".join(self._parts)}</svg>'
        )
