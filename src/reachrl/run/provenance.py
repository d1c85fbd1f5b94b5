"""Where a run's numbers come from: commit, versions, hardware, seed and command."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from reachrl.run.atomic import write_json_atomic
from reachrl.run.cores import available_cores
from reachrl.run.records import Provenance, read_record

PACKAGES = (
    "reachrl", "torch", "transformers", "numpy", "gymnasium", "metaworld", "mujoco", "tokenizers", "safetensors",
    "pyarrow", "pydantic",
)  # fmt: skip


def _git(folder: Path, *arguments: str) -> str | None:
    """Ask git about a folder; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(file: Path | None = None) -> dict[str, Any]:
    """Return the commit of a source file (by default, of this package) and whether tracked files differ from it.

    Both are None where git does not track the file.
    """
    file = file or Path(__file__)
    folder = file.resolve().parent
    # An installed copy may sit inside somebody else's repository (site-packages in a project): not its commit.
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return {"commit": None, "dirty": None}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changed)}


def plugin_source(name: str) -> dict[str, Any]:
    """Return where an imported plug-in `module:Class` comes from: file, SHA-256 of it, commit; None where unknown."""
    module = sys.modules.get(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file():  # a notebook's
        return {"name": name, "file": None, "sha256": None, "commit": None, "dirty": None}
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"name": name, "file": str(Path(file).resolve()), "sha256": digest, **commit(Path(file))}


def cpu_model() -> str:
    """Return the processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide the numbers; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def accelerators() -> list[str]:
    """Return the names of the GPUs torch sees, if torch is loaded; this module never loads it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def collect_provenance(
    *,
    seed: int,
    protocol_hash: str | None = None,
    config_hash: str | None = None,
    plugins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Describe the software, the hardware and the command of this process.

    Args:
        seed: The run's seed.
        protocol_hash: Digest of the evaluation protocol; only numbers with the same one compare.
        config_hash: Digest of the resolved configuration.
        plugins: Import strings of the plug-ins in use by configuration key.

    Returns:
        A JSON-ready record.
    """
    return {
        **commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "protocol_hash": protocol_hash,
        "config_hash": config_hash,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": accelerators(),
        "packages": package_versions(),
        "plugins": {key: plugin_source(name) for key, name in (plugins or {}).items()},
    }


def write_provenance(path: Path, stage: str | None = None, **facts: Any) -> dict[str, Any]:
    """Write `collect_provenance(**facts)` to a file, keeping what earlier commands on the same run wrote.

    Args:
        path: The run's `provenance.json`.
        stage: The stage that this command is about to run; None: it runs none.
        facts: The arguments of `collect_provenance`.

    Returns:
        The record as written; `stages` says of each stage which command and source ran it last; `earlier` lists
        started, command, commit and dirty of every other command, in order. The same command of the same source, as
        when a killed run is resumed, is listed once.

    Raises:
        StorageError: The file that is there is damaged, or the new one cannot be written.
    """
    record = collect_provenance(**facts)
    record["earlier"], record["stages"] = [], {}
    if Path(path).exists():
        remedy = "it lists the run's earlier commands: repair it, or delete it to go on without them"
        before = read_record(Path(path), Provenance, remedy=remedy)
        if "from" in before:  # where a branch begins
            record["from"] = before["from"]
        again = all(before.get(key) == record[key] for key in ("command", "commit", "dirty"))
        here = {key: before.get(key) for key in ("started", "command", "commit", "dirty")}
        record["earlier"] = before.get("earlier", []) + ([here] if before.get("command") and not again else [])
        record["started"] = before.get("started") if again else record["started"]
        record["stages"] = before.get("stages", {})
    if stage is not None:
        kept = ("started", "command", "commit", "dirty", "packages", "plugins")
        now = {key: record[key] for key in kept}
        known = record["stages"].get(stage)
        if known is not None and all(known.get(key) == now[key] for key in ("command", "commit", "dirty")):
            now["started"] = known.get("started")
        record["stages"][stage] = now
    write_json_atomic(path, record)
    return record
