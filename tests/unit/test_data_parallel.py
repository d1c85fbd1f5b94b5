"""Learners that share the work take the step that one alone would take."""

import json
import time
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from toy_policy import toy_config, toy_policy

from forked import forker, ranks
from reachrl.backends.group import Group

SHARDED = "backend.sharding=full"
WITH_VISION = ("algorithm.minibatch_size=16", "algorithm.train_vision=true")
ADAPTERS = ("policy.lora.rank=2", "policy.critic=adapter")
VIT = '{kind="vit", width=16, depth=2, num_heads=2, mlp_width=24, patch_size=8}'
OFT = (  # two cameras, a state, chunks of two actions
    *("policy.kind=openvla_oft", "policy.chunk_size=2", "policy.num_cameras=2", "policy.state_size=3"),
    *("env.kind=two_eyed_env:TwoEyed", "env.image_size=16", "policy.image_size=16", f"policy.towers=[{VIT}]"),
    *("policy.image_mean=[[0.5, 0.5, 0.5]]", "policy.image_std=[[0.5, 0.5, 0.5]]", "policy.value_hidden_size=8"),
    *("policy.language_model.hidden_size=32", "policy.language_model.num_layers=2", "algorithm.ratio_level=action"),
)
SCRIPT = Path(__file__).with_name("data_parallel_steps.py")


CASES = [
    (2, ("algorithm.minibatch_size=16",)),
    # No critic; a group of three episodes, whose rows are in blocks of both processes.
    (2, ("algorithm.kind=grpo", "algorithm.group_size=3", "algorithm.minibatch_size=16")),
    (2, (SHARDED, "algorithm.kind=rloo", "algorithm.group_size=3", "algorithm.minibatch_size=16")),
    # Minibatches of 3 rows over 3 processes: often some process has none of them.
    (3, ("algorithm.minibatch_size=3", "algorithm.micro_batch_size=2", "algorithm.epochs=1")),
    (2, (*WITH_VISION, "algorithm.weight_decay=0.1")),
    # Each process has a part of the weights: all must make as many passes, even those without rows.
    (2, (SHARDED, "algorithm.minibatch_size=16", "policy.critic=separate")),
    (3, (SHARDED, "algorithm.minibatch_size=3", "algorithm.micro_batch_size=2", "algorithm.epochs=1")),
    (2, (SHARDED, *WITH_VISION, "policy.gradient_checkpointing=true")),
    (2, (SHARDED, "algorithm.minibatch_size=7", "algorithm.target_kl=1e-5", *ADAPTERS)),
    (2, ("algorithm.minibatch_size=16", "policy.lora.base=nf4", *ADAPTERS)),
    (2, (SHARDED, "algorithm.minibatch_size=16", *OFT)),
]


class Launches:
    """Groups of 1, 2 and 3 processes, each launched once for all of its cases: most of the time is imports."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, {}
        toy_policy(toy_config(), seed=5).save_pretrained(folder / "base")

    def overrides(self, size: int, changes: tuple[str, ...]) -> tuple[str, ...]:
        """Of a case as a group of `size` runs it; one process has nothing to split."""
        base = f"policy.checkpoint={self.folder / 'base'}"
        kept = tuple(each for each in changes if size > 1 or each != SHARDED)
        return (*kept, base) if "policy.lora.rank=2" in changes else kept

    def out(self, size: int, changes: tuple[str, ...]) -> Path:
        """The case's own folder."""
        return self.folder / f"{size} {zlib.crc32(repr(self.overrides(size, changes)).encode()):x}"

    def result(self, size: int, changes: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
        """Figures of the leader, weights of each process."""
        if size not in self.said:
            self.said[size] = self.launch(size, [each for number, each in CASES if size in (1, number)])
        out = self.out(size, changes)
        own = [load_file(path) for path in sorted(out.glob("weights-*.safetensors"))]  # none where weights are split
        assert (out / "figures.json").is_file() and len(own) in (0, size), f"{size} processes: {self.said[size]}"
        saved = {}
        for path in sorted((out / "final" / "policy").rglob("*.safetensors")):
            saved |= {f"{path.parent.name} {name}": tensor for name, tensor in load_file(path).items()}
        return json.loads((out / "figures.json").read_text()), [saved, *own]

    def launch(self, size: int, cases: list[tuple[str, ...]]) -> str:
        """Run the cases, in processes that find each other as those of `torchrun` do.

        Returns:
            What they said; if they failed, the case at fault is the first without figures.
        """
        given = {str(self.out(size, changes)): self.overrides(size, changes) for changes in cases}
        for out in given:
            Path(out).mkdir()
        processes = [forker().start(str(SCRIPT), json.dumps(given), **rank) for rank in ranks(size)]
        deadline = time.monotonic() + 600
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break  # the others would wait for it
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
        said = "\n".join(process.communicate(timeout=60)[1][-5000:] for process in processes)
        return f"exit codes {codes}\n{said}"


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> Launches:
    return Launches(tmp_path_factory.mktemp("data_parallel"))


@pytest.mark.parametrize(("size", "changes"), CASES)
def test_two_or_three_processes_end_with_the_weights_of_one(launches, size, changes):
    alone, [saved, weights] = launches.result(1, changes)
    shared, all_weights = launches.result(size, changes)
    for one, many in zip(alone, shared, strict=True):
        assert one.keys() == many.keys()
        for name in one:
            part = "changed_weights" in name and SHARDED in changes  # of the leader's part of the weights
            bounds = {"abs": 0.01} if part else {"rel": 1e-4, "abs": 1e-6}
            assert many[name] == pytest.approx(one[name], **bounds, nan_ok=True), name
    assert alone[1]["grad_norm"] > 0.01  # something was learned from
    for others in all_weights:
        expected = saved if others.keys() == saved.keys() else weights
        assert others.keys() == expected.keys()
        for name, weight in expected.items():
            np.testing.assert_allclose(others[name].numpy(), weight.numpy(), rtol=0, atol=1e-5, err_msg=name)
    leader, *followers = all_weights[1:] or all_weights
    assert all(follower[name].equal(leader[name]) for follower in followers for name in leader)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_processes_end_well(launches, size):
    launches.result(size, next(changes for number, changes in CASES if size in (1, number)))
    assert launches.said[size].startswith(f"exit codes {[0] * size}\n"), launches.said[size]


def test_blocks_part_the_rows():
    for size in (1, 2, 3, 7):
        for rows in (0, 1, 6, 7, 20):
            parts = [list(range(rows))[Group(rank, size).block(rows)] for rank in range(size)]
            assert list(chain.from_iterable(parts)) == list(range(rows))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
