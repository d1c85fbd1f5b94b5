"""What TorchRL computes for episodes in groups and answers of different lengths; writes data/torchrl_grpo.json.

Run by hand, with torchrl installed: python tests/oracle/record_torchrl.py
"""

import json
from pathlib import Path

import torch
import torchrl
from tensordict import TensorDict, lazy_stack
from torch import nn
from torchrl.objectives.llm import GRPOLoss, MCAdvantage

LENGTHS, SLOTS, LOW, HIGH = (5, 1, 3, 4, 2, 5, 2, 3), 5, 0.2, 0.28
RETURNS = (1.0, 0.0, 0.0, 1.0, 0.25, 1.5, -0.75, 0.5, 0.0, 2.0, 0.0, 0.5)
GROUP = 4


def advantages() -> list[float]:
    """Of episodes in groups of four, each of three rewards that sum to its return."""
    transform = MCAdvantage(grpo_size=GROUP, trajectory_return="sum")
    found = []
    for first in range(0, len(RETURNS), GROUP):
        for worth in RETURNS[first : first + GROUP]:
            steps = TensorDict(
                {
                    "query": [f"start {first}"] * 3,
                    "next": {
                        "reward": torch.tensor([[0.5 * worth], [0.25 * worth], [0.25 * worth]], dtype=torch.float64),
                        "done": torch.tensor([[False], [False], [True]]),
                    },
                },
                batch_size=[3],
            )
            done = transform.inv(lazy_stack(list(steps.unbind(0))))
        found += done["advantage"].reshape(GROUP, 3)[:, 0].tolist()
    return found


class Answers(nn.Module):
    """Stands for a language model: given log-probs of the tokens, and their mask."""

    def __init__(self, logprobs: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self.logprobs, self.mask = logprobs, mask

    def get_dist(self, *_: object, **__: object) -> "Answers":
        """Itself: it is asked for `mask` and `log_prob` only."""
        return self

    def log_prob(self, _: torch.Tensor) -> torch.Tensor:
        """As given."""
        return self.logprobs


def loss() -> dict[str, list]:
    """The clipped objective of each answer, the mean over them, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    new, old = (0.3 * torch.randn(len(LENGTHS), SLOTS, generator=generator, dtype=torch.float64) - 3 for _ in range(2))
    mask = torch.arange(SLOTS) < torch.tensor(LENGTHS)[:, None]
    advantage = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    new.requires_grad_()
    objective = GRPOLoss(
        Answers(new, mask),
        clip_epsilon=(LOW, HIGH),
        aggregation="prompt_mean",
        entropy_bonus=False,
        masking_strategy="generic",
    ).double()
    batch = TensorDict(
        {
            "tokens": {"full": torch.zeros(mask.shape, dtype=torch.long)},
            "log_probs": {"full": old},
            "advantage": advantage[:, None, None].expand(*mask.shape, 1),
        },
        batch_size=[len(LENGTHS)],
    )
    mean = objective(batch).loss_objective.sum()
    mean.backward()
    assert new.grad is not None
    return {
        "logprobs": new.tolist(),
        "old_logprobs": old.tolist(),
        "mask": mask.tolist(),
        "advantages": advantage.tolist(),
        "loss": mean.item(),
        "gradient": new.grad.tolist(),
    }


if __name__ == "__main__":
    record = {"torchrl": torchrl.__version__, "torch": torch.__version__, "clip": [LOW, HIGH], "group_size": GROUP}
    record |= {"returns": RETURNS, "group_advantages": advantages()} | loss()
    path = Path(__file__).parent / "data" / "torchrl_grpo.json"
    path.write_text(json.dumps(record, indent=None) + "\n", encoding="utf-8")
