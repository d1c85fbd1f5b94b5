"""The documentation is run: code of the how-to pages, commands of every page, links between pages."""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import reachrl
from reachrl.algorithms.base import Batch
from reachrl.algorithms.ppo import PPO
from reachrl.cli.app import app
from reachrl.config.loading import list_presets, load_config
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import KIND_SECTIONS
from reachrl.errors import ConfigError
from reachrl.policies.base import Policy
from reachrl.testing.policies import TablePolicy, TablePolicyConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WALK = ROOT / "docs" / "walk-through.md"
HOW_TO = sorted(path for path in (ROOT / "docs" / "how-to").glob("*.md") if path.stem != "index")
SHORTER = (
    *("env.num_envs=2", "num_threads=1", "num_iterations=2", "rollout.num_steps=24", "demos.episodes_per_task=4"),
    *(
        "sft.epochs=2",
        "eval.num_starts=2",
        "eval.num_videos=1",
        "reward_model.steps=5",
        "reward_model.rollouts_per_task=2",
    ),
)  # the walk-through's runs, in seconds
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Title and text of a page's code blocks in one language."""
    return [(title, text) for found, title, text in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """Every `reachrl ...` line of a page's shell blocks, split into words."""
    lines = [line for _, text in blocks(page, "bash") for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("reachrl ")]


def evaluated_starts(result: Path) -> dict[tuple[str, int], bool]:
    """Success of the greedy episodes of an evaluation, by task and number of the start."""
    episodes = json.loads(result.read_text())["greedy"]["episodes"]
    return {(episode["task"], episode["start"]): episode["success"] for episode in episodes}


def check_command(words: list[str]) -> None:
    """The command and its options exist, and its configuration resolves."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    rest = iter(words)
    plain = []
    for word in rest:
        if word.startswith("-"):
            assert word in options, f"no option {word!r}"
            if not getattr(options[word], "is_flag", False):
                next(rest)  # its value
        else:
            plain.append(word)
    if plain and "=" in plain[0]:
        plain.insert(0, "toy")  # in place of the configuration of a run, which is not there
    if plain and "preset" in {parameter.name for parameter in command.params}:
        load_config(plain[0], plain[1:])


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """A folder to write a page's plug-in into, importable in this test only."""
    (tmp_path / "my_lab").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_code_of_a_how_to_page_works(page, my_lab):
    code = blocks(page, "python")
    assert code and all(title for title, _ in code), "each block says which file it is"
    files = {title: "\n\n".join(text for name, text in code if name == title) for title, _ in code}  # cells of one file
    for title, text in files.items():
        (my_lab / title).write_text(text)
    tests = [title for title in files if title.startswith(("test_", "notebook"))]
    assert tests
    for title in tests:
        # Whoever defines a class in a notebook defines it in the program that is run.
        runpy.run_path(str(my_lab / title), run_name="__main__" if title.startswith("notebook") else title)
    for words in commands(page):
        check_command(words)


SIMULATORS = [
    (page, title, name)
    for page in (*HOW_TO, WALK)
    for title, text in blocks(page, "python")
    for name, bases in re.findall(r"^class (\w+)\((\w+)\):", text, re.MULTILINE)
    if bases in ("Env", "BatchedEnv")
]


@pytest.mark.parametrize(("page", "title", "name"), SIMULATORS, ids=lambda part: getattr(part, "stem", part))
def test_a_misspelt_task_of_a_pages_simulator_is_refused(page, title, name, my_lab):
    text = next(text for found, text in blocks(page, "python") if found == title and f"class {name}(" in text)
    (my_lab / "my_lab" / "simulator.py").write_text(text)
    kind = f"my_lab.simulator:{name}"
    tasks = load_config("toy", [f"env.kind={kind}"]).env.tasks
    for task in tasks:
        assert load_config("toy", [f"env.kind={kind}", f"env.tasks={task}"]).env.tasks == (task,)
    with pytest.raises(ConfigError, match=rf"env\.tasks(.|\n)*{tasks[0]}"):  # which names there are
        load_config("toy", [f"env.kind={kind}", f"env.tasks={tasks[0]}x"])


def test_demonstrations_of_a_simulator_of_many_worlds_are_refused_in_words(my_lab):
    text = dict(blocks(ROOT / "docs" / "how-to" / "simulator.md", "python"))["my_lab/worlds.py"]
    (my_lab / "my_lab" / "worlds.py").write_text(text)
    words = ["demos", "toy", "env.kind=my_lab.worlds:Sliders", "--run", "runs/worlds"]
    with pytest.raises(ConfigError, match=r"Sliders .*no scripted expert.*sft\.epochs=0.*reward\.kind=task"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_every_page_with_a_simulator_is_tried():
    assert {(page.stem, name) for page, _, name in SIMULATORS} >= {("simulator", "Slider"), ("simulator", "Sliders")}
    assert {page.stem for page, _, _ in SIMULATORS} >= {"simulator", "notebook", "walk-through"}


def test_the_walk_through_is_walked(my_lab):
    walked = []
    for language, title, text in BLOCK.findall(WALK.read_text()):
        if language == "python":
            (my_lab / title).write_text(text)
            if title.startswith(("test_", "notebook")):
                runpy.run_path(str(my_lab / title), run_name="__main__")
                walked.append(title)
        for words in [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("reachrl ")]:
            check_command(words)
            if "metaworld_quickstart" not in words:  # its experts and evaluations take minutes
                typed = CliRunner().invoke(app, [*words, *(SHORTER if "toy" in words else ())], catch_exceptions=False)
                assert typed.exit_code == 0, typed.output
                walked.append(words[0])
    tests = ["test_valve.py", "quickstart", "test_upright.py", "train", "eval", "report", "test_loop.py", "notebook.py"]
    assert walked == tests
    for run in ("upright", "notebook"):  # a decision costs at most the price of 0.05, and starts lie sideways
        lines = [json.loads(line) for line in (my_lab / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        lying = [line["reward/lying"] for line in lines if line["kind"] == "train"]
        assert len(lying) == 2 and all(-0.05 < price < -0.005 for price in lying)
    turned = evaluated_starts(my_lab / "runs" / "upright" / "eval" / "after.json")
    policy, turn = reachrl.load_policy(my_lab / "runs" / "upright"), importlib.import_module("my_lab.loop").turn
    assert {(task, number): turn(policy, task, number)[0] for task, number in turned} == turned


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (WALK, *HOW_TO) and commands(page)], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_exist_and_resolve(page, my_lab):
    for title, text in [("mine.toml", text) for _, text in blocks(page, "toml") if "base =" in text]:
        (my_lab / title).write_text(text)
        load_config(title)
    for words in commands(page):
        check_command(words)


def test_make_lines_of_the_readme_resolve():
    found = re.findall(r"^make quickstart .*ARGS=\"([^\"]+)\"", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert found
    for arguments in found:
        load_config("metaworld_quickstart", arguments.split())


def test_the_reference_names_every_command():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()

    def names(command, path):
        if not hasattr(command, "commands"):
            return [path]
        return [name for key, inner in command.commands.items() for name in names(inner, f"{path} {key}")]

    assert [name for name in names(typer.main.get_command(app), "reachrl") if f"`{name}" not in page] == []


def test_every_preset_is_explained():
    page = (ROOT / "docs" / "concepts" / "configuration.md").read_text()
    assert [preset for preset in list_presets() if f"`{preset}`" not in page] == []


def test_every_group_of_kinds_is_explained():
    page = (ROOT / "docs" / "concepts" / "configuration.md").read_text()
    named = [f"`{section}`" for section in KIND_SECTIONS] + [f"`reachrl.{group}`" for group in KIND_SECTIONS.values()]
    assert [words for words in named if words not in page] == []


def test_the_how_to_names_every_member_of_a_policy():
    page = (ROOT / "docs" / "how-to" / "policy.md").read_text()
    members = {name for name in {**vars(Policy), **Policy.__annotations__} if not name.startswith("_")}
    assert sorted(name for name in members if not re.search(rf"`{name}\b", page)) == []


def test_the_reference_names_every_figure_of_an_update():
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text()
    none = {name: torch.zeros(0) for name in ("advantages", "returns", "old_values")}
    none |= {name: torch.zeros(0, 2) for name in ("token_ids", "behaviour_logprobs", "old_logprobs")}
    none |= {"token_mask": torch.zeros(0, 2, dtype=torch.bool), "malformed": torch.zeros(0, dtype=torch.bool)}
    algorithm = PPO(PPOConfig(), TablePolicy(TablePolicyConfig()), seed=0, temperature=1.0)
    figures = [*algorithm.update(Batch(rows=torch.arange(0), **none), iteration=0), "engine_kl"]
    assert [name for name in figures if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    index = (ROOT / "docs" / "decisions" / "index.md").read_text()
    missing = []
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        listed = page.name in index if re.match(r"decisions/\d", name) else name in nav
        if not listed and not name.startswith("benchmarks/"):
            missing.append(name)
    assert missing == []
