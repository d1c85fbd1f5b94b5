"""Options of the LIBERO environment, checked without the simulator."""

import pytest

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_tasks import STEP_LIMITS, SUITES, instruction
from reachrl.config.loading import load_config
from reachrl.errors import ConfigError


@pytest.mark.parametrize(
    ("suite", "limit"),
    [
        ("libero_spatial", 220),
        ("libero_object", 280),
        ("libero_goal", 300),
        ("libero_10", 520),
        ("libero_90", 400),
    ],
)
def test_a_suite_brings_its_tasks_and_its_published_limit(suite, limit):
    config = LiberoConfig(suite=suite)
    assert (config.tasks, config.max_steps) == (SUITES[suite], limit)
    assert STEP_LIMITS[suite] == limit
    assert len(set(config.tasks)) == (90 if suite == "libero_90" else 10)


def test_instructions_leave_the_scene_out():
    assert instruction("put_the_bowl_on_the_stove") == "put the bowl on the stove"
    assert instruction(SUITES["libero_10"][2]) == "turn on the stove and put the moka pot on it"
    assert instruction("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet") == "close the top drawer of the cabinet"


def test_a_wrong_task_is_told_with_the_one_that_was_meant():
    given = ["env.kind=libero", "env.tasks=pick_up_the_milk_and_place_it_in_a_basket"]
    with pytest.raises(ConfigError, match="did you mean 'pick_up_the_milk_and_place_it_in_the_basket'"):
        load_config("paper", given)
    with pytest.raises(ConfigError, match="it is one of libero_goal: set env.suite"):
        load_config("paper", ["env.kind=libero", "env.tasks=put_the_bowl_on_the_stove"])


def test_a_suite_that_is_no_name_is_told():
    with pytest.raises(ConfigError, match=r"env\.suite = \[1\]: Input should be 'libero_spatial'"):
        load_config("paper", ["env.kind=libero", "env.suite=[1]"])


def test_training_on_stored_starts_has_fifty_of_them():
    assert LiberoConfig(split="paper").num_train_starts == 50
    with pytest.raises(ConfigError, match="50 stored start states; ask for at most that many"):
        load_config("paper", ["env.kind=libero", "env.split=paper", "env.num_train_starts=51"])


def test_a_resolved_configuration_is_read_back_as_it_was():
    config = load_config("paper", ["env.kind=libero", "env.suite=libero_goal"]).env
    assert LiberoConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_the_7b_preset_of_a_suite_is_the_papers(suite):
    from reachrl.config.policy import OpenVLAConfig

    config = load_config(suite)
    env, policy, algorithm = config.env, config.policy, config.algorithm
    assert (env.suite, env.tasks, env.max_steps, env.gripper) == (suite, SUITES[suite], STEP_LIMITS[suite], "openvla")
    assert (policy.dataset, str(policy.checkpoint)) == (
        suite,
        f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}",
    )
    sizes = OpenVLAConfig.openvla_7b()
    for name in ("towers", "language_model", "image_size", "num_action_tokens", "projector_expansion", "prompt_length"):
        assert getattr(policy, name) == getattr(sizes, name), name
    assert (algorithm.lr, algorithm.gamma, algorithm.gae_lambda, algorithm.minibatch_size) == (2e-5, 0.99, 0.95, 16)
    assert config.rollout.temperature == 1.5
    assert (algorithm.clip_eps_low, algorithm.clip_eps_high, algorithm.warmup_iterations, algorithm.epochs) == (
        0.2,
        0.2,
        5,
        1,
    )
    assert (config.reward.mode, config.reward.pay, config.reward.weight) == ("sum", "keyframes", 1.0)
    assert config.curriculum.weighting == "paper"
    # 10,000 optimiser steps.
    assert config.num_iterations * config.rollout.num_steps * env.num_envs == 10_000 * algorithm.minibatch_size
