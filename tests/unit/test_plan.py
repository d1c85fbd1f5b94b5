"""Plans against the modules they speak of: parameters, products, bytes kept and at work; advice; the command."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reachrl.config.env import MetaworldConfig
from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.plan import compute
from reachrl.plan.activations import cache_row, features_row, head_copy, layer_row, training_row
from reachrl.plan.advice import advise, apply
from reachrl.plan.device import DEVICES, GIB, Device, find_device
from reachrl.plan.memory import MemoryPlan, Part, plan_memory, usable
from reachrl.plan.parameters import adapter_parameters, total_parameters, value_head_parameters, weights
from reachrl.plan.timing import plan_time
from reachrl.policies.base import PolicyInput
from reachrl.policies.given_linear import GivenLinear
from reachrl.policies.openvla.policy import OpenVLAPolicy

SIZES = {
    "image_size": 28,
    "towers": (
        {
            "kind": "vit",
            "width": 64,
            "depth": 3,
            "num_heads": 4,
            "mlp_width": 200,
            "patch_size": 7,
            "layer_scale": True,
            "class_token": True,
            "num_registers": 4,
        },
        {"kind": "conv", "stages": [{"channels": 32, "kernel": 7, "stride": 7}]},
    ),
    "language_model": {"hidden_size": 128, "intermediate_size": 344, "num_layers": 5, "num_heads": 4},
}
GQA = {"language_model": {**SIZES["language_model"], "num_kv_heads": 2}}
LORA = {"lora": {"rank": 8}, "checkpoint": "nowhere"}
ALL_PARTS = {"lora": {"rank": 8, "parts": ["language_model", "projector", "vision"]}, "checkpoint": "nowhere"}
ONE_TOWER = {
    "towers": SIZES["towers"][:1],
    "image_mean": ((0.5, 0.5, 0.5),),
    "image_std": ((0.5, 0.5, 0.5),),
}
# Name -> options; what is trained, in which numbers, and how.
VARIANTS = {
    "full": {},
    "grouped heads": GQA,
    "one tower": ONE_TOWER,
    "full vocabulary": {"vocabulary": "full", "dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "separate critic": {"critic": "separate"},
    "detached value": {"value_gradient_to_trunk": False},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": LORA,
    "lora bfloat16": {**LORA, "dtype": "bfloat16"},
    "lora everywhere": ALL_PARTS,
    "adapter critic": {**LORA, "critic": "adapter", "dtype": "bfloat16"},
    "lora checkpointing": {**LORA, "gradient_checkpointing": True},
}
# The towers are trained in a few of them only.
WITH_VISION = ("full", "one tower", "bfloat16", "lora everywhere")
ROWS = 4
CPU = Device(name="cpu", memory=16, bf16=0.1, fp32=0.1, bandwidth=20)


def configure(**changes: object) -> OpenVLAConfig:
    return OpenVLAConfig.model_validate({**SIZES, **changes})


def build(config: OpenVLAConfig) -> OpenVLAPolicy:
    """The policy that `config` describes, with random weights where it asks for a checkpoint's."""
    plain = config.model_copy(update={"lora": None, "checkpoint": None, "critic": "shared"})
    policy = OpenVLAPolicy(config if config.lora is None else plain)
    if config.lora is not None:
        policy.config = config
        policy.add_adapters(Path("nowhere"))
    return policy


def rows_of(policy: OpenVLAPolicy, rows: int = ROWS) -> tuple[PolicyInput, PolicyInput, torch.Tensor]:
    """Frames, the same with cached features, and actions; one prompt is shorter, so that a mask is needed."""
    config = policy.config
    mask = torch.ones(rows, config.prompt_length, dtype=torch.bool)
    mask[0, -2:] = False
    ids = torch.randint(3, 100, mask.shape)
    pixels = torch.randn(rows, 3 * len(config.towers), config.image_size, config.image_size)
    seen = PolicyInput(prompt_ids=ids, prompt_mask=mask, pixel_values=pixels)
    with torch.no_grad():
        cached = replace(seen, pixel_values=None, vision_features=policy.vision_features(pixels))
    return seen, cached, torch.full((rows, config.num_action_tokens), policy.first_action_id)


def run_of(policy: OpenVLAConfig, *, passes: int = 1) -> TrainConfig:
    """One decision in each of `ROWS` environments for every pass of the minibatch that they make."""
    ppo = PPOConfig(importance_cap=2.0, epochs=1, minibatch_size=passes * ROWS, micro_batch_size=ROWS)
    return TrainConfig(env=MetaworldConfig(num_envs=ROWS), num_steps=passes, policy=policy, ppo=ppo)


def large(**changes: object) -> TrainConfig:
    """The 7B policy in a run of 2,048 decisions an iteration, 16 rows a pass."""
    policy = OpenVLAConfig.openvla_7b(**{"checkpoint": "openvla-7b", **changes})
    ppo = PPOConfig(micro_batch_size=16)
    return TrainConfig(env=MetaworldConfig(num_envs=16), num_steps=128, policy=policy, ppo=ppo)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules without storage; that device knows no autocast."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        yield


# --- parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("train_vision", [False, True])
def test_parameters_are_those_of_the_module(name: str, train_vision: bool) -> None:
    config = configure(**VARIANTS[name])
    with on_meta():
        policy = build(config)
    groups = policy.parameter_groups()
    trained = groups["trunk"] + groups["value"] + (groups["vision"] if train_vision else [])
    held = weights(config, PPOConfig(train_vision=train_vision))
    assert sum(part.count for part in held) == sum(p.numel() for p in policy.parameters())
    assert sum(part.bytes for part in held) == sum(p.nbytes for p in policy.parameters())
    for role, parameters in (("value", groups["value"]), (None, None)):
        ours = sum(part.bytes for part in held if part.trained_by == role)
        ids = {id(parameter) for parameter in trained}
        theirs = parameters or [p for p in policy.parameters() if id(p) not in ids]
        assert ours == sum(p.nbytes for p in theirs)


def test_parameters_of_the_default_and_of_the_released_size() -> None:
    with on_meta():
        assert total_parameters(OpenVLAConfig()) == sum(p.numel() for p in OpenVLAPolicy(OpenVLAConfig()).parameters())
        released = OpenVLAConfig.openvla_7b()
        assert total_parameters(released) == sum(p.numel() for p in OpenVLAPolicy(released).parameters())
    assert total_parameters(released) - value_head_parameters(released) == 7_498_156_704
    adapted = OpenVLAConfig.openvla_7b(lora={"rank": 32}, checkpoint="openvla-7b")
    assert adapter_parameters(adapted, "language_model") == 79_953_920
    assert adapter_parameters(adapted, "vision") == adapter_parameters(released, "language_model") == 0


# --- products ---------------------------------------------------------------------------------------


def products(run: Callable[[], object]) -> int:
    """FLOPs by PyTorch's own count; attention unfused, since it does not know the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def train(policy: OpenVLAPolicy, inputs: PolicyInput, actions: torch.Tensor) -> None:
    out = policy.evaluate(inputs, actions)
    (out.logprobs.sum() + out.entropy.sum() + out.values.square().sum()).backward()


@pytest.mark.parametrize(
    ("name", "train_vision"),
    [*((name, False) for name in [*VARIANTS, "copy"]), *((name, True) for name in WITH_VISION)],
)
def test_products_are_those_that_pytorch_counts(name: str, train_vision: bool) -> None:
    config = configure(**({**ALL_PARTS, "rollout_copy": True} if name == "copy" else VARIANTS[name]))
    policy = build(config)
    if not train_vision:
        policy.freeze(["vision"])
    seen, cached, actions = rows_of(policy)
    with torch.no_grad():
        policy.act(seen)  # a copy to decode with is made
        assert products(lambda: policy.act(seen)) == pytest.approx(
            ROWS * (compute.prefill(config) + compute.decode_steps(config)), rel=1e-3
        )
        assert products(lambda: policy.values(seen)) == pytest.approx(ROWS * compute.values(config), rel=1e-3)
        scoring = compute.vision(config) + compute.evaluation(config, train_vision=train_vision)
        assert products(lambda: policy.evaluate(seen, actions)) == pytest.approx(ROWS * scoring.forward, rel=1e-3)
    whole = compute.evaluation(config, train_vision=train_vision).total + compute.vision(config).total * train_vision
    counted = products(lambda: train(policy, seen if train_vision else cached, actions))
    assert counted == pytest.approx(ROWS * whole, rel=1e-3)


def test_products_of_the_default_size_with_its_convolutions() -> None:
    config = OpenVLAConfig()
    policy = build(config)
    seen, _, actions = rows_of(policy, 2)
    whole = compute.evaluation(config, train_vision=True) + compute.vision(config)
    assert products(lambda: train(policy, seen, actions)) == pytest.approx(2 * whole.total, rel=1e-3)


def test_products_of_the_released_size() -> None:
    config = OpenVLAConfig.openvla_7b(**LORA)
    with on_meta():
        policy = build(config)
        _, cached, actions = rows_of(policy, 1)
        counted = products(lambda: train(policy, cached, actions))
    assert counted == pytest.approx(compute.evaluation(config, train_vision=False).total, rel=1e-3)


# --- memory -----------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive and were made while it was on, now and at the most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes and key not in self.known:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._track, out)
        return out


def tensors(policy: OpenVLAPolicy, inputs: PolicyInput, actions: torch.Tensor) -> list[torch.Tensor]:
    given = [inputs.prompt_ids, inputs.prompt_mask, inputs.pixel_values, inputs.vision_features, actions]
    gradients = [parameter.grad for parameter in policy.parameters()]
    rest = [tensor for tensor in [*given, *gradients] if tensor is not None]
    return [*policy.parameters(), *policy.buffers(), *rest]


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


def plan_inputs(config: OpenVLAConfig) -> int:
    """Bytes of the frames that a plan counts and that the test made before."""
    return ROWS * (features_row(config) + 4 * 3 * len(config.towers) * config.image_size**2)


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
    given = [module for module in modules if isinstance(module, GivenLinear)]
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
    {"num_steps": 256},
    {"ppo.micro_batch_size": 32},
    {"ppo.train_vision": True},
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
    if "ppo.train_vision" in more:  # towers without adapters: nothing is trained, but nothing is cached either
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
    config = large().model_copy(update={"num_steps": 1})
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
    longer = seconds(apply(config, {"ppo.epochs": 3}), device)
    assert longer["PPO, 3 epochs"] == pytest.approx(1.5 * base["PPO, 2 epochs"])
    again = seconds(apply(config, {"policy.gradient_checkpointing": True}), device)
    assert 1.3 < again["PPO, 2 epochs"] / base["PPO, 2 epochs"] < 1.5


def test_phases_follow_one_another_and_some_memory_stays_free() -> None:
    parts = (Part("a", 8 * GIB), Part("b", 4 * GIB, "rollout"), Part("c", 3 * GIB, "update"), Part("d", GIB, "update"))
    plan = MemoryPlan((*parts, Part("e", GIB, "update")))
    assert (plan.peak, plan.worst) == (13 * GIB, "update")
    assert plan.fits(replace(CPU, memory=13.7)) and not plan.fits(replace(CPU, memory=13.6))


# --- devices and advice -----------------------------------------------------------------------------


def test_the_cpu_is_measured_quickly_and_sensibly() -> None:
    device = find_device("cpu")
    assert device.is_cpu and 0 < device.memory < 1e5
    assert 1e-3 < device.fp32 < 100 and 0.1 < device.bandwidth < 1e4
    assert find_device("cpu", 3.0).memory == 3.0


def test_the_released_model_fits_as_adapters_and_not_as_a_whole() -> None:
    whole, card = large(critic="separate"), DEVICES["h100"]
    plan = plan_memory(whole, card)
    assert not plan.fits(card) and plan.peak > 2 * usable(card)
    assert plan.of("always") > 14.5e9 + 2 * 13e9 * 3  # two trunks, their gradients and states
    first = advise(whole, card)[0]
    assert first.overrides == {"policy.lora.rank": 32, "policy.critic": "adapter"}
    adapted = large(lora={"rank": 32}, critic="adapter")
    assert plan_memory(adapted, DEVICES["h200"]).fits(DEVICES["h200"])


@pytest.mark.parametrize(
    "config",
    [
        large(critic="separate"),
        large(dtype="float32"),
        large(lora={"rank": 32}, critic="adapter", rollout_copy=True),
        large().model_copy(update={"ppo": PPOConfig(train_vision=True)}),
        load_config("robust", ["policy.critic=separate"]),
        large(rollout_copy=True, compile_prefill=True),
        apply(large(rollout_copy=True), {"policy.rollout_precision": "float8", "ppo.importance_cap": 2.0}),
    ],
    ids=["separate", "float32", "adapters", "vision", "robust", "compiled copy", "copy in 8 bits"],
)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_advised_changes_save_what_they_say_and_stop_when_it_fits(config: TrainConfig, share: float) -> None:
    device = replace(DEVICES["h100"], memory=share * plan_memory(config, DEVICES["h100"]).peak / GIB)
    changes, plan = advise(config, device), plan_memory(config, device)
    assert changes and not plan.fits(device)
    for change in changes:
        assert not plan.fits(device)
        config = apply(config, change.overrides)
        after = plan_memory(config, device)
        assert change.saves == pytest.approx(plan.peak - after.peak) and change.saves > 0
        assert change.leaves == after.peak
        plan = after
    assert plan.fits(device) or (share < 0.9 and advise(config, device) == [])
    assert not (share < 0.1 and plan.fits(device))


def test_the_first_change_saves_most_of_all() -> None:
    config, device = large(critic="separate"), DEVICES["a100-40"]
    changes = advise(config, device)
    for other in ({"policy.gradient_checkpointing": True}, {"env.num_envs": 8}, {"ppo.micro_batch_size": 4}):
        saved = plan_memory(config, device).peak - plan_memory(apply(config, other), device).peak
        assert changes[0].saves >= saved


def test_nothing_is_advised_where_it_fits_or_where_it_makes_no_sense() -> None:
    assert advise(large(lora={"rank": 32}), DEVICES["h200"]) == []
    scratch = large(checkpoint=None)  # no weights to freeze
    advised = {key for change in advise(scratch, DEVICES["4090"]) for key in change.overrides}
    assert advised and not any("lora" in key for key in advised)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def reachrl(command_line):
    """Run `reachrl ...`; returns exit code, stdout, stderr."""
    return command_line


def test_a_plan_that_fits_ends_with_0_and_one_line(reachrl) -> None:
    code, out, err = reachrl("plan", "robust", "--device", "h200", "--decisions-per-second", "100")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("Fits: ") and "on h200" in out.splitlines()[-1]
    assert "20.5" in next(line for line in out.splitlines() if line.startswith("environment steps"))
    assert max(map(len, out.splitlines())) <= 100 and "would help" not in out


def test_a_plan_that_does_not_fit_ends_with_1_and_changes_that_make_it_fit(reachrl) -> None:
    arguments = ("plan", "robust", "--memory", "4", "ppo.micro_batch_size=256")
    code, out, err = reachrl(*arguments)
    assert (code, err) == (1, "")
    assert out.splitlines()[-1].startswith("Does not fit: ") and "would, at" in out.splitlines()[-1]
    lines = out[out.index("would help") :].splitlines()
    advised = [word for line in lines if not line.startswith(" ") for word in line.split() if "=" in word]
    assert advised
    assert reachrl(*arguments, *advised)[0] == 0


def test_where_nothing_helps_it_says_so(reachrl) -> None:
    code, out, _ = reachrl("plan", "toy", "--device", "h200", "--memory", "0.01")
    assert code == 1 and "the least that is known to be possible is" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h300"], "unknown device 'h300' (did you mean 'h200'?). Known devices: cpu, h200"),
        (["ppo.lrr=1"], "unknown key 'ppo.lrr'"),
        (["--device", "h200", "--memory", "-1"], "--memory -1"),
        (["--device", "h200", "--decisions-per-second", "0"], "--decisions-per-second 0"),
    ],
)
def test_mistakes_are_told_without_a_traceback(reachrl, arguments: list[str], words: str) -> None:
    code, out, err = reachrl("plan", "robust", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_policy_from_outside_is_not_guessed_at() -> None:
    class Other(OpenVLAConfig.__base__):  # another section
        kind: str = "mine"
        """Its kind."""

    config = load_config("robust").model_copy(update={"policy": Other()})
    with pytest.raises(ConfigError, match=r"policy.kind='mine'"):
        plan_memory(config, CPU)
