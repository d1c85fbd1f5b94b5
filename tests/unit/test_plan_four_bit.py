"""Plans of a 4-bit base against the policy they speak of, and when one is advised."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_policies import CPU, ROWS, Live, given_bytes, large, products, rows_of, run_of, tensors, train
from plan_policies import configure as sized

from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.plan.advice import advise, apply
from reachrl.plan.device import DEVICES, GIB
from reachrl.plan.memory import plan_memory, usable
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time
from reachrl.policies.openvla.policy import OpenVLAPolicy

LLM = {"language_model": {"hidden_size": 128, "intermediate_size": 384, "num_layers": 5, "num_heads": 4}}
VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "mixed": {"compute_dtype": "bfloat16"},
    "adapter critic": {"dtype": "bfloat16", "critic": "adapter"},
    "checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "copy": {"dtype": "bfloat16", "rollout_copy": True},
    "mixed copy": {"compute_dtype": "bfloat16", "rollout_copy": True},
}


def configure(folder: Path, **changes: object) -> OpenVLAConfig:
    """Adapters on a 4-bit base of random weights, which is written into `folder`."""
    torch.manual_seed(0)
    OpenVLAPolicy(sized(**LLM)).save_pretrained(folder / "base")
    lora = {"checkpoint": folder / "base", "lora": {"rank": 8, "base": "nf4"}}
    return sized(**{**LLM, **lora, **changes})


def scales(policy: OpenVLAPolicy) -> list[torch.Tensor]:
    """What is held beside the packed weights, but for tables of levels: 1 KB a map, whatever its size."""
    states = [p.quant_state for p in policy.parameters() if hasattr(p, "quant_state")]
    return [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]


def test_a_4_bit_base_takes_what_is_planned(tmp_path: Path) -> None:
    config = configure(tmp_path, dtype="bfloat16", critic="adapter")
    policy = OpenVLAPolicy(config)
    held = outline_of(run_of(config), accelerator=False).weights
    taken = sum(p.nbytes for p in policy.parameters()) + sum(tensor.nbytes for tensor in scales(policy))
    assert sum(part.bytes for part in held) == pytest.approx(taken, rel=1e-3)
    packed = next(part for part in held if "4 bits" in part.name)
    assert packed.count == 5 * (4 * 128 * 128 + 3 * 128 * 384)
    assert packed.trained_by is None and 8 * packed.width == pytest.approx(4.127, abs=0.01)
    plain = outline_of(run_of(apply_policy(config, base="plain")), accelerator=False).weights
    assert sum(part.count for part in held) == sum(part.count for part in plain)


def apply_policy(config: OpenVLAConfig, **lora: object) -> OpenVLAConfig:
    assert config.lora is not None
    return config.model_copy(update={"lora": config.lora.model_copy(update=lora)})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_phase_needs_what_its_live_tensors_take(name: str, tmp_path: Path) -> None:
    config = configure(tmp_path, **VARIANTS[name])
    policy = OpenVLAPolicy(config)
    policy.freeze(["vision"])
    _, cached, actions = rows_of(policy)
    policy.act(cached)  # a copy to decode with is made
    run = run_of(config)
    plan, outline = plan_memory(run, CPU), outline_of(run, accelerator=False)
    extra = scales(policy)
    if policy._rollout is not None:
        own = [p for module in (policy._rollout.projector, policy._rollout.model) for p in module.parameters()]
        shared = {p.data_ptr() for p in policy.parameters()}
        made = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in own if p.data_ptr() not in shared}
        assert outline.kept_for_acting(ROWS) == pytest.approx(sum(made.values()), rel=0.01)
        extra += own
    with Live([*tensors(policy, cached, actions), *extra]) as acting:
        policy.act(cached, with_values=False)
    assert near(outline.acting.peak(ROWS) - outline.features * ROWS, acting.peak, config)
    with Live([*tensors(policy, cached, actions), *extra]) as updating:
        train(policy, cached, actions)
    made = sum(part.bytes for part in plan.parts if part.name == "gradients")
    assert near(plan.of("update") + made, updating.peak + given_bytes(cached), config)
    plain = outline_of(run_of(apply_policy(config, base="plain")), accelerator=False)
    assert outline.training[0].flops(ROWS) == plain.training[0].flops(ROWS)  # decoding a map is no product
    assert products(lambda: policy.values(cached)) <= outline.valuing.flops(ROWS)  # its own kernel is not counted


def near(planned: float, measured: float, config: OpenVLAConfig) -> bool:
    """Planned is some decoded maps too much at the most: a kernel of bitsandbytes' own may decode piece by piece."""
    decoded = (2 if "bfloat16" in (config.dtype, config.compute_dtype) else 4) * 128 * 384
    return 0.98 * measured <= planned <= 1.05 * measured + decoded


def test_wide_layers_in_4_bits() -> None:
    device = replace(DEVICES["h200"], launch_s=0.0)
    plain, packed = (large(2, lora={"rank": 32, "base": base}, critic="adapter") for base in ("plain", "nf4"))
    spared = plan_memory(plain, device).of("always") - plan_memory(packed, device).of("always")
    assert spared == pytest.approx(2 * 202_375_168 * (2 - 4.127 / 8), rel=1e-3)
    # Bytes moved by decoding: 0.5 read and 2 written a weight, and read again as the plain map is.
    more = outline_of(packed, accelerator=True).acting.moved(0) - outline_of(plain, accelerator=True).acting.moved(0)
    assert more == pytest.approx(7 * 2 * 202_375_168 * (0.5 + 2), rel=0.12)  # and its scales
    seconds = {}
    for name, config in {"plain": plain, "nf4": packed}.items():
        seconds[name] = {part.name: part.seconds for part in plan_time(config, device).stretches}
    assert 1 < seconds["nf4"]["PPO, 2 epochs"] / seconds["plain"]["PPO, 2 epochs"] < 1.05


def short(*overrides: str):
    """The preset of the 7B policy with an eighth of its layers."""
    return load_config("libero_spatial", ["policy.language_model.num_layers=2", *overrides])


def test_four_bits_are_advised_where_the_frozen_weights_fill_the_card() -> None:
    config = short()
    card = replace(DEVICES["4090"], memory=5.0)
    assert not plan_memory(config, card).fits(card)
    changes = advise(config, card)
    assert {"policy.lora.base": "nf4"} in [change.overrides for change in changes]
    assert changes[-1].leaves <= usable(card)
    text = [word for change in changes for word in change.text.split()]
    assert plan_memory(short(*text), card).fits(card)


def test_four_bits_are_not_advised_where_other_changes_suffice_or_they_cannot_be() -> None:
    def advised(config, device) -> bool:
        return any("policy.lora.base" in change.overrides for change in advise(config, device))

    plain = large(2, lora={"rank": 32}, critic="adapter")
    peak = plan_memory(plain, DEVICES["h100"]).peak / GIB
    roomy, card = replace(DEVICES["h100"], memory=0.9 * peak), replace(DEVICES["4090"], memory=3.8)
    assert not plan_memory(plain, roomy).fits(roomy) and not advised(plain, roomy)
    assert advised(plain, card)
    changes = [list(change.overrides) for change in advise(large(2, critic="separate"), card)]
    assert changes.index(["policy.lora.rank", "policy.critic"]) < changes.index(["policy.lora.base"])
    odd = apply(plain, {"policy.language_model.intermediate_size": 11000})
    sharded = apply(plain, {"backend.kind": "ray", "backend.sharding": "full", "backend.evaluator_envs": 1})
    assert not advised(odd, card) and not advised(sharded, card)
