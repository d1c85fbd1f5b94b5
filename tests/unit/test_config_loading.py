"""Configuration: layers, overrides, errors that name the key, and a reason for every deviation."""

import pytest

from reachrl.config.loading import config_hash, explain, list_presets, load_config
from reachrl.config.train import refuse_training
from reachrl.errors import ConfigError


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_loads_and_explains_every_deviation_from_the_paper(preset):
    assert list_presets()[preset]
    load_config(preset)
    unexplained = [deviation.key for deviation in explain(preset) if not deviation.reason]
    assert not unexplained


def test_the_paper_preset_is_the_paper():
    """Values of the published script of the day before the submission, and of the paper's text."""
    paper = load_config("paper")
    algorithm = paper.algorithm
    assert (algorithm.gamma, algorithm.gae_lambda) == (0.99, 0.95)
    assert (algorithm.clip_eps_low, algorithm.clip_eps_high) == (0.2, 0.2)
    assert (paper.rollout.temperature, algorithm.warmup_iterations, algorithm.lr, algorithm.epochs) == (1.5, 5, 2e-5, 1)
    assert (
        algorithm.ratio_level == "action" and not algorithm.bootstrap_truncated and not algorithm.normalize_advantages
    )
    assert (paper.reward.mode, paper.reward.pay, paper.reward.weight) == ("sum", "keyframes", 1.0)
    assert explain("paper") == []


def test_overrides_reach_their_fields_and_change_the_hash():
    plain = load_config("metaworld_quickstart")
    changed = load_config(
        "metaworld_quickstart", ["algorithm.lr=3e-6", "env.tasks=reach,push", "algorithm.target_kl=none"]
    )
    assert (
        changed.algorithm.lr == 3e-6 and changed.env.tasks == ("reach", "push") and changed.algorithm.target_kl is None
    )
    assert plain.algorithm.lr != 3e-6 and config_hash(plain) != config_hash(changed)
    assert config_hash(plain) == config_hash(load_config("metaworld_quickstart"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.lrr=1", "unknown key 'algorithm.lrr' (did you mean 'lr'?)"),
        ("algoritm.lr=1", "unknown key 'algoritm' (did you mean 'algorithm'?)"),
        ("ppo.lr=1", "unknown key 'ppo.lr' (did you mean 'algorithm.lr'?)"),
        ("ppo.temperature=1", "unknown key 'ppo.temperature' (did you mean 'rollout.temperature'?)"),
        ("num_steps=3", "unknown key 'num_steps' (did you mean 'rollout.num_steps'?)"),
        ("algorithm.lr=fast", "algorithm.lr = 'fast': Input should be a valid number"),
        ("algorithm.lr=-1", "algorithm.lr = -1: Input should be greater than 0"),
        ("algorithm=3", "'algorithm' is a section"),
        ("seed", "not of the form key=value"),
        ("eval.num_starts=51", "eval.num_starts=51 exceeds env.num_eval_starts=50"),
        ("eval.temperatures=", "eval.temperatures = []"),
        ("eval.seed=-1", "eval.seed = -1: Input should be greater than or equal to 0"),
        ("env.kind=isaac", "unknown kind 'isaac'. Known kinds: libero, metaworld, reach_toy"),
        ("env.tasks=drawer-opn", "no task 'drawer-opn'"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("num_iterations=0", "num_iterations = 0: Input should be greater than or equal to 1"),
        ("algorithm.lr=inf", "algorithm.lr = inf: Input should be a finite number"),
    ],
)
def test_mistakes_name_the_key_and_what_was_expected(override, message):
    overrides = ["seed=2", override] if override.startswith("seed.") else [override]
    with pytest.raises(ConfigError) as error:
        load_config("metaworld_quickstart", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        ("toy", ["policy.num_action_tokens=7"], (7, "reach_toy", 4)),
        ("metaworld_quickstart", ["policy.num_action_tokens=2"], (2, "metaworld", 4)),
        ("metaworld_quickstart", ["env.kind=libero"], (4, "libero", 7)),
        ("metaworld_oft", ["policy.num_action_tokens=3"], (3, "metaworld", 4)),
    ],
)
def test_a_policy_answers_with_a_token_for_each_number_of_an_action(preset, overrides, said):
    with pytest.raises(ConfigError) as error:
        refuse_training(load_config(preset, overrides))
    tokens, kind, numbers = said
    assert str(error.value) == (
        f"policy.num_action_tokens={tokens}, but actions of env.kind={kind} have {numbers} numbers, and each takes one "
        f"token: set policy.num_action_tokens={numbers}"
    )


def test_the_stated_size_of_actions_is_the_environments():
    from reachrl.envs.metaworld import MetaworldEnv
    from reachrl.testing.envs import ReachEnv

    for kind, tasks in ((ReachEnv, ("red-square",)), (MetaworldEnv, ("drawer-open",))):
        config = kind.Config(tasks=tasks)
        assert kind(config).action_space.shape == (config.action_dim,)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["policy.kind=openvla_oft", "policy.chunk_sise=4", "env.execute=2"], "policy.chunk_sise"),
        (["policy.kind=openvla_oft", "policy.chunk_size=0", "env.execute=2"], "policy.chunk_size"),
        (["env.max_step=9", "algorithm.kind=grpo", "rollout.num_steps=12"], "env.max_step"),
    ],
)
def test_a_wrong_section_is_not_judged_by_its_default(overrides, key):
    with pytest.raises(ConfigError) as error:
        load_config("toy", overrides)
    _, *problems = str(error.value).splitlines()
    assert len(problems) == 1 and key in problems[0]


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config("metaworld_quickstart", ["algorithm.lrr=1", "sft.batch_size=none", "rollout.num_steps=0"])
    for key in ("algorithm.lrr", "sft.batch_size", "rollout.num_steps"):
        assert key in str(error.value)


def test_a_preset_file_builds_on_another(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "robust"\nseed = 7\n[algorithm]\nlr = 1e-5\n')
    config = load_config(str(mine))
    assert (config.seed, config.algorithm.lr) == (7, 1e-5)
    assert config.algorithm.target_kl == load_config("robust").algorithm.target_kl
    mine.write_text("seed = = 7")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(mine))
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "absent.toml"))
    with pytest.raises(ConfigError, match="did you mean 'robust'"):
        load_config("robst")


def test_presets_in_a_circle_are_refused_and_a_base_lies_beside_its_preset(tmp_path):
    (tmp_path / "below.toml").write_text('base = "robust"\nseed = 3\n')
    (tmp_path / "above.toml").write_text('base = "below.toml"\n')
    assert load_config(str(tmp_path / "above.toml")).seed == 3
    (tmp_path / "below.toml").write_text('base = "above.toml"\n')
    with pytest.raises(ConfigError, match="circle"):
        load_config(str(tmp_path / "above.toml"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mine.toml", b"base = 3\n", "mine.toml: base = 3: expected the name or the file of a preset"),
        ("mine.toml", b"reasons = 3\n", "mine.toml: reasons is a table of keys and sentences"),
        ("mine.toml", b"[reasons]\nseed = 3\n", "mine.toml: reasons is a table of keys and sentences"),
        ("mine.toml", b'description = "\xe9"\n', "mine.toml: not valid TOML: 'utf-8' codec"),
        ("mine.json", b"[1]", "mine.json: expected an object such as a run's config.json, found list"),
    ],
)
@pytest.mark.parametrize("read", [load_config, explain])
def test_a_file_that_is_no_preset_is_told(tmp_path, read, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path / name))
    assert words in str(error.value)


def test_a_preset_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.toml").touch()
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ConfigError, match=r"mine\.toml cannot be read: Permission denied"):
        load_config(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["reward_model.shuffled_negatives=0.2"], "reward_model: shuffled_negatives needs num_frames"),
        (["reward_model.refit_every=1", "rollout.num_steps=3"], "options: reward_model.refit_every=1 needs episodes"),
        (
            ["algorithm.gamma=0", "reward.pay=segments"],
            "options: reward.pay=segments divides the potential by algorithm.gamma=0",
        ),
        (["reward_model.rollouts_per_task=9", "env.num_train_starts=8"], "rollouts_per_task=9 exceeds env.num_train"),
    ],
)
def test_a_check_across_options_gives_its_reason_and_not_the_whole_section(overrides, line):
    with pytest.raises(ConfigError) as error:
        load_config("toy", overrides)
    assert line in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.gamma=0"],  # paid at steps
        ["algorithm.gamma=0", "reward.pay=segments", "reward.mode=sum"],  # scores, which nothing discounts
        ["algorithm.gamma=0", "reward.pay=segments", "env.max_steps=1"],
        ["env.num_train_starts=1", "reward.kind=task"],  # no reward model is fitted
        ["env.num_train_starts=1", "reward.checkpoint=mine"],
    ],
)
def test_what_an_option_forbids_elsewhere_is_allowed_where_nothing_uses_it(overrides):
    load_config("toy", overrides)
