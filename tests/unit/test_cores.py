"""Cores by affinity and by the quota of control groups, as the kernel documents both versions."""

import os

import pytest
import torch

from reachrl.cli.display import Display
from reachrl.config.loading import load_config
from reachrl.errors import ConfigError
from reachrl.pipeline import run_stage
from reachrl.run import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Fakes a machine of 8 cores: what /proc/self/cgroup says, and files below /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")

    def fake(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return fake


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu_max": "max 100000"}, 8),
        ("0::/\n", {"cpu_max": "200000 100000"}, 2),
        ("0::/\n", {"cpu_max": "150000 100000"}, 2),
        ("0::/\n", {"cpu_max": "50000 100000"}, 1),
        ("0::/\n", {"cpu_max": "1600000 100000"}, 8),
        ("0::/pod/main\n", {"pod__main__cpu_max": "max 100000", "pod__cpu_max": "300000 100000"}, 3),
        ("0::/as/the/host/sees/it\n", {"cpu_max": "400000 100000"}, 4),
        ("0::/\n", {}, 8),
        ("3:cpu,cpuacct:/pod\n0::/\n", {"cpu,cpuacct__pod__cfs_quota_us": "-1"}, 8),
        (
            "3:cpu,cpuacct:/pod\n1:name=systemd:/a:b\n",
            {"cpu,cpuacct__pod__cfs_quota_us": "250000", "cpu,cpuacct__pod__cfs_period_us": "100000"},
            3,
        ),
    ],
)
def test_a_containers_quota_counts(machine, own, files, expected):
    machine(own, **files)
    assert cores.available_cores() == expected


def test_without_control_groups_the_affinity_counts(machine):
    assert cores.available_cores() == 8


@pytest.mark.parametrize(
    ("quota", "usual", "asked", "expected"),
    [("200000", 6, "none", 2), ("max", 6, "none", 6), ("200000", 1, "none", 1), ("200000", 6, "5", 5)],
)
def test_pytorch_computes_in_no_more_threads_than_the_quota_grants(
    machine, monkeypatch, tmp_path, quota, usual, asked, expected
):
    """Asked of a stage that goes no further, as `torchrun` is for training only."""
    machine("0::/\n", cpu_max=f"{quota} 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(usual)
    try:
        with pytest.raises(ConfigError, match="torchrun is for"):
            run_stage("sft", load_config("toy", [f"num_threads={asked}"]), tmp_path / "run", Display())
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
