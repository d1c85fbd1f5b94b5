"""Fitting: the split, refusals, atomic results and their reuse, reproducibility."""

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.errors import ConfigError, DivergedError
from reachrl.rewards.process import optimise as optimise_module
from reachrl.rewards.process.fit import fit_reward_model, split_starts
from reachrl.rewards.process.optimise import random_shift, shuffled_clip
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.types import Start, Trajectory

CONFIG = SmallRewardModelConfig(image_size=32, channels=(8, 8, 8, 8), hidden=8, steps=6, batch_size=8, log_every=3)


def trajectory(index, *, success=True, task="reach", seed=0, split="train"):
    rng = np.random.default_rng([index, seed])
    return Trajectory(
        start=Start(task, split, index),
        instruction=f"{task} the goal",
        images={"camera": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)},
        actions=rng.normal(size=(5, 4)).astype(np.float32),
        ee_state=rng.random((6, 4)).astype(np.float32),
        success=success,
        source="expert" if success else "policy",
    )


def data_set():
    data = [trajectory(i, task=task) for task in ("reach", "push") for i in range(10)]
    return data + [trajectory(i, task=task, success=False, seed=1) for task in ("reach", "push") for i in range(4)]


def numbered_frames():
    """Six frames, each of one grey value: its number."""
    return np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], (6, 32, 32, 3)).copy()


def test_split_separates_starts_and_holds_out_both_outcomes():
    data = data_set()
    heldout = split_starts(data, 0.2, 0)
    assert split_starts(data[::-1], 0.2, 0) == heldout
    assert split_starts(data, 0.2, 1) != heldout
    assert len(heldout) == 4  # of each task: 1 of the 4 starts that saw a failure, 1 of the 6 others
    for task in ("reach", "push"):
        out = [t for t in data if t.start in heldout and t.start.task == task]
        assert sorted(t.success for t in out) == [False, True, True]


def test_split_of_tiny_sets_keeps_something_to_fit():
    assert split_starts([trajectory(0)], 0.5, 0) == frozenset()
    assert len(split_starts([trajectory(0), trajectory(1)], 0.9, 0)) == 1


def test_no_frame_of_a_heldout_start_reaches_the_optimiser(monkeypatch, tmp_path):
    data = data_set()
    marked = {start: index for index, start in enumerate(sorted({t.start for t in data}))}
    data = [replace(t, images={"camera": np.full_like(t.frames, marked[t.start])}) for t in data]
    seen = set()

    def spy(images, pixels, generator):
        seen.update(np.unique(images).tolist())
        return images

    monkeypatch.setattr(optimise_module, "random_shift", spy)
    fit_reward_model(data, CONFIG.model_copy(update={"steps": 60}), seed=0, folder=tmp_path)
    heldout = split_starts(data, CONFIG.heldout_fraction, 0)
    assert seen == {mark for start, mark in marked.items() if start not in heldout}


def test_files_reports_and_reuse(tmp_path):
    reports = []
    data = data_set()
    first = fit_reward_model(iter(data), CONFIG, seed=0, folder=tmp_path, on_step=lambda *args: reports.append(args))
    assert [step for step, _ in reports] == [3, 6]
    assert all(np.isfinite(metrics["train_loss"]) and np.isfinite(metrics["heldout_loss"]) for _, metrics in reports)
    # with fewer held-out frames than the probe holds, the last report is the measured held-out loss
    assert reports[-1][1]["heldout_loss"] == pytest.approx(first.quality["heldout"]["loss"], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "quality.json"]
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written == json.loads(json.dumps(first.quality))
    assert written["heldout"]["successes"] == 4 and written["heldout"]["failures"] == 2
    assert set(written["per_task"]) == {"reach", "push"}

    reports.clear()
    again = fit_reward_model(data, CONFIG, seed=0, folder=tmp_path, on_step=lambda *args: reports.append(args))
    assert again.skipped and reports == [] and again.quality == written
    frames = data[0].frames
    np.testing.assert_array_equal(
        again.model.score(frames, ["reach the goal"] * 6), first.model.score(frames, ["reach the goal"] * 6)
    )
    for other in (
        {"config": CONFIG.model_copy(update={"lr": 2e-3})},
        {"seed": 1},
        {"trajectories": data[:-1]},
    ):
        arguments = {"trajectories": data, "config": CONFIG, "seed": 0} | other
        result = fit_reward_model(
            arguments["trajectories"], arguments["config"], seed=arguments["seed"], folder=tmp_path
        )
        assert not result.skipped


def test_fit_repeats_exactly_and_leaves_the_global_generator_alone(tmp_path):
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))
        before = torch.random.get_rng_state()
        model = fit_reward_model(data_set(), CONFIG, seed=3, folder=tmp_path / name).model
        assert torch.equal(before, torch.random.get_rng_state())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_fit_cut_short_is_repeated(tmp_path):
    fit_reward_model(data_set(), CONFIG, seed=0, folder=tmp_path)
    (tmp_path / "quality.json").unlink()  # written last: its absence means the fit did not finish
    assert not fit_reward_model(data_set(), CONFIG, seed=0, folder=tmp_path).skipped


def test_useless_data_are_refused(tmp_path):
    big = replace(trajectory(1), images={"camera": np.zeros((6, 64, 64, 3), np.uint8)})
    cases = [
        ([], "no trajectories.*`demos` stage"),
        ([trajectory(i, success=False) for i in range(3)], "None of the 3 trajectories succeeded.*Collect"),
        ([trajectory(0), big], "several sizes, 32x32, 64x64 pixels"),
        ([trajectory(0), trajectory(7, split="eval")], "eval start 7.*`train` starts only"),
    ]
    for data, match in cases:
        with pytest.raises(ConfigError, match=match):
            fit_reward_model(data, CONFIG, seed=0, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_successes_alone_are_allowed_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = fit_reward_model([trajectory(i) for i in range(6)], CONFIG, seed=0, folder=tmp_path)
    assert "All 6 trajectories succeeded" in caplog.text
    assert result.quality["heldout"]["auc"] is None


def test_a_diverging_fit_saves_nothing(tmp_path):
    with pytest.raises(DivergedError, match=r"lower `reward_model\.lr`"):
        fit_reward_model(data_set(), CONFIG.model_copy(update={"lr": 1e30}), seed=0, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frames_without_a_label_take_no_part(monkeypatch, tmp_path):
    data = [replace(trajectory, images={"camera": numbered_frames()}) for trajectory in data_set()]
    seen = set()

    def spy(clips, pixels, generator):
        seen.update(np.unique(clips).tolist())
        return clips

    monkeypatch.setattr(optimise_module, "random_shift", spy)
    config = CONFIG.model_copy(update={"label": "events", "event_last": 2, "gripper_change": 1.0, "steps": 30})
    quality = fit_reward_model(data, config, seed=0, folder=tmp_path).quality
    assert seen == {0, 4, 5}  # every fifth frame and the last two
    assert quality["heldout"]["frames"] == 4 * 3 + 2 * 2 and np.isfinite(quality["heldout"]["loss"])


def test_shuffled_clips_show_the_same_episode_in_an_order_that_never_was():
    one = trajectory(0)
    one = replace(
        one,
        images={"camera": np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)},
    )
    config = CONFIG.model_copy(update={"num_frames": 3, "frame_stride": 2})
    model = SmallRewardModel.for_fit(config, ["reach the goal"])
    draw = np.random.default_rng(0)
    right = {(0, 0, t) for t in range(3)} | {(0, 1, 3), (0, 2, 4), (1, 3, 5)}
    orders = {tuple(shuffled_clip(one, model, draw)[:, 0, 0, 0].tolist()) for _ in range(200)}
    assert len(orders) > 5 and not orders & right
    assert {tuple(sorted(order)) for order in orders} <= {tuple(sorted(order)) for order in right}


def test_shuffled_negatives_replace_their_share_of_a_batch_with_zeros():
    data = data_set()
    labels = [np.ones(6, np.float32)] * len(data)
    config = CONFIG.model_copy(update={"num_frames": 2, "shuffled_negatives": 0.25})
    model = SmallRewardModel.for_fit(config, [t.instruction for t in data])
    batches = optimise_module._batches(model, data, labels, range(len(data)), config, 0)
    for _ in range(5):
        clips, _, target = next(batches)
        assert clips.shape == (8, 2, 32, 32, 3) and sorted(target.tolist()) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_refit_starts_from_the_given_weights_and_takes_its_own_number_of_steps(tmp_path):
    first = fit_reward_model(data_set(), CONFIG, seed=0, folder=tmp_path / "first").model
    config = CONFIG.model_copy(update={"refit_steps": 3, "lr": 1e-6, "log_every": 1})
    steps = []
    again = fit_reward_model(
        data_set(),
        config,
        seed=0,
        folder=tmp_path / "again",
        start_from=copy.deepcopy(first),
        on_step=lambda s, _: steps.append(s),
    ).model
    assert steps == [1, 2, 3]
    frames, texts = data_set()[0].frames, ["reach the goal"] * 6
    before, after = first.score(frames, texts), again.score(frames, texts)
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert not np.array_equal(after, before)


def test_random_shift_moves_content_by_at_most_the_given_pixels():
    clips = np.zeros((200, 2, 16, 16, 3), dtype=np.uint8)
    clips[:, :, 8, 8] = 255
    shifted = random_shift(clips, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(shifted[:, 0], shifted[:, 1])  # the frames of a clip move together
    rows, columns = np.argwhere(shifted[:, 0, ..., 0] == 255).T[1:]
    assert len(rows) == 200
    assert set(rows) == set(columns) == {6, 7, 8, 9, 10}
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, None, None, :, None], (8, 1, 16, 16, 3))
    assert (np.diff(random_shift(ramp, 3, np.random.default_rng(0)).astype(int), axis=3) >= 0).all()  # edges repeat
