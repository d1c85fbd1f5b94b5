"""How reports and tables write numbers and names."""

from collections.abc import Sequence
from itertools import takewhile

_SHORT = 22  # characters that fit beside a chart


def plain(number: float) -> str:
    """Write a number as briefly as it can be read."""
    if number == 0:
        return "0"
    if abs(number) >= 1e5 or abs(number) < 1e-3:
        return f"{number:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{number:.4g}"


def task_labels(tasks: Sequence[str], longest: int = _SHORT) -> dict[str, str]:
    """A short label for each task: long names lose the words that all of them share, then their middle.

    Args:
        tasks: distinct names.
        longest: characters a label may have.
    """
    if all(len(task) <= longest for task in tasks):
        return {task: task for task in tasks}
    words = [task.split("_") for task in tasks]
    front = _shared(words) if len(tasks) > 1 else 0
    back = _shared([own[front:][::-1] for own in words]) if len(tasks) > 1 else 0
    labels = {task: " ".join(own[front : len(own) - back]) for task, own in zip(tasks, words, strict=True)}
    half = (longest - 1) // 2
    return {task: own if len(own) <= longest else f"{own[:half]}…{own[-half:]}" for task, own in labels.items()}


def _shared(words: Sequence[Sequence[str]]) -> int:
    """How many first words are the same in all of them."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))


def percent(number: float) -> str:
    """Write a share as whole per cent."""
    return f"{100 * number:.0f}%"


def tenths(number: float | None) -> str:
    """Write a share as per cent with one decimal; a dash where there is none."""
    return "–" if number is None else f"{100 * number:.1f} %"


def signed(number: float | None, digits: int = 3) -> str:
    """Write a number with its sign; a dash where there is none."""
    return "–" if number is None else f"{number:+.{digits}f}"


def duration(seconds: float | None) -> str:
    """Write seconds as seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def gibibytes(number: float | None) -> str:
    """Write bytes as GiB."""
    return "–" if number is None else f"{number / 2**30:.2f} GiB"
