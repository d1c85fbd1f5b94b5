"""The interface of a policy, as the learner and the collector use it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from reachrl.config.base import Section
from reachrl.errors import CheckpointError, ConfigError, ExtensionError
from reachrl.policies.answers import ActionSample, Evaluation, Noise, PolicyInputs
from reachrl.policies.folders import PolicyFolders
from reachrl.policies.observed import check_temperature, one_observation
from reachrl.policies.trained_on import MIN_DECISIONS, TrainedOn, warn_of_limits, warn_of_unfamiliar
from reachrl.types import Observation


class Policy(nn.Module, ABC):
    """An autoregressive vision-language-action policy with a value head.

    `inputs` are the `PolicyInputs` that `encode` or `cache` returned.
    """

    Config: ClassVar[type[Section]]
    folders: ClassVar[PolicyFolders] = PolicyFolders()
    """What recognises, describes, verifies and exports saved policies of this kind."""
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
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    @property
    def action_dim(self) -> int:
        """Numbers of one action, `D`; override it where an action has not one token for each."""
        return self.num_action_tokens // self.num_actions

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic behind the log-probs: how closely two passes over the same rows can agree."""
        return next(self.parameters()).dtype

    @property
    def acting_dtype(self) -> torch.dtype:
        """The type of the arithmetic behind the log-probs of `act`, if that is coarser."""
        return self.compute_dtype

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
        warn_of_unfamiliar(self, observation.instructions, observation.images)
        rng = np.random.default_rng() if generator is None else generator

        def noise(position: int) -> Tensor:
            return torch.from_numpy(rng.gumbel(size=(1, self.num_choices)).astype(np.float32)).to(self.device)

        asked = {"temperature": temperature, "noise": noise} if temperature > 0 else {}
        inputs = self.encode(observation)
        actions = self.actions(self.act(inputs, **asked, with_values=False))[0]
        lately = actions if self._lately is None else np.concatenate([self._lately, actions])
        self._lately = lately[-MIN_DECISIONS:]
        warn_of_limits(self, lately)
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

    @abstractmethod
    def reset_critic(self) -> None:
        """Begin a critic with a trunk of its own anew, after a warm start that trained the actor.

        Its trunk gets the actor's current weights, its head has learned nothing. Nothing to do for a shared critic.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and action statistics into `folder`."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: Path) -> "Policy":
        """Read what `save_pretrained` wrote.

        Where the section marks keys as `Affects.TRAINING | Affects.FUTURE`, these come as keyword arguments, to be
        taken instead of the stored ones: a run may go on with others.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """

    def restore(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote back into this policy; override to do it without building a second one.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """
        saved = type(self).from_pretrained(folder)
        if saved.architecture() != self.architecture():
            raise CheckpointError(f"{folder}: the checkpoint's architecture is not the configuration's")
        self.load_state_dict(saved.state_dict())

    @classmethod
    def outline(cls, config: Any, *, recorder: Callable[[Any], Any] | None = None) -> "Policy":
        """Build the policy that `config` describes on the meta device: shapes without numbers, for planning.

        Called under `torch.device("meta")`. Override it where the constructor reads a checkpoint, which need not exist.
        What the plan then runs there (`act`, `cache`, `evaluate`, `values`) must not read numbers, as `item()` and
        `if mask.any()` do; ask for the device first, as for an accelerator, which would have to wait.

        Args:
            config: the policy's section.
            recorder: stands for what records work on an accelerator, for policies whose acting replays recordings; it
                takes work and returns what repeats it. None: as on a CPU.
        """
        return cls(config)

    def example_inputs(self, observation: Observation) -> Any:
        """Rows as large as those of `encode`, whatever is in them, for planning on the meta device.

        Override it where `encode` needs what `outline` does not have, such as a tokenizer.
        """
        return self.encode(observation).to(self.device)

    def acting_rows(self, rows: int) -> int:
        """Rows for which acting holds memory when it is asked for `rows`: more where recordings have fixed sizes."""
        return rows

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role: `vision`, `trunk` (projector, language model), `value`.

        What is frozen for good (the weights under adapters) is in none of them.
        """

    def trunk_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parts of the trunk that may have a learning rate of their own: `projector` and `head` (the output layer)."""
        return {}

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What must be equal for weights to fit; stored in checkpoints and compared on load."""

    def sharding_units(self) -> list[nn.Module]:
        """Modules that are computed by calling them, none inside another: what sharded learners gather one at a time.

        What is in none of them is gathered for each pass as one piece.
        """
        return []

    def note_training(self, instructions: Iterable[str], images: Mapping[str, np.ndarray]) -> None:
        """Add instructions, cameras and the sizes of frames u8[... H W 3] to what it is known to be trained on."""
        new = TrainedOn.of(instructions, images)
        self.trained_on = new if self.trained_on is None else self.trained_on.joined(new)

    def freeze(self, roles: Sequence[str]) -> None:
        """Stop gradients into the parameter groups named in `roles`."""
        for role in roles:
            for parameter in self.parameter_groups()[role]:
                parameter.requires_grad_(False)


def check_shown(policy: Policy, cameras: Collection[str], state_size: int | None) -> None:
    """Refuse to show a policy less than it looks at.

    Args:
        policy: which says `num_cameras` and `state_size`.
        cameras: that there are, by name.
        state_size: numbers of the state that there are; None: there is no state.

    Raises:
        ConfigError: what is missing.
    """
    name = type(policy).__name__
    if len(cameras) < policy.num_cameras:
        raise ConfigError(
            f"{name} looks at {policy.num_cameras} cameras, and there {'is' if len(cameras) == 1 else 'are'} "
            f"{len(cameras)} ({', '.join(cameras)}): name as many in env.cameras, in the policy's order"
        )
    if policy.state_size is not None and policy.state_size != state_size:
        there = "no state" if state_size is None else f"a state of {state_size} numbers"
        raise ConfigError(
            f"{name} takes a state of {policy.state_size} numbers, and there is {there}: choose an environment (or "
            "demonstrations) that shows what the policy was made for"
        )
