"""Plans against the policies they speak of, really run: what is alive, what is multiplied; time."""

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
    given_bytes,
    large,
    products,
    rows_of,
    run_of,
    tensors,
    train,
)

from reachrl.config.loading import load_config
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.rollout import RolloutSection
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.plan.advice import apply
from reachrl.plan.device import DEVICES, GIB, Device
from reachrl.plan.memory import MemoryPlan, Part, plan_memory
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time
from reachrl.policies.frozen_linear import FrozenLinear
from reachrl.registry import trust
from reachrl.testing.policies import TablePolicy, TablePolicyConfig

CASES = [*((name, False) for name in VARIANTS), *((name, True) for name in WITH_VISION)]


@pytest.mark.parametrize(("name", "train_vision"), CASES)
def test_a_plan_is_what_the_policy_takes_when_it_runs(name: str, train_vision: bool) -> None:
    config = configure(**VARIANTS[name])
    policy = build(config)
    if not train_vision:
        policy.freeze(["vision"])
    run = run_of(config, train_vision=train_vision)
    outline = outline_of(run, accelerator=False)
    seen, cached, actions = rows_of(policy)
    scored = seen if train_vision else cached
    _check_parameters(policy, outline.weights)
    # acting
    policy.act(seen, with_values=False)  # a copy to decode with is made
    copied: list[torch.Tensor] = []
    if policy._rollout is not None:
        for module in (policy._rollout.projector, policy._rollout.model):
            copied += [*module.parameters(), *module.buffers()]
    with Live([*tensors(policy, seen, actions), *copied]) as acting:
        policy.act(seen, with_values=False)
    assert outline.acting.peak(ROWS) == pytest.approx(acting.peak + given_bytes(seen), rel=0.02)
    assert products(lambda: policy.act(seen, with_values=False)) == pytest.approx(outline.acting.flops(ROWS), rel=1e-3)
    # scoring
    with torch.no_grad():
        with Live(tensors(policy, scored, actions)) as scoring:
            policy.evaluate(scored, actions)
        given = train_vision * given_bytes(seen)
        assert outline.scoring.peak(ROWS) == pytest.approx(scoring.peak + given, rel=0.02)
        assert products(lambda: policy.evaluate(scored, actions)) == pytest.approx(
            outline.scoring.flops(ROWS), rel=1e-3
        )
        valued = outline.valuing.flops(ROWS) + outline.seeing.flops(ROWS)
        assert products(lambda: policy.values(seen)) == pytest.approx(valued, rel=1e-3)
    # training: the first pass makes the gradients, the second adds to them
    for passes in (1, 2):
        plan = plan_memory(run_of(config, passes=passes, train_vision=train_vision), CPU)
        made = sum(part.bytes for part in plan.parts if part.name == "gradients") if passes == 1 else 0
        with Live(tensors(policy, scored, actions)) as updating:
            train(policy, scored, actions)
        assert plan.of("update") + made == pytest.approx(updating.peak + given_bytes(scored), rel=0.02)
    counted = products(lambda: train(policy, scored, actions))
    assert counted == pytest.approx(outline.training[0].flops(ROWS), rel=1e-3)
    # the optimiser
    optimizer = torch.optim.AdamW(parameter for parameter in policy.parameters() if parameter.requires_grad)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with Live([*tensors(policy, cached, actions), *states]) as stepping:
        optimizer.step()
    assert plan.of("optimiser step") == pytest.approx(stepping.peak, rel=0.05)


def _check_parameters(policy, held) -> None:
    value = {id(parameter) for parameter in policy.parameter_groups()["value"]}
    for role in ("policy", "value", None):
        own = [
            p
            for p in policy.parameters()
            if role == ((p.requires_grad and ("value" if id(p) in value else "policy")) or None)
        ]
        assert sum(part.count for part in held if part.trained_by == role) == sum(p.numel() for p in own)
        assert sum(part.bytes for part in held if part.trained_by == role) == sum(p.nbytes for p in own)


def test_a_phase_has_room_for_every_number_of_rows() -> None:
    config = configure()
    policy, outline = build(config), outline_of(run_of(config), accelerator=False)
    policy.freeze(["vision"])
    for rows in (2, 9):
        _, cached, actions = rows_of(policy, rows)
        policy.zero_grad()
        train(policy, cached, actions)
        with Live(tensors(policy, cached, actions)) as updating:
            train(policy, cached, actions)
        assert outline.training[0].peak(rows) == pytest.approx(updating.peak + given_bytes(cached), rel=0.02)


def test_known_sizes_of_the_released_model() -> None:
    outline = outline_of(large(), accelerator=True)
    assert sum(part.count for part in outline.weights) == 7_498_156_704 + 4_196_353
    assert outline.features == 256 * 2176 * 2 + 31 * 9 + 9  # 1.1 MB, and a prompt's ids and mask
    cache = 2 * 32 * 4096 * 2 * (1 + 256 + 31 + 6)  # 0.524 MB a token
    assert cache < outline.acting.peak(2) - outline.acting.peak(1) < 1.5 * cache
    # Two FLOPs for each weight of the decoder layers and token and four backward, but for the last layer's queries.
    tokens, maps = 294, 6_476_005_376
    assert outline.training[0].flops(1) == pytest.approx(6 * tokens * maps * 31.4 / 32, rel=0.03)
    adapted = outline_of(large(lora={"rank": 32}), accelerator=True)
    assert sum(part.count for part in adapted.weights if "adapters" in part.name) == 79_953_920
    assert 1.6e9 < outline.training[1][1] < 1.9e9 and 2.4e9 < adapted.training[1][1] < 2.6e9


def test_any_policy_is_planned_whose_passes_read_no_numbers() -> None:
    trust("reachrl.testing.policies:TablePolicy")
    config = load_config("toy").model_copy(update={"policy": TablePolicyConfig(num_contexts=3, num_action_tokens=5)})
    outline = outline_of(config, accelerator=False)
    assert [(part.name, part.count, part.trained_by) for part in outline.weights] == [
        ("features", 1, None), ("logits", 3 * 5 * 256, "policy"), ("value", 3, "value"),
    ]  # fmt: skip
    assert outline.features == 4  # one float32
    row = 5 * 256 * 4  # what a table of logits, and each function of it, takes
    assert 3 * row < outline.training[0].peak(2) - outline.training[0].peak(1) < 9 * row
    assert plan_memory(config, CPU).peak > 0 and plan_time(config, CPU).seconds > 0


def test_a_chunk_that_is_read_in_one_pass_is_planned() -> None:
    sizes = {**SIZES, "num_cameras": 2, "state_size": 8, "chunk_size": 4, "critic": "adapter", **LORA}
    config = load_config("toy").model_copy(update={"policy": OpenVLAOFTConfig.model_validate(sizes)})
    outline = outline_of(config, accelerator=True)
    tokens, prompt = 4 * 4, 1 + 2 * 16 + 1 + 15 + 4 * 4 + 1  # BOS, patches of both cameras, state, prompt, answer, stop
    maps = 5 * (4 * 128**2 + 3 * 128 * 344)
    assert outline.acting.flops(1) > 2 * prompt * maps * 4 / 5  # the last layer is read at the answer alone
    assert (
        outline.features == 2 * 16 * 96 * 4 + 8 * 4 + 16 * 9
    )  # float32 features and state; ids and mask of the prompt
    assert plan_memory(config, CPU).peak > 0 and tokens == outline.policy.num_action_tokens


class ReadingConfig(TablePolicyConfig):
    kind: str = "test_plan:Reading"
    """Its kind."""


class Reading(TablePolicy):
    """Looks at numbers."""

    Config = ReadingConfig

    def act(self, inputs, **options):
        return super().act(inputs, **options) if inputs.pixels.sum().item() >= 0 else None


def test_a_policy_that_reads_numbers_is_refused_with_what_it_must_do() -> None:
    trust("test_plan:Reading")
    config = load_config("toy").model_copy(update={"policy": ReadingConfig()})
    with pytest.raises(
        ConfigError, match=r"policy.kind='test_plan:Reading': `act` does not run on PyTorch's meta device"
    ):
        plan_memory(config, CPU)


def test_optimiser_states_follow_the_numbers_of_what_is_trained() -> None:
    def size(config: TrainConfig, name: str) -> float:
        return sum(part.bytes for part in plan_memory(config, DEVICES["h200"]).parts if name in part.name)

    full, adapted = large(), large(lora={"rank": 32})
    assert size(full, "Adam states") == 2 * size(full, "trainable weights")
    assert size(full, "trainable weights") == 2 * 6_810_325_504 + 4 * 4_196_353  # 2 bytes of the trunk, 4 of the head
    assert size(adapted, "trainable weights") == 4 * (79_953_920 + 4_196_353)
    assert size(adapted, "frozen weights") == 2 * 7_498_156_704
    assert size(full, "AdamW's temporaries") == 2 * 6_810_325_504
    maps = 2 * (2 * (4 * 4096**2 + 3 * 4096 * 11008) + 71_385_600)
    assert size(large(2, rollout_copy=True, decode_graphs=False), "kept for acting") == pytest.approx(maps, rel=1e-4)


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
    planned = next(part for part in plan_memory(run_of(config), CPU).parts if "kept for acting" in part.name)
    biases = sum(m.bias.nbytes for m in given if m.bias is not None)
    stored = [m.scale.untyped_storage() for m in given if hasattr(m, "scale")]
    scales = {storage._cdata: storage.nbytes() for storage in stored}
    assert planned.bytes == pytest.approx(sum(held.values()) + biases + sum(scales.values()), rel=0.002)


def test_recorded_steps_keep_their_cache() -> None:
    def kept(config: TrainConfig, device: Device = DEVICES["h200"]) -> float:
        return sum(part.bytes for part in plan_memory(config, device).parts if "kept for acting" in part.name)

    row = 2 * 2 * 4096 * 2 * (1 + 256 + 31 + 6)
    recorded, plain = large(2, rollout_copy=True), large(2, rollout_copy=True, decode_graphs=False)
    assert kept(recorded) - kept(plain) == pytest.approx(16 * row, rel=0.01)
    more = {"env.num_envs": 20}  # the next size that is recorded is 32
    assert kept(apply(recorded, more)) - kept(apply(plain, more)) == pytest.approx(32 * row, rel=0.01)
    assert kept(recorded, CPU) == kept(plain, CPU) == kept(plain)
    assert plan_memory(recorded, DEVICES["h200"]).of("rollout") < plan_memory(plain, DEVICES["h200"]).of("rollout")


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
    {"policy.language_model.num_layers": 5},
]


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more)))
def test_more_of_something_takes_more_memory(more: dict[str, object]) -> None:
    config = large(3, lora={"rank": 32})
    before, after = plan_memory(config, DEVICES["h200"]), plan_memory(apply(config, more), DEVICES["h200"])
    if "algorithm.train_vision" in more:  # towers without adapters: nothing is trained, but nothing is cached either
        assert after.of("always") < before.of("always") and after.of("update") > before.of("update")
        return
    phases = ("always", "rollout", "scoring", "update", "optimiser step")
    assert after.peak >= before.peak
    assert sum(after.of(phase) for phase in phases) > sum(before.of(phase) for phase in phases)


# --- time -------------------------------------------------------------------------------------------


def test_time_agrees_with_arithmetic_done_by_hand() -> None:
    # An H200 at 790 TFLOP/s and 4.3 TB/s, 16 rows of 287 tokens: 84 ms of products in the prefill and 21.5 ms for six
    # steps, of which each reads 13 GB of weights. What lies between the products takes a sixth of that again.
    shares = {"forward_share": 790 / 989, "bandwidth_share": 4.3 / 4.8, "launch_s": 0.0}
    floor = replace(DEVICES["h200"], **shares)
    config = large().model_copy(update={"rollout": RolloutSection(num_steps=1)})
    taken = {part.name: part.seconds for part in plan_time(config, floor, 1e9).stretches}
    assert 0.084 + 0.0215 < taken["acting"] < 1.3 * (0.084 + 0.0215)


def test_time_scales_with_work_and_machine() -> None:
    config, device = large(3, lora={"rank": 32}), DEVICES["h200"]

    def seconds(config: TrainConfig, device: Device) -> dict[str, float]:
        return {part.name: part.seconds for part in plan_time(config, device).stretches}

    base = seconds(config, device)
    twice = seconds(config, replace(device, bf16=2 * device.bf16, bandwidth=2 * device.bandwidth, launch_s=0))
    assert twice["acting"] == pytest.approx(base["acting"] / 2, rel=0.2)
    assert twice["environment steps"] == base["environment steps"] == pytest.approx(2048 / 360)
    longer = seconds(apply(config, {"algorithm.epochs": 3}), device)
    assert longer["PPO, 3 epochs"] == pytest.approx(1.5 * base["PPO, 2 epochs"])
    # 2,048 decisions in minibatches of 256: 512 rows after the last step, 128 at each of 15 looks of a stop before it.
    flops = {part.name: part.flops for part in plan_time(config, device).stretches}
    stopping = apply(config, {"algorithm.target_kl": 0.01})
    stopped = {part.name: part.flops for part in plan_time(stopping, device).stretches}
    assert stopped["KL of the update"] == pytest.approx((512 + 15 * 128) / 512 * flops["KL of the update"])
    assert 1.5 < flops["PPO, 2 epochs"] / (2 * 2048 / 512 * flops["KL of the update"]) < 3  # a step is a pass and more
    again = seconds(apply(config, {"policy.gradient_checkpointing": True}), device)
    assert 1.3 < again["PPO, 2 epochs"] / base["PPO, 2 epochs"] < 1.5


def test_phases_follow_one_another_and_some_memory_stays_free() -> None:
    parts = (Part("a", 8 * GIB), Part("b", 4 * GIB, "rollout"), Part("c", 3 * GIB, "update"), Part("d", GIB, "update"))
    plan = MemoryPlan((*parts, Part("e", GIB, "update")))
    assert (plan.peak, plan.worst) == (13 * GIB, "update")
    assert plan.fits(replace(CPU, memory=13.7)) and not plan.fits(replace(CPU, memory=13.6))
