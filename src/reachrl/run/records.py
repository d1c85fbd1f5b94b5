"""Schemas of a run's JSON files; each file is validated when it is read.

A schema states what readers rely on. Other keys are ignored, as later versions add some.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from reachrl.errors import StorageError

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Number = float | None  # null is what is not finite


class Record(BaseModel):
    """An object with more keys than these."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StageRecord(Record):
    """One stage of `stages.json`."""

    done: bool
    wall_s: Seconds
    peak_rss_bytes: Count
    attempts: Count
    info: dict[str, Any]


class Stages(RootModel[dict[str, StageRecord]]):
    """`stages.json`."""


class _EvalInfo(Record):
    caveats: list[str]


class _EvalStage(Record):
    info: _EvalInfo


class EvalStage(Record):
    """Caveats of success rates, in `stages.json`."""

    eval: _EvalStage


class Rate(Record):
    """Successes among episodes, with what was computed from them."""

    k: Count
    n: Count
    rate: Number = None
    wilson95: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _a_part_of_the_whole(self) -> Self:
        if self.k > self.n:
            raise ValueError(f"{self.k} of {self.n} episodes")
        return self


class _Episode(Record):
    task: str
    start: int
    success: bool


class Outcome(Rate):
    """One mode of an evaluation."""

    per_task: dict[str, Rate] = {}
    episodes: list[_Episode] = []


class Evaluation(RootModel[dict[str, Outcome]]):
    """`eval/before.json` and `eval/after.json`, by mode."""


class _Measured(Record):
    rates: dict[str, Rate]
    paired_test: dict[str, Any] | None
    against_plain: dict[str, dict[str, Any]]


class _MeasuredAxis(_Measured):
    axis: str
    what: str
    levels: list[dict[str, Any]]


class RobustnessRecord(Record):
    """`robust/robust.json`."""

    suite: str
    mode: str
    policies: dict[str, str]
    plain: _Measured
    perturbed: _Measured
    axes: list[_MeasuredAxis]


class BestPoint(Rate):
    """`checkpoints/best/validation.json`: by what those weights were chosen."""

    iteration: Count
    mode: str


class _WholeRate(Record):
    k: Count
    n: Count
    rate: float
    wilson95: Annotated[list[float], Field(min_length=2, max_length=2)]


class _WholeOutcome(_WholeRate):
    per_task: dict[str, _WholeRate]


class WholeEvaluation(RootModel[Annotated[dict[str, _WholeOutcome], Field(min_length=1)]]):
    """An evaluation with everything that is computed from it."""


class _Bin(Record):
    mean_score: Number
    mean_label: Number
    n: Count


class _Quality(Record):
    calibration_error: Number
    reliability: list[_Bin]


class RewardQuality(Record):
    """`quality.json` of a fitted reward model."""

    fingerprint: str
    heldout: _Quality


class _Calibration(Record):
    p: Number
    observed: Number
    n: Count


class _ReportedQuality(Record):
    auc: Number = None
    rank_correlation: Number = None
    accuracy: Number = None
    ece: Number = None
    calibration: list[_Calibration] | None = None


class _AtTemperature(Record):
    mode: str
    paired_test: dict[str, Number] | None = None
    against_headline: dict[str, Number] | None = None


class _Best(Record):
    iteration: Count
    of: Count
    validation: Rate
    success: dict[str, Rate]
    against_last: dict[str, dict[str, Number]]


class Summary(Record):
    """`summary.json`."""

    caveats: list[str] = []
    mode: str = "greedy"
    success_before: Rate | None = None
    success_after: Rate | None = None
    success_before_greedy: Rate | None = None
    success_after_greedy: Rate | None = None
    success_before_sampled: Rate | None = None
    success_after_sampled: Rate | None = None
    paired_test: dict[str, Number] | None = None
    temperatures: list[_AtTemperature] = []
    best: _Best | None = None
    wall_s: dict[str, Seconds] | None = None
    peak_rss_bytes: Count | None = None
    num_env_steps: Count | None = None
    reward_model: _ReportedQuality | None = None


class _Attempt(Record):
    command: list[str] | None = None
    commit: str | None = None
    started: str | None = None


class Provenance(_Attempt):
    """`provenance.json`."""

    earlier: list[_Attempt] = []
    stages: dict[str, _Attempt] = {}
    plugins: dict[str, dict[str, Any]] = {}
    memory_bytes: Count | None = None
    gpus: list[Any] | None = None
    packages: dict[str, str | None] | None = None


class _Turn(Record):
    step: int
    prompt: str | None = None
    image_png_base64: str | None = None
    actions: list[list[float]] = []
    action_tokens: list[int] = []
    logprob: Number = None
    value: Number = None
    rewards: dict[str, Number] | None = None


class Conversation(Record):
    """`conversation.json`."""

    task: str | None = None
    instruction: str | None = None
    start: int | None = None
    success: bool | None = None
    turns: list[_Turn] = []


class _ConfigChange(Record):
    iteration: int
    changes: dict[str, Any]


class ConfigHistory(RootModel[list[_ConfigChange]]):
    """`config_history.json`."""


class AnyObject(Record):
    """Any JSON object."""


def read_record(path: Path, shape: type[BaseModel], *, remedy: str) -> Any:
    """Read a JSON file and validate it against its schema.

    Args:
        path: of the file.
        shape: one of the classes above.
        remedy: what to do about a damaged file, for the message.

    Raises:
        StorageError: it is missing, cannot be read, is not JSON or has another shape; names file and place.
    """
    try:
        content = json.loads(path.read_bytes())
        shape.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise StorageError(f"{path} is damaged: {where}: {problem['msg']}; {remedy}") from error
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not JSON ({error}); {remedy}") from error
    return content
