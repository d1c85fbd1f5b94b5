"""Options of evaluation: which starts, at which temperatures, and the validation curve during training."""

import math
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from reachrl.config.base import Section
from reachrl.config.marks import Affects

GREEDY, SAMPLED = "greedy", "sampled"
MEAN: Literal["mean"] = "mean"
Temperature = float | Literal["mean"]
"""Of evaluated actions. `mean` is no temperature, but stands in the place of one: see `EvalSection.temperatures`."""
_EARLIER = {"modes", "temperature"}  # keys of earlier versions: `greedy` and `sampled`, the latter at one temperature


def mode_name(temperature: Temperature) -> str:
    """The name of a temperature in records: `greedy` for 0, `sampled` for 1, `sampled@0.6` for 0.6, `mean`."""
    if temperature == MEAN:
        return MEAN
    if temperature == 0:
        return GREEDY
    return SAMPLED if temperature == 1 else f"{SAMPLED}@{temperature!r}"


def mode_temperature(mode: str) -> Temperature:
    """The temperature that `mode_name` gave a name to.

    Raises:
        ValueError: no temperature has that name.
    """
    if mode == MEAN:
        return MEAN
    found = {GREEDY: 0.0, SAMPLED: 1.0}.get(mode)
    if found is None:
        found = float(mode.removeprefix(f"{SAMPLED}@"))
    if not 0 <= found < math.inf or mode_name(found) != mode:
        raise ValueError(f"{mode!r} is not the name of a temperature")
    return found


def with_temperatures(section: dict[str, Any]) -> dict[str, Any]:
    """The same section without `modes` and `temperature`, as configurations of earlier versions say `temperatures`.

    Raises:
        ValueError: it has both, or what neither version knows.
    """
    if not _EARLIER & section.keys():
        return section
    rest = {key: value for key, value in section.items() if key not in _EARLIER}
    modes, warm = section.get("modes", [SAMPLED, GREEDY]), section.get("temperature", 1.0)
    if "temperatures" in rest:
        raise ValueError("modes and temperature are said by temperatures now, which is set too: leave them out")
    modes = [str(mode).strip() for mode in (modes.split(",") if isinstance(modes, str) else modes)]
    if not {*modes} <= {GREEDY, SAMPLED}:
        raise ValueError(f"modes are said by temperatures now; as modes {GREEDY} and {SAMPLED} are known")
    if isinstance(warm, bool) or not isinstance(warm, int | float) or warm <= 0:
        raise ValueError("temperature is said by temperatures now; alone it is a number above 0")
    return rest | {"temperatures": [0.0 if mode == GREEDY else float(warm) for mode in modes]}


def _known(temperature: Any) -> Any:
    """One entry of `temperatures`, with one message for all that is none."""
    if temperature == MEAN:
        return MEAN
    try:
        number = math.nan if isinstance(temperature, bool) else float(temperature)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{temperature!r}: expected 0 (greedy), a number above it, or {MEAN}")
    return number


class EvalSection(Section):
    """Evaluation on start states that nothing was ever trained on."""

    num_starts: Annotated[int, Field(ge=1), Affects.PROTOCOL] = 50
    """Held-out start states per task in the final evaluation, before and after; the first ones of the set."""
    temperatures: Annotated[
        tuple[Annotated[float, Field(ge=0)] | Literal["mean"], ...],
        Field(min_length=1, max_length=16),
        Affects.EVALUATION,
    ] = (1.0, 0.0)
    """Temperatures of the evaluated actions, each played on the same starts with the same noise: 0 takes the likeliest
    tokens (`greedy`), 1 samples the policy's own distribution (`sampled`), and `mean` takes the mean of that
    distribution, one action dimension after the other. The first is the headline of the report."""
    seed: Annotated[int, Field(ge=0), Affects.PROTOCOL] = 0
    """Seed of the sampling noise, so that two evaluations of equal weights are equal."""
    during_every: Annotated[int, Field(ge=0), Affects.TRAINING | Affects.FUTURE] = 0
    """Iterations between evaluations during training, at the first temperature; 0: none. They, and one of the last
    weights, choose `checkpoints/best`. On Ray a process of its own plays them beside training."""
    during_starts: Annotated[int, Field(ge=1), Affects.TRAINING | Affects.FUTURE] = 10
    """Validation start states per task of those; the first ones of a set that neither training nor the final evaluation
    uses."""
    patience: Annotated[Annotated[int, Field(ge=1)] | None, Affects.TRAINING | Affects.FUTURE] = None
    """Training ends early once so many of those evaluations in a row were not better than all before them. None: it
    never does."""
    num_videos: Annotated[int, Field(ge=0), Affects.SPEED] = 3
    """Tasks whose first held-out episode is recorded before and after."""

    @property
    def modes(self) -> tuple[str, ...]:
        """The temperatures by name, the headline first."""
        return tuple(map(mode_name, self.temperatures))

    @model_validator(mode="before")
    @classmethod
    def _earlier_keys(cls, data: Any) -> Any:
        return with_temperatures(cast("dict[str, Any]", data)) if isinstance(data, dict) else data

    @field_validator("temperatures", mode="before")
    @classmethod
    def _each_known(cls, temperatures: Any) -> Any:
        number = isinstance(temperatures, int | float) and not isinstance(temperatures, bool)
        if number or temperatures == MEAN:
            return (_known(temperatures),)
        several = isinstance(temperatures, list | tuple)
        return list(map(_known, cast("list[Any]", temperatures))) if several else temperatures

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, temperatures: tuple[Temperature, ...]) -> tuple[Temperature, ...]:
        if len(set(temperatures)) < len(temperatures):
            raise ValueError("a temperature stands there twice; name each once")
        return temperatures
