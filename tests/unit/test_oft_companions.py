"""The files that OpenVLA-OFT's training leaves beside its weights: read as tensors, whatever else they hold."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from reachrl.errors import CheckpointError
from reachrl.policies.openvla_oft import companions
from reachrl.policies.openvla_oft.companions import PROPRIO, find, read_tensors
from reachrl.policies.openvla_oft.proprio import ProprioProjector

SHAPES = {"fc1.weight": (4, 3), "fc1.bias": (4,)}


def state(**changes: object) -> dict[str, object]:
    return {"fc1.weight": torch.arange(12.0).view(4, 3), "fc1.bias": torch.ones(4), **changes}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_state_of_a_projector_is_read_with_and_without_a_prefix(tmp_path, prefix):
    module = ProprioProjector(8, 4)
    content = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    path = saved(tmp_path / "proprio_projector--150000_checkpoint.pt", content)
    assert find(tmp_path, PROPRIO) == path
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    other = ProprioProjector(8, 4)
    other.load_state_dict(read_tensors(path, expected))
    rows = torch.randn(2, 8)
    assert torch.equal(other(rows), module(rows))


class Runs:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.mark, "was run")


def test_a_file_that_would_run_code_runs_nothing(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "proprio_projector--1_checkpoint.pt"
    saved(path, state(fc1=Runs(mark)))
    with pytest.raises(CheckpointError, match=r"proprio_projector--1_checkpoint\.pt holds other things than tensors"):
        read_tensors(path, SHAPES)
    path.write_bytes(pickle.dumps(Runs(mark)))  # without torch's archive
    with pytest.raises(CheckpointError, match="not an archive as torch.save writes"):
        read_tensors(path, SHAPES)
    assert not mark.exists()
    torch.load(saved(path, state(fc1=Runs(mark))), weights_only=False)
    assert mark.read_text() == "was run"  # the file would have


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (state(surprise=torch.ones(1)), "surprise are unknown"),
        ({"fc1.weight": torch.ones(4, 3)}, r"fc1\.bias is missing, expected numbers \[4\]"),
        (state(**{"fc1.bias": torch.ones(5)}), r"fc1\.bias is float32 \[5\], expected numbers \[4\]"),
        (state(**{"fc1.bias": torch.ones(4, dtype=torch.int64)}), r"fc1\.bias is int64"),
        (state(**{"fc1.bias": torch.ones(4).to_sparse()}), r"fc1\.bias is float32 \[4\]"),
        (
            state(**{"fc1.bias": torch.tensor([1.0, float("nan"), 0, 0])}),
            r"fc1\.bias holds numbers that are not finite",
        ),
        ([torch.ones(1)], "holds a list of something else"),
        (state(step=3), "holds a dict of something else"),
        (torch.ones(3), "holds a Tensor of something else"),
    ],
)
def test_what_is_not_the_expected_tensors_is_named(tmp_path, content, says):
    with pytest.raises(CheckpointError, match=says):
        read_tensors(saved(tmp_path / "part.pt", content), SHAPES)


def test_a_cut_file_is_named(tmp_path):
    path = saved(tmp_path / "part.pt", state())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"part\.pt is truncated"):
        read_tensors(path, SHAPES)
    with pytest.raises(CheckpointError, match=r"other\.pt is missing"):
        read_tensors(tmp_path / "other.pt", SHAPES)


def test_an_archive_that_unpacks_to_more_than_the_bound_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "part.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as file:
        file.write(bytes((1 << 20) + 1))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="holds 1,048,577 bytes, expected at most 1,048,576"):
        read_tensors(path, SHAPES)


def test_two_files_of_one_part_are_refused(tmp_path):
    assert find(tmp_path, PROPRIO) is None
    for step in (50000, 100000):
        saved(tmp_path / f"proprio_projector--{step}_checkpoint.pt", state())
    with pytest.raises(CheckpointError, match=r"2 files of one part: proprio_projector--100000_checkpoint\.pt"):
        find(tmp_path, PROPRIO)
