"""A group algorithm as one plug-in file: the reward is how far to the right an episode came."""

import numpy as np
import torch

from reachrl.algorithms.base import Algorithm, Batch, decisions, valid_rows
from reachrl.config.algorithm import AlgorithmSection, Needs


class MineConfig(AlgorithmSection):
    kind: str = "group_algorithm:Mine"
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
