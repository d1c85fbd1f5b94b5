"""How the report writes numbers."""


def plain(number: float) -> str:
    """Write a number as briefly as it can be read."""
    if number == 0:
        return "0"
    if abs(number) >= 1e5 or abs(number) < 1e-3:
        return f"{number:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{number:.4g}"


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
