"""Parameters and products of a plan against the modules it speaks of."""

from collections.abc import Callable

import pytest
import torch
from plan_policies import ALL_PARTS, LORA, ROWS, VARIANTS, WITH_VISION, build, configure, on_meta, rows_of, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.plan import compute
from reachrl.plan.parameters import adapter_parameters, total_parameters, value_head_parameters, weights
from reachrl.policies.openvla.policy import OpenVLAPolicy

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
