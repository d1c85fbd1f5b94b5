"""Perturbations that every environment has: levels apart from training values, noise, delay, other words."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from toy_policy import toy_config, toy_policy

from reachrl.config.env import EnvSection, MetaworldConfig
from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_tasks import SUITES, instruction
from reachrl.config.loading import load_config
from reachrl.config.marks import Affects, affecting
from reachrl.config.metaworld_rewordings import REWORDINGS
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.config.paraphrases import paraphrase, spoken
from reachrl.config.perturbations import RandomiseSection, Variant
from reachrl.demos.expert import Demonstrator
from reachrl.envs.base import Env, Perturbed, observed
from reachrl.envs.libero.env import LiberoEnv
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError
from reachrl.evaluation import protocol_hash
from reachrl.functional.perturbation import Filter
from reachrl.registry import build
from reachrl.rollout.collector import Collector
from reachrl.streams import Stream
from reachrl.types import Start

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
EVALUATED, TRAINED = (1, 2, 3), (4, 5, 6)


class Recorder(Env):
    """Shows grey frames and keeps the actions that reach it."""

    def __init__(self):
        self.config = EnvSection(kind="recorder", tasks=("t",))
        self.tasks, self.received = ("t",), []
        self.observation_space = observed(["camera"], 200)
        self.action_space = gym.spaces.Box(np.float32([-1, 0.25]), np.float32([1, 1]))

    def instruction(self, task):
        return "close the drawer"

    def expert_action(self):
        raise NotImplementedError

    def reset(self, *, seed=None, options=None):
        self.received = []
        return self._seen(), {"success": False}

    def step(self, action):
        self.received.append(action.tolist())
        return self._seen(), 0.0, False, False, {"success": False}

    def _seen(self):
        return {"images": {"camera": np.full((200, 200, 3), 128, np.uint8)}, "ee_state": np.zeros(4, np.float32)}


def started(variant):
    return {"start": Start("t", "eval", 3, variant)}


@pytest.mark.parametrize("section", [EnvSection, MetaworldConfig, LiberoConfig])
def test_no_value_of_training_is_evaluated(section):
    for name, axis in section.axes.items():
        assert axis.levels and axis.training, name
        assert not {*axis.levels} & {*axis.training}, name
        assert min(axis.training) > 0 and list(axis.levels) == sorted(axis.levels)


def test_noise_has_its_standard_deviation_and_comes_again():
    env = Perturbed(Recorder())
    first, _ = env.reset(options=started("noise=20"))
    frame = first["images"]["camera"].astype(float)
    assert frame.std() == pytest.approx((20**2 + 1 / 12) ** 0.5, rel=0.01)  # 1/12: rounding to whole grey levels
    assert frame.mean() == pytest.approx(128, abs=0.2)
    second = env.step(np.zeros(2, np.float32))[0]["images"]["camera"]
    assert abs(np.corrcoef(frame.ravel(), second.ravel())[0, 1]) < 0.02
    again, _ = env.reset(options=started("noise=20"))
    assert (again["images"]["camera"] == first["images"]["camera"]).all()
    other, _ = env.reset(options=started("noise=20#7"))
    assert (other["images"]["camera"] != first["images"]["camera"]).mean() > 0.9
    plain, _ = env.reset(options=started(""))
    assert (plain["images"]["camera"] == 128).all()


def test_delayed_actions_arrive_two_steps_late():
    inner = Recorder()
    env = Perturbed(inner)
    env.reset(options=started("delay=2"))
    for number in range(5):
        env.step(np.float32([number / 8, 1]))
    rest = [0.0, 0.25]  # zeros, as far as the action space has them
    assert inner.received == [rest, rest, [0.0, 1.0], [0.125, 1.0], [0.25, 1.0]]
    env.reset(options=started(""))
    env.step(np.float32([0.5, 1]))
    assert inner.received == [[0.5, 1.0]]


def test_an_axis_that_an_environment_does_not_have_is_refused():
    with pytest.raises(ValueError, match="recorder has no such axis; it has language, noise, delay"):
        Perturbed(Recorder()).reset(options=started("camera=5"))


SENTENCES = {task: (text, REWORDINGS[task]) for task, text in INSTRUCTIONS.items()} | {
    task: (instruction(task), ()) for tasks in SUITES.values() for task in tasks
}


def test_paraphrases_are_never_the_instruction_and_those_of_training_never_evaluated():
    assert REWORDINGS.keys() == INSTRUCTIONS.keys() and len(SENTENCES) == 180
    instructions = {text for text, _ in SENTENCES.values()}
    for task, (text, rewordings) in SENTENCES.items():
        said = {
            level: {paraphrase(text, level, choice, rewordings) for choice in range(4)}
            for level in (*EVALUATED, *TRAINED)
        }
        evaluated = set().union(*(said[level] for level in EVALUATED))
        trained = set().union(*(said[level] for level in TRAINED))
        assert not (evaluated | trained) & instructions, task
        assert not evaluated & trained, task
        assert len(said[1]) == len(said[4]) == 4


def test_paraphrases_say_the_same():
    assert paraphrase("close the drawer", 1, 0) == "please close the drawer"
    assert paraphrase("close the drawer", 2, 0) == "shut the compartment"
    assert paraphrase("close the drawer", 3, 0) == "please shut the compartment"
    assert paraphrase("close the drawer", 3, 0, ("shove the drawer back in", "-")) == "shove the drawer back in"
    assert paraphrase("pick up the black bowl", 2, 0) == "grab the black dish"  # the longer word first
    assert spoken("close the drawer", Start("t", "eval", 0, "noise=10")) == "close the drawer"
    with pytest.raises(ValueError, match="language=7"):
        paraphrase("close the drawer", 7, 0)


def test_variants_survive_their_text():
    for variant in (Variant("camera", 7.5), Variant("delay", 4, 123)):
        assert Variant.of(Start("t", "eval", 0, str(variant))) == variant
    assert Variant.of(Start("t", "eval", 0)) is None
    assert (
        repr(Start("t", "eval", 0, "camera=5"))
        == repr(Start("t", "eval", 0))
        == "Start(task='t', split='eval', index=0)"
    )


def test_training_draws_its_own_values_for_a_share_of_the_episodes():
    section, axes = RandomiseSection(axes=("camera", "delay"), share=0.25), MetaworldConfig.axes
    plain = Start("reach", "train", 5)
    drawn = [section.varied(plain, axes, 1, Stream.RANDOMISE_TRAINING, number) for number in range(4000)]
    variants = [variant for start in drawn if (variant := Variant.of(start))]
    assert len(variants) / 4000 == pytest.approx(0.25, abs=0.025)  # four standard deviations
    assert {(v.axis, v.value) for v in variants} == {(a, x) for a in ("camera", "delay") for x in axes[a].training}
    assert len({v.draw for v in variants}) == len(variants)
    assert drawn[:50] == [section.varied(plain, axes, 1, Stream.RANDOMISE_TRAINING, number) for number in range(50)]
    assert drawn[:50] != [section.varied(plain, axes, 2, Stream.RANDOMISE_TRAINING, number) for number in range(50)]
    assert RandomiseSection().varied(plain, axes, 1, Stream.RANDOMISE_TRAINING, 0) is plain


def test_unknown_axes_are_refused_in_the_configuration():
    for key in ("env.randomise.axes=glare", "demos.randomise.axes=glare"):
        with pytest.raises(ConfigError, match=r"has no axis 'glare'; it has language, noise, delay"):
            load_config("toy", [key])
    with pytest.raises(ConfigError, match="did you mean 'colour'"):
        load_config("metaworld_quickstart", ["env.randomise.axes=color"])


def test_success_rates_with_and_without_randomised_training_compare():
    plain, varied = toy_config(), toy_config("env.randomise.axes=noise", "demos.randomise.axes=delay")
    assert protocol_hash(plain) == protocol_hash(varied)
    assert affecting(varied, Affects.DATA).keys() == affecting(plain, Affects.DATA).keys()
    assert affecting(varied, Affects.DATA)["env"] == affecting(plain, Affects.DATA)["env"]  # the same demonstrations
    assert affecting(varied, Affects.DATA)["demos"] != affecting(plain, Affects.DATA)["demos"]
    assert affecting(varied, Affects.TRAINING)["env"] != affecting(plain, Affects.TRAINING)["env"]


def test_a_resumed_collector_goes_on_with_the_same_perturbed_episodes():
    config = toy_config("env.randomise.axes=noise,delay,language", "env.randomise.share=0.8", "env.max_steps=3")
    policy = toy_policy(config)

    def collector(envs):
        return Collector(policy, envs, seed=3, temperature=1.0, vary=config.env.varied)

    def assign(number):
        return Start(config.env.tasks[number % 3], "train", number % 50)

    with VectorEnv(config.env, 2) as envs:
        whole = collector(envs)
        whole.collect(assign, 16, policy_version=0)
        state = whole.state()
        expected = whole.collect(assign, 16, policy_version=1)
        resumed = collector(envs)
        resumed.load_state(state)
        found = resumed.collect(assign, 16, policy_version=1)
    assert (found.frames == expected.frames).all() and found.instructions == expected.instructions
    assert (found.token_ids == expected.token_ids).all() and found.episodes == expected.episodes
    variants = {v.axis for e in expected.episodes if (v := Variant.of(e.start))}
    plain = {f"move to the {task.replace('-', ' ')}" for task in config.env.tasks}
    assert len(variants) >= 2 and {text for row in expected.instructions for text in row} - plain


def test_demonstrations_vary_where_they_are_to():
    config = toy_config("demos.randomise.axes=language", "demos.randomise.share=1", "demos.episodes_per_task=1")
    env = build("envs", config.env)
    told = [Demonstrator(env, section, 1, lambda _: None) for section in (config.demos, toy_config().demos)]
    sentences = [_instruction(each.attempt("red-square", 0)["data"]) for each in told]
    assert sentences[1] == "move to the red square" != sentences[0]
    assert sentences[0] in {
        paraphrase("move to the red square", level, choice) for level in TRAINED for choice in range(4)
    }


def _instruction(data):
    import pyarrow as pa

    return pa.ipc.open_stream(data).read_all().column("instruction")[0].as_py()


def test_simulators_of_many_worlds_perturb_each_row_by_itself():
    from batched_worlds import SPEED, Sliders, SlidersConfig

    starts = [Start("left", "eval", 0, "delay=2"), Start("left", "eval", 0), Start("left", "eval", 0, "noise=10"),
              Start("right", "eval", 0, "language=2")]  # fmt: skip
    envs = Sliders(SlidersConfig(), 4)
    first = envs.reset(starts, starts)
    assert first.instructions[3] == "shove the bar to the right end"
    assert (first.images["front"][0] == first.images["front"][1]).all()
    clean = first.images["front"][1].astype(float)
    noisy = first.images["front"][2].astype(float)
    assert 5 < (noisy - clean)[clean > 0].std() < 15 and (noisy != clean).any()
    place = envs.x.copy()
    actions = np.zeros((4, 1, 4), np.float32)
    actions[:, 0, 0] = 1
    moved = []
    for _ in range(3):
        envs.step(actions, starts)
        moved.append(envs.x - place)
    np.testing.assert_allclose([row[0] for row in moved], [0, 0, SPEED], atol=1e-9)
    np.testing.assert_allclose([row[1] for row in moved], [SPEED, 2 * SPEED, 3 * SPEED], atol=1e-9)
    envs.replay(starts, [actions[0].repeat(3, axis=0)] * 4)
    np.testing.assert_allclose(envs.x - place, moved[-1], atol=1e-9)


def test_a_filter_is_there_only_where_something_is_filtered():
    assert Filter.of(Start("t", "eval", 0), np.zeros(2, np.float32)) is None
    assert Filter.of(Start("t", "eval", 0, "camera=5"), np.zeros(2, np.float32)) is None


@pytest.mark.parametrize(("gripper", "opens"), [("simulator", -1.0), ("openvla", 1.0)])
def test_liberos_robot_rests_with_an_open_gripper(gripper, opens):
    env = object.__new__(LiberoEnv)  # made, it would need the simulator
    env.config = LiberoConfig(gripper=gripper)
    assert env.rest_action().tolist() == [0, 0, 0, 0, 0, 0, opens]
    assert env.rest_action().dtype == np.float32
