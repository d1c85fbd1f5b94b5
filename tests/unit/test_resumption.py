"""What may change in a run that has begun: the marks decide, every remedy a message names is permitted."""

import ast
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from tiny_run import play, tiny_config, train_lines

import reachrl
from reachrl.config.backend import RayBackendConfig
from reachrl.config.loading import is_default, load_config
from reachrl.config.marks import marks
from reachrl.config.reward_model import TransformersRewardModelConfig
from reachrl.errors import ConfigError
from reachrl.pipeline import STAGES
from reachrl.pipeline.resumption import Progress, check_changes
from reachrl.run.configuration import ABSENT, Change, config_changes, read_history

FINISHED = {stage: frozenset(STAGES[: STAGES.index(stage)]) for stage in STAGES}


def in_stage(stage: str, *, left: bool = True) -> Progress:
    """A run whose stage `stage` was interrupted; `left`: with something that it goes on from."""
    return Progress(FINISHED[stage], FINISHED[stage] | ({stage} if left else set()), 4 if left else 0)


def change(progress: Progress, override: str, preset: str = "toy") -> None:
    old, new = load_config(preset), load_config(preset, [override])
    found = config_changes(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert found
    check_changes(new, found, progress, where="run r")


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        *(
            ("train", text)
            for text in ("algorithm.lr=1e-5", "num_iterations=60", "env.worker_timeout_s=300", "device=cpu")
        ),
        *(("train", text) for text in ("checkpoint_every=1", "keep_checkpoints=9", "eval.during_every=2")),
        *(("train", text) for text in ("backend.kind=ray", "policy.gradient_checkpointing=true", "num_threads=2")),
        *(("sft", text) for text in ("sft.lr=1e-5", "sft.warmup_steps=5", "algorithm.epochs=1", "reward.kind=task")),
        *(("eval", text) for text in ("env.worker_timeout_s=300", "device=cpu", "eval.num_videos=0")),
    ],
)
def test_what_still_acts_may_change(stage: str, override: str) -> None:
    change(in_stage(stage), override)


@pytest.mark.parametrize(
    ("stage", "override", "reason"),
    [
        ("train", "seed=2", "it decided what stage 'demos' and stage 'sft' and stage 'reward' and stage 'train' made"),
        ("train", "sft.lr=1e-5", "it acts in stage 'sft', and that has finished"),
        ("train", "reward.kind=task", "it decided what stage 'train' made"),
        ("train", "policy.language_model.num_layers=3", "it decided what stage 'sft' made"),
        ("sft", "demos.action_noise=0.1", "it decided what stage 'demos' made"),
        ("sft", "sft.heldout_fraction=0.3", "it decided what stage 'sft' made"),
        ("eval", "algorithm.lr=1e-5", "it acts in stage 'train', and that has finished"),
        ("eval", "eval.num_starts=3", "it decided what stage 'eval' made"),
        ("sft", "env.max_steps=9", "it decided what stage 'demos' made"),
    ],
)
def test_what_would_make_something_wrong_is_refused(stage: str, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"asked for ({reason})")):
        change(in_stage(stage), override)


def test_a_key_that_nobody_knows_any_more_is_refused() -> None:
    config = load_config("toy")
    now = config.model_dump(mode="json")
    before = {**now, "algorithm": {**now["algorithm"], "gone": 3}}
    with pytest.raises(ConfigError, match=r"algorithm\.gone: 3 in the run, absent asked for"):
        check_changes(config, config_changes(before, now), in_stage("train"), where="run r")


NEWER = ("explain_after", "audit", "algorithm.dual_clip", "policy.language_model.num_kv_heads", "env.execute")


def without(config: dict, *keys: str) -> dict:
    """A configuration as a version wrote it that did not have these keys."""
    config = json.loads(json.dumps(config))
    for key in keys:
        *sections, last = key.split(".")
        inner = config
        for section in sections:
            inner = inner[int(section)] if isinstance(inner, list) else inner[section]
        del inner[last]
    return config


def test_a_newer_key_at_its_default_is_no_change() -> None:
    config = load_config("toy")
    now = config.model_dump(mode="json")
    for keys in (NEWER, ("policy.towers.1.stages.1.stride",), ("env.radius", "policy.towers.0.kind")):
        before = without(now, *keys)
        assert config_changes(before, now, partial(is_default, config)) == []
        assert {change.key for change in config_changes(before, now)} == {*keys}  # nobody says what the defaults are
    needed = config_changes(without(now, "policy.towers.1.stages.0.channels"), now, partial(is_default, config))
    assert needed == [Change("policy.towers.1.stages.0.channels", ABSENT, 16)]  # it has none


def test_a_newer_key_at_another_value_is_a_change() -> None:
    config = load_config("toy", ["algorithm.dual_clip=3", "explain_after=7", "audit.window=50"])
    now = config.model_dump(mode="json")
    found = config_changes(without(now, *NEWER), now, partial(is_default, config))
    assert {change.key: (change.old, change.new) for change in found} == {
        "algorithm.dual_clip": (ABSENT, 3),
        "explain_after": (ABSENT, 7),
        "audit": (ABSENT, now["audit"]),
    }
    with pytest.raises(ConfigError, match=r"algorithm\.dual_clip: absent in the run, 3\.0 asked for .*has finished"):
        check_changes(config, found, in_stage("eval"), where="run r")


# For each key that an error or a warning tells the user to change: the stage that stops with it, and whether that
# stage then goes on from what it left. Keys of the policy are named before anything is trained.
REMEDIES = {
    **dict.fromkeys(("demos.action_noise", "demos.episodes_per_task", "demos.max_attempts_factor"), ("demos", True)),
    **dict.fromkeys(("env.max_steps", "env.tasks", "env.image_size", "env.mesh_faces", "env.kind"), ("demos", True)),
    **dict.fromkeys(("env.cameras", "env.execute"), ("demos", True)),
    **dict.fromkeys(("sft.lr", "sft.warmup_steps"), ("sft", True)),
    **dict.fromkeys(("sft.epochs", "policy.checkpoint", "policy.dataset", "policy.language_model"), ("sft", False)),
    **dict.fromkeys(("policy.lora", "policy.lora.base", "policy.lora.parts", "policy.resize"), ("sft", False)),
    **dict.fromkeys(("policy.lora.rank", "policy.lora.alpha"), ("sft", False)),
    **dict.fromkeys(("policy.tokenizer", "policy.towers", "policy.num_action_tokens", "policy.dtype"), ("sft", False)),
    **dict.fromkeys(("reward_model.rollouts_per_task", "reward_model.num_frames"), ("reward", True)),
    **dict.fromkeys(("reward_model.prompt", "reward_model.checkpoint", "reward_model.steps"), ("reward", True)),
    **dict.fromkeys(
        (f"reward_model.{key}" for key in ("model_class", "processor_class", "positive")), ("reward", True)
    ),
    **dict.fromkeys(("reward.checkpoint", "reward.kind", "env.num_envs"), ("train", False)),
    **dict.fromkeys(("algorithm.kind", "algorithm.train_vision"), ("train", False)),
}
ALWAYS = ("train", True)  # of every other key that is named: a running training is the narrowest


def named_keys() -> dict[str, set[str]]:
    """Keys that raised errors and warnings of the package name, with the files that do."""
    known = set(marks(load_config("metaworld_quickstart"))) | set(marks(load_config("libero_object")))
    known |= {f"backend.{key}" for key in RayBackendConfig.model_fields}
    known |= {f"reward_model.{key}" for key in TransformersRewardModelConfig.model_fields}
    plain = {"device", "rollout.num_steps", "num_iterations", "collect_ahead", "num_threads"}
    known = {key for key in known if "." in key or key in plain}
    word = re.compile(r"(?<![\w.])[a-z_]+(?:\.[a-z_]+)*")
    found: dict[str, set[str]] = {}
    root = Path(reachrl.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] in ("config", "plan"):  # said before anything runs
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            warns = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning"
            if warns or isinstance(node, ast.Raise):
                parts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                for key in known.intersection(word.findall("".join(parts))):
                    found.setdefault(key, set()).add(file.name)
    return found


def test_another_kind_is_one_difference_however_many_options_it_has() -> None:
    old, new = load_config("toy"), load_config("toy", ["reward.kind=task"])
    changes = config_changes(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert len(changes) > 3
    everything = frozenset({"demos", "sft", "reward", "train", "eval"})
    with pytest.raises(ConfigError) as told:
        check_changes(new, changes, Progress(finished=everything, begun=everything, iterations=3), where="here")
    assert [line.partition(":")[0].strip() for line in str(told.value).splitlines()[1:-1]] == ["reward.kind"]


def test_every_remedy_of_a_message_is_permitted() -> None:
    found = named_keys()
    assert {
        "algorithm.lr",
        "algorithm.value_lr",
        "sft.lr",
        "demos.action_noise",
        "reward.weight",
        "device",
    } <= found.keys()
    forbidden = []
    for key, files in found.items():
        stage, left = REMEDIES.get(key, ALWAYS)
        # Demonstrations and the fit of a reward model begin anew with other options; the others go on.
        progress = in_stage(stage, left=left and stage in ("sft", "train", "eval"))
        preset = "libero_object" if key.startswith(("policy.lora", "env.assets")) else "toy"
        config = load_config(preset, ["backend.kind=ray"] if key.startswith("backend.") else [])
        if key.startswith("reward_model.") and key not in marks(config):
            config = load_config(preset, ["reward_model.kind=transformers"])
        try:
            check_changes(config, [Change(key, "old", "new")], progress, where="run")
        except ConfigError:
            forbidden.append((key, sorted(files), stage))
    assert not forbidden, "these messages name a remedy that the run folder refuses"


# -- real runs, seconds long ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    play(tiny_config(), run, "sft")
    return run


@pytest.fixture(scope="module")
def three(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations and everything after them."""
    run = tmp_path_factory.mktemp("three") / "run"
    shutil.copytree(begun, run)
    play(tiny_config(), run)
    return run


@pytest.fixture
def copy(three: Path, tmp_path: Path) -> Path:
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_goes_on_as_if_it_had_been_meant_to(begun: Path, copy: Path, tmp_path: Path) -> None:
    longer = tiny_config("num_iterations=5")
    play(longer, copy)
    straight = tmp_path / "straight"
    shutil.copytree(begun, straight)
    play(longer, straight)
    assert len(train_lines(straight)) == 5
    assert train_lines(copy) == train_lines(straight)
    weights = Path("policy") / "model.safetensors"
    assert (copy / weights).read_bytes() == (straight / weights).read_bytes()
    for file in ("eval/after.json", "eval/before.json", "config.json"):
        assert json.loads((copy / file).read_text()) == json.loads((straight / file).read_text()), file
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["num_env_steps"] == 5 * 4 * 2
    (entry,) = read_history(copy)
    assert entry["iteration"] == 3 and entry["changes"] == {"num_iterations": [3, 5]}


def test_a_run_of_an_earlier_version_is_reported_and_extended(copy: Path) -> None:
    written = without(json.loads((copy / "config.json").read_text()), *NEWER)
    (copy / "config.json").write_text(json.dumps(written))
    (copy / "report.html").unlink()
    play(tiny_config(), copy, "eval", "report")
    assert (copy / "report.html").exists() and read_history(copy) == []
    assert json.loads((copy / "config.json").read_text()) == written
    play(tiny_config("num_iterations=4"), copy, "train")
    assert [entry["changes"] for entry in read_history(copy)] == [{"num_iterations": [3, 4]}]


def test_collecting_ahead_goes_on_from_where_a_longer_run_had_its_checkpoint(begun: Path, tmp_path: Path) -> None:
    ahead = ("collect_ahead=true", "algorithm.importance_cap=2.0")
    runs = [tmp_path / name for name in ("extended", "straight")]
    for run in runs:
        shutil.copytree(begun, run)
    play(tiny_config(*ahead), runs[0], "reward", "train")
    for run in runs:
        play(tiny_config(*ahead, "num_iterations=5"), run, "reward", "train")
    assert [line["lag"] for line in train_lines(runs[1])] == [0, 1, 0, 1, 0]
    assert train_lines(runs[0]) == train_lines(runs[1])


def test_a_lower_learning_rate_acts_from_the_checkpoint_on(begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    play(tiny_config("num_iterations=2"), run, "reward", "train")
    play(tiny_config("num_iterations=3", "algorithm.lr=1e-6", "algorithm.value_lr=1e-7"), run, "train")
    rates = [line["lr"] for line in train_lines(run)]
    assert rates[1:] == [2e-4, 1e-6]
    with pytest.raises(ConfigError, match=r"algorithm\.lr: 1e-06 in the run, 0\.0002 asked for .*has finished"):
        play(tiny_config("num_iterations=3", "algorithm.value_lr=1e-7"), run, "train")


def test_fewer_iterations_than_there_are_is_refused_and_an_early_end_is_not(copy: Path) -> None:
    with pytest.raises(ConfigError, match="has trained 3 iterations, num_iterations=2 were asked for"):
        play(tiny_config("num_iterations=2"), copy, "train")
    (copy / "stages.json").write_text(json.dumps({"sft": json.loads((copy / "stages.json").read_text())["sft"]}))
    longer = tiny_config("num_iterations=44")
    (copy / "config.json").write_text(json.dumps(longer.model_dump(mode="json")))
    with pytest.raises(ConfigError, match=r"3 of 44 iterations are done: .*--until 3` ends it there.*--checkpoint"):
        play(longer, copy, "eval")
    lines = play(longer, copy, "report")
    assert any("3 of 44 iterations" in line for line in lines)
    assert "3 of 44" in (copy / "report.html").read_text()
    play(tiny_config("num_iterations=3"), copy, "train")
    assert json.loads((copy / "stages.json").read_text())["train"]["info"]["iterations"] == 3


@pytest.mark.parametrize("stage", ["train", "eval", "report"])
def test_a_mistyped_run_folder_is_named_and_not_made(stage: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no run for '{stage}': give its folder, or begin with `reachrl sft`"):
        play(tiny_config(), tmp_path / "mistyped", stage)
    assert not any(tmp_path.iterdir())


def test_training_needs_no_reward_model_where_none_is_fitted(begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    play(tiny_config("num_iterations=1"), run, "train")  # neither `demos` nor `reward` has ever run here
    assert len(train_lines(run)) == 1
    fitted = tiny_config("num_iterations=1", "reward.kind=process", "reward_model.rollouts_per_task=0")
    other = tmp_path / "other"
    shutil.copytree(begun, other)
    with pytest.raises(ConfigError, match="stage 'train' needs 'demos'"):
        play(fitted, other, "train")
