"""A 4-bit base: bitsandbytes' NF4 of what is stored, and everything else as with a plain base of those weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import small_policy
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from plan_policies import Live
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from reachrl.backends.weights import actor_gap, load_packed
from reachrl.cli.app import app
from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import CheckpointError, ConfigError, MissingExtra
from reachrl.policies.lora import export as lora_export
from reachrl.policies.lora import four_bit
from reachrl.policies.openvla import export
from reachrl.policies.openvla.policy import OpenVLAPolicy

LLM = {"language_model": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "num_heads": 2}}
inputs, scores = small_policy.inputs, small_policy.scores
MAPS = 3 * 7
# What QLoRA's appendix E lists; each of a block's weights is the nearest of these times the block's largest.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)


def small(**changes: object) -> OpenVLAConfig:
    return small_policy.small(**{**LLM, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    policy = OpenVLAPolicy(small())
    with torch.no_grad():
        policy.value_head.fc2.weight.normal_()
        for p in policy.language_model.model.layers.parameters():
            p.mul_(2)  # initial weights are small: as they are, rounding them would hardly be seen
    folder = tmp_path_factory.mktemp("base") / "policy"
    policy.save_pretrained(folder)
    return folder


def adapted(base: Path, held: str = "nf4", seed: int | None = 1, **changes: object) -> OpenVLAPolicy:
    """Adapters that change something, on a base held as `held`."""
    lora = {"base": held, **changes.pop("lora", {})}  # pyright: ignore[reportGeneralTypeIssues]
    return small_policy.adapted(base, seed, **LLM, lora=lora, **changes)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight after bitsandbytes' own functions, called by themselves."""
    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))


def twin(base: Path, **changes: object) -> OpenVLAPolicy:
    """The same adapters on a plain base that holds the rounded weights."""
    policy = adapted(base, held="plain", **changes)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name.startswith("language_model.model.layers.") and name.endswith("_proj.base_layer.weight"):
                p.copy_(rounded(p.detach()))
    return policy


def linears(policy: OpenVLAPolicy) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in policy.named_modules() if isinstance(m, Linear4bit)}


# --- what is held -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_maps_of_the_layers_are_in_4_bits_and_nothing_else_is(base: Path, dtype: str) -> None:
    policy, stored = adapted(base, dtype=dtype, critic="adapter"), load_file(base / "model.safetensors")
    found = linears(policy)
    assert len(found) == MAPS
    for name, module in found.items():
        weight = stored.pop(f"{name}.weight").to(getattr(torch, dtype))
        held = module.get_base_layer()
        assert held.weight.dtype == torch.uint8 and held.weight.nbytes == weight.numel() // 2
        ours = four_bit.dense_weight(held)
        assert ours.dtype == weight.dtype and torch.equal(ours, rounded(weight))
        # By hand: the nearest level of each block's largest; double quantisation moves the largest by under 2 %.
        blocks = weight.float().view(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        levels = LEVELS[(blocks / largest).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)]
        apart = (ours.float().view(-1, 64) - levels * largest).abs() / largest
        assert apart.max() < 0.02
    rest = dict(policy.named_parameters())
    for name, weight in stored.items():
        known = name if name in rest else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(rest[known], weight.to(rest[known].dtype)), name
    assert type(policy.language_model.lm_head) is torch.nn.Linear


def test_adapters_begin_as_on_a_plain_base(base: Path) -> None:
    ours, plain = adapted(base, critic="adapter"), dict(adapted(base, "plain", critic="adapter").named_parameters())
    matrices = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    assert len(matrices) == 2 * 2 * MAPS
    assert all(torch.equal(p, plain[n]) and p.dtype == torch.float32 for n, p in matrices.items())


class OnTheMachine(Live):
    """Without what has no storage: the policy is built that way before its weights are read."""

    def _track(self, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            super()._track(tensor)


def test_a_base_is_read_map_by_map(tmp_path: Path) -> None:
    """What is alive at once while loading: the 4-bit base, what is not quantised, and a few maps on their way."""
    wide = {"language_model": {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8, "num_heads": 2}}
    torch.manual_seed(0)
    OpenVLAPolicy(small(**wide)).save_pretrained(tmp_path / "base")
    peaks = {}
    for held in ("plain", "nf4"):
        config = small(**wide, checkpoint=tmp_path / "base", lora={"rank": 1, "base": held})
        with OnTheMachine([]) as live:
            policy = OpenVLAPolicy(config)
        peaks[held] = live.peak
        del policy
    largest, maps = 4 * 256 * 512, 4 * 8 * (4 * 256 * 256 + 3 * 256 * 512)
    saved = maps * (1 - 4.2 / 32)
    assert peaks["plain"] - peaks["nf4"] > saved - 6 * largest > 0.7 * saved


# --- what it computes -------------------------------------------------------------------------------


def test_it_is_the_policy_on_the_rounded_weights(base: Path) -> None:
    options = {"critic": "adapter", "lora": {"parts": ("language_model", "projector", "vision")}}
    ours, theirs, plain = adapted(base, **options), twin(base, **options), adapted(base, "plain", **options)
    ids = torch.arange(12).view(3, 4) + ours.first_action_id
    (logits, values), (others, their_values) = (p.action_logits(inputs(p), ids) for p in (ours, theirs))
    assert torch.allclose(logits, others, atol=1e-4) and torch.allclose(values, their_values, atol=1e-4)
    assert (logits - plain.action_logits(inputs(plain), ids)[0]).abs().max() > 0.05
    assert torch.allclose(ours.act(inputs(ours)).logprobs, theirs.act(inputs(theirs)).logprobs, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapters_alone_and_are_those_of_the_rounded_weights(
    base: Path, checkpointing: bool
) -> None:
    found = []
    for make in (adapted, twin):
        policy = make(base, critic="adapter", gradient_checkpointing=checkpointing)
        out = policy.evaluate(inputs(policy), torch.arange(12).view(3, 4) + policy.first_action_id)
        (out.logprobs.sum() + out.values.sum()).backward()
        found.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(".lora_" in name or name.startswith("value_head.") for name in ours)
    assert len([name for name in ours if ".lora_" in name]) == 2 * 2 * MAPS
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_actor_and_critic_do_not_touch_each_other(base: Path, checkpointing: bool) -> None:
    small_policy.assert_apart(adapted(base, critic="adapter", gradient_checkpointing=checkpointing))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("numbers", "tolerance"),
    [({}, 1e-5), ({"dtype": "bfloat16"}, 0.05), ({"compute_dtype": "bfloat16"}, 0.05)],
    ids=["float32", "bfloat16", "mixed"],
)
def test_acting_scoring_and_training_are_one_function(
    base: Path, copy: bool, numbers: dict[str, str], tolerance: float
) -> None:
    """Some CPUs have a path of bitsandbytes for passes without gradients that multiplies in bfloat16 and repacks."""
    policy = adapted(base, critic="adapter", rollout_copy=copy, **numbers)
    packed = {name: module.get_base_layer().weight.clone() for name, module in linears(policy).items()}
    sample = policy.act(inputs(policy))
    with torch.no_grad():
        scored = policy.evaluate(inputs(policy), sample.token_ids)
    trained = policy.evaluate(inputs(policy), sample.token_ids)
    for out in (scored, trained):
        assert torch.allclose(out.logprobs, sample.logprobs, atol=tolerance)
        assert torch.allclose(out.values, sample.values, atol=tolerance)
    assert torch.allclose(scored.logprobs, trained.logprobs, atol=1e-6)
    assert all(torch.equal(m.get_base_layer().weight, packed[name]) for name, m in linears(policy).items())


def test_mixed_precision_computes_as_over_plain_weights(base: Path) -> None:
    ours, theirs = (make(base, compute_dtype="bfloat16") for make in (adapted, twin))
    assert ours.compute_dtype == torch.bfloat16
    for policy in (ours, theirs):  # what is kept of a layer is kept in 16 bits
        with policy._arithmetic():
            assert policy.language_model.model.layers[0].mlp.up_proj(torch.ones(2, 64)).dtype == torch.bfloat16
    assert torch.allclose(scores(ours), scores(theirs), atol=0.05)
    scores(ours).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameter_groups()["trunk"])


# --- the copy that decodes --------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("language_model",), ("projector",)])
def test_the_copy_holds_the_decoded_base_with_the_adapters(base: Path, parts: tuple[str, ...]) -> None:
    policy = adapted(base, rollout_copy=True, lora={"parts": parts})
    policy.act(inputs(policy))
    assert policy._rollout is not None
    stored = load_file(base / "model.safetensors")
    for index, layer in enumerate(policy._rollout.model.layers):
        for path in ("self_attn.k_proj", "mlp.down_proj"):
            name = f"language_model.model.layers.{index}.{path}"
            expected, trained = rounded(stored[f"{name}.weight"]), policy.get_submodule(name)
            if "language_model" in parts:
                expected = expected + 2.0 * trained.lora_B["default"].weight @ trained.lora_A["default"].weight
            assert torch.allclose(layer.get_submodule(path).weight, expected, atol=1e-6)


def test_the_copy_follows_every_step_and_what_is_restored(base: Path, tmp_path: Path) -> None:
    policy = adapted(base, rollout_copy=True, critic="adapter")
    optimizer = torch.optim.AdamW(policy.parameter_groups()["trunk"], lr=0.05)
    ids = torch.arange(12).view(3, 4) + policy.first_action_id
    for _ in range(2):
        policy.evaluate(inputs(policy), ids).logprobs.sum().backward()
        optimizer.step()
        sample = policy.act(inputs(policy))
        scored = policy.evaluate(inputs(policy), sample.token_ids).logprobs
        assert torch.allclose(sample.logprobs, scored, atol=1e-5)
    adapted(base, seed=5, critic="adapter").save_pretrained(tmp_path / "policy")
    policy.restore(tmp_path / "policy")
    sample = policy.act(inputs(policy))
    assert torch.allclose(sample.logprobs, policy.evaluate(inputs(policy), sample.token_ids).logprobs, atol=1e-5)


# --- on disk, and on its way ------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_restored_exactly(base: Path, tmp_path: Path) -> None:
    policy = adapted(base, critic="adapter")
    policy.save_pretrained(tmp_path / "policy")
    assert sum(path.stat().st_size for path in (tmp_path / "policy").rglob("*.safetensors")) < 100_000
    other = OpenVLAPolicy.from_pretrained(tmp_path / "policy")
    assert other.config.lora is not None and other.config.lora.base == "nf4" and len(linears(other)) == MAPS
    fresh = adapted(base, seed=None, critic="adapter")
    before = {n: (m.get_base_layer().weight, m.get_base_layer().weight.clone()) for n, m in linears(fresh).items()}
    fresh.restore(tmp_path / "policy")
    for again in (other, fresh):
        ours, theirs = policy.act(inputs(policy)), again.act(inputs(again))
        assert torch.equal(ours.logprobs, theirs.logprobs) and torch.equal(ours.values, theirs.values)
        assert torch.equal(scores(policy), scores(again))
    for name, module in linears(fresh).items():  # neither replaced nor quantised a second time
        held, bits = before[name]
        assert module.get_base_layer().weight is held and torch.equal(held, bits)


def test_a_base_held_differently_is_warned_of_on_loading_and_refused_on_resuming(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted(base).save_pretrained(tmp_path / "policy")
    assert not caplog.records
    plain = adapted(tmp_path / "policy", "plain", seed=None)
    assert "trained with policy.lora.base=nf4, and are put on a base held as plain" in caplog.text
    assert torch.allclose(scores(plain), scores(adapted(base, "plain")), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"lora\.base \(checkpoint 'nf4', configured 'plain'\)"):
        plain.restore(tmp_path / "policy")
    caplog.clear()
    folded = OpenVLAPolicy(small(checkpoint=tmp_path / "policy"))
    assert "not exactly the one that was trained" in caplog.text
    assert torch.allclose(scores(folded), scores(plain), atol=1e-5)
    caplog.clear()
    adapted(base, "plain").save_pretrained(tmp_path / "other")
    adapted(tmp_path / "other", "nf4", seed=None)
    assert "trained with policy.lora.base=plain, and are put on a base held as nf4" in caplog.text


@pytest.mark.parametrize("copy", [False, True])
def test_weights_reach_an_actor_with_a_base_of_its_own(base: Path, copy: bool) -> None:
    learner, actor = adapted(base, critic="adapter"), adapted(base, seed=2, critic="adapter", rollout_copy=copy)
    weights = small_policy.packed(learner)
    assert all(".lora_" in info.name for bucket in weights.buckets for info in bucket.tensors)
    load_packed(actor, weights, train_vision=False)
    assert actor_gap(actor, weights, **small_policy.PROBE) < 1e-4
    assert torch.allclose(actor.act(inputs(actor)).logprobs, learner.act(inputs(learner)).logprobs, atol=1e-5)


# --- merged -----------------------------------------------------------------------------------------


def test_a_merge_is_into_what_is_stored_and_says_how_far_that_is(base: Path, tmp_path: Path) -> None:
    policy = adapted(base, critic="adapter")
    policy.set_action_stats(np.full(4, -0.25), np.full(4, 0.75), np.ones(4, bool))
    policy.save_pretrained(tmp_path / "policy")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "policy"), "--merge", "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert "trained on a 4-bit base" in " ".join(result.output.split())
    stored, merged = (load_file(tmp_path / f / "model.safetensors") for f in (base, "merged"))
    name = "language_model.model.layers.1.mlp.up_proj"
    a, b = (policy.get_submodule(f"{name}.lora_{k}.default").weight for k in "AB")
    assert torch.allclose(merged[f"{name}.weight"], stored[f"{name}.weight"] + 2.0 * b @ a, atol=1e-6)
    found = export.export_merged(tmp_path / "policy", tmp_path / "again").trained
    assert found is not None and found > 0.01
    alone = OpenVLAPolicy.from_pretrained(tmp_path / "merged")
    assert torch.allclose(scores(alone), scores(adapted(base, "plain", critic="adapter")), atol=1e-5)


def test_a_wrong_merge_is_refused_however_far_the_bases_are_apart(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base).save_pretrained(tmp_path / "policy")
    right = lora_export.deltas
    wrong = lambda *of: {name: (a, b, 3 * scale) for name, (a, b, scale) in right(*of).items()}  # noqa: E731
    monkeypatch.setattr(lora_export, "deltas", wrong)
    with pytest.raises(CheckpointError, match="than rounding explains"):
        export.export_merged(tmp_path / "policy", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_a_plain_base_has_no_such_difference(base: Path, tmp_path: Path) -> None:
    adapted(base, "plain").save_pretrained(tmp_path / "policy")
    assert export.export_merged(tmp_path / "policy", tmp_path / "merged").trained is None


# --- refusals ---------------------------------------------------------------------------------------


def test_without_bitsandbytes_the_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reachrl\[quantised\]'"):
        adapted(base)
    adapted(base, "plain")


@pytest.mark.parametrize("sizes", [{"hidden_size": 96}, {"intermediate_size": 344}])
def test_widths_that_are_no_whole_blocks_are_refused(base: Path, sizes: dict[str, int]) -> None:
    llm = {"language_model": {**LLM["language_model"], **sizes}}
    with pytest.raises(ValidationError, match="expected multiples of 64"):
        small(**llm, checkpoint=base, lora={"base": "nf4"})
    small(**llm, checkpoint=base, lora={})


def test_sharding_is_refused() -> None:
    options = ["policy.checkpoint=base", "policy.lora.base=nf4"]
    load_config("toy", options)
    with pytest.raises(ConfigError, match=r"set backend\.sharding=none"):
        load_config("toy", [*options, "backend.kind=ray", "backend.sharding=full"])


def test_four_bits_need_adapters_on_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"policy\.checkpoint must say which"):
        load_config("toy", ["policy.lora.base=nf4"])


def test_the_library_fetches_no_code_as_it_is_imported(tmp_path, monkeypatch, caplog):
    """As bitsandbytes 0.50 does on CPUs with bfloat16 instructions."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): raise AssertionError('fetched')\n")
    backends = tmp_path / "bitsandbytes" / "backends" / "cpu"
    backends.mkdir(parents=True)
    for folder in (tmp_path / "bitsandbytes", backends.parent, backends):
        (folder / "__init__.py").write_text("")
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("from .backends.cpu import ops\n")
    (backends / "ops.py").write_text(
        "import logging\n"
        "try:\n"
        "    from kernels import get_kernel\n"
        "    get_kernel('kernels-community/quantization-bitsandbytes', version=1)\n"
        "except ImportError as error:\n"
        "    logging.getLogger(__name__).warning('Failed to load: %s', error)\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert four_bit.library().__file__ == str(tmp_path / "bitsandbytes" / "__init__.py")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            del sys.modules[name]
    assert not caplog.records and "kernels" not in sys.modules
    import kernels  # whoever wants it otherwise still gets it

    assert kernels.get_kernel
    del sys.modules["kernels"]
