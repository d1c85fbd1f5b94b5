"""Plans against the modules they speak of: bytes kept and at work; time."""

from dataclasses import replace

import pytest
import torch
from plan_policies import (
    CPU,
    LORA,
    ROWS,
    SIZES,
    VARIANTS,
    WITH_VISION,
    Live,
    build,
    configure,
    large,
    plan_inputs,
    rows_of,
    run_of,
    tensors,
    train,
)

from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.rollout import RolloutSection
from reachrl.config.train import TrainConfig
from reachrl.plan.activations import cache_row, features_row, head_copy, layer_row, training_row
from reachrl.plan.advice import apply
from reachrl.plan.device import DEVICES, GIB, Device
from reachrl.plan.memory import MemoryPlan, Part, plan_memory
from reachrl.plan.timing import plan_time
from reachrl.policies.frozen_linear import FrozenLinear

# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train_vision"),
    [
        *((name, False) for name in [*VARIANTS, "mixed", "lora mixed"] if "checkpointing" not in name),
        *((name, True) for name in WITH_VISION),
    ],
)
def test_bytes_kept_are_those_that_autograd_keeps(name: str, train_vision: bool) -> None:
    mixed = {"compute_dtype": "bfloat16"}
    config = configure(**({**mixed, **(LORA if "lora" in name else {})} if "mixed" in name else VARIANTS[name]))
    policy = build(config)
    if not train_vision:
        policy.freeze(["vision"])
    seen, cached, actions = rows_of(policy)
    own = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    kept, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        shape = {tensor.shape, tensor.T.shape if tensor.ndim == 2 else tensor.shape}
        cast = "mixed" in name and bool(shape & {parameter.shape for parameter in policy.parameters()})
        if storage._cdata not in own and not cast:  # autocast's copies of weights are a part of their own
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.evaluate(seen if train_vision else cached, actions)
    predicted = ROWS * sum(training_row(config, train_vision=train_vision).values()) + head_copy(config)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.03)


COPIES = {
    "copy": {**LORA, "rollout_copy": True},
    "copy in 8 bits": {
        **LORA,
        "rollout_copy": True,
        "rollout_precision": "float8",
        "dtype": "bfloat16",
        "language_model": {**SIZES["language_model"], "intermediate_size": 352},
    },
}


@pytest.mark.parametrize("name", [*VARIANTS, *COPIES])
def test_a_phase_needs_what_its_live_tensors_take(name: str) -> None:
    config = configure(**(VARIANTS | COPIES)[name])
    policy = build(config)
    policy.freeze(["vision"])
    seen, cached, actions = rows_of(policy)
    policy.act(cached)  # a copy to decode with is made
    plan = plan_memory(run_of(config), CPU)
    given = plan_inputs(config)
    copied: list[torch.Tensor] = []
    if policy._rollout is not None:
        for module in (policy._rollout.projector, policy._rollout.model):
            copied += [*module.parameters(), *module.buffers()]
    with Live([*tensors(policy, cached, actions), *copied]) as acting:
        policy.act(cached)
    assert plan.of("rollout") - given == pytest.approx(acting.peak, rel=0.05)
    with Live(tensors(policy, seen, actions)) as scoring, torch.no_grad():
        policy.evaluate(seen, actions)
    assert ROWS * features_row(config) <= plan.of("scoring") == pytest.approx(scoring.peak, rel=0.25)
    for passes in (1, 2):  # the first pass makes the gradients, the second adds to them
        plan = plan_memory(run_of(config, passes=passes), CPU)
        made = sum(part.bytes for part in plan.parts if part.name == "gradients") if passes == 1 else 0
        with Live(tensors(policy, cached, actions)) as updating:
            train(policy, cached, actions)
        assert plan.of("update") + made - ROWS * features_row(config) == pytest.approx(updating.peak, rel=0.1)
    optimizer = torch.optim.AdamW(parameter for parameter in policy.parameters() if parameter.requires_grad)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with Live([*tensors(policy, cached, actions), *states]) as stepping:
        optimizer.step()
    assert plan.of("optimiser step") == pytest.approx(stepping.peak, rel=0.05)


def test_known_sizes_of_the_released_model() -> None:
    config = OpenVLAConfig.openvla_7b()
    assert cache_row(config) == 2 * 32 * 4096 * 2 * (1 + 256 + 31 + 6)  # 0.524 MB a token
    assert features_row(config) == 256 * 2176 * 2  # 1.1 MB
    assert training_row(config, train_vision=False)["vision"] == 0
    assert 1.6e9 < sum(training_row(config, train_vision=False).values()) < 1.9e9


def test_optimiser_states_follow_the_numbers_of_what_is_trained() -> None:
    def size(config: TrainConfig, name: str) -> float:
        return sum(part.bytes for part in plan_memory(config, DEVICES["h200"]).parts if part.name == name)

    full, adapted = large(), large(lora={"rank": 32})
    assert size(full, "Adam states") == 2 * size(full, "gradients") == 2 * size(full, "trainable weights")
    assert size(full, "gradients") == 2 * 6_810_325_504 + 4 * 4_196_353  # 2 bytes of the trunk, 4 of the value head
    assert size(adapted, "gradients") == 4 * (79_953_920 + 4_196_353)
    assert size(adapted, "frozen weights") == 2 * 7_498_156_704
    assert size(full, "AdamW's temporaries") == 2 * 6_810_325_504
    assert size(large(rollout_copy=True), "copy to decode with") == 2 * (6_476_267_520 - 64 * 4096 + 71_385_600)


def test_a_gpu_and_a_cpu_hold_different_things() -> None:
    names = {part.name for part in plan_memory(load_config("robust"), CPU).parts}
    assert {"16 simulators, PyTorch", "frames of an iteration"} <= names
    gpu = {part.name for part in plan_memory(load_config("robust"), DEVICES["h200"]).parts}
    assert not any("simulators" in name for name in gpu) and any("CUDA" in name for name in gpu)


def test_a_copy_in_8_bits_takes_its_weights_and_a_little() -> None:
    wide = {**SIZES["language_model"], "intermediate_size": 160}
    config = configure(rollout_copy=True, rollout_precision="float8", dtype="bfloat16", language_model=wide)
    policy = build(config)
    policy.act(rows_of(policy)[1])
    copy = policy._rollout
    assert copy is not None
    modules = [module for part in (copy.projector, copy.model) for module in part.modules()]
    given = [module for module in modules if isinstance(module, FrozenLinear)]
    storages = [m.weight.untyped_storage() for m in given]  # parts of a fused map share theirs
    held = {storage._cdata: storage.nbytes() for storage in storages}
    planned = next(part for part in plan_memory(run_of(config), CPU).parts if part.name == "copy to decode with")
    biases = sum(m.bias.nbytes for m in given if m.bias is not None)
    assert planned.bytes == sum(held.values()) + biases


def test_recorded_steps_keep_their_cache() -> None:
    def cache(config: TrainConfig, device: str = "h200") -> Part:
        return next(part for part in plan_memory(config, DEVICES[device]).parts if "cache" in part.name)

    row = cache_row(OpenVLAConfig.openvla_7b())
    kept = cache(apply(large(rollout_copy=True), {"env.num_envs": 20}))
    assert (kept.phase, kept.bytes) == ("always", 32 * row)  # the next size that is recorded
    for changes in ({}, {"rollout_copy": True, "decode_graphs": False}):
        passing = cache(large(**changes))
        assert (passing.phase, passing.bytes) == ("rollout", 16 * row)


MORE = [
    {"env.num_envs": 32},
    {"rollout.num_steps": 256},
    {"algorithm.micro_batch_size": 32},
    {"algorithm.train_vision": True},
    {"policy.lora.rank": 64},
    {"policy.critic": "adapter"},
    {"policy.prompt_length": 64},
    {"policy.rollout_copy": True},
    {"policy.dtype": "float32"},
    {"policy.language_model.num_layers": 40},
]


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more)))
def test_more_of_something_takes_more_memory(more: dict[str, object]) -> None:
    config = large(lora={"rank": 32})
    before, after = plan_memory(config, DEVICES["h200"]), plan_memory(apply(config, more), DEVICES["h200"])
    if "algorithm.train_vision" in more:  # towers without adapters: nothing is trained, but nothing is cached either
        assert after.of("always") < before.of("always") and after.of("update") > before.of("update")
        return
    phases = ("always", "rollout", "scoring", "update", "optimiser step")
    assert after.peak >= before.peak
    assert sum(after.of(phase) for phase in phases) > sum(before.of(phase) for phase in phases)


def test_checkpointing_keeps_one_layer_instead_of_all() -> None:
    without, with_it = large(), large(gradient_checkpointing=True)
    saved = plan_memory(without, CPU).of("update") - plan_memory(with_it, CPU).of("update")
    policy = without.policy
    assert isinstance(policy, OpenVLAConfig)
    inputs, added = 31 * 294 * 4096 * 2, 32064 * 4096 * 2  # a layer again takes more than a gradient to be added
    assert saved == pytest.approx(16 * (30 * layer_row(policy, 294) - inputs) + added, rel=1e-6)


# --- time -------------------------------------------------------------------------------------------


def test_time_agrees_with_arithmetic_done_by_hand() -> None:
    # An H200 at 790 TFLOP/s and 4.3 TB/s, 16 rows of 287 tokens: 84 ms of prefill and 21.5 ms for six steps, of which
    # each reads 13 GB of weights.
    shares = {"forward_share": 790 / 989, "bandwidth_share": 4.3 / 4.8, "layer_call_s": 0.0}
    floor = replace(DEVICES["h200"], **shares)
    config = large().model_copy(update={"rollout": RolloutSection(num_steps=1)})
    taken = {part.name: part.seconds for part in plan_time(config, floor, 1e9).stretches}
    assert taken["prefill"] == pytest.approx(0.084, rel=0.02)
    assert taken["decode steps"] == pytest.approx(0.0215, rel=0.05)


def test_time_scales_with_work_and_machine() -> None:
    config, device = large(lora={"rank": 32}), DEVICES["h200"]

    def seconds(config: TrainConfig, device: Device) -> dict[str, float]:
        return {part.name: part.seconds for part in plan_time(config, device).stretches}

    base = seconds(config, device)
    twice = seconds(config, replace(device, bf16=2 * device.bf16, bandwidth=2 * device.bandwidth, layer_call_s=0))
    assert twice["prefill"] == pytest.approx(base["prefill"] / 2)
    assert twice["environment steps"] == base["environment steps"] == pytest.approx(2048 / 360)
    longer = seconds(apply(config, {"algorithm.epochs": 3}), device)
    assert longer["PPO, 3 epochs"] == pytest.approx(1.5 * base["PPO, 2 epochs"])
    # 2,048 decisions in minibatches of 256: 512 rows after the last step, 128 at each of 15 looks of a stop before it.
    flops = {part.name: part.flops for part in plan_time(config, device).stretches}
    stopping = apply(config, {"algorithm.target_kl": 0.01})
    stopped = {part.name: part.flops for part in plan_time(stopping, device).stretches}
    assert stopped["KL of the update"] == pytest.approx((512 + 15 * 128) / 512 * flops["KL of the update"])
    assert flops["PPO, 2 epochs"] > 2 * 2048 / 512 * 2 * flops["KL of the update"]  # a step is a pass and more
    again = seconds(apply(config, {"policy.gradient_checkpointing": True}), device)
    assert 1.3 < again["PPO, 2 epochs"] / base["PPO, 2 epochs"] < 1.5


def test_phases_follow_one_another_and_some_memory_stays_free() -> None:
    parts = (Part("a", 8 * GIB), Part("b", 4 * GIB, "rollout"), Part("c", 3 * GIB, "update"), Part("d", GIB, "update"))
    plan = MemoryPlan((*parts, Part("e", GIB, "update")))
    assert (plan.peak, plan.worst) == (13 * GIB, "update")
    assert plan.fits(replace(CPU, memory=13.7)) and not plan.fits(replace(CPU, memory=13.6))
