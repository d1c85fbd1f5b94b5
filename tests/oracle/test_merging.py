"""A merged checkpoint beside what peft computes from base and adapters, in weights and in log-probabilities."""

from pathlib import Path

import peft_merge
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_policy import adapted, foreign, save_base, scores, unseal

from reachrl.policies.openvla.export import export_merged
from reachrl.policies.openvla.policy import OpenVLAPolicy


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    state = {key: value if key.startswith("value_head") else value.to(request.param) for key, value in state.items()}
    save_file(state, path, {"format": "pt"})
    return unseal(tmp_path / "base")


@pytest.mark.parametrize("of_another_tool", [False, True])
def test_peft_merges_to_the_same_weights_and_acts_the_same(base: Path, tmp_path: Path, of_another_tool: bool) -> None:
    """Of another tool: head and convolution included, which peft multiplies in another order."""
    if of_another_tool:
        foreign(base, tmp_path / "trained", written={"use_rslora": True})
    else:
        adapted(base, lora={"parts": ("language_model", "projector", "vision")}).save_pretrained(tmp_path / "trained")
    export_merged(tmp_path / "trained", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    plain = OpenVLAPolicy.from_pretrained(base)
    without = scores(plain)
    peft_merge.attach(plain, tmp_path / "trained", skipped=lambda _: False)
    beside = scores(plain)
    kinds = {name: tensor.dtype for name, tensor in merged.items()}
    peft_merge.fold(plain, kinds)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in plain.state_dict().items()}
    for name, tensor in merged.items():
        spacing = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.float(), weights[name].float(), rtol=spacing, atol=1e-6)
        assert (tensor.float() == weights[name].float()).float().mean() > 0.7 or tensor.dtype == torch.float32
    ours = scores(OpenVLAPolicy.from_pretrained(tmp_path / "merged"))
    rounding = (scores(plain) - beside).abs().mean().item()
    difference = (ours - scores(plain)).abs().mean().item()
    assert difference <= 1e-5 + 0.1 * rounding and difference < 0.01 * (beside - without).abs().mean().item()
