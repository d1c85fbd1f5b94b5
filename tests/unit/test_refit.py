"""Refits between iterations: which episodes they see, when they happen, and that a killed run repeats them."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reachrl.config.loading import load_config
from reachrl.demos.shard import iter_shard, write_shard
from reachrl.demos.store import finish_store
from reachrl.errors import CheckpointError, ConfigError
from reachrl.pipeline import evaluation
from reachrl.pipeline.evaluation import episode_rewards
from reachrl.pipeline.refit import (
    Refitter,
    audit_figures,
    episode_trajectories,
    first_data,
    read_version,
)
from reachrl.pipeline.rl_stages import _trajectory, build_reward, trained_reward
from reachrl.rewards.process.fit import fit_reward_model
from reachrl.rewards.running_scale import RunningScale
from reachrl.rollout.episodes import PlayedEpisode, Turn
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import save_checkpoint
from reachrl.run.directory import Run
from reachrl.testing.rewards import make_rollout, one_camera
from reachrl.types import Episode, Start, Trajectory

OPTIONS = (
    "reward_model.steps=4",
    "reward_model.refit_every=2",
    "reward_model.refit_steps=3",
    "reward_model.refit_window=2",
    "checkpoint_every=2",
)


def rollout_of(seed=0):
    """Two environments, twelve steps; every fourth step ends an episode, those of the first success."""
    rollout = make_rollout(12, 2, seed=seed)
    ended = np.zeros((12, 2), bool)
    ended[3::4] = True
    ended[11, 1] = False  # one is still running
    success = ended & np.array([True, False])
    rows = np.argwhere(ended)
    rng = np.random.default_rng(seed)
    return replace(
        rollout,
        valid=np.ones((12, 2), bool),
        terminated=success,
        truncated=ended & ~success,
        success=success,
        final_rows=rows,
        final_observation=one_camera(rng.integers(0, 255, (len(rows), 32, 32, 3), dtype=np.uint8)),
        episodes=tuple(
            # the first episode of environment 0 began before this rollout
            Episode(start=Start("reach", "train", i), success=n == 0, num_steps=count, num_decisions=count, env=n)
            for i, (t, n) in enumerate(rows.tolist())
            for count in [9 if (t, n) == (3, 0) else 4]
        ),
    )


def stored(index, *, success=True):
    rng = np.random.default_rng(index)
    return Trajectory(
        start=Start("reach", "train", 100 + index),
        instruction="reach the goal",
        images={"camera": rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)},
        actions=rng.normal(size=(4, 4)).astype(np.float32),
        ee_state=rng.random((5, 4)).astype(np.float32),
        success=success,
        source="expert" if success else "policy",
    )


@pytest.fixture
def run(tmp_path):
    config = load_config("toy", OPTIONS)
    with Run.open(tmp_path / "run", {}, tensorboard=False) as opened:
        opened.demos.mkdir()
        write_shard(opened.demos / "reach.parquet", [stored(i) for i in range(6)])
        finish_store(opened.demos, ["reach.parquet"])
        failures = [stored(i, success=False) for i in range(6, 9)]
        write_shard(opened.reward_model / "rollouts" / "policy.parquet", failures)
        write_shard(opened.reward_model / "audit.parquet", [stored(5), failures[-1]])
        fit_reward_model(first_data(config, opened), config.reward_model, seed=1, folder=opened.reward_model)
        yield opened


def test_whole_episodes_become_trajectories_frame_by_frame():
    rollout = rollout_of()
    found = {each.start.index: each for each in episode_trajectories(rollout)}
    assert sorted(found) == [1, 2, 3, 4]  # neither the one that began before the rollout nor the one still running
    for place, (t, n) in enumerate(rollout.final_rows.tolist()):
        if place == 0:
            continue
        each, rows = found[place], slice(t - 3, t + 1)
        np.testing.assert_array_equal(each.frames[:-1], rollout.frames[rows, n])
        np.testing.assert_array_equal(each.frames[-1], rollout.final_frames[place])
        np.testing.assert_array_equal(each.ee_state[1:], rollout.ee_state[rows, n])
        np.testing.assert_array_equal(each.ee_state[0], each.ee_state[1])
        assert each.success == (n == 0) and len(each.actions) == 4


def test_refits_come_when_due_as_new_versions_and_leave_the_model_in_use_alone(run):
    config = load_config("toy", OPTIONS)
    refitter, model = Refitter(config, run), read_version(run, 0)
    before = copy.deepcopy(model.state_dict())
    assert refitter(rollout_of(0), 0, model) is None
    found = refitter(rollout_of(1), 1, model)
    assert found is not None
    refitted, figures = found
    assert all((before[key] == value).all() for key, value in model.state_dict().items())
    assert any((before[key] != value).any() for key, value in refitted.state_dict().items())
    assert figures["reward_model/version"] == 1
    assert figures["reward_model/auc"] == audit_figures(config, run, refitted)["auc"]
    frames = stored(0).frames
    texts = ["reach the goal"] * 5
    np.testing.assert_array_equal(read_version(run, 1).score(frames, texts), refitted.score(frames, texts))
    with pytest.raises(CheckpointError, match="missing"):
        read_version(run, 2)


def test_versions_that_no_checkpoint_names_are_removed(run):
    config = load_config("toy", OPTIONS)
    for version in (1, 2, 3, 5, 6):  # 6 is newer than the newest checkpoint: a killed run may not have got there
        shutil.copytree(run.reward_model / "model", run.reward_model / f"version_{version:04d}" / "model")
    for step, version in ((4, 2), (10, 5)):
        state = {"reward": {"version": version}}
        save_checkpoint(
            run.checkpoints, step, lambda folder, state=state: write_json_atomic(folder / "state.json", state)
        )
    found = Refitter(config, run)(rollout_of(1), 13, read_version(run, 5))
    assert found is not None and found[1]["reward_model/version"] == 7
    left = sorted(folder.name for folder in run.reward_model.glob("version_*"))
    assert left == ["version_0002", "version_0005", "version_0006", "version_0007"]


def test_a_refit_sees_the_first_data_and_the_episodes_of_its_window(run, monkeypatch):
    config = load_config("toy", OPTIONS)
    seen = []

    def spy(data, *args, **kwargs):
        seen.append([each.start.index for each in data])
        return fit_reward_model(data, *args, **kwargs)

    monkeypatch.setattr("reachrl.pipeline.refit.fit_reward_model", spy)
    refitter, model = Refitter(config, run), read_version(run, 0)
    for iteration in range(4):
        refitter(rollout_of(iteration), iteration, model)
    first = [each.start.index for each in first_data(config, run)]
    assert seen == [first + [1, 2, 3, 4] * 2] * 2


def test_a_run_resumed_at_its_checkpoint_refits_to_the_same_weights(run):
    config = load_config("toy", OPTIONS)
    refitter, model = Refitter(config, run), read_version(run, 0)
    results = [refitter(rollout_of(iteration), iteration, model) for iteration in range(6)]
    again = [refitter(rollout_of(iteration), iteration, model) for iteration in range(4, 6)]  # checkpoint after 3
    assert results[5] is not None and again[1] is not None
    for one, other in zip(results[5][0].parameters(), again[1][0].parameters(), strict=True):
        assert (one == other).all()
    kept = sorted(int(path.stem.rpartition("_")[2]) for path in (run.reward_model / "fresh").iterdir())
    assert kept == [2, 3, 4, 5]  # the window and what a checkpoint may lie back
    assert len(list(iter_shard(run.reward_model / "fresh" / "iteration_000005.parquet"))) == 4


def film(seed):
    """A recorded episode of six decisions."""
    rng = np.random.default_rng(seed)
    turns = [
        Turn(
            observation=one_camera(rng.integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)),
            ee_state=rng.random(4).astype(np.float32),
            progress=np.full(2, np.nan, np.float32),
            token_ids=np.zeros(4, np.int64),
            token_mask=np.ones(4, bool),
            malformed=False,
            actions=np.zeros((1, 4), np.float32),
            logprob=0.0,
            value=0.0,
        )
        for _ in range(6)
    ]
    return PlayedEpisode(
        start=Start("reach", "eval", seed),
        instruction="reach the goal",
        success=True,
        num_steps=6,
        num_decisions=6,
        turns=tuple(turns),
        final_observation=turns[0].observation,
    )


def test_films_show_the_reward_that_training_ended_with(run, monkeypatch):
    """That is the model's last version and the running scale, which watching does not change."""
    plain, scaled = (load_config("toy", [*OPTIONS, *more]) for more in ([], ["reward.normalise=true"]))
    reward = build_reward(scaled, run)
    for iteration in range(2):
        reward(rollout_of(iteration))
        reward.adapt(rollout_of(iteration), iteration=iteration)
    state = reward.state_dict()
    assert state["version"] == 1 and state["scale"]["count"] == 48
    save_checkpoint(run.checkpoints, 2, lambda folder: write_json_atomic(folder / "state.json", {"reward": state}))

    after = trained_reward(scaled, run)
    shown = [episode_rewards(scaled, after, film(seed)).parts["process"] for seed in (0, 1, 0)]
    np.testing.assert_array_equal(shown[0], shown[2])
    assert after.state_dict() == state
    unscaled = episode_rewards(plain, trained_reward(plain, run), film(0)).parts["process"]
    scale = RunningScale()
    scale.load_state_dict(state["scale"])
    scale.update(unscaled[:, 0] / scaled.reward.weight)  # as in training, a batch counts before it is paid
    np.testing.assert_allclose(shown[0] * scale.deviation, unscaled, rtol=1e-4)
    first = episode_rewards(plain, build_reward(plain, run), film(0)).parts["process"]
    assert not np.allclose(first, unscaled)  # another version of the model

    played = SimpleNamespace(episodes=[film(1), film(0), film(0)], record=lambda: {"episodes": []})
    results = dict.fromkeys(scaled.eval.modes, played)
    told = {"before": build_reward(scaled, run), "after": after}
    monkeypatch.setattr(evaluation, "trained_iterations", lambda run: 2)
    for when, paid in told.items():
        films = []
        monkeypatch.setattr(evaluation, "write_film", lambda *_, process, films=films, **__: films.append(process))
        evaluation._write_half(scaled, run, SimpleNamespace(prompt=str), results, when)
        expected = [episode_rewards(scaled, paid, film(seed)).parts["process"][:, 0].tolist() for seed in (1, 0, 0)]
        assert films == expected * len(scaled.eval.modes)
    turns = json.loads(run.conversation.read_text())["turns"]
    assert [turn["rewards"]["process"] for turn in turns] == expected[0]


def test_a_missing_or_damaged_checkpoint_is_told_before_anything_is_shown(run):
    config = load_config("toy", OPTIONS)
    with pytest.raises(CheckpointError, match="no checkpoint lies here"):
        trained_reward(config, run)
    folder = save_checkpoint(run.checkpoints, 2, lambda folder: write_json_atomic(folder / "state.json", {}))
    with pytest.raises(CheckpointError, match=r"state\.json: missing or damaged"):
        trained_reward(config, run)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json: missing or damaged"):
        trained_reward(config, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.num_steps=10"], r"those of 15 decisions \(env\.max_steps=15\) exceed rollout.num_steps=10"),
        (["reward.kind=task"], r"refit_every=2 refits the model that this run fits"),
        (["reward.weight=0"], r"refit_every=2 refits the model that this run fits"),
        (["reward.checkpoint=somewhere"], r"refit_every=2 refits the model that this run fits"),
    ],
)
def test_refits_that_cannot_be_are_refused_with_the_configuration(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config("toy", [*OPTIONS, *changes])


def test_the_configuration_may_add_trajectories(run, tmp_path):
    write_shard(tmp_path / "more.parquet", [stored(20), stored(21)])
    config = load_config("toy", [*OPTIONS, f"reward_model.trajectories={tmp_path / 'more.parquet'}"])
    assert [each.start.index for each in first_data(config, run)][-2:] == [120, 121]


def test_an_episode_of_the_policy_that_ends_inside_its_first_chunk_has_whole_chunks_of_its_time():
    episode = film(0)
    turn = replace(episode.turns[0], actions=np.array([[1, 2], [3, 4]], np.float32))
    seen = replace(episode, turns=(turn,), control_hz=20.0)
    short = _trajectory(seen, 4)
    np.testing.assert_array_equal(short.actions, [[1, 2, 3, 4, 3, 4, 3, 4]])
    assert short.control_hz == 5.0
