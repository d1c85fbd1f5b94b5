"""Stages `eval` and `report`: held-out success before and after, videos, one conversation, the summary."""

import base64
import copy
import io
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from reachrl.backends.policy_loading import saved_policy
from reachrl.config.evaluation import mode_temperature
from reachrl.config.loading import config_hash
from reachrl.config.train import TrainConfig
from reachrl.envs.vector import open_envs
from reachrl.errors import StorageError
from reachrl.evaluation import EvalResult, against_headline, compare, heldout_starts, protocol_hash
from reachrl.pipeline.base import Display, caveats
from reachrl.pipeline.playing import play_modes
from reachrl.pipeline.refit import audit_figures
from reachrl.pipeline.rl_stages import build_reward, trained_reward
from reachrl.policies.base import Policy
from reachrl.report.report import write_report
from reachrl.report.video import write_film
from reachrl.rewards.base import Reward
from reachrl.rewards.process.reward import ProcessReward
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.atomic import write_json_atomic
from reachrl.run.directory import Run
from reachrl.run.file_names import file_name
from reachrl.run.records import BestPoint, Evaluation, RewardQuality, read_record
from reachrl.types import Observation, Rewards, Rollout
from reachrl.validation import BEST

_AGAIN = "delete it and `eval` in stages.json, and evaluate again"


def run_eval(config: TrainConfig, run: Run, display: Display) -> dict[str, Any]:
    """Evaluate the warm-started and the trained policy on the same held-out starts; record some episodes.

    Where validation chose weights other than the last (`checkpoints/best`), they play too. A finished part
    (`eval/before.json`) is kept when the stage is resumed.
    """
    starts = heldout_starts(config.env, config.eval)
    policies = {"before": run.sft / "policy", "after": run.policy}
    if (point := best_point(run)) is not None and point["iteration"] != trained_iterations(run):
        policies["best"] = run.checkpoints / BEST / "policy"
    with open_envs(config.env, config.env.num_envs) as envs:
        for when, folder in policies.items():
            if (run.eval / f"{when}.json").exists():
                continue
            policy = saved_policy(config, folder)
            played = dict.fromkeys(config.eval.modes, starts)
            name = "best by validation" if when == "best" else f"{when} RL"
            results = play_modes(config, policy, played, display, f"{name}, held-out starts", envs=envs)
            _write_half(config, run, policy, results, when)
    rates = {when: _headline(config, _read(config, run, when))["rate"] for when in ("before", "after")}
    return rates | {"caveats": list(caveats(config))}


def _write_half(config: TrainConfig, run: Run, policy: Policy, results: dict[str, EvalResult], when: str) -> None:
    """Write videos, conversation, metrics and, last, the record of one policy's evaluation."""
    reward = trained_reward(config, run) if when == "after" else build_reward(config, run)
    record = {mode: result.record() for mode, result in results.items()}
    episodes = [episode for result in results.values() for episode in result.episodes if episode.turns]
    for episode in episodes if when != "best" else ():
        _film(config, run, reward, episode, when)
    if when == "after" and episodes:
        # The longest success has most to show; with none, the first failure.
        chosen = max(episodes, key=lambda episode: (episode.success, episode.num_steps))
        write_json_atomic(run.conversation, conversation(config, policy, reward, chosen))
    if when == "best":
        point = best_point(run)
        assert point is not None
        iteration = point["iteration"]
    else:
        iteration = trained_iterations(run) if when == "after" else 0
        run.metrics.truncate_after("eval", "iteration", iteration - 1)  # of an evaluation that was cut short here
    if when != "best" and isinstance(reward, ProcessReward) and reward.model is not None:
        # The same held-out trajectories each time: a refit that forgets them shows here.
        run.metrics.truncate_after("audit", "iteration", iteration - 1)
        run.log({"kind": "audit", "iteration": iteration} | audit_figures(config, run, reward.model))
    for mode, outcome in record.items():
        of = {"kind": "eval", "iteration": iteration, "mode": mode, "temperature": mode_temperature(mode)}
        run.log(of | _figures(outcome))
    write_json_atomic(run.eval / f"{when}.json", record)


def trained_iterations(run: Run) -> int:
    """The iterations that training ended with: fewer than `num_iterations` where `eval.patience` ended it."""
    return int(run.stages.read()["train"]["info"]["iterations"])


def best_point(run: Run) -> dict[str, Any] | None:
    """The validation point of `checkpoints/best`; None where nothing was chosen.

    Raises:
        StorageError: its file is missing or damaged.
    """
    folder = run.checkpoints / BEST
    if not folder.is_dir():
        return None
    remedy = f"delete {folder} to evaluate without it"
    return read_record(folder / "validation.json", BestPoint, remedy=remedy)


def episode_rewards(config: TrainConfig, reward: Reward, episode: PlayedEpisode) -> Rewards:
    """The training reward of a recorded episode, step by step: f32[T 1] parts; `reward` stays as it is."""
    steps = len(episode.turns)
    assert episode.final_observation is not None
    seen = Observation.concat([turn.observation for turn in episode.turns])
    ended = np.zeros((steps, 1), dtype=bool)
    ended[-1] = True
    success = ended & episode.success
    rollout = Rollout(
        images={camera: frames[:, None] for camera, frames in seen.images.items()},
        state=None if seen.state is None else seen.state[:, None],
        instructions=((episode.instruction,),) * steps,
        last_observation=episode.final_observation,
        final_observation=episode.final_observation,
        final_rows=np.array([[steps - 1, 0]]),
        token_ids=np.stack([turn.token_ids for turn in episode.turns])[:, None],
        token_mask=np.stack([turn.token_mask for turn in episode.turns])[:, None],
        behaviour_logprobs=np.zeros((steps, 1, len(episode.turns[0].token_ids)), dtype=np.float32),
        malformed=np.array([[turn.malformed] for turn in episode.turns]),
        success=success,
        terminated=success,
        truncated=ended & ~success,
        valid=np.ones((steps, 1), dtype=bool),
        executed=np.array([[len(turn.actions)] for turn in episode.turns], np.int32),
        ee_state=np.stack([turn.ee_state for turn in episode.turns])[:, None],
        progress=np.stack([turn.progress for turn in episode.turns])[:, None],
        episodes=(),
        policy_version=0,
    )
    state = copy.deepcopy(reward.state_dict())
    rewards = reward(rollout)
    reward.load_state_dict(state)  # a running scale, say, learns from training alone
    return rewards


def conversation(config: TrainConfig, policy: Policy, reward: Reward, episode: PlayedEpisode) -> dict[str, Any]:
    """One episode as the multi-turn conversation it is, JSON-ready."""
    rewards = episode_rewards(config, reward, episode)
    turns = [
        {
            "step": step,
            "image_png_base64": _png(turn.image),
            "prompt": policy.prompt(episode.instruction),
            "action_tokens": turn.token_ids[turn.token_mask].tolist(),
            "malformed": turn.malformed,
            "actions": turn.actions.tolist(),
            "logprob": turn.logprob,
            "value": turn.value,
            "rewards": {name: float(part[step, 0]) for name, part in rewards.parts.items()},
        }
        for step, turn in enumerate(episode.turns)
    ]
    return {
        "task": episode.start.task,
        "instruction": episode.instruction,
        "start": episode.start.index,
        "success": episode.success,
        "turns": turns,
    }


def run_report(config: TrainConfig, run: Run, display: Display) -> dict[str, Any]:
    """Write `summary.json` and `report.html` from what lies in the run folder."""
    write_json_atomic(run.summary, summary(config, run))
    path = write_report(run.path)
    return {"report": path.name}


def summary(config: TrainConfig, run: Run) -> dict[str, Any]:
    """The machine-readable end of a run."""
    before, after = _read(config, run, "before"), _read(config, run, "after")
    try:
        tests = {mode: asdict(compare(before[mode], after[mode])) for mode in config.eval.modes}
    except ValueError as error:
        raise StorageError(f"{run.eval / 'after.json'} does not belong to before.json: {error}; {_AGAIN}") from error
    others = against_headline({mode: after[mode] for mode in config.eval.modes})
    records = run.stages.read()
    wall = {name: record["wall_s"] for name, record in records.items()}
    found: dict[str, Any] = {
        "caveats": records["eval"]["info"]["caveats"],
        "success_before": _figures(_headline(config, before)),
        "success_after": _figures(_headline(config, after)),
        "mode": config.eval.modes[0],
        "paired_test": tests[config.eval.modes[0]],
    }
    for mode in config.eval.modes:
        found |= {
            f"success_before_{mode}": _figures(before[mode]),
            f"success_after_{mode}": _figures(after[mode]),
        }
    return found | {
        "temperatures": [
            {"mode": mode, "temperature": temperature, "paired_test": tests[mode], "against_headline": others.get(mode)}
            for mode, temperature in zip(config.eval.modes, config.eval.temperatures, strict=True)
        ],
        "protocol_hash": protocol_hash(config),
        "config_hash": config_hash(config),
        "seed": config.seed,
        "wall_s": wall | {"total": round(sum(wall.values()), 3)},
        "peak_rss_bytes": max(record["peak_rss_bytes"] for record in records.values()),
        "num_env_steps": records["train"]["info"]["env_steps"],
        "best": _best(config, run, after),
        "reward_model": _reward_quality(config, run),
    }


def _best(config: TrainConfig, run: Run, after: dict[str, Any]) -> dict[str, Any] | None:
    """The weights that validation chose, beside the last: success at each temperature, paired with the last."""
    point = best_point(run)
    if point is None:
        return None
    last = trained_iterations(run)
    found = after if point["iteration"] == last else _read(config, run, "best")
    return {
        "iteration": point["iteration"],
        "of": last,
        "validation": {key: point[key] for key in ("mode", "k", "n", "rate", "wilson95")},
        "success": {mode: _figures(found[mode]) for mode in config.eval.modes},
        "against_last": {mode: asdict(compare(after[mode], found[mode])) for mode in config.eval.modes},
    }


def _film(config: TrainConfig, run: Run, reward: Reward, episode: PlayedEpisode, when: str) -> None:
    parts = episode_rewards(config, reward, episode).parts
    write_film(
        run.videos / f"{when}_{file_name(episode.start.task, '.mp4')}",
        episode.frames(),
        instruction=episode.instruction,
        # An untrained critic has nothing to say about the warm-started policy.
        values=[turn.value for turn in episode.turns] if when == "after" and config.algorithm.needs.values else None,
        process=parts["process"][:, 0].tolist() if "process" in parts else None,
        success=episode.success,
    )


def _reward_quality(config: TrainConfig, run: Run) -> dict[str, Any] | None:
    """Held-out quality of the reward model this run fitted, or none."""
    if not config.fits_reward_model:
        return None
    remedy = "delete it and the folder `model` beside it, and fit the reward model again"
    quality = read_record(run.reward_model / "quality.json", RewardQuality, remedy=remedy)["heldout"]
    return quality | {
        "ece": quality["calibration_error"],
        "calibration": [
            {"p": found["mean_score"], "observed": found["mean_label"], "n": found["n"]}
            for found in quality["reliability"]
        ],
    }


def _read(config: TrainConfig, run: Run, when: str) -> dict[str, Any]:
    path = run.eval / f"{when}.json"
    found = read_record(path, Evaluation, remedy=_AGAIN)
    for mode in config.eval.modes:
        if found.get(mode, {}).get("rate") is None:
            raise StorageError(f"{path} is damaged: no rate of {mode} episodes (eval.temperatures); {_AGAIN}")
    return found


def _headline(config: TrainConfig, record: dict[str, Any]) -> dict[str, Any]:
    return record[config.eval.modes[0]]


def _figures(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key != "episodes"}


def _png(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()
