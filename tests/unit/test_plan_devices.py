"""Plans for devices: what they cannot compute, amounts that are none, and runs of several processes."""

import pytest

from reachrl.config.loading import load_config
from reachrl.errors import ConfigError
from reachrl.plan.advice import advise
from reachrl.plan.device import DEVICES
from reachrl.plan.memory import plan_memory

IN_8_BITS = ["policy.rollout_copy=true", "policy.rollout_precision=float8", "ppo.importance_cap=2"]


@pytest.fixture
def reachrl(command_line):
    """Run `reachrl ...`; returns exit code, stdout, stderr."""
    return command_line


@pytest.mark.parametrize("device", DEVICES)
def test_8_bits_are_planned_only_where_gpus_multiply_them(reachrl, device: str) -> None:
    config = load_config("libero_spatial", IN_8_BITS)
    if device not in ("a100-80", "a100-40"):
        assert plan_memory(config, DEVICES[device]).peak > 0
        return
    for planned in (plan_memory, advise):
        with pytest.raises(ConfigError, match=rf"capability 8\.9 or later .*, {device} has 8\.0; set policy\.rollout_"):
            planned(config, DEVICES[device])
    code, out, err = reachrl("plan", "libero_spatial", "--device", device, *IN_8_BITS)
    assert (code, out) == (2, "") and "needs a GPU of compute capability 8.9" in err


@pytest.mark.parametrize("option", ["--memory", "--decisions-per-second"])
@pytest.mark.parametrize("amount", ["nan", "inf", "-inf", "-1", "0"])
def test_amounts_that_are_none_are_refused(reachrl, option: str, amount: str) -> None:
    code, out, err = reachrl("plan", "robust", "--device", "h200", option, amount)
    assert (code, out) == (2, "")
    assert f"{option} {amount}: expected" in err and "a finite number above 0" in err and "Traceback" not in err
