"""Marks on configuration keys: on each one, and what hashes and identities are taken of."""

from typing import Annotated, Literal

import pytest

from reachrl.config.base import Section
from reachrl.config.env import EnvSection, MetaworldConfig
from reachrl.config.language_model import LoRAConfig
from reachrl.config.libero import LiberoConfig
from reachrl.config.loading import config_hash, load_config
from reachrl.config.marks import Affects, affecting, mark_of, marks
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.reward_model import RewardModelSection
from reachrl.config.train import KIND_SECTIONS, TrainConfig
from reachrl.demos.collect import collection_id
from reachrl.registry import BUILTINS, section_class


def built_in_sections() -> list[type[Section]]:
    chosen = [section_class(group, kind) for group in KIND_SECTIONS.values() for kind in BUILTINS[group]]
    fixed = [field.annotation for name, field in TrainConfig.model_fields.items() if name not in KIND_SECTIONS]
    return [TrainConfig, *chosen, *(cls for cls in fixed if isinstance(cls, type) and issubclass(cls, Section))]


@pytest.mark.parametrize("section", built_in_sections(), ids=lambda cls: cls.__name__)
def test_every_key_of_a_built_in_section_says_what_it_affects(section: type[Section]) -> None:
    unmarked = [key for key in section.model_fields if mark_of(section, key) is None]
    assert not unmarked, f"{section.__name__}: write Annotated[..., Affects.X] on {unmarked} (reachrl.config.marks)"


# What success rates of today's environments rest on; a key that joins or leaves changes every protocol hash.
EPISODE = {"kind", "tasks", "image_size", "max_steps", "execute", "mesh_faces"}
LIBERO = {"cameras", "suite", "split", "simulation", "gripper"}


def test_the_keys_of_protocols_and_of_architectures() -> None:
    assert affecting(MetaworldConfig(), Affects.PROTOCOL).keys() == EPISODE | {"cameras", "action_repeat"}
    libero = load_config("libero_object").env
    assert isinstance(libero, LiberoConfig)
    assert affecting(libero, Affects.PROTOCOL).keys() == EPISODE | LIBERO
    assert affecting(load_config("toy").eval, Affects.PROTOCOL) == {"num_starts": 40, "seed": 0}
    architecture = affecting(OpenVLAConfig(), Affects.ARCHITECTURE)
    assert architecture.keys() == {
        *("kind", "image_size", "towers", "image_mean", "image_std", "projector_expansion", "language_model"),
        *("num_action_tokens", "critic", "value_hidden_size", "lora"),
    }
    assert architecture["language_model"]["hidden_size"] == 128  # a section below is there with all its keys
    assert architecture["language_model"].keys() == OpenVLAConfig().language_model.model_dump().keys()


def test_a_collection_is_told_by_what_decides_its_episodes_alone() -> None:
    config = load_config("toy")

    def identity(*overrides: str) -> str:
        changed = load_config("toy", overrides)
        return collection_id(changed.env, changed.demos, changed.seed)

    same = identity()
    for override in ("env.num_envs=2", "demos.workers=1", "demos.max_attempts_factor=9", "env.render_device=cpu"):
        assert identity(override) == same, override
    assert identity('env.tasks=["red-square"]') == same  # a shard is of one task
    for override in ("env.max_steps=9", "demos.action_noise=0.1", "seed=7", "env.num_train_starts=30"):
        assert identity(override) != same, override
    assert config.demos.workers is None


def test_the_configuration_hash_leaves_out_what_decides_no_number() -> None:
    plain = config_hash(load_config("toy"))
    for same in ("description=x", "keep_checkpoints=3", "env.worker_timeout_s=9", "backend.env_groups=2"):
        assert config_hash(load_config("toy", [same])) == plain, same
    for other in ("algorithm.lr=1e-9", "num_iterations=7", "device=cpu", "seed=2", "eval.temperature=0.5"):
        assert config_hash(load_config("toy", [other])) != plain, other


class NestedSection(Section):
    depth: int = 1


class PluginEnv(EnvSection):
    kind: Literal["mine"] = "mine"  # pyright: ignore[reportIncompatibleVariableOverride]
    tasks: tuple[str, ...] = ("a",)
    colour: str = "red"
    nested: NestedSection = NestedSection()
    cache: Annotated[int, Affects.SPEED] = 3
    damping: Annotated[float, Affects.FUTURE] = 0.5


def test_a_plug_in_s_unmarked_keys_take_the_mark_of_their_section() -> None:
    assert affecting(PluginEnv(), Affects.PROTOCOL).keys() == {
        *("kind", "tasks", "image_size", "max_steps", "execute", "colour", "nested")
    }
    assert affecting(PluginEnv(), Affects.PROTOCOL)["nested"] == {"depth": 1}
    config = TrainConfig(env=PluginEnv(num_eval_starts=100))
    found = marks(config)
    assert found["env.colour"] == found["env.nested.depth"] == Affects.EPISODE
    assert found["env.cache"] == Affects.SPEED
    assert found["env.damping"] == Affects.EPISODE | Affects.FUTURE
    assert found["env.tasks"] == Affects.EPISODE  # redeclared: the base's mark


def test_a_mark_of_the_future_alone_adds_to_that_of_the_section() -> None:
    found = marks(load_config("toy"))
    assert found["algorithm.lr"] == Affects.TRAINING | Affects.FUTURE
    assert found["sft.lr"] == Affects.WARM_START | Affects.FUTURE
    assert marks(PPOConfig())["lr"] == Affects.EVERYTHING | Affects.FUTURE  # a section by itself
    with_adapters = OpenVLAConfig.model_validate({"checkpoint": "base", "lora": LoRAConfig(rank=4)})
    assert marks(with_adapters)["lora.rank"] == Affects.ARCHITECTURE
    assert mark_of(RewardModelSection, "lr") == Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE
