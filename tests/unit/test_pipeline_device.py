"""Where a run computes: named by the configuration, refused when it is not there."""

import pytest
import torch

from reachrl.backends.policy_loading import device_of
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(TrainConfig()) == torch.device("cuda")
    assert device_of(TrainConfig(device="cuda:1")) == torch.device("cuda", 1)
    assert device_of(TrainConfig(device="cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees 2 CUDA devices"):
        device_of(TrainConfig(device="cuda:2"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of(TrainConfig()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=auto"):
        device_of(TrainConfig(device="cuda"))
