"""What a validation found wrong, in lines that name the key and what was expected."""

from pydantic import ValidationError

from reachrl.config.base import Section
from reachrl.config.values import as_section, shown_value, suggestion

MAX_PROBLEMS = 20
# Former names of sections and keys, before releases: where each is now.
_MOVED = {
    "num_steps": "rollout.num_steps",
    "ppo.temperature": "rollout.temperature",
    "ppo.engine_kl_alarm": "rollout.engine_kl_alarm",
    "ppo": "algorithm",
}


def problems_of_section(error: ValidationError, cls: type[Section], prefix: str, *, across: bool = True) -> list[str]:
    """One line for each problem, with its key, the value, what was expected, and the nearest known key.

    Args:
        error: from validating a section.
        cls: the section's class.
        prefix: dotted key of the section, empty for the whole configuration.
        across: whether problems of the section as a whole count, which checks across its options find.
    """
    lines: list[str] = []
    found = [item for item in error.errors(include_url=False) if across or item["loc"]]
    for item in found[:MAX_PROBLEMS]:
        path = [str(part) for part in item["loc"]]
        key = ".".join(part for part in [prefix, *path] if part)
        if item["type"] == "extra_forbidden":
            known = _known(cls, path[:-1])
            inner = as_section(item.get("input")) if key in _MOVED else None
            if inner:
                lines += [
                    f"unknown key {shown_value(f'{key}.{each}')} (did you mean {_moved(f'{key}.{each}')!r}?)."
                    for each in inner
                ]
                continue
            hint = f" (did you mean {_MOVED[key]!r}?)" if key in _MOVED else suggestion(path[-1], known)
            lines.append(f"unknown key {shown_value(key)}{hint}. Known here: {', '.join(known)}.")
        else:
            said = item["msg"].removeprefix("Value error, ")
            # A check across options fails for the whole section, which is too long to print.
            whole = isinstance(item.get("input"), dict | Section)
            lines.append(
                f"{key or 'options'}: {said}." if whole else f"{key} = {shown_value(item.get('input'))}: {said}."
            )
    if len(found) > MAX_PROBLEMS:
        lines.append(f"... and {len(found) - MAX_PROBLEMS} more in {prefix or 'the options'}.")
    return lines


def _moved(key: str) -> str:
    """The present name of a key that has moved."""
    section, _, leaf = key.partition(".")
    return _MOVED.get(key, f"{_MOVED[section]}.{leaf}")


def _known(cls: type[Section], path: list[str]) -> list[str]:
    fields = cls.model_fields
    for part in path:
        annotation = fields[part].annotation if part in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return []
        fields = annotation.model_fields
    return sorted(fields)
