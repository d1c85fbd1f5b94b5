"""House rules that no other tool checks: light imports, safe loading, pinned versions, help for every option."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import reachrl.config
from reachrl.cli.config import field_help
from reachrl.config.base import Section
from reachrl.testing.envs import ReachConfig

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "mujoco", "metaworld", "gymnasium", "pyarrow", "matplotlib", "tensorboard"}


def heavy_modules_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has imported once `code` has run."""
    script = (
        f"import sys\ntry:\n{re.sub('^', '    ', code, flags=re.M)}\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('HEAVY', *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split()[1:])


def command(*arguments: str) -> str:
    return f"sys.argv = ['reachrl', *{arguments!r}]\nfrom reachrl.cli.app import main\nmain()"


# --- imports ----------------------------------------------------------------------------------------


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports anywhere: at its top, inside a function, or for annotations alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if whole <= modules else {node.module, *whole}
    return found & modules


def import_circle(source: Path) -> list[str]:
    """Modules below `source` that import one another in a circle, [] if there is none."""
    paths = {".".join(path.relative_to(source).with_suffix("").parts): path for path in source.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    edges = {name: imported_modules(path, set(paths)) - {name} for name, path in paths.items()}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    while ends := [name for name in edges if not any(name in edges[other] for other in edges)]:
        for name in ends:  # they lead into a circle without being part of one
            del edges[name]
    return sorted(edges)


def test_no_import_runs_in_a_circle():
    assert import_circle(ROOT / "src") == []


def test_an_import_circle_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("from b import f\n")
    (tmp_path / "b.py").write_text("try:\n    import a\nexcept ImportError:\n    pass\nimport c\n")
    (tmp_path / "c.py").write_text("import json\n")
    (tmp_path / "d.py").write_text("import a\n")
    assert import_circle(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("back", ["def f():\n    import a\n", "if TYPE_CHECKING:\n    from a import f\n"])
def test_an_import_circle_through_a_function_or_an_annotation_would_be_found(tmp_path, back):
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text(back)
    assert import_circle(tmp_path) == ["a", "b"]


def test_only_a_policy_with_adapters_brings_peft():
    # With bitsandbytes, which peft imports where it is installed, more than a second of every start.
    for path in (ROOT / "src" / "reachrl" / "policies").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what runs when the module is imported
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "peft" not in ast.unparse(node).replace(".", " ").split(), path


def too_long(source: Path, file_lines: int = 300, function_lines: int = 60) -> list[str]:
    """Files, and functions without their docstrings, that have more lines than a reader should meet at once."""
    found = []
    for path in sorted(source.rglob("*.py")):
        text = path.read_text()
        if (count := len(text.splitlines())) > file_lines:
            found.append(f"{path.name} {count}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (count := (node.end_lineno or 0) - body[0].lineno + 1) > function_lines:
                    found.append(f"{path.name}:{node.name} {count}")
    return found


def test_no_file_and_no_function_is_too_long():
    assert too_long(ROOT / "src") == []


def test_a_long_file_and_a_long_function_would_be_found(tmp_path):
    (tmp_path / "long.py").write_text('def f():\n    """Say."""\n' + "    pass\n" * 61 + "x = 1\n" * 238)
    assert too_long(tmp_path) == ["long.py 301", "long.py:f 61"]
    (tmp_path / "long.py").write_text('def f():\n    """Say."""\n' + "    pass\n" * 60 + "x = 1\n" * 238)
    assert too_long(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quickstart", "--help"],
        ["version"],
        ["list"],
        ["config", "metaworld_quickstart", "--docs"],
        ["config", "paper", "--explain"],
    ],
    ids=" ".join,
)
def test_looking_around_imports_neither_torch_nor_a_simulator(arguments):
    assert heavy_modules_after(command(*arguments)) == set()


def test_a_wrong_configuration_is_told_before_torch_is_imported():
    code = command("train", "metaworld_quickstart", "algorithm.lrr=1")
    assert heavy_modules_after(f"try:\n    {code.replace(chr(10), chr(10) + '    ')}\nexcept SystemExit: pass") == set()


def test_a_stage_does_import_torch():
    # The control of the tests above: what they look for can be found.
    assert "torch" in heavy_modules_after("import reachrl.pipeline, reachrl.backends.local")


def test_a_process_that_steps_environments_does_not_import_torch():
    code = "import reachrl.envs.vector, reachrl.envs.worker, reachrl.envs.metaworld, reachrl.testing.envs"
    assert heavy_modules_after(code) & {"torch", "transformers", "tensorboard"} == set()


# --- safety -----------------------------------------------------------------------------------------


def calls(path: Path) -> list[tuple[int, str, dict[str, ast.expr]]]:
    """Every call in a file: line, dotted name, keyword arguments."""
    tree = ast.parse(path.read_text())
    return [
        (node.lineno, ast.unparse(node.func), {k.arg: k.value for k in node.keywords if k.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def unsafe(path: Path) -> list[str]:
    """Calls that run whatever a file says."""
    found = []
    for line, name, keywords in calls(path):
        flags = [
            k for k in ("allow_pickle", "trust_remote_code") if k in keywords and ast.unparse(keywords[k]) == "True"
        ]
        tensors_only = name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(False))) == "True"
        if (
            re.fullmatch(r"(torch\.load|(c?[pP]ickle|dill|joblib)\.loads?|yaml\.(unsafe_|full_)?load|eval|exec)", name)
            and not tensors_only
        ) or flags:
            found.append(f"{path.name}:{line} {name} {' '.join(flags)}")
    return found


def test_nothing_is_loaded_that_could_run_code():
    files = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 50
    found = [each for path in files for each in unsafe(path)]
    # A class of a notebook, from our own parent process through its pipe: no file is involved.
    assert [re.sub(r":\d+", "", each) for each in found] == ["registry.py pickle.loads "]


def test_unsafe_loading_would_be_found(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import torch\ntorch.load('x')\nnp.load('y', allow_pickle=True)\nnp.load('z')\n"
        "torch.load('v', weights_only=True)\ntorch.load('w', weights_only=flag)\n"
    )
    assert unsafe(tmp_path / "bad.py") == [
        "bad.py:2 torch.load ",
        "bad.py:3 np.load allow_pickle",
        "bad.py:6 torch.load ",
    ]


# --- text files -------------------------------------------------------------------------------------


def without_encoding(path: Path) -> list[str]:
    """Calls that read or write text as the locale says: another encoding under LANG=C or PYTHONUTF8=0."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        mode = keywords.get("mode") or next(iter(node.args[1:2] if name == "open" else node.args[:1]), None)
        opens = name == "open" or (name.endswith(".open") and isinstance(mode, ast.Constant))
        binary = mode is not None and "b" in ast.unparse(mode)
        if (
            name.rpartition(".")[2] in ("read_text", "write_text")
            or (opens and not binary)
            or (name.startswith("subprocess.") and {"text", "universal_newlines"} & keywords.keys())
        ):
            found.append(f"{path.name}:{node.lineno} {name}")
    return found


def test_text_is_utf8_whatever_the_locale():
    files = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    assert [found for path in files for found in without_encoding(path)] == []


def test_text_in_the_locales_encoding_would_be_found(tmp_path):
    (tmp_path / "bad.py").write_text(
        "p.read_text()\np.write_text('x')\nopen(p)\nopen(p, 'a')\np.open('w')\nsubprocess.run(c, text=True)\n"
        "open(p, 'rb')\np.open(mode='wb')\nhand.open()\np.read_text(encoding='utf-8')\nRun.open(p, c)\n"
    )
    assert [found.split()[0] for found in without_encoding(tmp_path / "bad.py")] == [
        f"bad.py:{line}" for line in range(1, 7)
    ]


# --- installation -----------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows)
    return {canonicalize_name(name): version for name, version in rows}


def closure(extras: tuple[str, ...]) -> set[str]:
    """Every distribution the project needs with `extras`, as installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    todo, seen, needed = [Requirement(line) for line in wanted], set(), set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        needed.add(key[0])
        for line in distribution(requirement.name).requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                todo.append(inner)
    return needed


def test_every_package_an_install_brings_is_pinned_at_the_version_tested_here():
    pinned = pins()
    try:
        needed = closure(("metaworld", "dev"))
    except PackageNotFoundError as missing:
        pytest.fail(f"{missing} is a dependency in pyproject.toml but is not installed; run `make venv`")
    installed = {name: distribution(name).version.split("+")[0] for name in needed}
    assert {name: pinned.get(name) for name in needed} == installed


# --- words ------------------------------------------------------------------------------------------


def sections() -> list[type[Section]]:
    modules = [
        importlib.import_module(f"reachrl.config.{m.name}") for m in pkgutil.iter_modules(reachrl.config.__path__)
    ]
    found = {
        cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, Section)
    }
    return sorted(found - {Section} | {ReachConfig}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("section", sections(), ids=lambda cls: cls.__name__)
def test_every_option_has_help(section):
    assert [key for key in section.model_fields if not field_help(section, key)] == []


def test_make_has_every_target_that_is_spoken_of():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / ".ci" / "run"]
    spoken = {word for page in pages for word in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), flags=re.M)}
    assert {"quickstart", "test", "lint", "docs"} <= spoken <= targets


def test_no_home_is_asked_for_in_a_way_that_raises_without_one():
    raising = ("Path.home()", ".expanduser()", "getpass.getuser()")  # os.path.expanduser leaves the name as it is
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py"))}
    found = [(path.name, call) for path, text in sources.items() for call in raising if call in text]
    assert found == []
