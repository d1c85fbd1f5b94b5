"""Plans of a 4-bit base against the policy they speak of, and when one is advised."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_policies import CPU, ROWS, Live, large, plan_inputs, rows_of, run_of, tensors, train
from plan_policies import configure as sized

from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.plan.activations import features_row, head_copy, training_row
from reachrl.plan.advice import advise, apply
from reachrl.plan.device import DEVICES, GIB
from reachrl.plan.memory import plan_memory, usable
from reachrl.plan.parameters import NF4_BYTES, layer_parameters, weights
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
    held = weights(config, PPOConfig())
    taken = sum(p.nbytes for p in policy.parameters()) + sum(tensor.nbytes for tensor in scales(policy))
    assert sum(part.bytes for part in held) == pytest.approx(taken, rel=1e-3)
    packed = next(part for part in held if "4 bits" in part.name)
    assert packed.count == layer_parameters(config) == 5 * (4 * 128 * 128 + 3 * 128 * 384)
    assert packed.trained_by is None and pytest.approx(4.127, abs=5e-4) == 8 * NF4_BYTES
    plain = weights(apply_policy(config, base="plain"), PPOConfig())
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
    plan = plan_memory(run_of(config), CPU)
    given = plan_inputs(config)
    extra = scales(policy)
    if policy._rollout is not None:
        own = [p for module in (policy._rollout.projector, policy._rollout.model) for p in module.parameters()]
        shared = {p.data_ptr() for p in policy.parameters()}
        made = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in own if p.data_ptr() not in shared}
        copied = next(part for part in plan.parts if part.name == "copy to decode with")
        assert copied.bytes == pytest.approx(sum(made.values()), rel=0.01)
        extra += own
    with Live([*tensors(policy, cached, actions), *extra]) as acting:
        policy.act(cached)
    assert between(acting.peak, plan.of("rollout") - given, config)
    with Live([*tensors(policy, cached, actions), *extra]) as updating:
        train(policy, cached, actions)
    made = sum(part.bytes for part in plan.parts if part.name == "gradients")
    rows = ROWS * features_row(config)
    assert between(updating.peak, plan.of("update") + made - rows, config)


def between(measured: float, planned: float, config: OpenVLAConfig) -> bool:
    """Planned is a decoded map too much at the most: it may be let go before the widest moment.

    In mixed precision on a CPU peft makes a float32 copy of what it reads, as it asks for CUDA's autocast only.
    """
    least = 0.88 if config.compute_dtype else 0.95
    decoded = (2 if "bfloat16" in (config.dtype, config.compute_dtype) else 4) * 128 * 384
    return least * measured <= planned <= 1.05 * measured + decoded


@pytest.mark.parametrize("name", ["float32", "bfloat16", "mixed", "adapter critic"])
def test_bytes_kept_are_those_that_autograd_keeps(name: str, tmp_path: Path) -> None:
    config = configure(tmp_path, **VARIANTS[name])
    policy = OpenVLAPolicy(config)
    policy.freeze(["vision"])
    _, cached, actions = rows_of(policy)
    own = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    shapes = {parameter.shape for parameter in policy.parameters()}
    kept, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        cast = "mixed" in name and bool({tensor.shape, tensor.T.shape if tensor.ndim == 2 else tensor.shape} & shapes)
        if storage._cdata not in own and not cast:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.evaluate(cached, actions)
    predicted = ROWS * sum(training_row(config, train_vision=False).values()) + head_copy(config)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.03)


def test_the_released_size_in_4_bits() -> None:
    device = replace(DEVICES["h200"], layer_call_s=0.0)
    plain, packed = (large(lora={"rank": 32, "base": base}, critic="adapter") for base in ("plain", "nf4"))
    spared = plan_memory(plain, device).of("always") - plan_memory(packed, device).of("always")
    assert spared == pytest.approx(6_476_005_376 * (2 - 4.127 / 8), rel=1e-3)  # 9.6 GB
    assert plan_memory(packed, device).of("rollout") > plan_memory(plain, device).of("rollout")  # a map decoded
    seconds = {}
    for name, config in {"plain": plain, "nf4": packed}.items():
        seconds[name] = {part.name: part.seconds for part in plan_time(config, device).stretches}
    # Bound by arithmetic, or by bytes moved: then 0.5 + 2 x 2 bytes a weight in place of 2.
    assert seconds["nf4"]["PPO, 2 epochs"] == seconds["plain"]["PPO, 2 epochs"]
    assert 2 < seconds["nf4"]["decode steps"] / seconds["plain"]["decode steps"] < 2.3
    copied = apply(packed, {"policy.rollout_copy": True})
    again = {part.name: part.seconds for part in plan_time(copied, device).stretches}
    assert again["decode steps"] <= seconds["plain"]["decode steps"]


def test_four_bits_are_advised_where_the_frozen_weights_fill_the_card() -> None:
    config = load_config("libero_spatial")
    for memory in (15.0, 16.0):
        card = replace(DEVICES["4090"], memory=memory)
        assert not plan_memory(config, card).fits(card)
        changes = advise(config, card)
        assert changes[0].overrides == {"policy.lora.base": "nf4"} and changes[-1].leaves <= usable(card)
        text = [word for change in changes for word in change.text.split()]
        assert plan_memory(load_config("libero_spatial", text), card).fits(card)


def test_four_bits_are_not_advised_where_other_changes_suffice_or_they_cannot_be() -> None:
    def advised(config, device) -> bool:
        return any("policy.lora.base" in change.overrides for change in advise(config, device))

    plain = large(lora={"rank": 32}, critic="adapter")
    roomy = replace(DEVICES["h100"], memory=0.9 * plan_memory(plain, DEVICES["h100"]).peak / GIB)
    assert not plan_memory(plain, roomy).fits(roomy) and not advised(plain, roomy)
    card = DEVICES["4090"]
    assert advised(plain, card)
    changes = [list(change.overrides) for change in advise(large(critic="separate"), card)]
    assert changes.index(["policy.lora.rank", "policy.critic"]) < changes.index(["policy.lora.base"])
    odd = apply(plain, {"policy.language_model.intermediate_size": 11000})
    sharded = apply(plain, {"backend.kind": "ray", "backend.sharding": "full"})
    assert not advised(odd, card) and not advised(sharded, card)
