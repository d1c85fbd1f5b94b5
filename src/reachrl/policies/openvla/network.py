"""The modules of a Prismatic policy and the passes through them: towers, projector, Llama, value head."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import LlamaModel

from reachrl.config.policy import PrismaticConfig, recorded_rows
from reachrl.policies.base import Policy
from reachrl.policies.critic import SeparateTrunk, ValueHead
from reachrl.policies.decoding.recordings import Recorder
from reachrl.policies.decoding.rollout_copy import RolloutCopy
from reachrl.policies.llama import build_llama, decoder_layers, last_hidden
from reachrl.policies.lora import adapters
from reachrl.policies.openvla.family import OPENVLA, Family
from reachrl.policies.openvla.initialise import initialise
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.names import TARGETS, VALUE, adapter_sets
from reachrl.policies.openvla.sequence import arrange
from reachrl.policies.openvla.vision import Projector, VisionBackbone

logger = logging.getLogger(__name__)


class PrismaticNetwork(Policy):
    """Two vision towers, projector, language model and value head, trained whole or by adapters."""

    config: PrismaticConfig
    base: Path | None
    """Where the frozen weights under adapters come from; None without adapters."""
    first_choice: int
    """The vocabulary id of the first token that may be chosen."""
    _rollout: RolloutCopy | None
    _recorder: Recorder | None = None  # for planning

    @classmethod
    def family(cls, config: PrismaticConfig) -> Family:
        """What an official checkpoint is read as, given what `config` states of it."""
        return OPENVLA

    def fill_companions(self, folders: Sequence[Path]) -> None:
        """Read what official folders keep beside their weights, from the first that has it."""

    def write_companions(self, folder: Path) -> None:
        """Write beside adapters what they were trained with that is neither theirs nor in the weights of their base."""

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

    def _apply(self, fn: Any, recurse: bool = True) -> "PrismaticNetwork":
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

    def acting_rows(self, rows: int) -> int:
        """Recorded steps are filled up to the next of few sizes."""
        records = self._recorder is not None and getattr(self.config, "records_steps", False)
        return recorded_rows(rows) if records else rows

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
                recorder=self._recorder,
            )
        self._rollout.update()
        return self._rollout

    def _hidden(
        self, model: LlamaModel, embeds: Float[Tensor, "B S E"], valid: Bool[Tensor, "B S"], num_last: int
    ) -> Float[Tensor, "B Q E"]:
        """Normed hidden states of the last positions, by the adapters that are active now."""
        recompute = adapters.recomputing(self) if self.config.gradient_checkpointing else None
        return last_hidden(model, embeds, valid, num_last, recompute=recompute)

    def _features(self, inputs: OpenVLAInputs) -> Float[Tensor, "B P F"]:
        if inputs.vision_features is not None:
            return inputs.vision_features.to(self.projector.fc1.weight.dtype)
        if inputs.pixel_values is None:
            raise ValueError("OpenVLAInputs needs pixel_values or vision_features")
        return self._see(inputs.pixel_values)

    def _head(self) -> Float[Tensor, "V E"]:
        """The rows of the head that may be chosen."""
        return adapters.rows_of(self.language_model.lm_head, self.first_choice, self.num_choices)

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
        embeds, valid = arrange(model, projector(features), inputs)
        return self._hidden(model, embeds, valid, 1)[:, 0]

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

    def trunk_parts(self) -> dict[str, list[nn.Parameter]]:
        """The projector and the output layer, with their adapters."""
        prefixes = {"projector": "projector.", "head": "language_model.lm_head."}
        return {
            part: [parameter for name, parameter in self.named_parameters() if name.startswith(prefix)]
            for part, prefix in prefixes.items()
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
        return self.config.architecture()
