"""What is published: the wheel and the source distribution, built and opened."""

import email
import re
import shutil
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import reachrl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / build_wheel(str(folder)), folder / build_sdist(str(folder))


def test_the_wheel_holds_the_package_and_its_data(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "reachrl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= names
    assert "reachrl/py.typed" in names and any(name.endswith(".toml") for name in names)
    assert all(name.startswith(("reachrl/", f"reachrl-{reachrl.__version__}.dist-info/")) for name in names)


def test_the_metadata_states_licence_versions_and_command(built):
    wheel = zipfile.ZipFile(built[0])
    info = f"reachrl-{reachrl.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"reachrl = reachrl.cli.app:main" in wheel.read(f"{info}/entry_points.txt")
    # The major version of torch that an installation without constraints gets is the tested one.
    tested = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    version = tested.removeprefix("torch==")
    wanted = f"torch<{int(version.partition('.')[0]) + 1},>={version.rpartition('.')[0]}"
    assert wanted in metadata.get_all("Requires-Dist", [])


def test_the_source_distribution_holds_what_builds_and_tests_it(built):
    names = {Path(name).relative_to(f"reachrl-{reachrl.__version__}").as_posix() for name in _members(built[1])}
    wanted = {"LICENSE", "README.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt", "mkdocs.yml"}
    assert wanted | {"pyproject.toml", "tests/conftest.py", "src/reachrl/py.typed"} <= names
    assert not any("__pycache__" in name or name.startswith((".venv", "runs/")) for name in names)


def test_the_published_readme_has_no_link_that_an_index_cannot_follow(built, tmp_path):
    """Without a stated address of the repository such links are text; with one they lead to files that exist."""
    for text in (_description(built[0]), _description(built[1])):
        assert "![" not in text and not [target for _, target in _links(text) if not target.startswith("http")]
        assert "Walk-through: the first hour" in text and "```bash\nmake quickstart" in text
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "hatch_build.py", "pyproject.toml"):
        shutil.copy(ROOT / name, project / name)
    address = "https://forge.example/lab/reachrl"
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(f'{text}\n[project.urls]\nRepository = "{address}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        wheel = tmp_path / build_wheel(str(tmp_path))
    own = _links((ROOT / "README.md").read_text())
    published = _links(_description(wheel))
    assert len(own) == len(published) > 30
    for (mark, target), (_, absolute) in zip(own, published, strict=True):
        there = target.startswith("http")
        assert absolute == (target if there else f"{address}/{'raw' if mark else 'blob'}/HEAD/{target}")
        assert there or (ROOT / target.partition("#")[0]).exists()


def test_links_within_links_and_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from hatch_build import with_absolute_links

    text = '[![alt](p.png)](docs/a.md#b) `[x](y)` ![p](./q.svg "t") [m](mailto:a@b.c) [h](#here)\n```\n[x](y)\n```'
    assert with_absolute_links(text, "https://r/") == (
        "[![alt](https://r/raw/HEAD/p.png)](https://r/blob/HEAD/docs/a.md#b) `[x](y)` "
        '![p](https://r/raw/HEAD/q.svg "t") [m](mailto:a@b.c) [h](#here)\n```\n[x](y)\n```'
    )
    assert with_absolute_links("a ![p](q.svg)[b [c] d](e.md), [f](https://g)", "") == "a b [c] d, [f](https://g)"


def test_every_pin_satisfies_the_stated_requirements():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, (text for group in groups for text in group)):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == reachrl.__version__ and citation["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.18719"
    assert citation["references"][0]["authors"][0]["family-names"] == "Lu"


def _members(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def _description(archive: Path) -> str:
    """The README as the index shows it."""
    if archive.suffix == ".whl":
        metadata = zipfile.ZipFile(archive).read(f"reachrl-{reachrl.__version__}.dist-info/METADATA")
    else:
        with tarfile.open(archive) as tar:
            metadata = tar.extractfile(f"reachrl-{reachrl.__version__}/PKG-INFO").read()
    return email.message_from_bytes(metadata).get_payload(decode=True).decode()


def _links(text: str) -> list[tuple[str, str]]:
    """Each picture ("!") and link ("") of a Markdown text without code, with its target."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", prose)
