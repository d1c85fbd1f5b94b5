"""What a repository of the hub holds beside what was downloaded: asked once, kept, never run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from reachrl.policies.storage import published as module
from reachrl.policies.storage.published import Published, published

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A repository of the hub, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.reachable = True

    def model_info(self, name: str, *, revision: str, **_: object) -> SimpleNamespace:
        self.asked.append((name, revision))
        if not self.reachable:
            raise ConnectionError("no network")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=len(t)) for n, t in self.files.items()])

    def download(self, name: str, file: str, *, revision: str, local_dir: str) -> str:
        place = Path(local_dir) / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(self.files[file])
        return str(place)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    published.cache_clear()
    return hub


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "models--me--a-model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_names_and_code_are_seen_and_kept(hub: Hub, snapshot: Path, tmp_path: Path) -> None:
    hub.files = {"action_head--5_checkpoint.pt": "a pickle", "a/b.py": "import os", "large.py": "#" * (1 << 21)}
    expected = Published(names=tuple(hub.files), code={"a/b.py": "import os"})
    assert published(snapshot) == expected and hub.asked == [("me/a-model", COMMIT)]
    published.cache_clear()  # as in another process, later, without a network
    hub.reachable = False
    assert published(snapshot) == expected and len(hub.asked) == 1
    assert list(snapshot.iterdir()) == []  # nothing of it is where weights are loaded from
    [kept] = (tmp_path / "cache" / "hub").iterdir()
    kept.write_text("damaged")
    published.cache_clear()
    assert published(snapshot) == Published() and len(hub.asked) == 2


def test_without_a_network_a_warning_says_what_is_not_known(
    hub: Hub, snapshot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.reachable = False
    assert published(snapshot) == Published()
    assert "list of files of me/a-model cannot be read (no network)" in caplog.text


def test_other_folders_are_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "snapshots" / COMMIT).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "snapshots" / COMMIT):
        assert published(folder) == Published()
    assert hub.asked == []
