"""8-bit linear maps against a brute-force rounding, and the policy that decodes with them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_policy import adapted, inputs, small

from reachrl.policies.frozen_linear import Float8Linear, FrozenLinear
from reachrl.policies.llama import decoder_layers
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.testing.policies import given_noise

FLOAT8 = {"rollout_copy": True, "rollout_precision": "float8", "dtype": "bfloat16"}


def all_numbers() -> torch.Tensor:
    """Every finite number of E4M3: 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # not a number
                number = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                found += [number, -number]
    return torch.tensor(found, dtype=torch.float64)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Each row of `x` in steps of its own scale, by trying every number there is."""
    numbers, x = all_numbers(), x.double()
    scale = x.abs().amax(-1, keepdim=True) / 448
    return numbers[(x / scale).unsqueeze(-1).sub(numbers).abs().argmin(-1)] * scale


def layer_of(weight: torch.Tensor) -> Float8Linear:
    layer = Float8Linear.empty(*weight.shape, like=weight)
    layer.give(weight, None)
    return layer


def test_it_multiplies_the_nearest_8_bit_numbers() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32), torch.randn(2, 5, 32) * 3
    weight[7], x[1, 2] = weight[7] * 1000, 0  # scales of their own; nothing to scale
    rows = x.flatten(0, 1)
    some = rows.abs().amax(-1) > 0
    expected = torch.zeros(10, 48, dtype=torch.float64)
    expected[some] = nearest(rows[some]) @ nearest(weight).T
    torch.testing.assert_close(layer_of(weight)(x).flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-3)


def test_in_bfloat16_it_is_the_same_map() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32, dtype=torch.bfloat16), torch.randn(2, 5, 32, dtype=torch.bfloat16)
    out = layer_of(weight)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer_of(weight.float())(x.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [FrozenLinear, Float8Linear])
def test_parts_are_views_of_the_whole(kind: type[FrozenLinear]) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(3, 32), (torch.randn(16, 32), torch.randn(48, 32) * 7)
    whole = kind.empty(64, 32, like=x)
    for part, weight in zip(whole.split([16, 48]), weights, strict=True):
        part.give(weight, None)
    alone = []
    for weight in weights:
        layer = kind.empty(*weight.shape, like=x)
        layer.give(weight, None)
        alone.append(layer(x))
    torch.testing.assert_close(whole(x), torch.cat(alone, -1))


def test_decoding_in_8_bits_is_close_to_decoding_in_16(base: Path) -> None:
    """Close enough to be corrected for, and not the same: the gap is there to be measured."""
    whole, policy = (adapted(base, **{**FLOAT8, "rollout_precision": kind}) for kind in ("as_trained", "float8"))
    noise = torch.zeros(3, 4, 256).scatter_(-1, torch.arange(12).view(3, 4, 1), 1e6)  # the same tokens for both
    ours, theirs = (each.act(inputs(each), noise=given_noise(noise)) for each in (policy, whole))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    gap = (ours.logprobs - theirs.logprobs).abs()
    assert 0 < gap.mean() < 0.1 and gap.max() < 0.3
    assert policy._rollout is not None
    layer = decoder_layers(policy._rollout.model)[1]
    assert layer.mlp.down_proj.weight.dtype == layer.self_attn.fused_qkv.weight.dtype == torch.float8_e4m3fn
    assert policy.acting_dtype == torch.float8_e4m3fn and policy.compute_dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in policy.parameter_groups()["trunk"]:
            parameter.zero_()
    plain = OpenVLAPolicy(small(checkpoint=base, dtype="bfloat16"))
    again = policy.act(inputs(policy), noise=given_noise(noise)).logprobs  # the adapters are gone
    away = (again - plain.act(inputs(plain), noise=given_noise(noise)).logprobs).abs().mean()
    assert away < 0.1 and (again - ours.logprobs).abs().mean() > 2 * away


def test_what_cannot_be_is_refused() -> None:
    for changes, words in (
        ({"rollout_precision": "float8", "dtype": "bfloat16"}, "rollout_copy=true"),
        ({"rollout_precision": "float8", "rollout_copy": True}, "bfloat16"),
        ({**FLOAT8, "language_model": {"intermediate_size": 344}}, "multiples of 16.*344"),
        ({"compile_prefill": True}, "rollout_copy=true"),
    ):
        with pytest.raises(ValidationError, match=words):
            small(**changes)


def test_compiled_layers_share_one_program() -> None:
    """Of each half one for the layers, one for the last, which is computed at one position: not one for each layer.

    As many again for batches of all other sizes.
    """
    # In a process of its own: what checks shapes in tests cannot be compiled.
    script = Path(__file__).with_name("compiled_layers.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "4", "8"]
