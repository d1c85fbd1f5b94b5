"""Plans for devices: what they cannot compute, amounts that are none, and runs of several processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_policy import toy_config, toy_policy

from reachrl.config.base import Section
from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.plan import device, memory
from reachrl.plan.advice import advise, apply
from reachrl.plan.device import DEVICES, GIB, Device
from reachrl.plan.memory import MemoryPlan, plan_memory
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time

IN_8_BITS = ["policy.rollout_copy=true", "policy.rollout_precision=float8", "algorithm.importance_cap=2"]
SHORT = ["policy.language_model.num_layers=2"]
H100 = DEVICES["h100"]
CPU = Device(name="cpu", memory=64, bf16=0.1, fp32=0.1, bandwidth=20)
SCRIPT = Path(__file__).with_name("sharded_memory.py")


def whole(*overrides: str, learners: int = 8, actors: int = 8) -> TrainConfig:
    """The 7B policy with an eighth of its layers, trained as a whole by processes of Ray."""
    counts = [f"backend.learners={learners}", f"backend.actors={actors}", "env.num_envs=16"]
    plain = ["policy.lora=none", "policy.critic=shared", "policy.language_model.num_layers=4", "backend.kind=ray"]
    return load_config("libero_spatial", [*plain, *counts, *overrides])


def size(plan: MemoryPlan | None, *words: str) -> float:
    """Bytes of all parts whose names hold one of `words`."""
    assert plan is not None
    return sum(part.bytes for part in plan.parts if any(word in part.name for word in words))


@pytest.fixture
def reachrl(command_line):
    """Run `reachrl ...`; returns exit code, stdout, stderr."""
    return command_line


@pytest.mark.parametrize("device", DEVICES)
def test_8_bits_are_planned_only_where_gpus_multiply_them(reachrl, device: str) -> None:
    config = load_config("libero_spatial", [*IN_8_BITS, *SHORT])
    if device not in ("a100-80", "a100-40"):
        assert plan_memory(config, DEVICES[device]).peak > 0
        return
    for planned in (plan_memory, advise):
        with pytest.raises(ConfigError, match=rf"capability 8\.9 or later .*, {device} has 8\.0; set policy\.rollout_"):
            planned(config, DEVICES[device])
    code, out, err = reachrl("plan", "libero_spatial", "--device", device, *IN_8_BITS, *SHORT)
    assert (code, out) == (2, "") and "needs a GPU of compute capability 8.9" in err


@pytest.mark.parametrize("option", ["--memory", "--decisions-per-second"])
@pytest.mark.parametrize("amount", ["nan", "inf", "-inf", "-1", "0"])
def test_amounts_that_are_none_are_refused(reachrl, option: str, amount: str) -> None:
    code, out, err = reachrl("plan", "robust", "--device", "h200", option, amount)
    assert (code, out) == (2, "")
    assert f"{option} {amount}: expected" in err and "a finite number above 0" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"env.num_envs=1{400 * '0'}"], "num_envs is a number of 1329 bits"),
        ([f"algorithm.epochs=1{400 * '0'}"], "epochs is a number of 1329 bits"),
        (["--decisions-per-second", "1e-320"], "too large or too small"),
    ],
    ids=["memory", "time", "rate"],
)
def test_numbers_beyond_all_bounds_are_told_without_a_traceback(reachrl, arguments: list[str], words: str) -> None:
    code, out, err = reachrl("plan", "toy", "--device", "h200", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_an_algorithm_from_outside_is_not_guessed_at() -> None:
    class Other(Section):
        kind: str = "mine"
        """Its kind."""

    config = load_config("robust").model_copy(update={"algorithm": Other()})
    with pytest.raises(ConfigError, match=r"algorithm.kind='mine'"):
        plan_memory(config, H100)


# --- several processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learners", "changes"),
    [
        (8, ("policy.critic=separate", "policy.gradient_checkpointing=true")),
        (3, ("policy.dtype=bfloat16",)),
        (4, ("policy.lora.rank=4", "policy.critic=adapter")),
    ],
    ids=["separate critic", "bfloat16", "adapters"],
)
def test_a_learner_with_a_piece_holds_what_really_sharded_learners_do(tmp_path, learners: int, changes) -> None:
    llm = {"hidden_size": 256, "intermediate_size": 688, "num_layers": 6, "num_heads": 4}
    sizes = [f"policy.language_model.{key}={value}" for key, value in llm.items()]
    rows = [
        "algorithm.micro_batch_size=4",
        "algorithm.score_batch_size=4",
        "algorithm.minibatch_size=16",
        "rollout.num_steps=32",
    ]
    if "policy.lora.rank=4" in changes:
        toy_policy(toy_config(*sizes)).save_pretrained(tmp_path / "base")
        changes += (f"policy.checkpoint={tmp_path / 'base'}",)
    ray = ["backend.kind=ray", f"backend.learners={learners}", "backend.sharding=full"]
    overrides = [*sizes, *rows, *ray, *changes]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(learners), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    config = toy_config(*overrides)
    plan = plan_memory(config, H100)
    assert size(plan, "frozen weights", "trainable weights") == pytest.approx(measured["weights"], rel=0.03)
    for name in ("gradients", "Adam states"):
        held = sum(part.bytes for part in plan.parts if part.name == name)
        assert held == pytest.approx(measured[name], rel=0.03)
    given = 4 * outline_of(config, accelerator=True).features
    assert 0.98 * measured["update"] < plan.of("update") - given < 1.3 * measured["update"]
    assert 0.98 * measured["scoring"] < plan.of("scoring") + given < 1.3 * measured["scoring"]


def test_sharding_divides_what_is_held_and_plain_learners_hold_all() -> None:
    parts = ("frozen weights", "trainable weights", "gradients", "Adam states")
    one, eight = plan_memory(whole(learners=1), H100), plan_memory(whole(), H100)
    split = plan_memory(whole("backend.sharding=full"), H100)
    held = {part.name: part.bytes for part in one.parts}
    for plan, share in ((eight, 1), (split, 8)):
        assert {part.name: part.bytes for part in plan.parts if part.name in parts} == {
            name: pytest.approx(held[name] / share) for name in parts
        }
        assert size(plan, "vision features of an iteration") == held["vision features of an iteration"] / 8
    # Gradients are summed in one tensor, which is float32 as the value head is.
    assert size(eight, "all gradients in one tensor") == 4 * (
        4 * 202_383_360 + 2 * 131_334_144 + 4096 + 71_385_600 + 4_196_353
    )
    assert size(one, "all gradients in one tensor", "gathered") == size(split, "all gradients in one tensor") == 0
    assert 2 * split.own_peak < eight.own_peak
    policy = split.of("start") + split.of("always")
    assert policy == pytest.approx(held["frozen weights"] + held["trainable weights"] + GIB, rel=0.01)


def test_an_actor_holds_a_policy_to_act_with_and_its_share_of_the_rows() -> None:
    config = whole("policy.rollout_copy=true", "policy.decode_graphs=false", actors=4)
    plan, alone = plan_memory(config, H100), plan_memory(apply(config, {"backend": {"kind": "local"}}), H100)
    assert plan.actor is not None and alone.actor is None
    assert size(plan.actor, "weights to act with") == size(plan, "frozen weights", "trainable weights")
    assert size(plan, "decoding", "kept for acting") == 0
    assert size(plan.actor, "gradients", "Adam", "activations") == 0
    assert size(plan.actor, "kept for acting") == pytest.approx(size(alone, "kept for acting"), rel=1e-4)
    assert size(plan.actor, "decoding 4 rows") == pytest.approx(size(alone, "decoding 16 rows") / 4, rel=0.1)
    assert size(plan_memory(apply(config, {"backend.env_groups": 2}), H100).actor, "decoding 2 rows") > 0
    small = replace(H100, memory=plan.actor.peak / GIB)  # an actor may be what does not fit
    few = {"rollout.num_steps": 8, "algorithm.micro_batch_size": 4, "algorithm.score_batch_size": 4}
    roomy = plan_memory(apply(config, {"policy.lora.rank": 8, **few}), small)
    assert roomy.own_peak < roomy.peak and not roomy.fits(small)


def test_where_actors_and_learners_share_devices_both_are_counted() -> None:
    beside = plan_memory(whole("backend.placement=colocated"), H100)
    apart = plan_memory(whole(), H100)
    assert beside.actor is None and apart.actor is not None
    assert beside.of("update") == apart.of("update")
    given = size(apart, "vision features of an iteration") + 3 * size(apart, "trainable weights")  # with Adam's states
    assert beside.of("rollout") == pytest.approx(apart.actor.peak - GIB - given)
    pieces = plan_memory(whole("backend.placement=colocated", "backend.sharding=full"), H100)
    assert size(pieces, "handed over") == -size(pieces, "vision features of an iteration") - next(
        part.bytes for part in pieces.parts if part.name == "gradients"
    )
    cpu = plan_memory(whole(learners=2, actors=3), CPU)
    assert size(cpu, "2 x trainable weights") == 2 * size(apart, "trainable weights")
    assert size(cpu, "3 x weights to act with") == 3 * size(apart.actor, "weights to act with")


def test_processes_share_the_time_of_the_work() -> None:
    alone, several = plan_time(whole(learners=1, actors=1), H100), plan_time(whole(learners=4, actors=4), H100)
    before, after = ({part.name: part.flops for part in plan.stretches} for plan in (alone, several))
    assert {name: before[name] / after[name] for name in ("acting", "PPO, 1 epochs")} == {
        "acting": 4,
        "PPO, 1 epochs": 4,
    }
    assert 3 < before["scoring"] / after["scoring"] < 4  # every learner scores the last frames
    assert before["environment steps"] == after["environment steps"]


def test_advice_splits_weights_and_leaves_every_actor_an_environment(reachrl) -> None:
    changes = advise(whole("policy.checkpoint=none"), replace(DEVICES["a100-40"], memory=14))
    assert changes[0].overrides == {"backend.sharding": "full"}
    least = advise(whole(actors=12), replace(H100, memory=1))
    assert all(change.overrides.get("env.num_envs", 12) >= 12 for change in least)
    arguments = ("plan", "libero_spatial", "--device", "h100", "backend.kind=ray", "backend.actors=11")
    code, out, err = reachrl(*arguments)
    assert (code, out) == (2, "") and "need 11 environments, but env.num_envs=10" in err


def test_the_output_says_whose_memory_it_is_and_what_is_not_counted(reachrl) -> None:
    ray = ("backend.kind=ray", "backend.learners=2", "backend.actors=2")
    _, out, _ = reachrl("plan", "libero_spatial", "--device", "h100", *SHORT, *ray)
    text = " ".join(out.split())
    assert "Memory of each of 2 GPUs with a learner part" in text and "Memory of each of 2 GPUs with an actor" in text
    assert "communication, waiting for the slowest process and work done meanwhile are not modelled" in text
    _, out, _ = reachrl("plan", "libero_spatial", "--device", "h100", *SHORT, *ray, "backend.placement=colocated")
    assert "Memory of each of 2 GPUs with a learner and an actor" in " ".join(out.split())
    _, out, _ = reachrl("plan", "libero_spatial", "--device", "h100", *SHORT, "backend.sharding=full")
    assert "backend.sharding=full has no effect on this plan" in " ".join(out.split())


@pytest.mark.parametrize(("cores", "measured_gb"), [(2, 0.954), (16, 4.87)])
def test_simulators_that_share_processes_hold_as_much_as_was_measured(cores, measured_gb, monkeypatch) -> None:
    """16 environments of Meta-World after every task: the proportional memory of 2 processes, and of 16."""
    monkeypatch.setattr(memory, "available_cores", lambda: cores)
    plan = plan_memory(load_config("robust"), CPU)
    resident = size(plan, "16 simulators, PyTorch") - 0.4 * GIB
    assert resident == pytest.approx(measured_gb * 1e9, rel=0.15)


def test_products_of_either_type_are_measured(monkeypatch) -> None:
    """Processors with bfloat16 instructions multiply that type several times faster than float32."""
    seen, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.dtype) or product(a, b, out=out))

    def shortest(run) -> float:
        before = len(seen)
        run()
        return 1.0 if len(seen) == before else {torch.bfloat16: 1e-3, torch.float32: 4e-3}[seen[-1]]

    monkeypatch.setattr(device, "_shortest", shortest)
    found = device.measure_cpu()
    assert (found.bf16, found.fp32) == pytest.approx((2e-12 * 640**3 / 1e-3, 2e-12 * 640**3 / 4e-3))
