"""The reference lists every option and every field, with type, default and, for options, what it is."""

import re
import runpy
from pathlib import Path

import pytest

from reachrl.config.train import KIND_SECTIONS
from reachrl.registry import BUILTINS

DOCS = Path(__file__).parents[2] / "docs"
WRITTEN = runpy.run_path(str(DOCS / "fields.py"))


@pytest.mark.parametrize("page", WRITTEN["PAGES"])
def test_a_page_lists_what_the_code_has(page):
    expected, found = WRITTEN["PAGES"][page](), (DOCS / "reference" / page).read_text()
    assert set(found.splitlines()) == set(expected.splitlines()), "run `python docs/fields.py`"


def test_every_option_says_what_it_is():
    rows = re.findall(
        r"^\| `([\w.]+)` \| .* \| (.*) \|$", (DOCS / "reference" / "options.md").read_text(), re.MULTILINE
    )
    assert [key for key, text in rows if not text and not key.endswith(".kind")] == []
    keys = {key for key, _ in rows}
    assert {"seed", "env.max_steps", "algorithm.lr", "policy.language_model.hidden_size", "rollout.num_steps"} <= keys


def test_every_kind_has_its_options():
    page = (DOCS / "reference" / "options.md").read_text()
    kinds = [f"## `{key}.kind={kind}`" for key, group in KIND_SECTIONS.items() for kind in BUILTINS[group]]
    assert [kind for kind in kinds if kind not in page] == []


def test_fields_have_shapes():
    page = (DOCS / "reference" / "fields.md").read_text()
    for name in ("Rollout", "Rewards"):  # what an author of a reward reads
        table = page.partition(f"## `reachrl.types.{name}`")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` .*\|  \|$", table, re.MULTILINE) == []
    assert (
        "| `final_rows` | `Int64[np.ndarray, 'E 2']` | required | (t, n) of the step that ended each of them |" in page
    )
