"""Optimizer state on disk: a restored optimizer takes the same steps, and a foreign one is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from reachrl.errors import CheckpointError, StorageError
from reachrl.run.optimizer_state import load_optimizer, save_optimizer


def make(hidden: int = 5, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 2))
    groups = [{"params": list(model[0].parameters()), "weight_decay": 0.3}, {"params": list(model[1].parameters())}]
    return model, kind(groups, lr=0.01, **options)  # pyright: ignore[reportCallIssue]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "amsgrad": True}])
def test_restored_optimizer_takes_the_same_steps(tmp_path: Path, options: dict) -> None:
    model, optimizer = make(**options)
    steps(model, optimizer, 0, 7)
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    twin, fresh = make(**options)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    load_optimizer(fresh, tmp_path / "o.safetensors")
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.3, 0.01]
    assert isinstance(fresh.param_groups[0]["betas"], tuple)
    assert {float(state["step"]) for state in fresh.state.values()} == {7.0}
    steps(model, optimizer, 7, 12)
    steps(twin, fresh, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_options_are_those_of_the_optimizer_that_goes_on(tmp_path: Path) -> None:
    model, optimizer = make()
    steps(model, optimizer, 0, 3)
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    twin, lower = make()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    for group in lower.param_groups:
        group["lr"], group["weight_decay"] = 0.0025, 0.0
    load_optimizer(lower, tmp_path / "o.safetensors")
    for group in optimizer.param_groups:  # as if the run had been told so from here on
        group["lr"], group["weight_decay"] = 0.0025, 0.0
    steps(model, optimizer, 3, 6)
    steps(twin, lower, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_without_the_state_the_steps_differ(tmp_path: Path) -> None:
    model, optimizer = make()
    steps(model, optimizer, 0, 7)
    twin, fresh = make()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    steps(model, optimizer, 7, 12)
    steps(twin, fresh, 7, 12)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    _, optimizer = make()
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    _, fresh = make()
    load_optimizer(fresh, tmp_path / "o.safetensors")
    assert len(fresh.state) == 0


def test_momentum_of_none_and_partial_state(tmp_path: Path) -> None:
    model, optimizer = make(kind=torch.optim.SGD, momentum=0.9)
    model[1].requires_grad_(False)  # only the first layer ever has state
    steps(model, optimizer, 0, 3)
    save_optimizer(optimizer, tmp_path / "o.safetensors")
    _, fresh = make(kind=torch.optim.SGD, momentum=0.9)
    load_optimizer(fresh, tmp_path / "o.safetensors")
    stored = [fresh.state[p]["momentum_buffer"] for p in fresh.param_groups[0]["params"]]
    wanted = [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]
    assert all(torch.equal(a, b) for a, b in zip(stored, wanted, strict=True))


def test_foreign_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    save_optimizer(make()[1], path)
    with pytest.raises(CheckpointError, match=r"group 0, parameter 0: shape \[5, 3\] stored, \[6, 3\] expected"):
        load_optimizer(make(hidden=6)[1], path)
    with pytest.raises(CheckpointError, match="state of AdamW, but the optimizer is SGD"):
        load_optimizer(make(kind=torch.optim.SGD)[1], path)
    one_group = torch.optim.AdamW(make()[0].parameters())
    with pytest.raises(CheckpointError, match="2 parameter groups stored, 1 expected"):
        load_optimizer(one_group, path)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    _, optimizer = make()
    with pytest.raises(CheckpointError, match="missing"):
        load_optimizer(optimizer, tmp_path / "none.safetensors")
    path = tmp_path / "o.safetensors"
    model, stepped = make()
    steps(model, stepped, 0, 2)
    save_optimizer(stepped, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load_optimizer(optimizer, path)


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.safetensors"
    save_optimizer(make()[1], path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reachrl.run.optimizer_state.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        save_optimizer(make()[1], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["o.safetensors"]
