"""Playing an evaluation's start states at each temperature, with progress and recorded episodes."""

from collections.abc import Callable, Mapping, Sequence

from reachrl.config.train import TrainConfig
from reachrl.envs.batch import EnvBatch
from reachrl.envs.vector import open_envs
from reachrl.evaluation import EvalResult, evaluate
from reachrl.pipeline.base import Display
from reachrl.policies.base import Policy
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.types import Start


def play_modes(
    config: TrainConfig,
    policy: Policy,
    starts: Mapping[str, Sequence[Start]],
    display: Display,
    title: str,
    *,
    envs: EnvBatch | None = None,
    on_episode: Callable[[str, PlayedEpisode], None] = lambda mode, episode: None,
) -> dict[str, EvalResult]:
    """Play the given starts of each mode once.

    The first mode of `config.eval` records the turns of start 0 of the first `eval.num_videos` tasks.

    Args:
        config: environment and evaluation.
        policy: what acts.
        starts: by mode.
        display: shows a progress bar.
        title: of the bar.
        envs: environments to use; None starts and closes some.
        on_episode: called with the mode as each episode ends.
    """
    count = sum(map(len, starts.values()))
    if envs is None:
        with open_envs(config.env, min(config.env.num_envs, count)) as own:
            return play_modes(config, policy, starts, display, title, envs=own, on_episode=on_episode)
    recorded = {Start(task, "eval", 0) for task in config.env.tasks[: config.eval.num_videos]}
    results: dict[str, EvalResult] = {}
    with display.stage("eval", count, title) as progress:
        for mode, chosen in starts.items():
            success: list[bool] = []

            def ended(episode: PlayedEpisode, mode: str = mode, success: list[bool] = success) -> None:
                on_episode(mode, episode)
                success.append(episode.success)
                progress.advance(1, **{mode: f"{sum(success)}/{len(success)}"})

            results[mode] = evaluate(
                policy.eval(),
                envs,
                chosen,
                mode=mode,
                config=config.eval,
                record=lambda start, first=mode == config.eval.modes[0]: first and start in recorded,
                on_episode=ended,
            )
    return results
