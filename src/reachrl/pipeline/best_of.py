"""Test-time search measured: the best of several sampled actions a decision, paired with the first one alone."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reachrl.backends.policy_loading import limit_threads, new_policy, saved_policy
from reachrl.config.evaluation import MEAN, mode_name
from reachrl.config.reward import ProcessRewardConfig
from reachrl.config.train import TrainConfig
from reachrl.envs.batch import EnvBatch
from reachrl.envs.vector import open_envs
from reachrl.errors import ConfigError
from reachrl.evaluation import EvalResult, compare, heldout_starts, protocol_hash
from reachrl.pipeline.base import Display, caveats
from reachrl.policies.base import Policy
from reachrl.rewards.process.base import RewardModel, load_reward_model
from reachrl.rollout.best_of import LOOKS_AHEAD, BestOfPlayer, Rank
from reachrl.run.atomic import write_json_atomic
from reachrl.types import Start

MOST = 64  # candidates a decision


def measure_best_of(
    config: TrainConfig, folder: Path | None, out: Path, counts: Sequence[int], rank: Rank, display: Display
) -> dict[str, Any]:
    """Play the held-out starts with the best of N candidates for each N, 1 among them; the result is `out`'s file too.

    Args:
        config: environment and evaluation; candidates are sampled at the first of its temperatures above 0.
        folder: a saved policy; None: the configuration's own.
        out: folder of `best-of-<rank>.json`.
        counts: every N.
        rank: what makes a candidate the best.
        display: shows a progress bar.

    Raises:
        ConfigError: greedy actions alone, or a rank that the policy or the reward model cannot give.
        CheckpointError: the reward model cannot be read.
    """
    temperature = next((each for each in config.eval.temperatures if each != MEAN and each > 0), None)
    if temperature is None:
        raise ConfigError("--best-of chooses among sampled actions: eval.temperatures needs one above 0")
    if rank == "critic" and not config.algorithm.needs.values:
        raise ConfigError("--rank critic needs a trained critic, and this configuration's algorithm has none")
    judge = _judge(config, folder) if rank == "reward" else None
    limit_threads(config)
    policy = (new_policy(config) if folder is None else saved_policy(config, folder)).eval()
    counts = sorted({1, *counts})
    starts = heldout_starts(config.env, config.eval)
    rows: list[dict[str, Any]] = []
    with (
        open_envs(config.env, min(config.env.num_envs, len(starts))) as envs,
        display.stage("eval", len(starts) * len(counts), f"best of {counts[-1]} by {rank}") as progress,
    ):
        for count in counts:
            record = _play(policy, envs, config, starts, count, rank, temperature, judge, lambda: progress.advance(1))
            first = rows[0]["outcomes"] if rows else record["outcomes"]
            rows.append({"best_of": count} | record | {"against_one": asdict(compare(first, record["outcomes"]))})
    result = {
        "rank": rank,
        "oracle_look_ahead": rank in LOOKS_AHEAD,
        "mode": mode_name(temperature),
        "policy": str(folder) if folder else None,
        "protocol_hash": protocol_hash(config),
        "caveats": list(caveats(config)),
        "rows": rows,
    }
    write_json_atomic(out / f"best-of-{rank}.json", result)
    return result


def _judge(config: TrainConfig, folder: Path | None) -> RewardModel:
    """The reward model that ranks: `reward.checkpoint`, else the one that the policy's run fitted."""
    given = config.reward.checkpoint if isinstance(config.reward, ProcessRewardConfig) else None
    path = given or (folder.parent / "reward_model" / "model" if folder is not None else None)
    if path is None or not path.is_dir():
        raise ConfigError(
            f"--rank reward needs a fitted reward model and there is none{f' in {path}' if path else ''}: name one "
            "with reward.kind=process reward.checkpoint=DIR"
        )
    model = load_reward_model(path).eval()
    if model.num_frames > 1:
        raise ConfigError(
            f"--rank reward scores the frame that a candidate leads to, and the reward model in {path} looks at "
            f"{model.num_frames} frames: fit one with reward_model.num_frames=1"
        )
    return model


def _play(
    policy: Policy,
    envs: EnvBatch,
    config: TrainConfig,
    starts: Sequence[Start],
    count: int,
    rank: Rank,
    temperature: float,
    judge: RewardModel | None,
    ended: Any,
) -> dict[str, Any]:
    with ExitStack() as stack:
        ahead = None
        if rank in LOOKS_AHEAD and count > 1:
            ahead = stack.enter_context(open_envs(config.env, count))
        player = BestOfPlayer(
            policy,
            envs,
            temperature=temperature,
            seed=config.eval.seed,
            count=count,
            rank=rank,
            look_ahead=ahead,
            reward_model=judge,
        )
        episodes = player.play(starts, on_episode=lambda _: ended())
    outcomes = EvalResult(mode=mode_name(temperature), episodes=tuple(episodes)).record()
    return {"outcomes": outcomes, "ms_per_decision": 1000 * player.seconds / max(1, player.decisions)}
