"""Cores by affinity and by the quota of control groups, as the kernel documents both versions."""

import os

import pytest

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
