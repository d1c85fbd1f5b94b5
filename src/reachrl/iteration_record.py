"""One iteration as a record of `metrics.jsonl`, and warnings about its metrics."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from reachrl.config.train import TrainConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.functional.stats import weighted_rate
from reachrl.run.weight_change import ALARM
from reachrl.training_checkpoint import TrainState
from reachrl.types import Episode, Rewards, Rollout

log = logging.getLogger(__name__)


def metrics(
    state: TrainState,
    rollout: Rollout,
    rewards: Rewards,
    stats: dict[str, float],
    curriculum: TaskSampler,
) -> dict[str, Any]:
    """One iteration's line of `metrics.jsonl`."""
    episodes, valid = rollout.episodes, rollout.valid
    num_valid = max(int(valid.sum()), 1)
    return (
        {
            "kind": "train",
            "iteration": state.iteration,
            "env_steps": state.env_steps + rollout.num_env_steps,
            "episodes": state.episodes + len(episodes),
            "success_k": sum(episode.success for episode in episodes),
            "success_n": len(episodes),
            "success": sum(episode.success for episode in episodes) / len(episodes) if episodes else None,
            "malformed_rate": float(rollout.malformed[valid].mean()) if valid.any() else None,
            "episode_length": float(np.mean([e.num_steps for e in episodes])) if episodes else None,
        }
        | episode_figures(rollout)
        | {f"reward/{name}": float(part[valid].sum()) / num_valid for name, part in rewards.parts.items()}
        | stats
        | uniform_success(episodes, curriculum)
        | curriculum.metrics()
    )


def episode_figures(rollout: Rollout) -> dict[str, Any]:
    """What tells why episodes fail; NaN where no episode tells it.

    Returns:
        `task_successes/<task>` and `task_episodes/<task>`: counts; `truncated`: share of the episodes that the time
        limit cut off; of those, `progress/end`: how far they came by the simulator's own word, 0..1, and
        `progress/late_gain`: how much of it in their last quarter; `gripper/early`: opening of the gripper, 0..1, after
        the decision with an episode's third control step.
    """
    successes, played = Counter[str](), Counter[str]()
    ends, gains, openings, cut = list[float](), list[float](), list[float](), 0
    for (t, n), episode in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True):
        successes[episode.start.task] += episode.success
        played[episode.start.task] += 1
        first = t + 1 - episode.num_decisions
        if episode.num_steps >= 3 and first >= 0:
            third = int((rollout.executed[first : t + 1, n].cumsum() >= 3).argmax())
            openings.append(float(rollout.ee_state[first + third, n, 3]))
        if not rollout.truncated[t, n]:
            continue
        cut += 1
        ends.append(float(rollout.progress[t, n, 1]))
        if (late := t - episode.num_decisions // 4) >= 0:
            gains.append(float(rollout.progress[t, n, 1] - rollout.progress[late, n, 1]))
    means = {"progress/end": ends, "progress/late_gain": gains, "gripper/early": openings}
    return {
        **{f"task_successes/{task}": successes[task] for task in played},
        **{f"task_episodes/{task}": count for task, count in played.items()},
        "truncated": cut / len(rollout.episodes) if rollout.episodes else None,
        **{name: float(np.mean(values)) if values else math.nan for name, values in means.items()},
    }


def uniform_success(episodes: Sequence[Episode], curriculum: TaskSampler) -> dict[str, float | None]:
    """Success as if every (task, training start) had been drawn equally often, whatever the curriculum preferred.

    Each episode weighs 1 / (number of starts x its chance of being drawn), so a policy that stands still has the
    same expected figure whatever the curriculum asks for. All None where a chance is unknown or no episode ended.

    Returns:
        `success_uniform`, the sum of the weights (to pool iterations by), and the effective number of episodes.
    """
    names = ("success_uniform", "success_uniform_weight", "success_uniform_n")
    chances = [episode.chance for episode in episodes if episode.chance is not None]
    if not episodes or len(chances) < len(episodes):
        return dict.fromkeys(names)
    units = len(curriculum.tasks) * curriculum.num_starts
    weights = [1 / (units * chance) for chance in chances]
    rate, effective = weighted_rate([episode.success for episode in episodes], weights)
    return dict(zip(names, (rate, sum(weights), effective), strict=True))


def warn_of_lost_rollout(state: TrainState, rollout: Rollout) -> None:
    """Warn of an iteration without any valid decision."""
    if not rollout.num_env_steps:
        log.warning(
            "iteration %d: nothing to train on, every environment was lost in every step; see the workers' logs",
            state.iteration,
        )


def warn_of_engine_gap(config: TrainConfig, state: TrainState, stats: dict[str, float]) -> None:
    """Warn when the sampler's log-probs differ from the learner's: the probability ratio is then wrong."""
    gap, alarm = stats["engine_kl"], config.rollout.engine_kl_alarm
    if gap > alarm:
        log.warning(
            "iteration %d: sampler and learner log-probs differ (engine_kl %.4f > %.4f); check that both use the "
            "same weights, temperature and numeric format, or set algorithm.importance_cap",
            state.iteration, gap, alarm,
        )  # fmt: skip


def warn_of_low_entropy(state: TrainState, stats: dict[str, float]) -> None:
    """Say so when the policy's entropy has fallen below `algorithm.entropy_floor`."""
    if stats.get("entropy_low"):
        log.warning(
            "iteration %d: entropy %.3f nats per action token is below algorithm.entropy_floor; the entropy bonus "
            "rises from %.4f", state.iteration, stats["entropy"], stats["entropy_coef"],
        )  # fmt: skip


def warn_of_lost_steps(state: TrainState, stats: dict[str, float]) -> None:
    """Warn when optimiser steps are rounded away instead of changing the weights."""
    for name, share in (("policy", stats.get("changed_weights")), ("critic", stats.get("value_changed_weights"))):
        if share is not None and share < ALARM:  # of NaN there is nothing to say
            log.warning(
                "iteration %d: the last step changed %.0f %% of the %s's weights that had a gradient; the rest was "
                "rounded away. Raise its learning rate, or hold its weights in float32",
                state.iteration, 100 * share, name,
            )  # fmt: skip
