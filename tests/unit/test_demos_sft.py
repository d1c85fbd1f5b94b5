"""Supervised fine-tuning on a toy that can be solved: it fits, resumes bit for bit, and keeps what was best."""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reachrl.backends.policy_loading import new_policy, saved_policy
from reachrl.cli.display import Display
from reachrl.config.demos import SFTSection
from reachrl.config.loading import config_dict, load_config
from reachrl.demos import sft
from reachrl.demos.schedule import batch_rows, learning_rate
from reachrl.demos.sft import train_sft
from reachrl.demos.split import heldout_trajectories
from reachrl.demos.store import finish_store, write_shard
from reachrl.errors import CheckpointError, DivergedError, StorageError
from reachrl.pipeline import warm_start
from reachrl.pipeline.warm_start import run_demos, run_sft
from reachrl.policies.base import ActionSample, Evaluation, Noise, Policy, PolicyInputs
from reachrl.run.directory import Run
from reachrl.types import Observation, Start, Trajectory

SIZE = 12
SENTENCES = ("go up", "go down")


@dataclass(frozen=True, kw_only=True)
class ToyInputs(PolicyInputs):
    words: Tensor
    pixels: Tensor


class ToyPolicy(Policy):
    """Dropout, a tied weight and a buffer: whatever may go wrong in a checkpoint, in 20,000 parameters."""

    num_action_tokens = 2

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.hidden = hidden
        self.pixels = nn.Linear(SIZE * SIZE * 3, hidden)
        self.words = nn.Embedding(2, hidden)
        self.out = nn.Linear(hidden, 2 * 256)
        self.tied = self.out  # two names, one tensor
        self.value = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(0.1)
        self.stats: Tensor
        self.register_buffer("stats", torch.zeros(2, 2, dtype=torch.float64))

    def prompt(self, instruction: str) -> str:
        return instruction

    def encode(self, observation: Observation) -> ToyInputs:
        assert observation.frames.dtype == np.uint8
        ids = torch.tensor([[SENTENCES.index(s)] for s in observation.instructions])
        pixels = torch.from_numpy(observation.frames).float().permute(0, 3, 1, 2) / 127.5 - 1
        return ToyInputs(words=ids[:, 0], pixels=pixels)

    def _logits(self, inputs: ToyInputs) -> tuple[Tensor, Tensor]:
        mixed = self.pixels(inputs.pixels.flatten(1)) + self.words(inputs.words)
        hidden = self.dropout(torch.relu(mixed))
        return self.out(hidden).view(-1, 2, 256), self.value(hidden)[:, 0]

    @torch.no_grad()
    def act(self, inputs: ToyInputs, *, temperature: float = 1.0, noise: Noise | None = None) -> ActionSample:
        logits, values = self._logits(inputs)
        ids = logits.argmax(-1)
        return ActionSample.full(ids, torch.zeros_like(ids, dtype=torch.float32), values)

    def evaluate(
        self, inputs: ToyInputs, token_ids: Tensor, token_mask: Tensor, *, temperature: float = 1.0
    ) -> Evaluation:
        logits, values = self._logits(inputs)
        logprobs = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
        return Evaluation(logprobs=logprobs, entropy=torch.zeros_like(logprobs), values=values)

    def values(self, inputs: ToyInputs) -> Tensor:
        return self._logits(inputs)[1]

    def decode_actions(self, token_ids: Tensor, token_mask: Tensor) -> np.ndarray:
        q01, q99 = self.stats.numpy()
        return (q01 + (token_ids.numpy() / 255) * (q99 - q01)).astype(np.float32)[:, None]

    def encode_actions(self, actions: np.ndarray) -> tuple[Tensor, Tensor]:
        q01, q99 = self.stats.numpy()
        ids = np.rint(np.clip((actions[:, 0] - q01) / (q99 - q01), 0, 1) * 255).astype(np.int64)
        return torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool)

    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        self.stats.copy_(torch.from_numpy(np.stack([q01, q99])))

    def reset_critic(self) -> None: ...

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.clone() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "ToyPolicy":
        policy = cls()
        try:
            policy.load_state_dict(load_file(folder / "model.safetensors"))
        except SafetensorError as error:
            raise CheckpointError(f"{folder / 'model.safetensors'}: {error}") from error
        return policy

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        trunk = [*self.words.parameters(), *self.out.parameters()]
        return {"vision": list(self.pixels.parameters()), "trunk": trunk, "value": list(self.value.parameters())}

    def architecture(self) -> dict[str, Any]:
        return {"hidden": self.hidden}


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright column shows where to go; the sentence decides the sign of the second dimension."""
    rng = np.random.default_rng(0)
    trajectories = []
    for index in range(24):
        sign, steps = index % 2, 8
        column = rng.integers(0, SIZE, steps + 1)
        images = np.full((steps + 1, SIZE, SIZE, 3), 20, np.uint8)
        images[np.arange(steps + 1), :, column] = 230
        actions = np.stack([column[:-1] / (SIZE - 1) * 2 - 1, np.full(steps, 1.0 - 2 * sign)], 1).astype(np.float32)
        trajectories.append(
            Trajectory(
                start=Start("reach", "train", index // 2),
                instruction=SENTENCES[sign],
                images={"camera": images},
                actions=actions,
                ee_state=np.zeros((steps + 1, 4), np.float32),
                success=True,
                source="expert",
            )
        )
    folder = tmp_path_factory.mktemp("store")
    write_shard(folder / "reach.parquet", trajectories)
    finish_store(folder, ["reach.parquet"])
    return folder


CONFIG = SFTSection(
    steps=60,
    batch_size=16,
    lr=5e-3,
    warmup_steps=5,
    shift_pixels=0,
    heldout_fraction=0.2,
    eval_every=10,
    checkpoint_every=15,
)


def fit(store: Path, folder: Path, config: SFTSection = CONFIG, *, stop_after: int | None = None, torch_seed: int = 0):
    """Train a fresh toy; `stop_after` interrupts as Ctrl-C would. Returns policy, result and the records."""
    torch.manual_seed(0)
    policy, records = ToyPolicy(), []
    torch.manual_seed(torch_seed)  # the caller's stream must not matter

    def on_step(record: dict[str, Any]) -> None:
        records.append(record)
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    try:
        result = train_sft(policy, store, config, seed=3, folder=folder, on_step=on_step)
    except KeyboardInterrupt:
        result = None
    return policy, result, [{k: v for k, v in r.items() if k != "seconds/step"} for r in records]


@pytest.fixture(scope="module")
def whole(store_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, *fit(store_folder, folder)


def test_toy_is_fitted(whole, store_folder: Path) -> None:
    _, policy, result, records = whole
    assert records[0]["train_loss"] > 5.0  # log(256) = 5.5 before anything is learnt
    assert result.best_heldout_loss < 0.5
    assert result.token_accuracy > 0.95
    # Checked without the trainer: every column and sentence gives the action the data were made of.
    images = np.full((SIZE, SIZE, SIZE, 3), 20, np.uint8)
    images[np.arange(SIZE), :, np.arange(SIZE)] = 230
    policy.eval()
    for sign, sentence in enumerate(SENTENCES):
        inputs = policy.encode(Observation(images={"camera": images}, instructions=(sentence,) * SIZE))
        actions = policy.actions(policy.act(inputs))[:, 0]
        expected = np.stack([np.arange(SIZE) / (SIZE - 1) * 2 - 1, np.full(SIZE, 1.0 - 2 * sign)], 1)
        assert np.abs(actions - expected).max() < 0.01


def test_shuffled_actions_cannot_be_held_out(whole, store_folder: Path, tmp_path: Path) -> None:
    from reachrl.demos.store import iter_trajectories

    rng = np.random.default_rng(1)
    shuffled = []
    for t in iter_trajectories(store_folder):
        fields = {name: getattr(t, name) for name in Trajectory.__slots__}
        shuffled.append(Trajectory(**{**fields, "actions": rng.permutation(t.actions)}))
    write_shard(tmp_path / "store" / "reach.parquet", shuffled)
    finish_store(tmp_path / "store", ["reach.parquet"])
    _, result, _ = fit(tmp_path / "store", tmp_path / "sft")
    assert result is not None
    assert result.best_heldout_loss > 3 * whole[2].best_heldout_loss


@pytest.mark.parametrize("stop_after", [7, 37, 60])
def test_killed_training_resumes_to_the_same_numbers(
    whole, store_folder: Path, tmp_path: Path, stop_after: int
) -> None:
    _, policy, result, records = whole
    _, nothing, first = fit(store_folder, tmp_path, stop_after=stop_after, torch_seed=11)
    assert nothing is None
    assert first == records[:stop_after]
    resumed, again, second = fit(store_folder, tmp_path, torch_seed=12)
    begun = min(stop_after, 59) // 15 * 15
    assert second == records[begun:]
    assert again == result
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), resumed.parameters(), strict=True))


def test_best_weights_are_kept(whole, store_folder: Path) -> None:
    folder, policy, result, records = whole
    curve = {r["step"]: r["heldout_loss"] for r in records if "heldout_loss" in r}
    assert sorted(curve) == [10, 20, 30, 40, 50, 60]
    changed = {r["step"]: r["changed_weights"] for r in records if "changed_weights" in r}
    assert changed.keys() == curve.keys() and min(changed.values()) > 0.95
    assert result.best_heldout_loss == min(curve.values()) == curve[result.best_step]
    saved = ToyPolicy.from_pretrained(folder / "policy")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), saved.parameters(), strict=True))
    assert json.loads((folder / "sft.json").read_text())["result"]["best_step"] == result.best_step
    assert {p.name for p in folder.iterdir()} == {"policy", "sft.json"}


def test_an_early_best_survives_a_bad_end(store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    evaluate = sft._Training.score
    losses = iter([3.0, 1.0, 2.0, 2.5])
    kept: dict[float, list[torch.Tensor]] = {}

    def score(self, rows):
        loss = next(losses)
        kept[loss] = [p.detach().clone() for p in self.policy.parameters()]
        evaluate(self, rows)
        return sft.HeldoutScore(loss=loss, token_accuracy=0.0, action_error=0.0)

    monkeypatch.setattr(sft._Training, "score", score)
    policy, result, _ = fit(store_folder, tmp_path, CONFIG.model_copy(update={"steps": 40}))
    assert result is not None
    assert result.best_step == 20
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), kept[1.0], strict=True))


def test_a_best_that_is_not_found_again_after_a_kill_is_forgotten(store_folder: Path, tmp_path: Path, monkeypatch):
    """On a GPU a resumed training repeats its losses only nearly: an abandoned attempt's weights must not be kept."""
    losses = iter([3.0, 1.0, 3.5, 3.2, 3.1])  # killed at step 22, resumed from step 15
    seen: list[list[torch.Tensor]] = []

    def score(self, rows):
        seen.append([p.detach().clone() for p in self.policy.parameters()])
        return sft.HeldoutScore(loss=next(losses), token_accuracy=0.0, action_error=0.0)

    monkeypatch.setattr(sft._Training, "score", score)
    config = CONFIG.model_copy(update={"steps": 40})
    fit(store_folder, tmp_path, config, stop_after=22)
    policy, result, _ = fit(store_folder, tmp_path, config)
    assert result is not None and (result.best_step, result.best_heldout_loss) == (10, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), seen[0], strict=True))


def test_never_more_than_two_bests_lie_on_disk(store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    counts, losses = [], iter(range(90, 0, -1))

    def score(self, rows):  # every evaluation finds a new best
        counts.append(len(list(tmp_path.glob("best_*"))))
        return sft.HeldoutScore(loss=next(losses), token_accuracy=0.0, action_error=0.0)

    monkeypatch.setattr(sft._Training, "score", score)
    fit(store_folder, tmp_path, CONFIG.model_copy(update={"eval_every": 4, "checkpoint_every": 20}))
    assert counts == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 2, 2, 2, 2]


def test_finished_training_is_only_loaded(whole, store_folder: Path) -> None:
    folder, policy, result, _ = whole
    again, loaded, records = fit(store_folder, folder)
    assert records == []
    assert loaded == result
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_other_options_are_refused(whole, store_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lr=0.005 was begun here, now it is 0.1"):
        fit(store_folder, whole[0], CONFIG.model_copy(update={"lr": 0.1}))


def test_truncated_checkpoint_is_named(store_folder: Path, tmp_path: Path) -> None:
    fit(store_folder, tmp_path, stop_after=20)
    weights = tmp_path / "checkpoint" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        fit(store_folder, tmp_path)


def test_crash_between_the_renames_of_a_checkpoint(whole, store_folder: Path, tmp_path: Path) -> None:
    fit(store_folder, tmp_path, stop_after=20)
    (tmp_path / "checkpoint").rename(tmp_path / f"checkpoint.old-{os.getpid()}")
    _, again, second = fit(store_folder, tmp_path)
    assert second == whole[3][15:]
    assert again == whole[2]


def test_micro_batches_leave_the_update_as_it_is(whole, store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    # Without dropout, whose draws depend on the shapes; 5 does not divide 16, so means of means would differ.
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    config = CONFIG.model_copy(update={"steps": 10})
    _, _, one = fit(store_folder, tmp_path / "one", config)
    _, _, parts = fit(store_folder, tmp_path / "parts", config.model_copy(update={"micro_batch_size": 5}))
    for a, b in zip(one, parts, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_first_loss_and_gradient_equal_a_plain_formula(store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    config = CONFIG.model_copy(update={"brightness": 0.0, "contrast": 0.0, "colour": 0.0, "steps": 1})
    seen: list[tuple[ToyInputs, Tensor]] = []
    evaluate = ToyPolicy.evaluate

    def spy(self, inputs, token_ids, token_mask, **kwargs):
        seen.append((inputs, token_ids))
        return evaluate(self, inputs, token_ids, token_mask, **kwargs)

    monkeypatch.setattr(ToyPolicy, "evaluate", spy)
    _, _, records = fit(store_folder, tmp_path, config)
    inputs, ids = seen[0]
    torch.manual_seed(0)
    fresh = ToyPolicy()
    logits, _ = fresh._logits(inputs)
    loss = nn.functional.cross_entropy(logits.reshape(-1, 256), ids.reshape(-1))
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in fresh.parameters() if p.grad is not None))
    assert records[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert records[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_targets_of_different_lengths_weigh_by_their_tokens(store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Loss over all tokens of the minibatch, in parts; held-out figures are means over rows of means over tokens."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    encode, evaluate, seen = ToyPolicy.encode_actions, ToyPolicy.evaluate, list[tuple[ToyInputs, Tensor, Tensor]]()

    def shorter(self, actions):
        ids, mask = encode(self, actions)
        mask[torch.from_numpy(actions[:, 0, 0] < 0), 1] = False
        return ids.where(mask, 0), mask

    def spy(self, inputs, token_ids, token_mask, **kwargs):
        seen.append((inputs, token_ids, token_mask))
        out = evaluate(self, inputs, token_ids, token_mask, **kwargs)
        return replace(out, logprobs=out.logprobs.masked_fill(~token_mask, math.nan))

    monkeypatch.setattr(ToyPolicy, "encode_actions", shorter)
    monkeypatch.setattr(ToyPolicy, "evaluate", spy)
    changes = {"brightness": 0.0, "contrast": 0.0, "colour": 0.0, "steps": 1, "lr": 1e-30, "micro_batch_size": 7}
    _, _, records = fit(store_folder, tmp_path, CONFIG.model_copy(update=changes))
    torch.manual_seed(0)
    fresh = ToyPolicy()
    nll = list[list[list[float]]]()  # by pass, row and token
    for inputs, ids, mask in seen:
        table = -fresh._logits(inputs)[0].detach().log_softmax(-1)
        rows = zip(table, ids, mask, strict=True)
        nll.append([[float(t[i, id]) for i, id in enumerate(own) if kept[i]] for t, own, kept in rows])
    trained = -(-CONFIG.batch_size // 7)
    batch, heldout = (list(chain.from_iterable(passes)) for passes in (nll[:trained], nll[trained:]))
    assert len(batch) == CONFIG.batch_size and {len(row) for row in batch} == {1, 2}
    assert records[0]["train_loss"] == pytest.approx(sum(map(sum, batch)) / sum(map(len, batch)), rel=1e-5)
    assert records[0]["heldout_loss"] == pytest.approx(np.mean([np.mean(row) for row in heldout]), rel=1e-5)


def test_value_head_is_left_alone(store_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = ToyPolicy().value.weight.clone()
    policy, *_ = fit(store_folder, tmp_path, CONFIG.model_copy(update={"steps": 5}))
    assert torch.equal(policy.value.weight, before)


def test_divergence_stops_before_anything_is_saved(store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sft, "learning_rate", lambda config, step, steps: math.inf if step == 20 else 1e-3)
    with pytest.raises(DivergedError, match="sft step 21"):
        fit(store_folder, tmp_path)
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert state["step"] == 15
    weights = load_file(tmp_path / "checkpoint" / "policy" / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_full_disk_keeps_the_last_checkpoint(whole, store_folder: Path, tmp_path: Path, monkeypatch) -> None:
    fit(store_folder, tmp_path, stop_after=16)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("reachrl.run.optimizer_state.save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            fit(store_folder, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint", "best_000010", "best_000030"}
    _, again, second = fit(store_folder, tmp_path)
    assert second == whole[3][15:]
    assert again == whole[2]


def test_every_row_comes_once_an_epoch() -> None:
    rows = np.arange(100, 137)
    stream = np.concatenate([batch_rows(rows, step, 8, seed=5) for step in range(37)])
    epochs = stream.reshape(8, 37)
    assert all(sorted(epoch) == list(rows) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert len(batch_rows(np.arange(3), 2, 8, seed=5)) == 8  # fewer rows than a minibatch


def test_learning_rate_rises_then_falls() -> None:
    config = SFTSection(lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    middle = 10 + 189 / 2  # halfway down the cosine
    assert (rates[int(middle)] + rates[int(middle) + 1]) / 2 == pytest.approx(0.55, abs=1e-3)
    assert learning_rate(SFTSection(lr=1.0, warmup_steps=500), 0, 20) == pytest.approx(0.5)  # a tenth of all steps


def test_split_is_by_start_and_stratified() -> None:
    starts = [Start(task, "train", index) for task in ("a", "b") for index in range(20) for _ in range(2)]
    starts.append(Start("lonely", "train", 0))
    held = heldout_trajectories(starts, fraction=0.1, seed=1)
    out = {s for s, h in zip(starts, held, strict=True) if h}
    kept = {s for s, h in zip(starts, held, strict=True) if not h}
    assert not out & kept
    assert [sum(s.task == t for s in out) for t in ("a", "b", "lonely")] == [2, 2, 0]
    backwards = heldout_trajectories(starts[::-1], fraction=0.1, seed=1)
    assert {s for s, h in zip(starts[::-1], backwards, strict=True) if h} == out
    assert {s for s, h in zip(starts, heldout_trajectories(starts, fraction=0.1, seed=2), strict=True) if h} != out
    assert not heldout_trajectories(starts, fraction=0.0, seed=1).any()


def test_heldout_rows_are_never_trained_on(store_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = ToyPolicy()
    policy.set_action_stats(-np.ones(2), np.ones(2), np.ones(2, bool))
    training = sft._Training(policy, sft.TrajectoryStore(store_folder), CONFIG, 3, tmp_path)
    starts = np.array([s.index for s in training.data.starts])
    trained = set(starts[training.data.trajectory_ids[training.train_rows]])
    held = set(starts[training.data.trajectory_ids[training.heldout_rows]])
    assert not trained & held
    assert len(held) == 2  # 0.2 of 12 starts
    assert len(training.train_rows) == 20 * 8  # two trajectories a start, 8 steps each


def test_the_bar_knows_how_many_steps_are_to_come_and_where_a_resumed_training_begins(
    store_folder, tmp_path, monkeypatch
):
    shown = []

    class Bar(Display):
        @contextmanager
        def stage(self, name, total=None, description="", *, completed=0):
            with super().stage(name, total, description, completed=completed) as stage:
                shown.append((total, completed, stage))
                yield stage

    config = load_config("toy").model_copy(update={"sft": CONFIG, "seed": 3})
    monkeypatch.setattr(warm_start, "new_policy", lambda config: ToyPolicy())
    with Run.open(tmp_path / "run", config_dict(config), tensorboard=False) as run:
        shutil.copytree(store_folder, run.demos)
        fit(store_folder, run.sft, stop_after=20)  # its checkpoint is of step 15
        run_sft(config, run, Bar(quiet=True))
        [(total, completed, stage)] = shown
        assert (total, completed, stage.completed) == (60, 15, 60)
        assert [record["step"] for record in run.metrics.read("sft")] == list(range(16, 61))


def test_no_epochs_keep_the_policy_as_it_is(tmp_path):
    config = load_config("toy", ["sft.epochs=0"])
    with Run.open(tmp_path / "run", config_dict(config)) as run:
        assert run_sft(config, run, Display(quiet=True)) == {"steps": 0}
        kept, fresh = saved_policy(config, run.sft / "policy").state_dict(), new_policy(config).state_dict()
    assert kept.keys() == fresh.keys()
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize(
    ("overrides", "collects"),
    [
        (["sft.epochs=0", "reward.kind=task"], False),
        (["sft.epochs=0", "reward.weight=0"], False),
        (["sft.epochs=0", "reward.checkpoint=somewhere"], False),
        (["sft.epochs=0"], True),  # the reward model is fitted to demonstrations
        (["reward.kind=task"], True),
        (["sft.epochs=0", "sft.steps=3", "reward.kind=task"], True),
    ],
)
def test_demonstrations_that_nobody_would_read_are_not_collected(tmp_path, monkeypatch, overrides, collects):
    asked = []
    monkeypatch.setattr(warm_start, "collect_demos", lambda *args, **kwargs: asked.append(args) or [])
    monkeypatch.setattr(warm_start, "outline", lambda store: {})
    config = load_config("toy", overrides)
    with Run.open(tmp_path / "run", config_dict(config), tensorboard=False) as run:
        assert run_demos(config, run, Display(quiet=True)) == {"trajectories": 0}
    assert bool(asked) == collects


def test_a_lower_learning_rate_acts_from_the_checkpoint_on(store_folder: Path, tmp_path: Path) -> None:
    fit(store_folder, tmp_path, stop_after=20)
    _, _, records = fit(store_folder, tmp_path, CONFIG.model_copy(update={"lr": CONFIG.lr / 100}))
    first = records[0]
    assert first["lr"] == pytest.approx(learning_rate(CONFIG, first["step"] - 1, CONFIG.steps or 0) / 100, rel=1e-9)
    with pytest.raises(CheckpointError, match="batch_size=16 was begun here, now it is 8"):
        fit(store_folder, tmp_path, CONFIG.model_copy(update={"batch_size": 8}))
