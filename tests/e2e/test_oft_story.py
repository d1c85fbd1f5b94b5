"""A tiny OpenVLA-OFT through the whole story: demonstrations, warm start, PPO or GRPO, resumption, evaluation."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from tiny_run import play, train_lines

from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy

VIT = {"kind": "vit", "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "patch_size": 8}
TINY = {
    "env.kind": "two_eyed_env:TwoEyed",
    "env.num_envs": 2,
    "env.max_steps": 8,
    "env.image_size": 16,
    "num_threads": 1,
    "num_iterations": 2,
    "checkpoint_every": 1,
    "policy.kind": "openvla_oft",
    "policy": {
        "image_size": 16,
        "towers": [VIT],
        "image_mean": [[0.5, 0.5, 0.5]],
        "image_std": [[0.5, 0.5, 0.5]],
        "language_model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2},
        "value_hidden_size": 8,
        "chunk_size": 4,
        "num_cameras": 2,
        "state_size": 3,
    },
    "demos.episodes_per_task": 2,
    "sft.epochs": 4,
    "sft.batch_size": 8,
    "reward.kind": "task",
    "rollout.num_steps": 4,
    "algorithm.minibatch_size": 8,
    "algorithm.micro_batch_size": 8,
    "eval.num_starts": 1,
    "eval.num_videos": 0,
}
ALGORITHMS = {
    # Episodes of eight steps hardly succeed: the entropy moves the policy even where all advantages are 0.
    "ppo": {"algorithm.warmup_iterations": 1, "algorithm.entropy_coef": 0.05},
    "grpo": {"algorithm.kind": "grpo", "algorithm.group_size": 2},
}


def configured(algorithm: str, **changes: object) -> TrainConfig:
    return load_config("toy", {**TINY, **ALGORITHMS[algorithm], **changes})


@pytest.mark.parametrize(("algorithm", "ratio"), [("grpo", "token"), ("ppo", "action"), ("ppo", "chunk")])
def test_the_whole_story(tmp_path, algorithm, ratio):
    config = configured(algorithm, **{"algorithm.ratio_level": ratio})
    play(config, tmp_path / "run")
    records = train_lines(tmp_path / "run")
    assert len(records) == 2
    policy = OpenVLAOFTPolicy.from_pretrained(tmp_path / "run" / "policy")
    # The quantiles of the demonstrations' states: twice x, y and z of the dot in a unit square.
    low, high = policy.state_stats.q01, policy.state_stats.q99
    assert (low >= 0).all() and (high[:2] > 1).all() and (high <= 2).all()
    sft = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in sft if line["kind"] == "sft"]
    assert losses[-1] < losses[0]
    if algorithm == "ppo":  # groups whose episodes are worth the same teach nothing
        warm = OpenVLAOFTPolicy.from_pretrained(tmp_path / "run" / "sft" / "policy")
        ours, theirs = (each.proprio_projector.fc2.weight for each in (policy, warm))
        assert (ours - theirs).abs().max() > 1e-6  # the state's projector is trained too


def test_a_run_goes_on_to_the_same_numbers(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    play(configured("ppo"), whole, "demos", "sft", "train")
    play(configured("ppo", num_iterations=1), cut, "demos", "sft", "train")
    play(configured("ppo"), cut, "train")
    assert train_lines(cut) == train_lines(whole)


def test_the_preset_is_what_it_says():
    config = load_config("metaworld_oft")
    assert config.env.cameras == ("corner2", "gripperPOV")
    assert config.policy.num_actions == 4 and config.actions_executed == 4 and config.longest_episode == 8
