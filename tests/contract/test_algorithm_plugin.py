"""A group algorithm as one plug-in file that touches no other: trained, stopped, resumed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from tiny_run import OVERRIDES, play, train_lines

from reachrl.config.loading import load_config

PLUGIN = """
import numpy as np
import torch

from reachrl.algorithms.base import Algorithm, Batch, decisions, valid_rows
from reachrl.config.algorithm import AlgorithmSection, Needs


class MineConfig(AlgorithmSection):
    kind: str = "one_file_algorithm:Mine"
    lr: float = 1e-3

    @property
    def needs(self):
        return Needs(whole_episodes=True, group_size=2)


class Mine(Algorithm):
    Config = MineConfig

    def __init__(self, config, policy, *, seed, temperature):
        super().__init__(config, policy, seed=seed, temperature=temperature)
        policy.freeze(["vision", "value"])
        self.optimizer = torch.optim.SGD(policy.parameter_groups()["trunk"], lr=config.lr, momentum=0.9)
        self.updates = 0

    def batch(self, rollout, rewards, scored):
        worth = {}
        for (t, n), episode in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True):
            rows = slice(t + 1 - episode.num_steps, t + 1)
            worth.setdefault(episode.group, []).append((rows, n, rollout.ee_state[rows, n, 0].sum()))
        advantages = np.zeros(rollout.valid.shape, np.float32)
        for members in worth.values():
            assert len(members) == 2
            for rows, n, value in members:
                advantages[rows, n] = value - np.mean([other for _, _, other in members])
        return Batch(**decisions(rollout, scored, valid_rows(rollout), advantages=advantages))

    def update(self, batch, *, iteration):
        assert self.updates == iteration
        rows = torch.arange(len(batch.rows))
        out = self.policy.evaluate(
            batch.inputs(rows), batch.token_ids, batch.token_mask, temperature=self.temperature, with_values=False
        )
        ratio = (out.logprobs - batch.old_logprobs).sum(-1).exp()
        loss = -(ratio * batch.advantages).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        return {"loss/mine": loss.item(), "updates": self.updates, "size": float(batch.advantages.abs().mean())}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]
"""


def test_one_file_trains_and_resumes(tmp_path, monkeypatch):
    (tmp_path / "one_file_algorithm.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = [option for option in OVERRIDES if not option.startswith("algorithm.")]
    options = [*plain, "algorithm.kind=one_file_algorithm:Mine", "checkpoint_every=1", "rollout.num_steps=8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    play(load_config("toy", [*options, "num_iterations=2"]), whole, "sft", "train")
    play(load_config("toy", [*options, "num_iterations=1"]), parts, "sft", "train")
    play(load_config("toy", [*options, "num_iterations=2"]), parts, "train")
    lines = train_lines(whole)
    assert train_lines(parts) == lines
    assert [line["updates"] for line in lines] == [1, 2] and all(line["size"] > 0 for line in lines)
    assert all(line["success_n"] == 4 for line in lines) and "kl" not in lines[0]
