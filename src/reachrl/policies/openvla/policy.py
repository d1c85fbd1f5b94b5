"""OpenVLA as a policy: two vision towers, projector, Llama, a 256-way action head and a value head."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import LlamaModel

from reachrl.config.base import Section
from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.action_tokens import tokens_from_unit, unit_from_tokens
from reachrl.policies.base import ActionSample, Evaluation, Noise, Policy
from reachrl.policies.critic import SeparateTrunk, ValueHead
from reachrl.policies.decoding.decode import action_logits, decode
from reachrl.policies.decoding.rollout_copy import RolloutCopy
from reachrl.policies.folders import PolicyFolders
from reachrl.policies.llama import PLAIN, build_llama, decoder_layers, last_hidden
from reachrl.policies.lora import adapters
from reachrl.policies.openvla import filling, storage
from reachrl.policies.openvla.family import OPENVLA, Family
from reachrl.policies.openvla.folders import OpenVLAFolders
from reachrl.policies.openvla.initialise import initialise
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.names import TARGETS, VALUE, adapter_sets
from reachrl.policies.openvla.preprocess import fit_frames, normalise_pixels
from reachrl.policies.openvla.sequence import embed, pad
from reachrl.policies.openvla.tokenizer import PROMPT, PromptTokenizer, build_tokenizer
from reachrl.policies.openvla.vision import Projector, VisionBackbone
from reachrl.policies.storage.saved import SavedPolicy
from reachrl.types import Observation

logger = logging.getLogger(__name__)


class OpenVLAPolicy(Policy):
    """The OpenVLA architecture in any size.

    The sequence of a row is `[BOS][patches][padding][rest of the prompt][action tokens]`. Whatever padding comes
    in, prompts are brought into this form first, so every row's first action position is at the same index.
    """

    Config: ClassVar[type[Section]] = OpenVLAConfig
    folders: ClassVar[PolicyFolders] = OpenVLAFolders()
    companions: ClassVar[tuple[str, ...]] = ()
    """How names of weights begin that an official folder keeps in files of their own."""

    def __init__(self, config: PrismaticConfig, saved: SavedPolicy[PrismaticConfig] | None = None) -> None:
        """Build the policy; random weights unless `config.checkpoint` names a folder.

        Under `with torch.device(...)` it is made on that device, and stored weights go straight there.

        Args:
            config: sizes, and what to begin from.
            saved: what `config.checkpoint` holds, where it was read already.

        Raises:
            CheckpointError: `config.checkpoint` cannot be read or has another architecture.
        """
        super().__init__()
        if config.checkpoint is not None:
            saved = saved or storage.read_for(config, self.family(config))
            config = storage.agreed(config, saved)
        self.config = config
        llm = config.language_model
        self.num_actions = config.num_actions
        self.num_action_tokens = config.num_actions * config.num_action_tokens
        self.first_action_id = llm.vocab_end - NUM_ACTION_BINS
        self.num_choices = llm.vocab_size if config.all_tokens else NUM_ACTION_BINS
        self.first_choice = 0 if config.all_tokens else self.first_action_id
        self._rollout: RolloutCopy | None = None
        self.base: Path | None = None  # where the frozen weights under the adapters come from
        self.origin = None if saved is None else saved.origin  # the official checkpoint that the weights began as
        self.tokenizer = self._tokenizer(saved)
        # Statistics; or the names to choose from, until one is chosen.
        self._action_stats: ActionStats | tuple[str, ...] = ActionStats.identity(config.num_action_tokens)
        self.state_stats: ActionStats | None = None
        if saved is not None:
            self._take_stats(saved)
            self.trained_on = saved.trained_on
        with nullcontext() if saved is None else torch.device("meta"):
            self._build()
        if saved is not None:
            filling.fill(self, saved, torch.get_default_device())
        self.eval()  # after everything that makes modules, which begin as if they were being trained

    @classmethod
    def family(cls, config: PrismaticConfig) -> Family:
        """What an official checkpoint is read as, given what `config` states of it."""
        return OPENVLA

    def fill_companions(self, folder: Path) -> None:
        """Read what an official folder keeps beside its weights."""

    def _tokenizer(self, saved: SavedPolicy[PrismaticConfig] | None) -> PromptTokenizer | None:
        llm = self.config.language_model
        if self.config.tokenizer == "built_in":
            return PromptTokenizer(build_tokenizer(llm), llm)
        return None if saved is None or saved.tokenizer is None else PromptTokenizer.from_file(saved.tokenizer, llm)

    def _build(self) -> None:
        config, llm = self.config, self.config.language_model
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config.vision_width, llm.hidden_size, config.projector_expansion, len(config.towers))
        self.language_model = build_llama(llm)
        if config.checkpoint is None:
            initialise(self.projector, self.language_model, llm)
        self.value_head = ValueHead(llm.hidden_size, config.value_hidden_size)
        dtype = getattr(torch, config.dtype)
        for module in (self.vision_backbone, self.projector, self.language_model):
            for parameter in module.parameters():  # parameters only: rotary frequencies stay in float32
                parameter.data = parameter.data.to(dtype)
        separate = config.critic == "separate"
        self.critic = SeparateTrunk(self.projector, self.language_model.model) if separate else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic behind the log-probs."""
        return getattr(torch, self.config.arithmetic)

    @property
    def acting_dtype(self) -> torch.dtype:
        """The type of the copy for decoding."""
        return torch.float8_e4m3fn if self.config.rollout_precision == "float8" else self.compute_dtype

    def _apply(self, fn: Any, recurse: bool = True) -> "OpenVLAPolicy":
        """Whatever moves or converts the weights also ends the copy that was made of them for decoding."""
        self._rollout = None
        return super()._apply(fn, recurse)

    def add_adapters(self, base: Path) -> None:
        """Freeze what was loaded from `base` and train adapters beside it, as `config.lora` says."""
        assert self.config.lora is not None
        self.base, self._rollout = base, None
        adapters.check_parts(self, self.config.lora, TARGETS)
        sets = adapter_sets(self.config)
        adapters.add_adapters(self, sets, trained=(VALUE,), four_bit=self.config.four_bit)
        if adapters.CRITIC in sets:
            adapters.copy_set(self, adapters.ACTOR, adapters.CRITIC)  # it begins as the actor

    # --- from observations -------------------------------------------------------------------------------------

    def prompt(self, instruction: str) -> str:
        """What the policy is asked in words, for people to read."""
        return PROMPT.format(instruction=instruction.lower())

    def encode(self, observation: Observation) -> OpenVLAInputs:
        """Turn the first camera's frames and instructions into prompt tokens and pixels, on the policy's device.

        Raises:
            CheckpointError: the policy came from a folder without `tokenizer.json`.
        """
        config = self.config
        prompt_ids, prompt_mask = self.encode_prompts(observation.instructions)
        images = fit_frames(observation.frames, config)
        pixels = normalise_pixels(images, config.image_mean, config.image_std, self.device)
        return OpenVLAInputs(prompt_ids=prompt_ids, prompt_mask=prompt_mask, pixel_values=pixels)

    def encode_prompts(self, instructions: tuple[str, ...]) -> tuple[Int64[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Prompt tokens alone, padded on the right: what rows with cached vision features need.

        Raises:
            CheckpointError: the policy has no tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                "this policy has no tokenizer: the folder it was loaded from holds no tokenizer.json. "
                "Put the model's tokenizer.json beside its weights, or pass prompt ids yourself"
            )
        rows = [self.tokenizer.prompt_ids(instruction) for instruction in instructions]
        ids, mask = pad(rows, self.config.prompt_length, self.config.language_model.pad_token_id)
        return ids.to(self.device), mask.to(self.device)

    def cache(self, inputs: OpenVLAInputs) -> OpenVLAInputs:
        """Rows with the vision towers' output instead of pixels."""
        return replace(inputs, pixel_values=None, vision_features=self._features(inputs))

    def vision_features(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P F"]:
        """The vision towers' output: what may be cached while the towers are frozen."""
        return self._see(pixel_values)

    def _see(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P F"]:
        with self._arithmetic():
            return self.vision_backbone(pixel_values.to(self.projector.fc1.weight.dtype))

    def _arithmetic(self) -> AbstractContextManager:
        """Mixed precision where `compute_dtype` asks for another type than the weights have."""
        if self.config.arithmetic == self.config.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _copy(self) -> RolloutCopy | None:
        """The copy to decode with, up to date; None: what is trained decodes."""
        if not self.config.rollout_copy:
            return None
        if self._rollout is None:
            self._rollout = RolloutCopy(
                self.projector,
                self.language_model.model,
                float8=self.config.rollout_precision == "float8",
                records_steps=self.config.records_steps,
                compiles_prefill=self.config.compile_prefill,
            )
        self._rollout.update()
        return self._rollout

    def _hidden(
        self, model: LlamaModel, embeds: Float[Tensor, "B S E"], valid: Bool[Tensor, "B S"], num_last: int
    ) -> Float[Tensor, "B Q E"]:
        """Normed hidden states of the last positions, by the adapters that are active now."""
        recompute = adapters.recomputing(self) if self.config.gradient_checkpointing else None
        return last_hidden(model, embeds, valid, num_last, recompute=recompute)

    # --- sequences ---------------------------------------------------------------------------------------------

    def _features(self, inputs: OpenVLAInputs) -> Float[Tensor, "B P F"]:
        if inputs.vision_features is not None:
            return inputs.vision_features.to(self.projector.fc1.weight.dtype)
        if inputs.pixel_values is None:
            raise ValueError("OpenVLAInputs needs pixel_values or vision_features")
        return self._see(inputs.pixel_values)

    def _head(self) -> Float[Tensor, "V E"]:
        """The rows of the head that may be chosen."""
        return self.language_model.lm_head.weight[self.first_choice : self.first_choice + self.num_choices]

    def _value(
        self, features: Float[Tensor, "B P F"], inputs: OpenVLAInputs, first_hidden: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B"]:
        """The value at the first action position, from the actor's hidden state or the critic's own trunk."""
        model, projector = self.language_model.model, self.projector
        if self.config.critic != "shared":
            if self.critic is not None:
                model, projector = self.critic.model, self.critic.projector
            with adapters.active(self, adapters.CRITIC):
                # detached: the towers belong to the actor
                return self.value_head(self._first_hidden(projector, model, features.detach(), inputs))
        if first_hidden is None:
            first_hidden = self._first_hidden(projector, model, features, inputs)
        return self.value_head(first_hidden if self.config.value_gradient_to_trunk else first_hidden.detach())

    def _first_hidden(
        self, projector: nn.Module, model: LlamaModel, features: Float[Tensor, "B P F"], inputs: OpenVLAInputs
    ) -> Float[Tensor, "B E"]:
        """What the first action token and the value are read from."""
        embeds, valid = embed(projector, model, features, inputs)
        return self._hidden(model, embeds, valid, 1)[:, 0]

    # --- the policy's four questions ---------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        inputs: OpenVLAInputs,
        *,
        temperature: float = 1.0,
        noise: Noise | None = None,
        with_values: bool = True,
    ) -> ActionSample:
        """Decode all rows at once, without gradients; greedy when `noise` is None."""
        features = self._features(inputs)
        copy = self._copy()
        projector, model = (self.projector, self.language_model.model) if copy is None else (copy.projector, copy.model)
        with self._arithmetic():
            embeds, valid = embed(projector, model, features, inputs)
            decoded = decode(
                model,
                self._head(),
                embeds,
                valid,
                first_id=self.first_choice,
                num_tokens=self.num_action_tokens,
                temperature=temperature,
                noise=noise,
                recordings=None if copy is None else copy.recordings,
                layer_pass=PLAIN if copy is None else copy.layer_pass,
            )
            wanted = with_values or self.config.critic == "shared"  # where they cost nothing
            values = self._value(features, inputs, decoded.first_hidden) if wanted else None
        return ActionSample.full(decoded.token_ids, decoded.logprobs, values)

    def action_logits(
        self,
        inputs: OpenVLAInputs,
        token_ids: Int64[Tensor, "B A"],
        *,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> tuple[Float[Tensor, "B A V"], Float[Tensor, "B"] | None]:
        """Teacher-forced logits of the tokens that may be chosen at each action position, and the values if wanted."""
        features = self._features(inputs)
        model = self.language_model.model
        with self._arithmetic():
            embeds, valid = embed(self.projector, model, features, inputs, token_ids[:, :-1])
            hidden = self._hidden(model, embeds, valid, token_ids.shape[1])
            logits = action_logits(hidden, self._head(), temperature)
            return logits, self._value(features, inputs, hidden[:, 0]) if with_values else None

    def evaluate(
        self,
        inputs: OpenVLAInputs,
        token_ids: Int64[Tensor, "B A"],
        token_mask: Bool[Tensor, "B A"] | None = None,
        *,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> Evaluation:
        """Score given actions over the action positions only, with gradients; an answer fills all of its slots."""
        logits, values = self.action_logits(inputs, token_ids, temperature=temperature, with_values=with_values)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, (token_ids - self.first_choice).unsqueeze(-1)).squeeze(-1)
        return Evaluation(logprobs=chosen, entropy=-(logprobs.exp() * logprobs).sum(-1), values=values)

    def values(self, inputs: OpenVLAInputs) -> Float[Tensor, "B"]:
        """State values; the same number that `act` and `evaluate` return for the same state."""
        with self._arithmetic():
            return self._value(self._features(inputs), inputs, None)

    # --- actions -----------------------------------------------------------------------------------------------

    @property
    def action_stats(self) -> ActionStats:
        """What maps actions to the environment's units.

        Raises:
            CheckpointError: the checkpoint holds several, and none was named or set.
        """
        if isinstance(self._action_stats, tuple):
            raise CheckpointError(
                f"{self.config.checkpoint} has {len(self._action_stats)} sets of action statistics "
                f"({list(self._action_stats)}), and the wrong one would move the robot by wrong amounts: name the one "
                "for your robot with policy.dataset=NAME (--dataset NAME of `reachrl model verify`)"
            )
        return self._action_stats

    def _take_stats(self, saved: SavedPolicy[PrismaticConfig]) -> None:
        stats = saved.stats
        if isinstance(stats, ActionStats):
            self.set_action_stats(stats.q01, stats.q99, stats.mask)
        elif stats:
            self._action_stats = stats

    def decode_actions(
        self, token_ids: Int64[Tensor, "B A"], token_mask: Bool[Tensor, "B A"] | None = None
    ) -> Float[np.ndarray, "B H D"]:
        """Map action tokens to actions f32[B H D] in the environment's units."""
        return self.action_stats.unnormalise(self.unit_actions(token_ids)).astype(np.float32)

    def action_limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The ends of the statistics' range; of a dimension that passes through nothing is known."""
        if isinstance(self._action_stats, tuple):
            return None
        stats = self.action_stats
        ones = np.ones(len(stats.q01))
        low, high = stats.unnormalise(-ones), stats.unnormalise(ones)
        return low, np.where(stats.mask & (stats.q01 < stats.q99), high, low)

    def unit_actions(self, token_ids: Int64[Tensor, "B A"]) -> Float[np.ndarray, "B H D"]:
        """Map action tokens, action by action, to normalised actions f64[B H D] in (-1, 1)."""
        unit = unit_from_tokens(token_ids.cpu().numpy(), self.config.language_model.vocab_end)
        return unit.reshape(len(unit), self.num_actions, self.config.num_action_tokens)

    def encode_actions(self, actions: Float[np.ndarray, "B H D"]) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"]]:
        """Map actions f32[B H D] in the environment's units to the nearest action tokens, which fill every slot."""
        unit = self.action_stats.normalise(np.asarray(actions, np.float64))
        tokens = tokens_from_unit(unit, self.config.language_model.vocab_end).reshape(len(unit), -1)
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the un-normalisation: f64[D] quantiles of the training actions; unmasked dims pass through.

        Raises:
            ConfigError: the vectors do not have one entry per action token.
        """
        stats = ActionStats.create(q01, q99, mask)
        if len(stats.q01) != self.config.num_action_tokens:
            raise ConfigError(
                f"policy.num_action_tokens = {self.config.num_action_tokens}, but actions have {len(stats.q01)} "
                f"dimensions; expected one token each. Set policy.num_action_tokens={len(stats.q01)}"
            )
        self._action_stats = stats

    # --- weights -----------------------------------------------------------------------------------------------

    def reset_critic(self) -> None:
        """Begin a critic with a trunk of its own anew: its trunk from the actor's weights, its head untrained."""
        if self.config.critic == "shared":
            return
        if self.critic is not None:
            self.critic.copy_from(self.projector, self.language_model.model)
        if self.base is not None:
            adapters.copy_set(self, adapters.ACTOR, adapters.CRITIC)
        if self.value_head.trained:
            logger.warning(
                "the critic begins anew, trunk and head: the warm start has trained the actor that it is a copy of "
                "(sft.epochs=0 keeps policy and critic as they are)"
            )
            self.value_head.reset()

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and action statistics into `folder`.

        With `config.lora`, the weights are the adapters (a standard peft folder) and the value head.
        """
        storage.save(self, folder)

    def restore(self, folder: Path) -> None:
        """Read back what `save_pretrained` wrote, without building a second policy.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
        """
        saved = storage.read(folder, family=self.family(self.config))
        filling.refill(self, saved)
        self._take_stats(saved)
        self.trained_on = saved.trained_on
        if self.tokenizer is None:
            self.tokenizer = self._tokenizer(saved)

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> "OpenVLAPolicy":
        """Read what `save_pretrained` wrote.

        Args:
            folder: the saved policy.
            options: of the section, instead of the stored ones: how it computes, not which policy it is.

        Raises:
            CheckpointError: a file is missing, truncated or of another architecture.
            ConfigError: the options do not go with the stored ones.
        """
        saved = storage.read(folder, dataset=options.get("dataset"), family=cls._told(options))
        stored = saved.config
        if all(getattr(stored, key) == value for key, value in options.items()):
            return cls(stored, saved)
        try:
            said = {key: getattr(stored, key) for key in stored.model_fields_set}
            return cls(type(stored).model_validate(said | options), saved)
        except ValidationError as error:
            raise ConfigError(f"{folder}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def _told(cls, options: Mapping[str, Any]) -> Family:
        """What a folder is read as, given options of the section."""
        return OPENVLA

    @classmethod
    def load_official(
        cls,
        folder: Path,
        *,
        dataset: str | None = None,
        tower_heads: Sequence[int] | None = None,
        critic: Literal["shared", "separate"] = "shared",
        **told: Any,
    ) -> "OpenVLAPolicy":
        """Read a checkpoint in the official layout; the critic starts untrained.

        Args:
            folder: with the official `config.json` and weights.
            dataset: which of its action statistics to use, when it holds several.
            tower_heads: attention heads of each tower, for towers other than the released ones.
            critic: the critic to add.
            told: options of the section that no file states, for a family that has them.

        Raises:
            CheckpointError: a file is missing or truncated, or its keys are not those of the architecture.
        """
        saved = storage.read(folder, tower_heads=tower_heads, dataset=dataset, family=cls._told(told))
        return cls(saved.config.model_copy(update={"dataset": dataset, "critic": critic}), saved)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role: `vision`, `trunk` (projector, language model), `value`."""
        value = list(self.value_head.parameters())
        if self.base is not None:
            trunk = ("projector.", "language_model.")
            return {
                "vision": adapters.parameters(self, adapters.ACTOR, ("vision_backbone.",)),
                "trunk": adapters.parameters(self, adapters.ACTOR, trunk),
                "value": [*value, *adapters.parameters(self, adapters.CRITIC, trunk)],
            }
        return {
            "vision": list(self.vision_backbone.parameters()),
            "trunk": [*self.projector.parameters(), *self.language_model.parameters()],
            "value": value if self.critic is None else [*value, *self.critic.parameters()],
        }

    def sharding_units(self) -> list[nn.Module]:
        """The towers, projectors, value head, and every decoder layer but the last, whose parts are used singly."""
        trunks: list[tuple[nn.Module, LlamaModel]] = [(self.projector, self.language_model.model)]
        if self.critic is not None:
            trunks.append((self.critic.projector, self.critic.model))
        units: list[nn.Module] = [self.vision_backbone, self.value_head]
        for projector, model in trunks:
            units += [projector, *decoder_layers(model)[:-1]]
        return units

    def architecture(self) -> dict[str, Any]:
        """What must be equal for weights to fit; stored in checkpoints and compared on load."""
        return storage.architecture_of(self.config)
