"""The interface of a policy, as the learner and the collector use it."""

import logging
from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from reachrl.config.evaluation import MEAN
from reachrl.errors import ExtensionError
from reachrl.functional.action_stats import at_limits, means_of
from reachrl.policies.answers import ActionSample, Evaluation, Noise, PolicyInputs
from reachrl.policies.module import PolicyModule
from reachrl.policies.observed import check_shown, check_temperature, one_observation
from reachrl.policies.trained_on import TrainedOn
from reachrl.types import Observation

logger = logging.getLogger(__name__)

MIN_DECISIONS = 30  # fewer say nothing about a mean


class Policy(PolicyModule):
    """An autoregressive vision-language-action policy with a value head.

    `inputs` are the `PolicyInputs` that `encode` or `cache` returned.
    """

    num_action_tokens: int
    """Token slots of an answer, `A`: its maximum length."""
    num_actions: int = 1
    """Actions per answer, `H`."""
    num_choices: int = 256
    """Number of tokens that each action token is chosen from, `V`; the width of the noise of `act`."""
    first_choice: int = 0
    """Vocabulary id of the first of them, if their ids are contiguous; otherwise override `choices`."""
    safe_action: float | np.ndarray = 0.0
    """Action executed in place of a malformed answer: a number for every dimension, or f32[D]. 0 means no motion if
    actions are pose changes; override it for absolute poses."""
    num_cameras: int = 1
    """Number of cameras that `encode` reads: the first ones of an observation."""
    state_size: int | None = None
    """Size of the observation's `state` that `encode` reads; None: it reads none."""
    trained_on: TrainedOn | None = None
    """Instructions, frame sizes and cameras of the training data; None: unknown, no warnings."""
    warned_of: frozenset[Hashable] = frozenset()
    """Keys of the warnings that were logged already."""
    _lately: np.ndarray | None = None  # the last actions of `predict`

    @property
    def action_dim(self) -> int:
        """Dimensions of one action, `D`; override it unless there is one token per dimension."""
        return self.num_action_tokens // self.num_actions

    @property
    def has_mean(self) -> bool:
        """Whether `act` takes `mean=True`: the tokens that are chosen from are bins of a number, in order."""
        return False

    @abstractmethod
    def prompt(self, instruction: str) -> str:
        """Return the text prompt for an instruction."""

    @abstractmethod
    def encode(self, observation: Observation) -> PolicyInputs:
        """Convert observations to model-ready rows on the policy's device."""

    def cache(self, inputs: Any) -> Any:
        """Replace pixels by the output of frozen vision towers.

        The learner calls it once per decision of a rollout and keeps the rows for the update, unless the towers are
        trained. The default returns `inputs` unchanged.
        """
        return inputs

    def example_inputs(self, observation: Observation) -> Any:
        """Return rows of the shape that `encode` returns, for planning on the meta device.

        Override it if `encode` needs anything that `outline` lacks, such as a tokenizer.
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
        mean: bool = False,
    ) -> ActionSample:
        """Decode all rows at once, without gradients.

        A token is `argmax(logits / temperature + noise(position))`: an exact sample of the softmax, greedy if `noise`
        is None. The caller draws the noise lazily from one stream per episode, so that an episode does not depend on
        the other rows of its batch. Without `with_values` the values may be None: rollouts are scored by the learner,
        so a separate critic need not run. With `mean`, which is asked only where `has_mean`, a token is the bin nearest
        to the mean of its distribution given the tokens before it, and `noise` is None.
        """

    @torch.no_grad()
    def predict(
        self,
        *,
        images: np.ndarray | Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray | None = None,
        temperature: float | Literal["mean"] = 0.0,
        samples: int = 1,
        generator: np.random.Generator | None = None,
    ) -> Float[np.ndarray, "H D"]:
        """Choose the next actions for one observation, in a control loop of your own.

        Args:
            images: the camera's frame u8[H W 3], of any size: it is resized as in training. Or a dict of one frame for
                each camera, in the order of `env.cameras`.
            instruction: the task in words.
            state: numbers of the robot f32[S], for a policy that takes them.
            temperature: 0 takes the likeliest tokens; above 0 they are sampled at that temperature; `mean` takes, in
                each dimension, the mean of their distribution.
            samples: above 1: the mean of so many sampled actions, which needs a temperature above 0.
            generator: source of the sampling noise. Give the same one at every step: it moves on with each.

        Returns:
            f32[H D]: `H` actions to execute in order, in the units of the environment.

        Logs a warning, once each, for an instruction, a frame size or a camera order that the policy was not trained
        on, and if the mean of its last 30 actions is at a limit.

        Raises:
            ConfigError: an argument is not what is described here, or the policy has no mean; says what it is.
            CheckpointError: the policy has several sets of action statistics, and none was chosen.
        """
        observation = one_observation(
            images, instruction, state, num_cameras=self.num_cameras, state_size=self.state_size
        )
        check_temperature(temperature, has_mean=self.has_mean, samples=samples)
        self.warn_of_unfamiliar(observation.instructions, observation.images)
        rng = np.random.default_rng() if generator is None else generator

        def noise(position: int) -> Tensor:
            return torch.from_numpy(rng.gumbel(size=(samples, self.num_choices)).astype(np.float32)).to(self.device)

        asked: dict[str, Any] = {}
        if temperature != 0:
            asked = {"mean": True} if temperature == MEAN else {"temperature": temperature, "noise": noise}
        inputs = self.encode(observation).rows(torch.zeros(samples, dtype=torch.int64))
        sample = self.act(inputs, **asked, with_values=False)
        actions = means_of(self.actions(sample)[None], ~sample.malformed.cpu().numpy()[None])[0]
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
        """Compute log-probs of given tokens by the code path of `act`; override it if noise does not choose the token.

        Raises:
            ExtensionError: `act` does not take the token that the noise chooses.
        """
        # Noise larger than every logit forces `act` to choose the given tokens.
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
        """Map vocabulary ids to indices into the `num_choices` tokens."""
        return token_ids - self.first_choice

    def token_actions(self) -> Int64[Tensor, "A"] | None:
        """Return the index of the action that each token slot belongs to; None: tokens encode the chunk as a whole.

        Used with `algorithm.ratio_level=action`: one probability ratio per action.
        """
        return None

    def actions(self, sample: ActionSample) -> Float[np.ndarray, "B H D"]:
        """Decode the actions to execute, in the environment's units; `safe_action` replaces malformed answers."""
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

        Without `with_values`, which algorithms without a critic use, the critic is not computed.
        """

    @abstractmethod
    def values(self, inputs: Any) -> Float[Tensor, "B"]:
        """Compute state values, equal to those of `act` and `evaluate` for the same state."""

    @abstractmethod
    def decode_actions(
        self, token_ids: Int64[Tensor, "B A"], token_mask: Bool[Tensor, "B A"]
    ) -> Float[np.ndarray, "B H D"]:
        """Map tokens to actions f32[B H D] in the environment's units; malformed rows are undefined."""

    def action_limits(self) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]] | None:
        """Return the range of the actions that tokens can encode, equal in constant dimensions; None: unknown."""
        return None

    @abstractmethod
    def encode_actions(self, actions: Float[np.ndarray, "B H D"]) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"]]:
        """Map actions f32[B H D] in the environment's units to the nearest tokens, and their mask."""

    @abstractmethod
    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Set the un-normalisation: f64[D] quantiles of the training actions; unmasked dims pass through."""

    def set_state_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Set the normalisation of the robot's state: f64[S] quantiles of the training states.

        The default does nothing, for a policy that reads no state or does not normalise it.
        """

    def check_shown(self, cameras: Collection[str], state_size: int | None) -> None:
        """Check that a source of observations has the cameras and the state that `encode` reads.

        Args:
            cameras: names of its cameras.
            state_size: numbers of its state; None: it has none.

        Raises:
            ConfigError: what is missing.
        """
        check_shown(type(self).__name__, self.num_cameras, self.state_size, cameras, state_size)

    def note_training(self, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
        """Add instructions, cameras and sizes of frames u8[... H W 3] to `trained_on`."""
        new = TrainedOn.of(instructions, images)
        self.trained_on = new if self.trained_on is None else self.trained_on.joined(new)

    def warn_of_unfamiliar(self, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
        """Log a warning, once each, for an instruction, a frame size or a camera order that was not trained on.

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
        """Log a warning, once, if the mean of successive actions is at a limit in a dimension that varies."""
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
