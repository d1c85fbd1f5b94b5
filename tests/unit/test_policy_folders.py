"""Which kind of policy a folder holds, and what the command line does with it, whatever kind that is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from official_folder import write_official
from small_policy import foreign

import reachrl
from reachrl.errors import CheckpointError
from reachrl.policies.folders import kind_of
from reachrl.registry import BUILTINS
from reachrl.testing.policies import TablePolicy, TablePolicyConfig

SOURCE = Path(reachrl.__file__).parent
TABLE = ("reachrl.testing.policies:TablePolicy", "reachrl.testing.policies:TablePolicyConfig")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved policy of another kind, known by the name `table`."""
    monkeypatch.setitem(BUILTINS["policies"], "table", TABLE)
    policy = TablePolicy(TablePolicyConfig(kind="table", num_contexts=3))
    with torch.no_grad():
        policy.logits[:, :, 7] = 50.0
    policy.save_pretrained(tmp_path / "table")
    return tmp_path / "table"


def test_a_folder_says_of_which_kind_it_is(base: Path, table: Path, tmp_path: Path) -> None:
    official = write_official(tmp_path / "official")
    for folder in (base, official, foreign(base, tmp_path / "adapters")):
        assert kind_of(folder) == "openvla"
    assert kind_of(table) == "table"
    # of another tool, on a base that is not on this machine
    raw = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = "somebody/model"
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(raw))
    assert kind_of(tmp_path / "adapters") == "openvla"


def test_what_no_kind_recognises_is_told_by_each(table: Path, tmp_path: Path) -> None:
    (table / "config.json").write_text(json.dumps({"kind": "paper"}))
    with pytest.raises(CheckpointError, match=r"not openvla: .*model_type is None.*not table: .*kind = 'paper'"):
        kind_of(table)


def test_a_folder_around_a_policy_says_where_the_policy_is(table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")  # a run's, not a policy's
    table.rename(run / "policy")
    with pytest.raises(CheckpointError, match=re.escape(f"give {run / 'policy'}") + "$"):
        kind_of(run)
    assert kind_of(run / "policy") == "table"


def test_a_folder_is_loaded_as_the_kind_that_it_is(table: Path) -> None:
    policy = reachrl.load_policy(table, device="cpu")
    assert isinstance(policy, TablePolicy) and policy.config.num_contexts == 3
    frame = np.full((8, 8, 3), 2, np.uint8)
    greedy = policy.decode_actions(torch.full((1, 2), 7))
    np.testing.assert_array_equal(policy.predict(images=frame, instruction="go"), greedy[0])


def test_any_kind_is_described_and_what_it_cannot_do_is_said(command_line, table: Path, tmp_path: Path) -> None:
    code, out, err = command_line("model", "info", table)
    assert (code, err) == (0, "")
    counts = {name: int(number.replace(",", "")) for name, number in re.findall(r"(?m)^(\w+) +([\d,]+) +0$", out)}
    assert counts == {"features": 1, "logits": 3 * 2 * 256, "value": 3}
    assert re.search(r"(?m)^all +1,540 are read", out) and "F32" in out
    code, _, err = command_line("export", table, "--out", tmp_path / "out")
    assert code == 2 and "no other layout" in err and not (tmp_path / "out").exists()
    code, _, err = command_line("model", "verify", table, "--recorded", tmp_path / "io.safetensors")
    assert code == 2 and "no official code" in err


def test_no_file_outside_a_family_imports_it() -> None:
    """Tables of import strings are the registry's."""
    family = re.compile(r"policies[./](openvla|openvla_oft|qwen_fast|pi0_fast)\b")
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if family.search(path.read_text()) and not family.search(str(path.relative_to(SOURCE)))
    }
    assert found <= {"registry.py"}
