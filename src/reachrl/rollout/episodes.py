"""Plays a list of start states to their ends, each once, on however many environments there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reachrl.config.evaluation import MEAN, Temperature
from reachrl.envs.batch import EnvBatch
from reachrl.errors import ExtensionError
from reachrl.policies.base import ActionSample, Policy
from reachrl.policies.observed import check_temperature
from reachrl.rollout.acting import EpisodeNoise, actions_executed, answer
from reachrl.streams import Stream, generator
from reachrl.types import SPLITS, EnvStep, Observation, Split, Start

Mode = Literal["greedy", "sampled", "mean"]

# Start i of one split is another start than that of another split: it gets other noise, too.
NOISE: dict[Split, Stream] = {
    "train": Stream.PRACTICE_NOISE,
    "validation": Stream.VALIDATION_NOISE,
    "eval": Stream.EVALUATION_NOISE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the conversation: what was seen, what was answered."""

    observation: Observation  # one row
    ee_state: np.ndarray  # f32[4] after the action
    progress: np.ndarray  # f32[2] before and after the action; NaN where the simulator reports none
    token_ids: np.ndarray  # i64[A]
    token_mask: np.ndarray  # bool[A]
    malformed: bool
    actions: np.ndarray  # f32[K D]: those carried out
    logprob: float
    value: float

    @property
    def image(self) -> np.ndarray:
        """The first camera's frame u8[H W 3]."""
        return self.observation.frames[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedEpisode:
    """A finished episode; `turns` and `final_observation` only if it was to be recorded."""

    start: Start
    instruction: str
    success: bool
    num_steps: int  # control steps: actions carried out
    num_decisions: int
    num_malformed: int = 0  # decisions whose answer stood for no action
    turns: tuple[Turn, ...] = ()
    final_observation: Observation | None = None  # one row
    control_hz: float | None = None  # control steps a second of simulated time; None: unknown

    def observations(self) -> Observation:
        """All that was seen in a recorded episode, the true final observation last: T + 1 rows."""
        assert self.final_observation is not None, "the episode was not recorded"
        return Observation.concat([*(turn.observation for turn in self.turns), self.final_observation])

    def frames(self) -> np.ndarray:
        """What the first camera saw: u8[T+1 H W 3]."""
        return self.observations().frames


class EpisodePlayer:
    """Assigns start states to environments as they become free.

    Args:
        policy: what acts.
        envs: where; their number changes the speed, not the outcomes.
        mode: `greedy`, `mean`, or `sampled` with noise addressed by (seed, split, task, start, step).
        temperature: of the distribution whose log-probs are recorded and sampled.
        seed: of the sampling noise.

    Raises:
        ConfigError: `mean`, and the policy has none.
    """

    def __init__(self, policy: Policy, envs: EnvBatch, *, mode: Mode, temperature: float, seed: int) -> None:
        self.policy, self.envs, self.mode = policy, envs, mode
        self.temperature, self.seed = temperature, seed
        self._execute = actions_executed(policy, envs)
        check_temperature(MEAN if mode == MEAN else temperature, has_mean=policy.has_mean)

    def play(
        self,
        starts: Sequence[Start],
        *,
        record: Callable[[Start], bool] = lambda _: False,
        on_episode: Callable[[PlayedEpisode], None] | None = None,
    ) -> list[PlayedEpisode]:
        """Play every start state once; the result is in the order of `starts`.

        Warns, once each, of an instruction, a frame size or an order of cameras that the policy was never trained on,
        and where the mean of all actions lies at a limit.

        Args:
            starts: what to play; one listed twice is played twice, with the same outcome.
            record: whether to keep an episode's turns.
            on_episode: called as each ends.
        """
        if not starts:
            return []
        queue = list(reversed(range(len(starts))))  # places in `starts`
        finished: dict[int, PlayedEpisode] = {}
        count = self.envs.num_envs

        def following() -> int | None:
            return queue.pop() if queue else None

        def at(places: Sequence[int | None]) -> list[Start | None]:
            return [None if place is None else starts[place] for place in places]

        places, upcoming = [following() for _ in range(count)], [following() for _ in range(count)]
        # With the queue empty an environment keeps stepping; its results are discarded.
        fillers = [start or starts[0] for start in at(places)]
        lengths, decisions = [0] * count, [0] * count  # of the running episodes
        malformed = [0] * count
        turns: list[list[Turn]] = [[] for _ in range(count)]
        chosen: list[np.ndarray] = []
        observation = self.envs.reset(fillers, [s or filler for s, filler in zip(at(upcoming), fillers, strict=True)])
        while len(finished) < len(starts):
            current = at(places)
            plain = [n for n, start in enumerate(current) if start is None or not start.variant]
            self.policy.warn_of_unfamiliar([observation.instructions[n] for n in plain], observation.images)
            sample, actions = self._act(observation, current, decisions)
            fillers = [s or filler for s, filler in zip(at(upcoming), fillers, strict=True)]
            step = self.envs.step(actions, fillers)
            for n, (place, start) in enumerate(zip(places, current, strict=True)):
                lengths[n] += int(step.executed[n])
                decisions[n] += 1
                malformed[n] += bool(sample.malformed[n])
                ended = bool(step.terminated[n] or step.truncated[n])
                if place is not None and start is not None and step.valid[n]:
                    chosen.append(actions[n, : step.executed[n]])
                    if record(start):
                        turns[n].append(_turn(observation, actions, sample, step, n))
                    if ended:
                        finished[place] = PlayedEpisode(
                            start=start,
                            instruction=observation.instructions[n],
                            success=bool(step.success[n]),
                            num_steps=lengths[n],
                            num_decisions=decisions[n],
                            num_malformed=malformed[n],
                            turns=tuple(turns[n]),
                            final_observation=step.final_observation.rows(slice(n, n + 1)) if turns[n] else None,
                            control_hz=self.envs.control_hz,
                        )
                        if on_episode is not None:
                            on_episode(finished[place])
                if ended or not step.valid[n]:
                    if place is not None and not step.valid[n]:
                        queue.append(place)  # its worker was lost: play it again
                    places[n], upcoming[n] = upcoming[n], following()
                    lengths[n], decisions[n], malformed[n], turns[n] = 0, 0, 0, []
            observation = step.observation
        self.policy.warn_of_limits(np.concatenate(chosen))
        return [finished[place] for place in range(len(starts))]

    def _act(
        self, observation: Observation, current: Sequence[Start | None], decisions: Sequence[int]
    ) -> tuple[ActionSample, np.ndarray]:
        noise = None
        if self.mode == "sampled":
            noise = self._noise(current, decisions)
        sample, actions = answer(
            self.policy,
            self.policy.encode(observation),
            temperature=self.temperature,
            noise=noise,
            with_values=True,
            mean=self.mode == MEAN,
        )
        return sample, actions[:, : self._execute]

    def _noise(self, current: Sequence[Start | None], decisions: Sequence[int], *more: int) -> EpisodeNoise:
        """Each row's own noise at its decision; `more` numbers draws beyond the first."""
        generators = (
            start and generator(self.seed, NOISE[start.split], start.task, start.index, decision, *more)
            for start, decision in zip(current, decisions, strict=True)
        )
        return EpisodeNoise(self.policy, generators)


def player_at(temperature: Temperature, policy: Policy, envs: EnvBatch, *, seed: int) -> EpisodePlayer:
    """A player that acts at this temperature; actions without noise are recorded with the policy's own log-probs.

    Raises:
        ConfigError: `mean`, and the policy has none.
    """
    if temperature == MEAN:
        return EpisodePlayer(policy, envs, mode=MEAN, temperature=1.0, seed=seed)
    mode = "sampled" if temperature else "greedy"
    return EpisodePlayer(policy, envs, mode=mode, temperature=temperature or 1.0, seed=seed)


def check_validation(envs: EnvBatch) -> None:
    """Refuse an environment that plays training or test starts for validation, as one does that knows two splits only.

    Raises:
        ExtensionError: which split's first frame it shows.
    """
    frames: dict[Split, bytes] = {}
    for split in SPLITS:
        starts = [Start(envs.tasks[0], split, 0)] * envs.num_envs
        frames[split] = envs.reset(starts, starts).frames[0].tobytes()
    for split in SPLITS:
        if split != "validation" and frames[split] == frames["validation"]:
            raise ExtensionError(
                f"the environment shows the same first frame for validation start 0 and {split} start 0 of task "
                f"{envs.tasks[0]!r}: eval.during_every would measure on {split} starts. Draw starts with "
                "reachrl.envs.base.start_key(start), which tells the splits apart, or set eval.during_every=0"
            )


def _turn(observation: Observation, actions: np.ndarray, sample: ActionSample, step: EnvStep, n: int) -> Turn:
    return Turn(
        observation=observation.rows(slice(n, n + 1)),
        ee_state=step.ee_state[n],
        progress=step.progress[n],
        token_ids=sample.token_ids[n].numpy(),
        token_mask=sample.token_mask[n].numpy(),
        malformed=bool(sample.malformed[n]),
        actions=actions[n, : step.executed[n]],
        logprob=float(sample.logprobs[n].sum()),
        value=float(sample.values[n]),  # pyright: ignore[reportOptionalSubscript]  (asked for above)
    )
