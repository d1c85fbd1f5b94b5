"""A layer that chooses another kind starts that section afresh; the same kind keeps the layers below."""

import pytest

from reachrl.config.loading import load_config
from reachrl.errors import ConfigError


def test_another_kind_leaves_the_old_ones_options_behind():
    # `robust` sets reward.mode and curriculum.floor, which these kinds do not have.
    config = load_config("robust", ["reward.kind=task", "curriculum.kind=uniform"])
    assert config.reward.model_dump() == {"kind": "task"}
    assert config.curriculum.model_dump() == {"kind": "uniform"}


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_overrides_does_not_matter(order):
    config = load_config("metaworld_quickstart", ["env.kind=reach_toy", "env.radius=0.15", "env.num_envs=2"][::order])
    assert (config.env.kind, config.env.model_dump()["radius"], config.env.num_envs) == ("reach_toy", 0.15, 2)


def test_naming_the_same_kind_again_changes_nothing():
    assert load_config("robust", ["reward.kind=process", "env.kind=metaworld"]) == load_config("robust")


def test_a_preset_file_may_change_a_kind_too(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "robust"\n[reward]\nkind = "task"\n')
    assert load_config(str(tmp_path / "mine.toml")).reward.model_dump() == {"kind": "task"}


def test_an_option_of_the_other_kind_is_still_an_error():
    with pytest.raises(ConfigError, match=r"reward\.mode"):
        load_config("robust", ["reward.mode=sum", "reward.kind=task"])
