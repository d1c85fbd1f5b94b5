"""Pages that open offline: one HTML file each, made from a template of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reachrl.report.formats import duration, gibibytes, signed, tenths
from reachrl.run.atomic import utf8, write_bytes_atomic

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **content: Any) -> str:
    """Fill a template; words are escaped, pictures are marked with `drawn` or the filter `drawn`.

    Args:
        template: a file of `report/templates/`.
        content: what it shows.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=tenths, duration=duration, size=gibibytes, signed=signed, drawn=drawn)
    return environment.get_template(template).render(**content)


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Fill a template and write it in one piece; see `render_page`.

    Raises:
        StorageError: the disk refused the write; a page that was there before is still there.
    """
    write_bytes_atomic(path, utf8(render_page(template, **content)))
    return path


def drawn(picture: str) -> Any:
    """Mark a drawn picture as HTML; its words were escaped when it was drawn."""
    import markupsafe

    return markupsafe.Markup(picture)


def two_widths(draw: Callable[..., str], *content: Any, **how: Any) -> Any:
    """What `draw` makes of some content, for wide pages and for telephones; the style sheet shows what fits."""
    wide, narrow = (draw(*content, **how, narrow=each) for each in (False, True))
    return drawn(f'<div class="on-wide">{wide}</div><div class="on-narrow">{narrow}</div>')
