"""What is advised when a plan does not fit; the devices; the command."""

from dataclasses import replace

import pytest
from plan_policies import large

from reachrl.config.loading import load_config
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import TrainConfig
from reachrl.plan import memory
from reachrl.plan.advice import advise, apply
from reachrl.plan.device import DEVICES, GIB, find_device
from reachrl.plan.memory import plan_memory

# --- devices and advice -----------------------------------------------------------------------------


def test_the_cpu_is_measured_quickly_and_sensibly() -> None:
    device = find_device("cpu")
    assert device.is_cpu and 0 < device.memory < 1e5
    assert 1e-3 < device.fp32 < 100 and 0.1 < device.bandwidth < 1e4
    assert find_device("cpu", 3.0).memory == 3.0


def test_weights_that_do_not_fit_are_trained_by_adapters() -> None:
    whole, card = apply(large(2, critic="separate"), {"algorithm.score_batch_size": 16}), DEVICES["h100"]
    card = replace(card, memory=0.6 * plan_memory(whole, card).peak / GIB)
    first = advise(whole, card)[0]
    assert first.overrides == {"policy.lora.rank": 32, "policy.critic": "adapter"}
    assert plan_memory(apply(whole, first.overrides), card).fits(card)


@pytest.mark.parametrize(
    "config",
    [
        large(2, critic="separate"),
        large(2, lora={"rank": 32}, critic="adapter", rollout_copy=True),
        large(2).model_copy(update={"algorithm": PPOConfig(train_vision=True)}),
        load_config("robust", ["policy.critic=separate"]),
        apply(
            large(2, rollout_copy=True, compile_prefill=True),
            {"policy.rollout_precision": "float8", "algorithm.importance_cap": 2.0},
        ),
    ],
    ids=["separate", "adapters", "vision", "robust", "copy in 8 bits"],
)
@pytest.mark.parametrize("share", [0.5, 0.01])
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
    assert plan.fits(device) or advise(config, device) == []
    assert not (share < 0.1 and plan.fits(device))


def test_the_first_change_saves_most_of_all() -> None:
    config, device = large(2, critic="separate"), replace(DEVICES["a100-40"], memory=16)
    changes = advise(config, device)
    for other in ({"policy.gradient_checkpointing": True}, {"env.num_envs": 8}, {"algorithm.micro_batch_size": 4}):
        saved = plan_memory(config, device).peak - plan_memory(apply(config, other), device).peak
        assert changes[0].saves >= saved


def test_nothing_is_advised_where_it_fits_or_where_it_makes_no_sense() -> None:
    assert advise(large(2, lora={"rank": 32}), DEVICES["h200"]) == []
    scratch = large(2, checkpoint=None)  # no weights to freeze
    advised = {key for change in advise(scratch, replace(DEVICES["4090"], memory=8)) for key in change.overrides}
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


def test_a_plan_that_does_not_fit_ends_with_1_and_changes_that_make_it_fit(reachrl, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_cores", lambda: 2)  # so many processes have the simulators
    arguments = ("plan", "robust", "--memory", "1.6", "algorithm.micro_batch_size=256")
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
        (["algorithm.lrr=1"], "unknown key 'algorithm.lrr'"),
        (["--device", "h200", "--memory", "-1"], "--memory -1"),
        (["--device", "h200", "--decisions-per-second", "0"], "--decisions-per-second 0"),
    ],
)
def test_mistakes_are_told_without_a_traceback(reachrl, arguments: list[str], words: str) -> None:
    code, out, err = reachrl("plan", "robust", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err
