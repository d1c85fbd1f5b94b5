"""Adapters: nothing at first, then what a dense update would be; saved in peft's format; merged without drift."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_policy import adapted, assert_apart, foreign, inputs, scores, small, unseal

from reachrl.errors import CheckpointError, ConfigError, ExtensionError
from reachrl.policies.lora.adapters import ACTOR, CRITIC, active, tensors
from reachrl.policies.lora.merging import merged
from reachrl.policies.openvla.export import export_adapter, export_merged
from reachrl.policies.openvla.policy import OpenVLAPolicy

UP = "base_model.model.language_model.model.layers.1.mlp.up_proj"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_fresh_adapters_change_nothing_and_only_they_are_trained(base: Path) -> None:
    whole = OpenVLAPolicy.from_pretrained(base)
    policy = adapted(base, seed=None, critic="adapter")
    sample, plain = policy.act(inputs(policy)), whole.act(inputs(whole))
    assert torch.equal(sample.logprobs, plain.logprobs)
    assert torch.allclose(sample.values, plain.values, atol=1e-6) and plain.values.abs().min() > 0.01
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name} == set(LINEARS)
    assert {name for name in trained if ".lora_" not in name} == {n for n in trained if n.startswith("value_head.")}
    groups = policy.parameter_groups()
    held = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(held) == sorted(id(dict(policy.named_parameters())[name]) for name in trained)
    # 3 layers, 7 linear maps of rank * (in + out)
    assert sum(p.numel() for p in groups["trunk"]) == 3 * 3 * (4 * (32 + 32) + 3 * (32 + 48))
    assert groups["vision"] == []


def test_an_adapted_policy_is_the_policy_with_dense_updates(base: Path) -> None:
    """The same function as weights W + alpha/rank B A, formed here in float64."""
    policy = adapted(base, lora={"parts": ("language_model", "projector", "vision")})
    dense = OpenVLAPolicy.from_pretrained(base)
    state = dense.state_dict()
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A[ACTOR].weight.double(), module.lora_B[ACTOR].weight.double()
            state[f"{name}.weight"] += (6.0 / 3.0 * b @ a).float()
    assert len([name for name, m in policy.named_modules() if hasattr(m, "lora_A")]) == 3 * 7 + 2 + 2 * 4
    dense.load_state_dict(state)
    assert torch.allclose(scores(policy), scores(dense), atol=1e-5)
    assert not torch.allclose(scores(policy), scores(OpenVLAPolicy.from_pretrained(base)), atol=1e-2)


def test_rollout_and_training_agree(base: Path) -> None:
    policy = adapted(base, critic="adapter")
    sample = policy.act(inputs(policy))
    out = policy.evaluate(inputs(policy), sample.token_ids)
    assert torch.allclose(out.logprobs, sample.logprobs, atol=1e-5)
    assert torch.allclose(out.values, sample.values, atol=1e-5)
    assert torch.allclose(policy.values(inputs(policy)), sample.values, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_actor_and_critic_do_not_touch_each_other(base: Path, checkpointing: bool) -> None:
    """Also when layers are computed again in the backward pass, long after the critic's adapters were active."""
    assert_apart(adapted(base, critic="adapter", gradient_checkpointing=checkpointing))


def test_computing_layers_again_gives_the_same_gradients(base: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = adapted(base, critic="adapter", gradient_checkpointing=checkpointing)
        out = policy.evaluate(inputs(policy), torch.arange(12).view(3, 4) + policy.first_action_id)
        (out.logprobs.sum() + out.values.sum()).backward()
        gradients.append([p.grad for group in policy.parameter_groups().values() for p in group])
    assert len(gradients[0]) > 80
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-5, atol=1e-7)


def test_layers_are_really_computed_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    policy = adapted(base, gradient_checkpointing=True)
    layer = policy.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.evaluate(inputs(policy), torch.arange(12).view(3, 4) + policy.first_action_id).logprobs.sum().backward()
    assert len(calls) == 2


def test_the_critic_starts_from_the_actors_adapters(base: Path) -> None:
    policy = adapted(base, critic="adapter")
    with active(policy, CRITIC):
        before = scores(policy)
    assert not torch.allclose(before, scores(policy), atol=1e-2)
    policy.reset_critic()
    with active(policy, CRITIC):
        assert torch.equal(scores(policy), scores(policy))
        after = scores(policy)
    assert torch.equal(after, scores(policy))
    policy.language_model.model.layers[0].self_attn.q_proj.lora_B[ACTOR].weight.data.add_(1)
    assert not torch.equal(scores(policy), after)  # copied, not shared


def test_saved_adapters_are_small_standard_and_exact(base: Path, tmp_path: Path) -> None:
    policy = adapted(base, critic="adapter")
    policy.set_action_stats(np.full(4, -0.3), np.full(4, 0.2), np.ones(4, bool))
    policy.save_pretrained(tmp_path / "policy")
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert "model.safetensors" not in names
    assert {"adapter_config.json", "adapter_model.safetensors", "critic", "value_head.safetensors"} <= names
    other = OpenVLAPolicy.from_pretrained(tmp_path / "policy")
    for name, value in policy.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.action_stats.q99[0] == 0.2
    ours, theirs = policy.act(inputs(policy)), other.act(inputs(other))
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.logprobs, theirs.logprobs)
    fresh = adapted(base, seed=None, critic="adapter")
    fresh.restore(tmp_path / "policy")
    assert torch.equal(scores(fresh), scores(policy))


def test_peft_itself_reads_the_saved_adapters(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = adapted(base)
    policy.save_pretrained(tmp_path / "policy")
    wrapped = PeftModel.from_pretrained(OpenVLAPolicy.from_pretrained(base), str(tmp_path / "policy"))  # pyright: ignore
    theirs = wrapped.base_model.model
    assert torch.allclose(scores(theirs), scores(policy), atol=1e-6)  # pyright: ignore[reportArgumentType]


def test_without_lora_adapters_are_folded_in(base: Path, tmp_path: Path) -> None:
    policy = adapted(base, lora={"parts": ("language_model", "vision")})
    policy.save_pretrained(tmp_path / "policy")
    whole = OpenVLAPolicy(small(checkpoint=tmp_path / "policy"))
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert torch.allclose(scores(whole), scores(policy), atol=1e-5)


def test_merging_rounds_once_in_the_weights_type() -> None:
    """Merging and unmerging in place in bfloat16 would drift; from the same base it is the same every time."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32, dtype=torch.bfloat16)
    a, b = torch.randn(4, 32) * 0.1, torch.randn(64, 4) * 0.1
    exact = (weight.double() + 0.5 * b.double() @ a.double()).bfloat16()
    before = weight.clone()
    assert (merged(weight, a, b, 0.5) == exact).float().mean() > 0.99  # float32 sums may fall on the other side
    assert torch.equal(weight, before)


def test_adapters_of_another_tool_are_folded_in_head_and_convolution_included(base: Path, tmp_path: Path) -> None:
    folder = foreign(base, tmp_path / "foreign")
    policy, state = OpenVLAPolicy.from_pretrained(folder), load_file(base / "model.safetensors")
    stored = load_file(folder / "adapter_model.safetensors")
    for name in ("language_model.lm_head", "vision_backbone.featurizer.patch_embed.proj"):
        a, b = (stored[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
        expected = state[f"{name}.weight"].double() + 2.0 * torch.einsum("or...,ri...->oi...", b, a)
        assert torch.allclose(policy.state_dict()[f"{name}.weight"].double(), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="fold them in first"):
        OpenVLAPolicy(small(checkpoint=folder, lora={"rank": 2}))
    rooted = foreign(base, tmp_path / "rooted", written={"use_rslora": True})  # alpha / sqrt(rank)
    name = "language_model.model.layers.1.mlp.up_proj"
    a, b = (stored[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
    there = OpenVLAPolicy.from_pretrained(rooted).state_dict()[f"{name}.weight"]
    assert torch.allclose(there, state[f"{name}.weight"] + 4 / 2**0.5 * b @ a, atol=1e-5)


def test_a_changed_base_is_refused(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    policy = adapted(own)
    policy.save_pretrained(tmp_path / "policy")
    state = load_file(own / "model.safetensors")
    state["language_model.model.norm.weight"] += 1
    save_file(state, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on other weights"):
        OpenVLAPolicy.from_pretrained(tmp_path / "policy")
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match="does not exist"):
        OpenVLAPolicy.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "expected plain LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trained biases"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected"),
        ({"rank_pattern": {"up_proj": 4}}, "rank_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 8}, r"up_proj\.weight \(\[2, 32\] and \[48, 2\]\).* are not of rank 8"),
        ({"r": 0}, "r = 0 and"),
        ({"r": None}, "r = None and"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": 0}, "lora_alpha = 0; .* both above 0"),
        ({"lora_alpha": -4.0}, "lora_alpha = -4.0"),
        ({"lora_alpha": True}, "lora_alpha = True"),
    ],
)
def test_adapters_we_cannot_fold_in_are_refused(base: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = foreign(base, tmp_path / "foreign", **change)
    with pytest.raises(CheckpointError, match=message):
        OpenVLAPolicy.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        export_merged(folder, tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        (f"{UP}.lora_A.weight", f"{UP}.lora_A.default.weight", "lora_A.default.weight; one matrix alone for .*up_proj"),
        (f"{UP}.lora_A.weight", None, "one matrix alone for .*up_proj"),
        (f"{UP}.lora_B.weight", None, "one matrix alone for .*up_proj"),
        (None, f"{UP}.lora_B.bias", "lora_B.bias"),
        (None, "base_model.model.language_model.model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        (None, f"{UP}.lora_A.weight".removeprefix("base_model.model."), "twice"),
        ("", None, "no LoRA matrices"),
    ],
)
def test_every_tensor_of_an_adapter_is_accounted_for(
    base: Path, tmp_path: Path, key: str | None, other: str | None, message: str
) -> None:
    """A tensor that is dropped would leave the base's outputs, or part of them, without a word."""
    path = foreign(base, tmp_path / "foreign") / "adapter_model.safetensors"
    stored = load_file(path) if key != "" else {}
    moved = stored.pop(key) if key else torch.zeros(2, 32)
    save_file(stored | ({other: moved} if other else {}), path)
    with pytest.raises(CheckpointError, match=message):
        OpenVLAPolicy.from_pretrained(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{UP}.lora_A.weight", (2, 33)),
        (f"{UP}.lora_B.weight", (32, 2)),
        ("base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_A.weight", (2, 3, 4, 16)),
    ],
)
def test_adapters_that_do_not_fit_their_weight_are_refused(
    base: Path, tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    path = foreign(base, tmp_path / "foreign") / "adapter_model.safetensors"
    save_file(load_file(path) | {key: torch.zeros(shape)}, path)
    with pytest.raises(CheckpointError, match="does not fit the weight of its base"):
        OpenVLAPolicy.from_pretrained(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="does not fit the weight of its base"):
        export_merged(tmp_path / "foreign", tmp_path / "merged")


HEAD = "base_model.model.language_model.lm_head.base_layer.weight"
WORDS = "base_model.model.language_model.model.embed_tokens.weight"


def test_copies_of_the_base_beside_the_matrices_are_accepted_and_others_refused(base: Path, tmp_path: Path) -> None:
    """Peft stores the frozen head under its adapter, and the embedding where it is told to."""
    path = foreign(base, tmp_path / "foreign") / "adapter_model.safetensors"
    stored, whole = load_file(path), load_file(base / "model.safetensors")
    assert [key for key in stored if ".lora_" not in key] == [HEAD]
    words = whole["language_model.model.embed_tokens.weight"]
    save_file({**stored, HEAD: stored[HEAD].bfloat16(), WORDS: words}, path)  # trained, and saved, in 16 bits
    merged_in = OpenVLAPolicy.from_pretrained(tmp_path / "foreign").state_dict()
    a, b = (stored[f"base_model.model.language_model.lm_head.lora_{k}.weight"] for k in "AB")
    head = whole["language_model.lm_head.weight"] + 2.0 * b @ a
    assert torch.allclose(merged_in["language_model.lm_head.weight"], head, atol=1e-5)
    assert torch.equal(merged_in["language_model.model.embed_tokens.weight"], words)
    for key, name in ((HEAD, "lm_head"), (WORDS, "embed_tokens")):
        changed = {HEAD: stored[HEAD], WORDS: words.clone()}[key].clone()
        changed[3, 3] += 1e-3
        save_file({**stored, key: changed}, path)
        for look in (OpenVLAPolicy.from_pretrained, lambda folder: export_merged(folder, tmp_path / "merged")):
            with pytest.raises(CheckpointError, match=rf"{name}\.weight with other numbers than the base"):
                look(tmp_path / "foreign")
    save_file({**stored, "base_model.model.language_model.other.weight": words}, path)
    with pytest.raises(CheckpointError, match=r"unknown tensors language_model\.other\.weight"):
        OpenVLAPolicy.from_pretrained(tmp_path / "foreign")


def test_adapters_that_change_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    """They would pass for trained ones under their name; ours may, where only a critic was trained."""
    path = foreign(base, tmp_path / "foreign") / "adapter_model.safetensors"
    save_file({k: v * (".lora_B." not in k) for k, v in load_file(path).items() if ".lora_" in k}, path)
    for look in (
        OpenVLAPolicy.from_pretrained,
        lambda folder: export_merged(folder, tmp_path / "merged"),
        lambda folder: export_adapter(folder, tmp_path / "copied"),
    ):
        with pytest.raises(CheckpointError, match="adapters that change nothing"):
            look(tmp_path / "foreign")
    faint = foreign(base, tmp_path / "faint", lora_alpha=1e-12)
    for look in (OpenVLAPolicy.from_pretrained, lambda folder: export_merged(folder, tmp_path / "merged")):
        with pytest.raises(CheckpointError, match=r"change \d+ of the 39,424 weights they are folded into"):
            look(faint)
    adapted(base, seed=None).save_pretrained(tmp_path / "ours")
    whole = OpenVLAPolicy(small(checkpoint=tmp_path / "ours"))
    assert torch.equal(scores(whole), scores(OpenVLAPolicy.from_pretrained(base)))


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"lora_alpha": 0}, ".", "lora_alpha = 0; expected"),
        ({"lora_alpha": 12.0}, ".", "lora_alpha = 12.0 there, 6.0 by config.json"),
        ({"r": 4}, ".", "r = 4 there, 3 by config.json"),
        ({"use_rslora": True}, ".", "use_rslora = True there"),
        ({"target_modules": ["q_proj"]}, ".", r"target_modules = \['q_proj'\] there"),
        ({"target_modules": "all-linear"}, ".", "target_modules = 'all-linear' there"),
        ({"use_dora": True}, ".", "use_dora"),
        ({"lora_alpha": 12.0}, "critic", "critic/adapter_config.json and .* lora_alpha = 12.0 there"),
    ],
)
def test_a_folder_whose_two_configurations_disagree_is_refused(
    base: Path, tmp_path: Path, changes: dict, where: str, message: str
) -> None:
    """It would act by one of them and be exported by the other."""
    folder, policy = tmp_path / "policy", adapted(base, critic="adapter")
    policy.save_pretrained(folder)
    path = unseal(folder) / where / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for look in (
        OpenVLAPolicy.from_pretrained,
        policy.restore,
        lambda folder: OpenVLAPolicy(small(checkpoint=folder)),
        lambda folder: export_merged(folder, tmp_path / "merged"),
        lambda folder: export_adapter(folder, tmp_path / "alone"),
    ):
        with pytest.raises(CheckpointError, match=message):
            look(folder)


def test_adapters_beside_a_configuration_without_are_refused(base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "policy")
    unseal(tmp_path / "policy")
    shutil.copyfile(base / "config.json", tmp_path / "policy" / "config.json")
    with pytest.raises(CheckpointError, match="describes a policy without"):
        OpenVLAPolicy.from_pretrained(tmp_path / "policy")


def test_adapters_on_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    folder = foreign(base, tmp_path / "foreign")
    itself = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(itself))
    with pytest.raises(CheckpointError, match="which holds adapters itself"):
        OpenVLAPolicy.from_pretrained(folder)


def test_truncated_adapters_are_named(base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "policy")
    path = tmp_path / "policy" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is truncated"):
        OpenVLAPolicy.from_pretrained(tmp_path / "policy")


def test_adapters_of_another_rank_are_refused(base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"lora\.rank \(checkpoint 3, configured 5\)"):
        OpenVLAPolicy(small(checkpoint=tmp_path / "policy", lora={"rank": 5, "alpha": 6.0}))


def test_options_that_cannot_work_are_refused(base: Path) -> None:
    with pytest.raises(ValidationError, match=r"policy\.checkpoint must say which"):
        small(lora={})
    with pytest.raises(ValidationError, match="second set of adapters"):
        small(checkpoint=base, critic="adapter")
    with pytest.raises(ValidationError, match="use critic="):
        small(checkpoint=base, critic="separate", lora={})
    conv = {"towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 8, "stride": 8}]},)}
    torch.manual_seed(0)
    folder = base.parent / "conv"
    OpenVLAPolicy(small(**conv)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="'vision' has no linear maps"):
        OpenVLAPolicy(small(**conv, checkpoint=folder, lora={"parts": ("vision",)}))


def test_mixed_precision_keeps_master_weights(base: Path) -> None:
    plain = OpenVLAPolicy.from_pretrained(base)
    mixed = OpenVLAPolicy(small(checkpoint=base, compute_dtype="bfloat16"))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    gap = (scores(mixed) - scores(plain)).abs().max().item()
    assert 1e-6 < gap < 0.1
    sample = mixed.act(inputs(mixed))
    assert sample.logprobs.dtype == torch.float32
    scores(mixed).sum().backward()
    assert mixed.language_model.model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32
    stored = OpenVLAPolicy(small(checkpoint=base, dtype="bfloat16", lora={}))
    kinds = {p.dtype for name, p in stored.named_parameters() if ".lora_" in name or name.startswith("value_head")}
    assert kinds == {torch.float32}
    assert stored.language_model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert all(torch.isfinite(t).all() for t in tensors(stored, ACTOR).values())


def test_a_critic_of_its_own_does_not_run_unasked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(base, critic="adapter")
    asked = policy.act(inputs(policy))
    calls = []
    monkeypatch.setattr(policy.value_head, "forward", lambda hidden: calls.append(1))
    unasked = policy.act(inputs(policy), with_values=False)
    assert not calls and unasked.values is None
    assert torch.equal(unasked.logprobs, asked.logprobs)


def test_the_first_ratio_is_judged_by_the_arithmetic_not_by_the_adapters_type(base: Path) -> None:
    """Float32 adapters on a 16-bit trunk: two batch sizes round differently, which is no mistake."""
    from reachrl.algorithms.minibatches import check_first_ratio

    for changes in ({"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}):
        policy = adapted(base, **changes)
        assert policy.compute_dtype == torch.bfloat16
        check_first_ratio(math.log(1.05), policy)
    with pytest.raises(ExtensionError, match=r"ratio of 1\.0500 or its inverse"):
        check_first_ratio(math.log(1.05), adapted(base))
