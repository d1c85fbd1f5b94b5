"""Every module's `training` flag is the policy's, whatever made the module: dropout acts in training alone."""

import shutil
from pathlib import Path

import peft_merge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_folder import HEADS, write_official
from small_policy import adapted, foreign, inputs, small
from torch import nn

from reachrl.config.language_model import LoRAConfig
from reachrl.policies.openvla import export
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.storage import read_config

# bitsandbytes quantises rows in blocks of 64.
WIDE = {"language_model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}}


def check(policy: nn.Module) -> None:
    wrong = {name: module.training for name, module in policy.named_modules() if module.training != policy.training}
    assert not wrong


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "policy"
    OpenVLAPolicy(small(**WIDE)).save_pretrained(folder)
    return folder


@settings(max_examples=9)
@given(
    dropout=st.sampled_from([0.0, 0.5]),
    critic=st.sampled_from(["shared", "adapter", "separate"]),
    held=st.sampled_from([None, "plain", "nf4"]),
    copied=st.booleans(),
    checkpointing=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_flags_agree_after_construction_load_restore_and_adapters(
    wide: Path,
    tmp_path_factory: pytest.TempPathFactory,
    dropout: float,
    critic: str,
    held: str | None,
    copied: bool,
    checkpointing: bool,
    training: bool,
    dtype: str,
) -> None:
    lora = None if held is None else {"rank": 2, "dropout": dropout, "base": held}
    allowed = critic in (("shared", "separate") if lora is None else ("shared", "adapter"))
    options = {"rollout_copy": copied, "gradient_checkpointing": checkpointing, "dtype": dtype, **WIDE}
    options |= {"critic": critic if allowed else "shared", "lora": lora}
    start = wide if lora is not None or options["critic"] == "shared" else None
    policy = OpenVLAPolicy(small(**options, checkpoint=start))
    assert not policy.training
    check(policy)
    folder = tmp_path_factory.mktemp("saved") / "policy"
    policy.save_pretrained(folder)
    for loaded in (OpenVLAPolicy.from_pretrained(folder), OpenVLAPolicy(small(**options, checkpoint=folder))):
        assert not loaded.training
        check(loaded)
    policy.train(training)
    policy.restore(folder)
    policy.reset_critic()
    assert policy.training == training
    check(policy)
    policy.act(inputs(policy))  # makes the copy
    check(policy)
    if policy._rollout is not None:
        for part in (policy._rollout.projector, policy._rollout.model):
            assert not any(module.training for module in part.modules())
    shutil.rmtree(folder)


@pytest.mark.parametrize("training", [False, True])
def test_adapters_added_later_take_the_policys_flag(base: Path, tmp_path: Path, training: bool) -> None:
    policy = OpenVLAPolicy.from_pretrained(base).train(training)
    policy.config = policy.config.model_copy(update={"lora": LoRAConfig(rank=2, dropout=0.5)})
    policy.add_adapters(base)
    assert policy.training == training
    check(policy)
    policy = OpenVLAPolicy.from_pretrained(base).train(training)
    peft_merge.attach(
        policy, foreign(base, tmp_path / "foreign", written={"lora_dropout": 0.5}), skipped=lambda _: False
    )
    check(policy)


def test_official_checkpoints_are_loaded_for_acting(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official")
    check(policy := OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS, critic="separate"))
    assert not policy.training
    config = read_config(folder, HEADS).model_copy(update={"lora": LoRAConfig(rank=2, dropout=0.5)})
    check(OpenVLAPolicy(config))


@pytest.mark.parametrize("held", ["plain", "nf4"])
def test_a_loaded_policy_with_dropout_gives_one_answer(wide: Path, tmp_path: Path, held: str) -> None:
    """The export's comparison with the 4-bit policy that was trained measured the noise of its dropout."""
    trained = adapted(wide, lora={"dropout": 0.5, "base": held}, **WIDE)
    trained.save_pretrained(tmp_path / "trained")
    policy, again = (OpenVLAPolicy.from_pretrained(tmp_path / "trained") for _ in range(2))
    first = policy.act(inputs(policy)).logprobs
    for other in (policy, again, trained):
        assert torch.equal(other.act(inputs(other)).logprobs, first)
    found = [export.export_merged(tmp_path / "trained", tmp_path / f"merged_{i}").trained for i in range(2)]
    assert found[0] == found[1] and (found[0] is None) == (held == "plain")
