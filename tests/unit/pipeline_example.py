"""A pipeline whose times can be worked out by hand, for the tests of the simulator in `benchmarks/`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pipeline_layout import Layout, Stages
from pipeline_rollout import collect_rollouts

# Every stage takes time, and no two sums of them are equal by chance.
STAGES = Stages(
    decode_fixed_s=0.3,
    decode_row_s=0.017,
    env_step_s=0.11,
    env_wait_s=0.029,
    step_fixed_s=0.0053,
    reward_row_s=0.0021,
    score_row_s=0.0031,
    update_row_s=0.0057,
    learner_efficiency=0.8,
    gradient_bytes=6e8,
    gradient_bytes_per_s=2e10,
    sync_fixed_s=0.7,
    sync_bytes=3e9,
    sync_bytes_per_s=1e10,
    handover_s=1.9,
)
LAYOUT = Layout(rows=(10, 10, 10), num_steps=20, cores=4, learners=2, epochs=3, minibatch=64)


def rollout_s(stages: Stages, layout: Layout, seed: int = 0) -> float:
    return collect_rollouts(stages, layout, 1, seed)[0].seconds
