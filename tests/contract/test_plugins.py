"""Extensions as one file each that touches no other: trained here and on Ray, killed and resumed.

All runs of a module share one Ray; a further extension is a file beside this one and a line in `PLUGINS`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from short_answers import DIMS, END, ShortConfig, ShortPolicy
from tiny_run import OVERRIDES, Lines, play, train_lines

from forked import python_is_forked
from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.envs.vector import VectorEnv
from reachrl.evaluation import EvalResult
from reachrl.pipeline import run_stage
from reachrl.rollout.acting import EpisodeNoise
from reachrl.rollout.episodes import EpisodePlayer
from reachrl.testing.conformance_policy import check_policy
from reachrl.types import Observation, Start

RAY = ("backend.kind=ray", "backend.actors=2", "backend.deadline_s=90")
WITHOUT_PPO = tuple(option for option in OVERRIDES if "warmup" not in option)
BARE = tuple(option for option in OVERRIDES if not option.startswith("algorithm."))
SHORT = "policy.kind=short_answers:ShortPolicy"
CHUNKS = (*OVERRIDES, "policy.kind=two_cameras:ChunkPolicy", "reward.kind=oracle", "algorithm.warmup_iterations=0")
CHUNKS += ("env.max_steps=12", "env.execute=5")
# Not a plug-in: OpenVLA-OFT, two cameras, a state and two actions a decision, on the same paths.
OFT = ("env.kind=two_eyed_env:TwoEyed", "env.image_size=16", "policy.kind=openvla_oft", "policy.image_size=16")
OFT += ("policy.chunk_size=2", "policy.num_cameras=2", "policy.state_size=3", "policy.image_std=[[0.5, 0.5, 0.5]]")
OFT += ('policy.towers=[{kind="vit", width=16, depth=2, num_heads=2, mlp_width=24, patch_size=8}]',)
OFT += ("policy.image_mean=[[0.5, 0.5, 0.5]]", "policy.language_model.num_layers=2")
PLUGINS = {
    "short answers, ppo": (*OVERRIDES, SHORT, "algorithm.warmup_iterations=0"),
    "short answers, an algorithm of groups": (*BARE, SHORT, "algorithm.kind=group_algorithm:Mine"),
    "two cameras, a state and chunks": (*CHUNKS, "env.kind=two_eyed_env:TwoEyed"),
    "many worlds, cameras and chunks": (*CHUNKS, "env.kind=batched_worlds:Sliders", "env.tasks=[left,right]"),
    "rloo": (*WITHOUT_PPO, "algorithm.kind=rloo", "algorithm.group_size=4", "env.radius=0.2", "env.max_steps=8", *OFT),
}
# Every file once; groups are of episodes of both actors.
ON_RAY = ("short answers, an algorithm of groups", "many worlds, cameras and chunks", "rloo")


def config_of(name: str, *more: str) -> TrainConfig:
    options = [*PLUGINS[name], "env.num_envs=4", "rollout.num_steps=8", "checkpoint_every=1", "num_iterations=2", *more]
    return load_config("toy", options)


class Killed(Exception):
    """Ends a run as a kill does: what comes after the last checkpoint is lost."""


def killed_in_the_second_iteration(config: TrainConfig, folder: Path) -> list[dict]:
    """Train, and be killed before the second iteration is in a checkpoint; the records of both."""
    records: list[dict] = []

    def kill(record: dict) -> None:
        records.append(record)
        if record["iteration"] == 1:
            raise Killed

    play(config, folder, "sft")
    with pytest.raises(Killed):
        run_stage("train", config, folder, Lines(), [kill])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of each extension, trained here without a break."""
    records: dict[str, list[dict]] = {}

    def get(name: str) -> list[dict]:
        if name not in records:
            folder = tmp_path_factory.mktemp("whole")
            play(config_of(name), folder, "sft", "train")
            records[name] = train_lines(folder)
        return records[name]

    return get


@pytest.fixture(scope="module")
def one_ray():
    """A Ray that every run here finds and leaves running."""
    ray = pytest.importorskip("ray")
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with python_is_forked():
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


@pytest.mark.parametrize("name", [name for name in PLUGINS if name != "rloo"])  # as GRPO, which has a test of its own
def test_killed_here_and_resumed_it_ends_with_the_same_figures(name, whole, tmp_path):
    killed_in_the_second_iteration(config_of(name), tmp_path)
    play(config_of(name), tmp_path, "train")
    assert train_lines(tmp_path) == whole(name)
    assert [record["iteration"] for record in whole(name)] == [0, 1]


@pytest.mark.parametrize("name", ON_RAY)
def test_on_ray_it_has_the_figures_of_one_process_which_can_go_on(name, whole, one_ray, tmp_path):
    on_ray = killed_in_the_second_iteration(config_of(name, *RAY), tmp_path)
    assert all(record["weight_sync/gap"] < 1e-5 for record in on_ray)
    play(config_of(name), tmp_path, "train")
    for records in (on_ray, train_lines(tmp_path)):
        for found, expected in zip(records, whole(name), strict=True):
            for key in expected.keys() & found.keys() - {"kind"}:
                wanted = expected[key] if expected[key] is None else pytest.approx(expected[key], rel=2e-3, abs=2e-5)
                assert found[key] == wanted, (found["iteration"], key)


def test_answers_differ_in_length_and_some_are_malformed(whole):
    for record in whole("short answers, ppo"):
        assert 0 < record["malformed_rate"] < 1 and record["kl"] > 0


@pytest.mark.parametrize("name", ["two cameras, a state and chunks", "many worlds, cameras and chunks"])
def test_chunks_of_five_actions_are_counted_as_such_and_move_the_policy(name, whole):
    first, second = whole(name)
    decisions = 4 * 8
    assert 3 * decisions < first["env_steps"] <= 5 * decisions < second["env_steps"] <= 10 * decisions
    assert first["kl"] > 0 and first["reward/process"] != second["reward/process"]


def test_groups_are_of_episodes_of_one_start(whole):
    records = whole("short answers, an algorithm of groups")
    assert [record["updates"] for record in records] == [1, 2] and all(record["size"] > 0 for record in records)
    assert all(record["success_n"] == 8 for record in records) and "kl" not in records[0]
    assert all(record["groups"] == 2 * record["rollouts"] for record in whole("rloo"))


def test_short_answers_keep_the_contract():
    torch.manual_seed(0)
    policy = ShortPolicy(ShortConfig())
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), dtype=np.uint8)
    observation = Observation(images={"camera": images}, instructions=("do it",) * 24)
    check_policy(policy, observation)
    noise = EpisodeNoise(policy, (np.random.default_rng([1, row]) for row in range(24)))
    sample = policy.act(policy.encode(observation), noise=noise)
    assert len(sample.token_mask.sum(1).unique()) > 3 and 0 < sample.malformed.sum() < 24
    torch.testing.assert_close(
        policy.acting_logprobs(policy.encode(observation), sample.token_ids, sample.token_mask), sample.logprobs
    )


def test_evaluations_count_malformed_answers_and_carry_out_the_safe_action():
    torch.manual_seed(0)
    config = config_of("short answers, ppo")
    with VectorEnv(config.env, 2) as envs:
        player = EpisodePlayer(ShortPolicy(ShortConfig()), envs, mode="sampled", temperature=1.0, seed=0)
        starts = [Start(config.env.tasks[0], "eval", index) for index in range(4)]
        result = EvalResult(mode="sampled", episodes=tuple(player.play(starts, record=lambda _: True)))
    turns = [turn for episode in result.episodes for turn in episode.turns]
    malformed = [turn for turn in turns if turn.malformed]
    assert 0 < len(malformed) < len(turns)
    assert result.record()["malformed_rate"] == len(malformed) / len(turns)
    for turn in malformed:
        said = turn.token_ids[turn.token_mask]
        numbers = (said != END).sum()
        assert numbers == 0 or numbers > DIMS or said[-1] != END
        assert not turn.actions.any()
    assert any(turn.actions.any() for turn in turns if not turn.malformed)
