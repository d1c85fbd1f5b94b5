"""Finding a checkpoint: a folder, or a model on the hub, without ever asking the real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from reachrl.errors import CheckpointError
from reachrl.policies.storage.hub import locate


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict]]:
    """Records what is asked of the hub; whatever it is lies in `tmp_path`."""
    asked = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_folder_is_taken_as_it_is(downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert locate(Path("owner/name")) == Path("owner/name")  # a folder goes before a model of that name
    assert downloads == []


def test_a_model_on_the_hub_is_downloaded_without_code_and_pickles(downloads, tmp_path: Path) -> None:
    assert locate(Path("openvla/openvla-7b_v0.1")) == tmp_path
    [(name, options)] = downloads
    assert name == "openvla/openvla-7b_v0.1"
    files = ["config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    refused = ["modeling_prismatic.py", "pytorch_model.bin", "checkpoints/latest-checkpoint.pt", "README.md"]
    assert list(filter_repo_objects([*files, *refused], allow_patterns=options["allow_patterns"])) == files


@pytest.mark.parametrize("name", ["/nowhere/model", "model", "a/b/c", "../elsewhere", "~/model", "owner/", "a b/c"])
def test_what_is_neither_is_told_at_once(downloads, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist or is not a folder.*owner/name"):
        locate(Path(name))
    assert downloads == []


def test_a_file_is_no_folder(downloads, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        locate(tmp_path / "model.safetensors")
    assert downloads == []


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=401)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("403", response=RESPONSE),
            r"gated: accept its terms on https://huggingface\.co/me/model",
        ),
        (errors.RepositoryNotFoundError("401", response=RESPONSE), "neither a folder here nor a model"),
        (errors.HFValidationError("--"), "neither a folder here nor a model"),
        (errors.LocalEntryNotFoundError("no network"), r"cannot be reached.*no network.*copy its files into a folder"),
        (errors.IncompleteSnapshotError("half", snapshot_path="x"), "cannot be reached"),
        (OSError(28, "No space left on device"), r"could not be downloaded.*No space left.*HF_HOME"),
        (errors.XetDownloadError("broken off"), "XetDownloadError: broken off.*continues where it stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_goes_wrong_is_said_with_what_to_do(monkeypatch, error: Exception, message: str) -> None:
    def snapshot_download(name: str, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=message) as caught:
        locate(Path("me/model"))
    assert "policy checkpoint me/model" in str(caught.value) and caught.value.__cause__ is error


def test_an_interruption_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(KeyboardInterrupt):
        locate(Path("me/model"))
