"""The interface of a policy, as the learner and the collector use it."""

import logging
from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from reachrl.errors import ConfigError, ExtensionError
from reachrl.functional.action_stats import at_limits
from reachrl.policies.answers import ActionSample, Evaluation, Noise, PolicyInputs
from reachrl.policies.module import PolicyModule
from reachrl.policies.observed import check_temperature, one_observation
from reachrl.policies.trained_on import TrainedOn
from reachrl.types import Observation

logger = logging.getLogger(__name__)

MIN_DECISIONS = 30  # fewer say nothing about a mean


class Policy(PolicyModule):
    """An autoregressive vision-language-action policy with a value head.

    `inputs` are the `PolicyInputs` that `encode` or `cache` returned.
    """

    num_action_tokens: int
    """Token slots of an answer, `A`: its length, or the greatest there can be."""
    num_actions: int = 1
    """Actions that one answer stands for, `H`."""
    num_choices: int = 256
    """Tokens that each action token is chosen from: what the noise of `act` must have one number for."""
    first_choice: int = 0
    """Vocabulary id of the first of them, where their ids follow one another; otherwise override `choices`."""
    safe_action: float | np.ndarray = 0.0
    """What is carried out instead of a malformed answer: every number of it, or f32[D]. 0 stands still where actions
    are changes of the pose; a policy whose actions are poses must say what is safe."""
    num_cameras: int = 1
    """Cameras that `encode` looks at: the first ones of an observation."""
    state_size: int | None = None
    """Numbers of the observation's `state` that `encode` reads; None: it reads none."""
    trained_on: TrainedOn | None = None
    """Instructions, frame sizes and cameras of its training data; None: unknown, nothing is warned of."""
    warned_of: frozenset[Hashable] = frozenset()
    """What was warned of already: an instruction, a camera's frame size, the limits of actions."""
    _lately: np.ndarray | None = None  # the last actions of `predict`

    @property
    def action_dim(self) -> int:
        """Numbers of one action, `D`; override it where an action has not one token for each."""
        return self.num_action_tokens // self.num_actions

    @abstractmethod
    def prompt(self, instruction: str) -> str:
        """What the policy is asked in words, for people to read."""

    @abstractmethod
    def encode(self, observation: Observation) -> PolicyInputs:
        """Turn observations into model-ready rows, on the policy's device."""

    def cache(self, inputs: Any) -> Any:
        """Rows in which pixels have given way to what the frozen vision towers make of them.

        The learner calls it once for every decision of a rollout and keeps the rows for the update, unless the towers
        are trained. The default keeps `inputs` as they are, pixels included.
        """
        return inputs

    def example_inputs(self, observation: Observation) -> Any:
        """Rows as large as those of `encode`, whatever is in them, for planning on the meta device.

        Override it where `encode` needs what `outline` does not have, such as a tokenizer.
        """
        return self.encode(observation).to(self.device)

    @abstractmethod
    def act(
        self,
        inputs: Any,
        *,
        temperature: float = 1.0,
        noise: Noise | None = None,
        with_values: bool = True,
    ) -> ActionSample:
        """Decode all rows at once, without gradients.

        A token is `argmax(logits / temperature + noise(position))`: an exact sample of the softmax, greedy when `noise`
        is None. The caller draws the noise, one stream per episode, so that an episode does not depend on which rows it
        was batched with, and only when it is asked for, so that long answers cost nothing in advance. Without
        `with_values` the sample may come without values: a critic with a trunk of its own need not run, and rollouts
        are scored by the learner anyway.
        """

    @torch.no_grad()
    def predict(
        self,
        *,
        images: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        temperature: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> Float[np.ndarray, "H D"]:
        """Choose the action for one moment of a loop of your own.

        Args:
            images: the camera's frame u8[H W 3], of any size: it is resized as in training. Or a dict of one frame for
                each camera, in the order of `env.cameras`.
            instruction: the task in words.
            state: numbers of the robot f32[S], for a policy that takes them.
            temperature: 0 takes the likeliest tokens; above 0 they are sampled at that temperature.
            generator: source of the sampling noise. Give the same one at every step: it moves on with each.

        Returns:
            f32[H D]: `H` actions to carry out in turn (here one), in the units of the environment.

        A warning is logged, once each, of an instruction, a frame size or an order of cameras that the policy was never
        trained on, and where the mean of its last 30 actions lies at a limit.

        Raises:
            ConfigError: an argument is not what is described here; says what it is.
            CheckpointError: the policy has several sets of action statistics, and none was chosen.
        """
        observation = one_observation(
            images, instruction, state, num_cameras=self.num_cameras, state_size=self.state_size
        )
        check_temperature(temperature)
        self.warn_of_unfamiliar(observation.instructions, observation.images)
        rng = np.random.default_rng() if generator is None else generator

        def noise(position: int) -> Tensor:
            return torch.from_numpy(rng.gumbel(size=(1, self.num_choices)).astype(np.float32)).to(self.device)

        asked = {"temperature": temperature, "noise": noise} if temperature > 0 else {}
        inputs = self.encode(observation)
        actions = self.actions(self.act(inputs, **asked, with_values=False))[0]
        lately = actions if self._lately is None else np.concatenate([self._lately, actions])
        self._lately = lately[-MIN_DECISIONS:]
        self.warn_of_limits(lately)
        return actions

    @torch.no_grad()
    def acting_logprobs(
        self,
        inputs: Any,
        token_ids: Int64[Tensor, "B A"],
        token_mask: Bool[Tensor, "B A"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "B A"]:
        """Log-probs of given tokens on the path that `act` takes; override it where noise does not choose the token.

        Raises:
            ExtensionError: `act` does not take the token that the noise chooses.
        """
        # Noise that outweighs every logit makes `act` choose what we want, on the very path of the rollout.
        chosen = self.choices(token_ids).where(token_mask, 0)

        def noise(position: int) -> Tensor:
            weighed = torch.zeros((len(chosen), self.num_choices), device=self.device)
            return weighed.scatter_(-1, chosen[:, position, None], 1e6)

        sample = self.act(inputs, temperature=temperature, noise=noise, with_values=False)
        if not (sample.token_ids.equal(token_ids) and sample.token_mask.equal(token_mask)):
            raise ExtensionError(
                f"{type(self).__name__}.act did not take the tokens that its noise chooses: a token must be "
                "argmax(logits / temperature + noise) over `num_choices` tokens, the first of which has the id "
                "`first_choice`. Fix `act`, override `choices` where ids do not follow one another, or override "
                "`acting_logprobs` where noise does not choose"
            )
        return sample.logprobs

    def choices(self, token_ids: Int64[Tensor, "B A"]) -> Int64[Tensor, "B A"]:
        """Where tokens are among the `num_choices` that the noise of `act` chooses from."""
        return token_ids - self.first_choice

    def token_actions(self) -> Int64[Tensor, "A"] | None:
        """Which of the `H` actions each token slot belongs to; None: every token stands for the chunk as a whole.

        Asked for where one probability ratio covers the tokens of one action of a chunk.
        """
        return None

    def actions(self, sample: ActionSample) -> Float[np.ndarray, "B H D"]:
        """What is carried out, in the environment's units: the decoded actions, `safe_action` for malformed answers."""
        actions = self.decode_actions(sample.token_ids, sample.token_mask)
        malformed = sample.malformed.cpu().numpy()
        if malformed.any():
            actions = np.where(malformed[:, None, None], np.asarray(self.safe_action, np.float32), actions)
        return actions

    @abstractmethod
    def evaluate(
        self,
        inputs: Any,
        token_ids: Int64[Tensor, "B A"],
        token_mask: Bool[Tensor, "B A"],
        *,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> Evaluation:
        """Score given tokens at the slots of the mask, with gradients.

        Without `with_values`, which only algorithms without a critic ask for, no critic is computed.
        """

    @abstractmethod
    def values(self, inputs: Any) -> Float[Tensor, "B"]:
        """State values; the same number that `act` and `evaluate` return for the same state."""

    @abstractmethod
    def decode_actions(
        self, token_ids: Int64[Tensor, "B A"], token_mask: Bool[Tensor, "B A"]
    ) -> Float[np.ndarray, "B H D"]:
        """Map tokens to actions f32[B H D] in the environment's units; malformed rows may become anything."""

    def action_limits(self) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]] | None:
        """The smallest and the largest action that tokens can say, equal where one cannot vary; None: unknown."""
        return None

    @abstractmethod
    def encode_actions(self, actions: Float[np.ndarray, "B H D"]) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"]]:
        """Map actions f32[B H D] in the environment's units to the nearest tokens, and their mask."""

    @abstractmethod
    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the un-normalisation: f64[D] quantiles of the training actions; unmasked dims pass through."""

    def set_state_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the normalisation of the robot's state: f64[S] quantiles of those seen in training.

        Nothing to do for a policy that reads no state, or reads it as it is.
        """

    def check_shown(self, cameras: Collection[str], state_size: int | None) -> None:
        """Refuse a source of observations that has fewer cameras than `encode` looks at, or another state.

        Args:
            cameras: names of its cameras.
            state_size: numbers of its state; None: it has none.

        Raises:
            ConfigError: what is missing.
        """
        name = type(self).__name__
        if len(cameras) < self.num_cameras:
            raise ConfigError(
                f"{name} looks at {self.num_cameras} cameras, and there {'is' if len(cameras) == 1 else 'are'} "
                f"{len(cameras)} ({', '.join(cameras)}): name as many in env.cameras, in the policy's order"
            )
        if self.state_size is not None and self.state_size != state_size:
            there = "no state" if state_size is None else f"a state of {state_size} numbers"
            raise ConfigError(
                f"{name} takes a state of {self.state_size} numbers, and there is {there}: choose an environment (or "
                "demonstrations) that shows what the policy was made for"
            )

    def note_training(self, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
        """Add instructions, cameras and the sizes of frames u8[... H W 3] to what it is known to be trained on."""
        new = TrainedOn.of(instructions, images)
        self.trained_on = new if self.trained_on is None else self.trained_on.joined(new)

    def warn_of_unfamiliar(self, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
        """Log a warning, once each, of an instruction, a frame size or an order of cameras that was not trained on.

        Args:
            instructions: the tasks in words.
            images: frames u8[... H W 3] by camera, in the order in which `encode` looks at them.
        """
        if self.trained_on is not None:
            for about, text in self.trained_on.unfamiliar(
                instructions, images, num_cameras=self.num_cameras, prompt=self.prompt
            ):
                self._warn_once(about, text)

    def warn_of_limits(self, actions: Float[np.ndarray, "N D"]) -> None:
        """Log a warning, once, where the mean of successive actions lies at a limit, in a dimension that varies."""
        limits = self.action_limits()
        if limits is None or len(actions) < MIN_DECISIONS:
            return
        if found := at_limits(actions, *limits):
            self._warn_once(
                "the limits of actions",
                f"over {len(actions)} decisions the mean action lies at its limit in {found}: the policy pushes as far "
                "as it can nearly all the time. Look at the frames, the instruction and the action statistics "
                "(policy.dataset): are they those it was trained with? A policy that has hardly been trained does so "
                "too.",
            )

    def _warn_once(self, about: Hashable, text: str) -> None:
        if about not in self.warned_of:
            self.warned_of |= {about}
            logger.warning("%s", text)
