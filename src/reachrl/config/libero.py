"""Options of the LIBERO environment."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from reachrl.config import libero_plus, libero_plus_files, libero_pro
from reachrl.config.env import EnvSection, named_once
from reachrl.config.libero_tasks import STEP_LIMITS, SUITES
from reachrl.config.marks import Affects
from reachrl.config.perturbations import CAMERA, COLOUR, DISTRACTORS, GENERAL_AXES, LIGHT, TEXTURE, Axis, PublishedTask
from reachrl.types import Start

NUM_STORED_STARTS = 50  # per task, shipped with the benchmark


class LiberoConfig(EnvSection):
    """LIBERO: a Franka arm and language tasks in five suites, robosuite physics, the benchmark of the VLA-RL paper."""

    packages: ClassVar[tuple[str, ...]] = ("hf-libero", "robosuite", "mujoco")
    action_dim: ClassVar[int | None] = 7

    axes: ClassVar[Mapping[str, Axis]] = {
        "camera": CAMERA,
        "light": LIGHT,
        "colour": replace(
            COLOUR, what="each colour of the room and the robot mixed with a random one; things keep theirs"
        ),
        "texture": TEXTURE,
        "distractors": DISTRACTORS,
        **GENERAL_AXES,
    }
    suites: ClassVar[tuple[str, ...]] = (*libero_plus.PROTOCOLS.values(), *libero_pro.PROTOCOLS.values())

    kind: Literal["libero"] = "libero"  # pyright: ignore[reportIncompatibleVariableOverride]

    suite: Annotated[
        Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"], Affects.EPISODE
    ] = "libero_object"
    """Which suite of tasks."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks of the suite; unset: all of them."""

    image_size: int = Field(default=128, ge=8, le=1024)
    """Side of the square camera frames, in pixels."""

    cameras: Annotated[tuple[Literal["agentview", "robot0_eye_in_hand"], ...], Affects.EPISODE] = Field(
        default=("agentview",), min_length=1
    )
    """What films the scene; the first is what policies and reward models with a single eye look at. The second is on
    the wrist."""

    max_steps: int = Field(ge=1)
    """Decisions of 50 ms per episode; unset: the suite's published limit."""

    num_train_starts: int = Field(default=200, ge=1)
    """Numbered start states per task for learning; at most 50 with `split=paper`."""

    num_eval_starts: int = Field(default=NUM_STORED_STARTS, ge=1, le=NUM_STORED_STARTS)
    """How many of the 50 start states stored with the benchmark are used."""

    split: Annotated[Literal["official", "paper"], Affects.EPISODE] = "official"
    """`official`: the stored start states are for evaluation only, and training starts are drawn anew by the task's
    own placement samplers, at a distance from them; `paper`: training uses the stored ones, as published trainers do,
    so that its success rates are on states that were trained on."""

    simulation: Annotated[Literal["fast", "faithful"], Affects.EPISODE] = "fast"
    """`faithful`: upstream's own stepping and drawing; `fast`: the same physics to rounding, cheaper by an order of
    magnitude, frames with simplified meshes and without smoothed edges."""

    mesh_faces: Annotated[int, Affects.EPISODE] = Field(default=200, ge=0)
    """`simulation=fast`: drawn meshes are simplified to about this many faces, scenery to ten times as many; 0 leaves
    them alone."""

    gripper: Annotated[Literal["simulator", "openvla"], Affects.EPISODE] = "simulator"
    """What the last number of an action means: -1 opens and 1 closes (`simulator`), or 1 opens and 0 closes with 0.5
    between, as published OpenVLA checkpoints have it (`openvla`)."""

    assets: Annotated[Path | None, Affects.SPEED] = None
    """Folder with the benchmark's meshes and textures; unset: `REACHRL_LIBERO_ASSETS`, then the assets' packages that
    `make libero` installs, then where an installed LIBERO has them, then the download from its hub."""

    def spoken(self, sentence: str, start: Start) -> str:
        """What the policy is told in an episode; published suites have sentences of their own."""
        if libero_pro.pro_kind(start):
            return libero_pro.pro_sentence(self.suite, start)
        if PublishedTask.of(start) is not None:
            return libero_plus_files.plus_sentence(self.suite, start)
        return super().spoken(sentence, start)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_suite(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        values = dict(cast("dict[str, Any]", data))
        suite = values.get("suite", "libero_object")
        if isinstance(suite, str) and suite in SUITES:  # anything else is refused where fields are checked
            values.setdefault("tasks", SUITES[suite])
            values.setdefault("max_steps", STEP_LIMITS[suite])
        if values.get("split") == "paper":
            values.setdefault("num_train_starts", NUM_STORED_STARTS)
        return values

    @field_validator("cameras")
    @classmethod
    def _no_camera_twice(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        return named_once("env.cameras", cameras)

    @model_validator(mode="after")
    def _tasks_of_the_suite(self) -> Self:
        known = SUITES[self.suite]
        for task in self.tasks:
            if task not in known:
                elsewhere = [suite for suite, tasks in SUITES.items() if task in tasks]
                close = get_close_matches(task[:100], known, n=1, cutoff=0.5)
                hint = f"it is one of {elsewhere[0]}: set env.suite" if elsewhere else "`reachrl list tasks` shows all"
                hint = f"did you mean {close[0]!r}?" if close and not elsewhere else hint
                raise ValueError(f"env.tasks: {self.suite} has no task {task[:100]!r}; {hint}")
        return self

    @model_validator(mode="after")
    def _starts_exist(self) -> Self:
        if self.split == "paper" and self.num_train_starts > NUM_STORED_STARTS:
            raise ValueError(
                f"env.num_train_starts={self.num_train_starts}: with split=paper training uses the "
                f"{NUM_STORED_STARTS} stored start states; ask for at most that many"
            )
        return self
