"""Collects decisions: the policy acts on all environments at once, the environments step in parallel."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from reachrl.envs.vector import VectorEnv
from reachrl.policies.base import Policy
from reachrl.rollout.noise import gumbel_noise
from reachrl.streams import Stream, generator
from reachrl.types import Episode, Observation, Rollout, Start


class Collector:
    """Keeps `N` environments running across iterations; an episode may span several.

    Args:
        policy: what acts (its current weights).
        envs: the environments.
        seed: of the sampling noise; each episode has its own stream, so an episode depends neither on the
            rows it was batched with nor on the number of environments stepping beside it.
        temperature: of the sampling distribution.
    """

    def __init__(self, policy: Policy, envs: VectorEnv, *, seed: int, temperature: float) -> None:
        self.policy, self.envs, self.seed, self.temperature = policy, envs, seed, temperature
        self._observation: Observation | None = None
        self._starts: list[Start] = []  # of the running episodes
        self._numbers: list[int] = []  # running number of each, the key of its noise
        self._next_starts: list[Start] = []
        self._actions: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]  # taken so far, for replay
        self._begun = 0

    def collect(
        self,
        assign: Callable[[], Start],
        num_steps: int,
        *,
        policy_version: int,
        on_step: Callable[[], None] | None = None,
    ) -> Rollout:
        """Take `num_steps` decisions in each environment.

        Args:
            assign: the curriculum's choice of the next episode.
            num_steps: `T`.
            policy_version: recorded in the rollout.
            on_step: called after each vectorised step (progress display).
        """
        if self._observation is None:
            self._begin(assign)
        assert self._observation is not None
        rows: dict[str, list[Any]] = {name: [] for name in ("images", "instructions", "ids", "logprobs", "steps")}
        finals: list[tuple[np.ndarray, tuple[int, int]]] = []
        episodes: list[Episode] = []
        for t in range(num_steps):
            observation = self._observation
            inputs = self.policy.encode(observation)
            sample = self.policy.act(inputs, temperature=self.temperature, gumbel=self._noise(), with_values=False)
            actions = self.policy.decode_actions(sample.action_ids)
            rows["images"].append(observation.images)
            rows["instructions"].append(observation.instructions)
            rows["ids"].append(sample.action_ids.cpu().numpy())
            rows["logprobs"].append(sample.logprobs.float().cpu().numpy())
            step = self.envs.step(actions, self._next_starts)
            rows["steps"].append(step)
            for n in range(self.envs.num_envs):
                self._actions[n].append(actions[n])
                if step.terminated[n] or step.truncated[n]:
                    finals.append((step.final_images[n], (t, n)))
                    episodes.append(
                        Episode(
                            start=self._starts[n],
                            success=bool(step.success[n]),
                            num_steps=len(self._actions[n]),
                            env=n,
                        )
                    )
                if step.terminated[n] or step.truncated[n] or not step.valid[n]:
                    self._follow(n, assign)
            self._observation = step.observation
            if on_step is not None:
                on_step()
        return self._rollout(rows, finals, episodes, policy_version)

    def state_dict(self) -> dict[str, Any]:
        """The running episodes as start states and the actions since; JSON-ready."""
        return {
            "begun": self._begun,
            "starts": [[s.task, s.index] for s in self._starts],
            "next_starts": [[s.task, s.index] for s in self._next_starts],
            "numbers": self._numbers,
            "actions": [[[float(x) for x in action] for action in taken] for taken in self._actions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replay the running episodes, which brings every simulator back to where it was."""
        self._begun = int(state["begun"])
        self._starts = [Start(task, "train", index) for task, index in state["starts"]]
        self._next_starts = [Start(task, "train", index) for task, index in state["next_starts"]]
        self._numbers = list(state["numbers"])
        dims = self.envs.action_dim
        histories = [np.array(taken, dtype=np.float32).reshape(-1, dims) for taken in state["actions"]]
        self._actions = [list(history) for history in histories]
        self._observation = self.envs.replay(self._starts, histories) if self._starts else None

    def _begin(self, assign: Callable[[], Start]) -> None:
        count = self.envs.num_envs
        self._starts = [assign() for _ in range(count)]
        self._next_starts = [assign() for _ in range(count)]
        self._numbers = list(range(count))
        self._begun = count
        self._observation = self.envs.reset(self._starts, self._next_starts)

    def _follow(self, n: int, assign: Callable[[], Start]) -> None:
        """Environment `n` has begun its next episode; queue the one after."""
        self._starts[n], self._next_starts[n] = self._next_starts[n], assign()
        self._numbers[n] = self._begun
        self._begun += 1
        self._actions[n] = []

    def _noise(self) -> torch.Tensor:
        generators = (
            generator(self.seed, Stream.ROLLOUT_NOISE, number, len(taken))
            for number, taken in zip(self._numbers, self._actions, strict=True)
        )
        return gumbel_noise(self.policy, generators)

    def _rollout(
        self,
        rows: dict[str, list[Any]],
        finals: Sequence[tuple[np.ndarray, tuple[int, int]]],
        episodes: Sequence[Episode],
        policy_version: int,
    ) -> Rollout:
        steps, images = rows["steps"], np.stack(rows["images"])
        assert self._observation is not None
        return Rollout(
            images=images,
            instructions=tuple(rows["instructions"]),
            last_observation=self._observation,
            final_images=np.stack([image for image, _ in finals]) if finals else images[:0, 0],
            final_rows=np.array([row for _, row in finals], dtype=np.int64).reshape(-1, 2),
            action_ids=np.stack(rows["ids"]),
            behaviour_logprobs=np.stack(rows["logprobs"]),
            success=np.stack([step.success for step in steps]),
            terminated=np.stack([step.terminated for step in steps]),
            truncated=np.stack([step.truncated for step in steps]),
            valid=np.stack([step.valid for step in steps]),
            ee_state=np.stack([step.ee_state for step in steps]),
            progress=np.stack([step.progress for step in steps]),
            episodes=tuple(episodes),
            policy_version=policy_version,
        )
