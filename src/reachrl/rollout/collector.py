"""Collects decisions: the policy acts on all environments at once, the environments step in parallel."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from reachrl.config.algorithm import Needs
from reachrl.envs.batch import EnvBatch
from reachrl.policies.base import ActionSample, Policy, PolicyInputs
from reachrl.rollout.acting import EpisodeNoise, actions_executed, answer
from reachrl.run.spans import SpanLog
from reachrl.streams import Stream, generator
from reachrl.types import OUTCOMES, Draw, EnvStep, Episode, Observation, Rollout, Start

Assign = Callable[[int], Draw | Start]
"""The curriculum's draw of the episode with this number; of a `Start` alone the probability is unknown."""

Vary = Callable[[Start, int, int], Start]
"""The start, perhaps perturbed, of the episode with a seed and a number; see `reachrl.config.env.EnvSection.varied`."""


class Collector:
    """Keeps environments running across iterations; an episode may span several.

    Environment `n` of all `N` plays the episodes numbered `n`, `n + N`, `n + 2 N` ... An episode's start and noise are
    addressed by its number, so it depends neither on the rows it was batched with nor on who else collects.

    Args:
        policy: what acts (its current weights).
        envs: the environments.
        seed: of the sampling noise.
        temperature: of the sampling distribution.
        first: number of the first of these environments among all.
        total: `N`; none: these are all.
        log: takes the spans of decoding and simulation.
        needs: of the algorithm. With `whole_episodes` a rollout begins and ends with its episodes: each environment
            plays as many as surely fit into `num_steps`, and `group_size` consecutive episodes begin alike.
        max_steps: control steps of the longest episode.
        vary: perturbs episodes.
        keep_inputs: rollouts hold what was decided on, as `policy.cache` makes it.
    """

    def __init__(
        self,
        policy: Policy,
        envs: EnvBatch,
        *,
        seed: int,
        temperature: float,
        first: int = 0,
        total: int | None = None,
        log: SpanLog | None = None,
        needs: Needs | None = None,
        max_steps: int = 1,
        vary: Vary = lambda start, seed, number: start,
        keep_inputs: bool = False,
    ) -> None:
        self.policy, self.envs, self.seed, self.temperature = policy, envs, seed, temperature
        self._keep_inputs = keep_inputs
        self.first, self.total = first, envs.num_envs if total is None else total
        self._log = log or SpanLog("actor")
        self._needs, self._execute = needs or Needs(), actions_executed(policy, envs)
        self._longest = math.ceil(max_steps / self._execute)  # decisions of an episode
        self._vary = vary
        self._played = 0  # whole episodes of each environment in earlier rollouts
        self._left: list[int] | None = None  # whole episodes that each environment still has to end in this rollout
        self._observation: Observation | None = None
        self._draws: list[Draw] = []  # of the running episodes
        self._numbers: list[int] = []  # of the running episodes
        self._next_draws: list[Draw] = []
        self._decisions = [0] * envs.num_envs  # taken so far in the running episodes
        self._actions: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]  # carried out in them, for replay

    def collect(self, assign: Assign, num_steps: int, *, policy_version: int) -> Rollout:
        """Take `num_steps` decisions in each environment.

        Args:
            assign: the curriculum's choice of the next episode.
            num_steps: `T`.
            policy_version: recorded in the rollout.
        """
        return collect_in_turn([self.collecting(assign, num_steps, policy_version=policy_version)])[0]

    def collecting(self, assign: Assign, num_steps: int, *, policy_version: int) -> Generator[None, None, Rollout]:
        """`collect` as a generator that yields while its simulators step, so that others can decode meanwhile."""
        if self._needs.whole_episodes:
            self._left = [num_steps // self._longest] * self.envs.num_envs
        if self._observation is None or self._left:
            self._begin(assign)
        assert self._observation is not None
        rows: dict[str, list[Any]] = {name: [] for name in ("observations", "inputs", "samples", "steps")}
        finals: list[tuple[Observation, tuple[int, int]]] = []
        episodes: list[Episode] = []
        for t in range(num_steps):
            if self._left is not None and not any(self._left):
                break
            began, observation = time.time(), self._observation
            inputs = self._encode(observation)
            sample, actions = answer(
                self.policy, inputs, temperature=self.temperature, noise=self._noise(), with_values=False
            )
            actions = actions[:, : self._execute]
            if self._keep_inputs:
                rows["inputs"].append(inputs)
            rows["observations"].append(observation)
            rows["samples"].append(sample)
            self.envs.send(actions, _starts(self._next_draws))
            self._log.add("decode", began)
            sent = time.time()
            yield
            step = self._counted(self.envs.receive())
            self._log.add("simulate", sent)
            rows["steps"].append(step)
            for n in range(self.envs.num_envs):
                self._actions[n].extend(actions[n, : step.executed[n]])
                self._decisions[n] += 1
                if self._left is not None and not self._left[n]:
                    continue
                ended = step.terminated[n] or step.truncated[n]
                if ended:
                    finals.append((step.final_observation.rows(slice(n, n + 1)), (t, n)))
                    episodes.append(
                        Episode(
                            start=self._draws[n].start,
                            success=bool(step.success[n]),
                            num_steps=len(self._actions[n]),
                            num_decisions=self._decisions[n],
                            env=self.first + n,
                            chance=self._draws[n].chance,
                            group=self._group(self._numbers[n]),
                        )
                    )
                if ended or not step.valid[n]:
                    self._follow(n, assign)
            self._observation = step.observation
        if self._needs.whole_episodes:
            self._played += num_steps // self._longest
        return self._rollout(rows, finals, episodes, policy_version)

    def state(self) -> list[dict[str, Any]]:
        """Each environment's running episode as its start and the actions carried out since, JSON-ready.

        [] before the first.

        Of whole episodes none is running: how many were played.
        """
        if self._needs.whole_episodes:
            return [{"played": self._played} for _ in range(self.envs.num_envs)] if self._played else []
        return [
            {
                "number": number,
                "start": [draw.start.task, draw.start.index],
                "chance": draw.chance,
                "next_start": [following.start.task, following.start.index],
                "next_chance": following.chance,
                "actions": [[float(x) for x in action] for action in self._actions[n]],
                "decisions": self._decisions[n],
            }
            for n, (number, draw, following) in enumerate(
                zip(self._numbers, self._draws, self._next_draws, strict=True)
            )
        ]

    def load_state(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replay running episodes, which brings every simulator back to where it was."""
        if not rows:
            return
        assert len(rows) == self.envs.num_envs
        if self._needs.whole_episodes:
            self._played = int(rows[0]["played"])
            return
        self._numbers = [int(row["number"]) for row in rows]
        self._draws = [self._drawn_again(row, "", number) for row, number in zip(rows, self._numbers, strict=True)]
        self._next_draws = [
            self._drawn_again(row, "next_", number + self.total)
            for row, number in zip(rows, self._numbers, strict=True)
        ]
        dims = self.envs.action_dim
        histories = [np.array(row["actions"], dtype=np.float32).reshape(-1, dims) for row in rows]
        self._actions = [list(history) for history in histories]
        self._decisions = [int(row["decisions"]) for row in rows]
        self._observation = self.envs.replay(_starts(self._draws), histories)

    def _begin(self, assign: Assign) -> None:
        self._numbers = [self.first + n + self._played * self.total for n in range(self.envs.num_envs)]
        self._draws = [self._draw(assign, number) for number in self._numbers]
        self._next_draws = [self._draw(assign, number + self.total) for number in self._numbers]
        self._actions, self._decisions = [[] for _ in range(self.envs.num_envs)], [0] * self.envs.num_envs
        self._observation = self.envs.reset(_starts(self._draws), _starts(self._next_draws))

    def _follow(self, n: int, assign: Assign) -> None:
        """Environment `n` has begun its next episode; queue the one after."""
        if self._left is not None:
            self._left[n] = max(0, self._left[n] - 1)
        self._numbers[n] += self.total
        following = self._draw(assign, self._numbers[n] + self.total)
        self._draws[n], self._next_draws[n] = self._next_draws[n], following
        self._actions[n], self._decisions[n] = [], 0

    def _group(self, number: int) -> int | None:
        """Number of the group of the episode with this number."""
        return number // self._needs.group_size if self._needs.whole_episodes else None

    def _draw(self, assign: Assign, number: int) -> Draw:
        """The start of the episode with this number: all of a group ask for that of the group."""
        group = self._group(number)
        address = number if group is None else group
        return self._varied(_drawn(assign(address)), address)

    def _drawn_again(self, row: dict[str, Any], prefix: str, number: int) -> Draw:
        """The draw in a row of `load_state`; checkpoints of earlier versions hold no chances."""
        task, index = row[f"{prefix}start"]
        return self._varied(Draw(Start(task, "train", index), row.get(f"{prefix}chance")), number)

    def _varied(self, draw: Draw, address: int) -> Draw:
        return replace(draw, start=self._vary(draw.start, self.seed, address))

    def _counted(self, step: EnvStep) -> EnvStep:
        """Mark the rows of environments that have played all their episodes as invalid; they keep stepping."""
        if self._left is None:
            return step
        counts = np.array(self._left) > 0
        flags = {name: getattr(step, name) & counts for name in ("success", "terminated", "truncated", "valid")}
        return replace(step, **flags)

    @torch.no_grad()
    def _encode(self, observation: Observation) -> PolicyInputs:
        inputs = self.policy.encode(observation)
        return self.policy.cache(inputs) if self._keep_inputs else inputs

    def _noise(self) -> EpisodeNoise:
        generators = (
            generator(self.seed, Stream.ROLLOUT_NOISE, number, decision)
            for number, decision in zip(self._numbers, self._decisions, strict=True)
        )
        return EpisodeNoise(self.policy, generators)

    def _rollout(
        self,
        rows: dict[str, list[Any]],
        finals: Sequence[tuple[Observation, tuple[int, int]]],
        episodes: Sequence[Episode],
        policy_version: int,
    ) -> Rollout:
        steps, seen, last = rows["steps"], rows["observations"], self._observation
        samples: list[ActionSample] = rows["samples"]
        assert last is not None
        return Rollout(
            images={camera: np.stack([each.images[camera] for each in seen]) for camera in last.images},
            instructions=tuple(each.instructions for each in seen),
            state=None if last.state is None else np.stack([each.state for each in seen]),
            last_observation=last,
            final_observation=Observation.concat([last.rows(slice(0)), *(final for final, _ in finals)]),
            final_rows=np.array([row for _, row in finals], dtype=np.int64).reshape(-1, 2),
            token_ids=np.stack([sample.token_ids.numpy() for sample in samples]),
            token_mask=np.stack([sample.token_mask.numpy() for sample in samples]),
            behaviour_logprobs=np.stack([sample.logprobs.numpy() for sample in samples]),
            malformed=np.stack([sample.malformed.numpy() for sample in samples]),
            **{name: np.stack([getattr(step, name) for step in steps]) for name in OUTCOMES},
            episodes=tuple(episodes),
            policy_version=policy_version,
            control_hz=self.envs.control_hz,
            action_bounds=self.envs.action_bounds,
            inputs=tuple(rows["inputs"]) if self._keep_inputs else None,
        )


def _drawn(assigned: Draw | Start) -> Draw:
    return assigned if isinstance(assigned, Draw) else Draw(assigned)


def _starts(draws: Sequence[Draw]) -> list[Start]:
    return [draw.start for draw in draws]


def collect_in_turn(collecting: Sequence[Generator[None, None, Rollout]]) -> list[Rollout]:
    """Drive several collectors' `collecting` in turn: while the simulators of one step, another decodes."""
    rollouts: list[Rollout | None] = [None] * len(collecting)
    waiting = dict(enumerate(collecting))
    while waiting:
        for place, one in list(waiting.items()):
            try:
                next(one)
            except StopIteration as stop:
                rollouts[place] = stop.value
                del waiting[place]
    return [rollout for rollout in rollouts if rollout is not None]
