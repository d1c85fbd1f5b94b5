"""Write the pages of the reference that list every option and every field: `python docs/fields.py`."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from pydantic_core import PydanticUndefined

from reachrl.cli.config import field_help
from reachrl.config.base import Section
from reachrl.config.train import KIND_SECTIONS, TrainConfig
from reachrl.errors import MissingExtra
from reachrl.registry import BUILTINS, section_class

REFERENCE = Path(__file__).parent / "reference"
# Modules whose public dataclasses a user of Python or the author of a plug-in meets.
MODULES = (
    "reachrl.types",
    "reachrl.results",
    "reachrl.policies.answers",
    "reachrl.algorithms.base",
    "reachrl.functional.action_stats",
    "reachrl.demos.sft",
    "reachrl.rollout.episodes",
)


def cell(text: object) -> str:
    """Words that stay inside their cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def section_rows(section: type[Section], key: str) -> Iterator[str]:
    """A row for each option of a section, those of sections inside it last."""
    inner: list[tuple[type[Section], str]] = []
    annotations = annotations_of(section)
    for name, field in section.model_fields.items():
        path = f"{key}.{name}" if key else name
        if not key and name in KIND_SECTIONS:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner.append((field.annotation, path))
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{cell(repr(default))}`"
        kind = cell(annotations.get(name, field.annotation))
        yield f"| `{path}` | `{kind}` | {shown} | {cell(field_help(section, name))} |"
    for part, path in inner:
        yield from section_rows(part, path)


def annotations_of(cls: type) -> dict[str, str]:
    """Annotations as they are written, without the marks of what a key affects."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if parent.__module__.startswith("reachrl"):
            found |= {name: annotation for name, annotation, _, _ in fields_in_source(parent)}
    return found


def fields_in_source(cls: type) -> Iterator[tuple[str, str, str | None, str]]:
    """Name, annotation, default and help of the fields that a class states itself, from its source."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    [body] = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for place, node in enumerate(body.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = node.annotation
        while isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
            annotation = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
        below = body.body[place + 1] if place + 1 < len(body.body) else None
        text = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = str(below.value.value)
        elif "  # " in (line := lines[(node.end_lineno or node.lineno) - 1]):
            text = line.rpartition("  # ")[2].partition("pyright:")[0].rstrip(" #")
        default = None if node.value is None else ast.unparse(node.value)
        yield node.target.id, ast.unparse(annotation), default, text


def options_page() -> str:
    """Every option of every built-in kind."""
    head = "| Option | Type | Default | What it is |\n|---|---|---|---|"
    parts = [
        "# Options",
        "Every option, as the key that is written in a preset or on the command line. Units and shapes are named where "
        "there are any; `reachrl config PRESET --docs` prints the same with a preset's values. Written by "
        "`python docs/fields.py`.",
        "## The whole run",
        "\n".join([head, *section_rows(TrainConfig, "")]),
    ]
    for key, group in KIND_SECTIONS.items():
        for kind in BUILTINS[group]:
            try:
                section = section_class(group, kind)
            except MissingExtra:
                continue
            parts += [
                f"## `{key}.kind={kind}`",
                cell(inspect.getdoc(section) or "").partition(". ")[0].rstrip(".") + ".",
            ]
            parts.append("\n".join([head, *section_rows(section, key)]))
    return "\n\n".join(parts) + "\n"


def public_dataclasses() -> Iterator[type]:
    """Those that the modules define themselves."""
    for name in MODULES:
        module = importlib.import_module(name)
        for each, found in vars(module).items():
            own = inspect.isclass(found) and found.__module__ == name and hasattr(found, "__dataclass_fields__")
            if own and not each.startswith("_"):
                yield found


def fields_page() -> str:
    """Every field of the public dataclasses."""
    parts = [
        "# Fields",
        "The data that users of Python and authors of plug-ins meet, with type, shape and default. `T` decisions, `N` "
        "environments, `A` token slots, `H` actions of a chunk, `D` action dimensions, `S` state numbers, `B` rows. "
        "Written by `python docs/fields.py`.",
    ]
    for cls in public_dataclasses():
        rows: list[str] = []
        for name, annotation, default, text in fields_in_source(cls):
            shown = "required" if default is None else f"`{cell(default)}`"
            rows.append(f"| `{name}` | `{cell(annotation)}` | {shown} | {cell(text)} |")
        parts += [f"## `{cls.__module__}.{cls.__qualname__}`", inspect.getdoc(cls) or ""]
        parts.append("\n".join(["| Field | Type | Default | What it is |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


PAGES = {"options.md": options_page, "fields.md": fields_page}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (REFERENCE / page).write_text(write(), encoding="utf-8")
