"""OpenVLA as a policy: two vision towers, projector, Llama, a 256-way action head and a value head."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import ValidationError
from torch import Tensor

from reachrl.config.base import Section
from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.errors import ConfigError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.base import ActionSample, Evaluation, Noise
from reachrl.policies.decoding.decode import Decoded, action_logits, decode
from reachrl.policies.decoding.recordings import Recorder
from reachrl.policies.decoding.rollout_copy import RolloutCopy
from reachrl.policies.llama import PLAIN
from reachrl.policies.lora import files as lora_files
from reachrl.policies.lora import four_bit
from reachrl.policies.openvla import filling, storage
from reachrl.policies.openvla.actions import BinnedActions
from reachrl.policies.openvla.encoding import PromptAndPixels
from reachrl.policies.openvla.family import OPENVLA, Family
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.names import LAYERS, VALUE, adapter_sets
from reachrl.policies.openvla.network import PrismaticNetwork
from reachrl.policies.openvla.sequence import arrange
from reachrl.policies.storage.saved import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    SavedPolicy,
    write_policy,
    write_state,
    write_stats,
)
from reachrl.policies.storage.weights import SINGLE_FILE


class OpenVLAPolicy(PromptAndPixels, BinnedActions, PrismaticNetwork):
    """The OpenVLA architecture in any size.

    The sequence of a row is `[BOS][patches][padding][rest of the prompt][action tokens]`. Whatever padding comes
    in, prompts are brought into this form first, so every row's first action position is at the same index.
    """

    Config: ClassVar[type[Section]] = OpenVLAConfig

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
    def outline(cls, config: PrismaticConfig, *, recorder: Recorder | None = None) -> "OpenVLAPolicy":
        """The policy that `config` describes, without its checkpoint, its adapters and 4-bit maps included.

        What would be compiled computes step by step.

        Raises:
            MissingExtra: a 4-bit base without bitsandbytes.
        """
        critic = "shared" if config.critic == "adapter" else config.critic
        policy = cls(config.model_copy(update={"checkpoint": None, "lora": None, "critic": critic}))
        eager = {"compile_prefill": False} if hasattr(config, "compile_prefill") else {}
        policy.config, policy._recorder = config.model_copy(update=eager), recorder
        if config.four_bit:
            four_bit.outline(policy, LAYERS, getattr(torch, config.dtype), policy.compute_dtype)
        if config.lora is not None:
            policy.add_adapters(Path("outline"))
        return policy

    def cache(self, inputs: OpenVLAInputs) -> OpenVLAInputs:
        """Rows with the vision towers' output instead of pixels."""
        return replace(inputs, pixel_values=None, vision_features=self._features(inputs))

    # --- the policy's four questions ---------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self,
        inputs: OpenVLAInputs,
        *,
        temperature: float = 1.0,
        noise: Noise | None = None,
        with_values: bool = True,
        mean: bool = False,
    ) -> ActionSample:
        """Decode all rows at once, without gradients; greedy when `noise` is None, unless the mean is asked for."""
        features, copy = self._features(inputs), self._copy()
        with self._arithmetic():
            decoded = self._decode(features, inputs, copy, temperature=temperature, noise=noise, mean=mean)
            wanted = with_values or self.config.critic == "shared"  # where they cost nothing
            values = self._value(features, inputs, decoded.first_hidden) if wanted else None
        return ActionSample.full(decoded.token_ids, decoded.logprobs, values)

    def _decode(
        self,
        features: Float[Tensor, "B P F"],
        inputs: OpenVLAInputs,
        copy: RolloutCopy | None,
        **choosing: Any,
    ) -> Decoded:
        """Choose the action tokens by `temperature`, `noise` and `mean`, with the decoding copy if there is one."""
        projector, model = (self.projector, self.language_model.model) if copy is None else (copy.projector, copy.model)
        embeds, valid = arrange(model, projector(features), inputs)
        return decode(
            model,
            self._head(),
            embeds,
            valid,
            first_id=self.first_choice,
            num_tokens=self.num_action_tokens,
            **choosing,
            recordings=None if copy is None else copy.recordings,
            layer_pass=PLAIN if copy is None else copy.layer_pass,
        )

    def _token_hidden(
        self, features: Float[Tensor, "B P F"], inputs: OpenVLAInputs, token_ids: Int64[Tensor, "B A"]
    ) -> Float[Tensor, "B A E"]:
        """Hidden states that the given action tokens are predicted from."""
        model = self.language_model.model
        embeds, valid = arrange(model, self.projector(features), inputs, token_ids[:, :-1])
        return self._hidden(model, embeds, valid, token_ids.shape[1])

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
        with self._arithmetic():
            hidden = self._token_hidden(features, inputs, token_ids)
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

    # --- weights -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and action statistics into `folder`.

        With `config.lora`, the weights are the adapters (a standard peft folder) and the value head. The folder is
        written aside and renamed into place; an earlier one stays until then.

        Raises:
            StorageError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        write_policy(folder, self._write)

    def _write(self, folder: Path) -> None:
        config = self.config
        # What the weights began as, for an export in its layout; reading puts the folder itself in its place.
        update: dict[str, Any] = {"checkpoint": self.origin, "dataset": config.dataset or self.stats_name}
        if config.lora is None:
            write_state(self.state_dict(), folder / SINGLE_FILE)
        else:
            assert self.base is not None
            update["checkpoint"] = self.base
            lora_files.save(self, adapter_sets(config), folder, base=self.base)
            self.write_companions(folder)
            write_state(self.value_head.state_dict(prefix=VALUE), folder / lora_files.VALUE_FILE)
        text = config.model_copy(update=update).model_dump_json(indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_stats(folder, self.action_stats, self.state_stats)
        if self.trained_on is not None:
            self.trained_on.write(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FILE)

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
        saved = storage.read(folder, dataset=options.get("dataset"), family=cls._family_of(options))
        stored = saved.config
        if all(getattr(stored, key) == value for key, value in options.items()):
            return cls(stored, saved)
        try:
            said = {key: getattr(stored, key) for key in stored.model_fields_set}
            return cls(type(stored).model_validate(said | options), saved)
        except ValidationError as error:
            raise ConfigError(f"{folder}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def _family_of(cls, options: Mapping[str, Any]) -> Family:
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
        **given: Any,
    ) -> "OpenVLAPolicy":
        """Read a checkpoint in the official layout; the critic starts untrained.

        Args:
            folder: with the official `config.json` and weights.
            dataset: which of its action statistics to use, when it holds several.
            tower_heads: attention heads of each tower, for towers other than the released ones.
            critic: the critic to add.
            given: options of the section that no file states, for a family that has them.

        Raises:
            CheckpointError: a file is missing or truncated, or its keys are not those of the architecture.
        """
        saved = storage.read(folder, tower_heads=tower_heads, dataset=dataset, family=cls._family_of(given))
        return cls(saved.config.model_copy(update={"dataset": dataset, "critic": critic}), saved)
