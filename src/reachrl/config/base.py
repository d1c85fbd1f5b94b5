"""The base of every configuration section."""

from typing import Any, cast, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


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
        return out
