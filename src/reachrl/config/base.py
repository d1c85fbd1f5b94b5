"""The base of every configuration section."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

MOST = 10**9  # of anything that is counted
LARGEST_SEED = 2**63 - 1  # what torch takes
LARGEST_RATE = 10.0  # a learning rate; useful ones are a thousand times smaller
LARGEST = 1e12  # size of any other number


class Section(BaseModel):
    """Frozen, typed options. Unknown keys are errors; the docstring under a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,  # JSON has no word for them
    )

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, data: Any) -> Any:
        """Accept `a,b` for a list, as it is typed on a command line."""
        if not isinstance(data, dict):
            return data
        out = dict(cast("dict[str, Any]", data))
        for name, field in cls.model_fields.items():
            value = out.get(name)
            if isinstance(value, str) and get_origin(field.annotation) is tuple:
                out[name] = [part.strip() for part in value.split(",") if part.strip()]
            _check_paths(name, field.annotation, out.get(name))
            if isinstance(out.get(name), bool) and _holds(field.annotation, int, float):
                raise ValueError(f"{name} is {str(out[name]).lower()}: expected a number")
        return out

    @model_validator(mode="after")
    def _numbers_are_of_a_size(self) -> Self:
        """Refuse what no machine can do, before it overflows somewhere."""
        for name in type(self).model_fields:
            most = LARGEST_SEED if name == "seed" else MOST
            for number in _numbers(getattr(self, name)):
                limit = most if isinstance(number, int) else LARGEST
                if abs(number) > limit:
                    raise ValueError(f"{name} is {_short(number)}: expected a size of at most {limit:g}")
        return self


def _check_paths(name: str, annotation: Any, value: Any) -> None:
    """Refuse a path that is empty, which would mean the current folder, or that no file can have."""
    if not _holds(annotation, Path):
        return
    for path in cast("list[Any]", value) if isinstance(value, list | tuple) else [value]:
        if isinstance(path, str) and (not path.strip() or "\0" in path):
            raise ValueError(f"{name} is {path!r}: expected a path (the current folder is ./), or none")


def _holds(annotation: Any, *types: type) -> bool:
    """Whether one of `types` is what a field takes, or one of the things it takes."""
    return annotation in types or any(_holds(inner, *types) for inner in get_args(annotation))


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a field's value; sections inside look after their own."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for item in cast("tuple[Any, ...]", value):
            yield from _numbers(item)


def _short(number: float) -> str:
    return f"a number of {number.bit_length()} bits" if isinstance(number, int) else f"{number:g}"
