"""OpenVLA-OFT as a policy: a chunk of actions, all of its tokens read in one pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import LlamaModel

from reachrl.config.base import Section
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.policy import PrismaticConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.base import Noise
from reachrl.policies.decoding.decode import Decoded, action_logits, choose
from reachrl.policies.decoding.rollout_copy import RolloutCopy
from reachrl.policies.lora import adapters
from reachrl.policies.openvla.family import Family
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import fit_frames, normalise_pixels
from reachrl.policies.openvla_oft.companions import NEW_FILE, PROPRIO, first, read_tensors
from reachrl.policies.openvla_oft.family import EPSILON, OFTFamily
from reachrl.policies.openvla_oft.inputs import OFTInputs
from reachrl.policies.openvla_oft.proprio import ProprioProjector, normalise_state
from reachrl.policies.openvla_oft.sequence import chunk_hidden, embed_chunk, most_padding
from reachrl.policies.openvla_oft.unstated import UNSTATED
from reachrl.policies.storage.saved import SavedPolicy
from reachrl.types import Observation


class OpenVLAOFTPolicy(OpenVLAPolicy):
    """OpenVLA whose sequence ends in placeholders and is attended to in both directions.

    All tokens of a chunk are independent given the observation, so acting and scoring are the same pass. Values are
    read where the first action token is.
    """

    Config: ClassVar[type[Section]] = OpenVLAOFTConfig
    config: OpenVLAOFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _projector_file: str = NEW_FILE

    @classmethod
    def family(cls, config: PrismaticConfig) -> Family:
        """What an official checkpoint is read as, given what `config` states of it."""
        return OFTFamily().of(config)

    @classmethod
    def _family_of(cls, options: Mapping[str, Any]) -> Family:
        return OFTFamily({key: value for key, value in options.items() if key in UNSTATED})

    def _build(self) -> None:
        super()._build()
        self.num_cameras, self.state_size = self.config.num_cameras, self.config.state_size
        size, width = self.config.state_size, self.config.language_model.hidden_size
        self.proprio_projector = None
        if size is not None:
            self.proprio_projector = ProprioProjector(size, width).to(getattr(torch, self.config.dtype))
        if size is not None and self.config.checkpoint is None:
            self.state_stats = ActionStats.identity(size)

    # --- from observations -------------------------------------------------------------------------------------

    def encode(self, observation: Observation) -> OFTInputs:
        """Turn frames of the first cameras, instructions and states into model-ready rows, on the policy's device.

        Raises:
            CheckpointError: the policy came from a folder without `tokenizer.json`.
            ConfigError: there are fewer cameras than the policy looks at, or a state of another size.
        """
        config = self.config
        prompt_ids, prompt_mask = self.encode_prompts(observation.instructions)
        state = observation.state
        self.check_shown(observation.images, None if state is None else state.shape[1])
        cameras = list(observation.images.values())[: config.num_cameras]
        pixels = [
            normalise_pixels(fit_frames(frames, config), config.image_mean, config.image_std, self.device)
            for frames in cameras
        ]
        return OFTInputs(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            pixel_values=torch.cat(pixels, 1),
            state=None if self.state_size is None or state is None else self._encode_state(state),
        )

    def noise_inputs(self, rng: np.random.Generator, rows: int) -> OFTInputs:
        """Rows of noise in the shape of what is seen, for comparing two policies; no tokenizer is needed."""
        cameras = [super(OpenVLAOFTPolicy, self).noise_inputs(rng, rows) for _ in range(self.config.num_cameras)]
        size, first = self.config.state_size, cameras[0]
        state = None if size is None else torch.from_numpy(rng.uniform(-1, 1, (rows, size)).astype(np.float32))
        return OFTInputs(
            prompt_ids=first.prompt_ids,
            prompt_mask=first.prompt_mask,
            pixel_values=torch.cat([each.pixel_values for each in cameras if each.pixel_values is not None], 1),
            state=None if state is None else state.to(self.device),
        )

    def example_inputs(self, observation: Observation) -> OFTInputs:
        """Rows of zeros: planning has no tokenizer and no statistics."""
        given, size = super().example_inputs(observation), self.config.state_size
        assert given.pixel_values is not None
        return OFTInputs(
            prompt_ids=given.prompt_ids,
            prompt_mask=given.prompt_mask,
            pixel_values=given.pixel_values.repeat(1, self.config.num_cameras, 1, 1),
            state=None if size is None else torch.zeros(len(given), size, device=self.device),
        )

    def _encode_state(self, state: np.ndarray) -> Float[Tensor, "B S"]:
        if self.state_stats is None:
            raise CheckpointError(
                f"{self.config.checkpoint} has several sets of statistics, and none was named: name the one for your "
                "robot with policy.dataset=NAME"
            )
        unit = normalise_state(state, self.state_stats)
        return torch.from_numpy(unit.astype(np.float32)).to(self.device)

    def _see(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P F"]:
        """The towers' output for each camera by itself, its patches one camera after the other."""
        channels = 3 * len(self.config.towers)
        return torch.cat([super(OpenVLAOFTPolicy, self)._see(each) for each in pixel_values.split(channels, 1)], 1)

    # --- sequences ---------------------------------------------------------------------------------------------

    def _embed(
        self, projector: nn.Module, model: LlamaModel, features: Float[Tensor, "B P F"], inputs: OFTInputs
    ) -> tuple[Float[Tensor, "B S E"], Bool[Tensor, "B S"]]:
        patches = projector(features)
        if self.proprio_projector is not None:
            if inputs.state is None:
                raise ValueError("OFTInputs needs the state that this policy was trained on")
            token = self.proprio_projector(inputs.state.to(features.dtype))
            if projector is not self.projector:
                token = token.detach()  # the state's projector belongs to the actor, as the towers do
            patches = torch.cat([patches, token[:, None]], 1)
        return embed_chunk(model, patches, inputs, num_tokens=self.num_action_tokens, stop=self.config.stop)

    def _chunk(
        self, projector: nn.Module, model: LlamaModel, features: Float[Tensor, "B P F"], inputs: OFTInputs
    ) -> Float[Tensor, "B A E"]:
        """Hidden states that the tokens are read from, by the adapters that are active now."""
        embeds, valid = self._embed(projector, model, features, inputs)
        recompute = adapters.recomputing(self) if self.config.gradient_checkpointing else None
        return chunk_hidden(model, embeds, valid, recompute=recompute, **self._reading(inputs, valid))

    def _reading(self, inputs: OFTInputs, valid: Bool[Tensor, "B S"]) -> dict[str, Any]:
        """Where the action tokens are read."""
        padding = most_padding(inputs, valid)
        return {"num_tokens": self.num_action_tokens, "stop": self.config.stop, "padding": padding}

    def chunk_hidden(self, inputs: OFTInputs) -> Float[Tensor, "B A E"]:
        """Normed hidden states that the action tokens are read from."""
        with self._arithmetic():
            return self._chunk(self.projector, self.language_model.model, self._features(inputs), inputs)

    def _first_hidden(
        self, projector: nn.Module, model: LlamaModel, features: Float[Tensor, "B P F"], inputs: OFTInputs
    ) -> Float[Tensor, "B E"]:
        return self._chunk(projector, model, features, inputs)[:, 0]

    # --- the policy's questions --------------------------------------------------------------------------------

    def _decode(
        self,
        features: Float[Tensor, "B P F"],
        inputs: OFTInputs,
        copy: RolloutCopy | None,
        *,
        temperature: float,
        noise: Noise | None,
        mean: bool = False,
    ) -> Decoded:
        """Choose all tokens at once, with the decoding copy if there is one."""
        if copy is None:
            hidden = self._chunk(self.projector, self.language_model.model, features, inputs)
        else:
            embeds, valid = self._embed(copy.projector, copy.model, features, inputs)
            reading = self._reading(inputs, valid)
            hidden = chunk_hidden(copy.model, embeds, valid, acting=copy.layer_pass, **reading)
        logits = action_logits(hidden, self._head(), temperature)
        noises = (None if noise is None else noise(position) for position in range(logits.shape[1]))
        choice = torch.cat([choose(*each, mean=mean) for each in zip(logits.unbind(1), noises, strict=True)], 1)
        logprobs = logits.log_softmax(-1).gather(-1, choice[..., None]).squeeze(-1)
        return Decoded(token_ids=choice + self.first_choice, logprobs=logprobs, first_hidden=hidden[:, 0])

    def _token_hidden(
        self, features: Float[Tensor, "B P F"], inputs: OFTInputs, token_ids: Int64[Tensor, "B A"]
    ) -> Float[Tensor, "B A E"]:
        """Hidden states of the chunk, which depend on no token."""
        return self._chunk(self.projector, self.language_model.model, features, inputs)

    def token_actions(self) -> Int64[Tensor, "A"]:
        """Which action of the chunk each token belongs to: the tokens of an action stand together."""
        return torch.arange(self.num_action_tokens) // self.config.num_action_tokens

    # --- statistics --------------------------------------------------------------------------------------------

    def _take_stats(self, saved: SavedPolicy[PrismaticConfig]) -> None:
        super()._take_stats(saved)
        if saved.state_stats is not None:
            self.set_state_stats(saved.state_stats.q01, saved.state_stats.q99, saved.state_stats.mask)

    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the un-normalisation: f64[D] quantiles of the training actions; unmasked dims pass through.

        Raises:
            ConfigError: the vectors do not have one entry per dimension of an action.
        """
        super().set_action_stats(q01, q99, mask)
        self._action_stats = ActionStats.create(q01, q99, mask, epsilon=EPSILON)

    def set_state_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the normalisation of states: f64[S] quantiles of those seen in training.

        Raises:
            ConfigError: the vectors do not have one entry per number of the state.
        """
        stats = ActionStats.create(q01, q99, mask, epsilon=EPSILON)
        if len(stats.q01) != self.config.state_size:
            raise ConfigError(
                f"policy.state_size = {self.config.state_size}, but the statistics of the state have "
                f"{len(stats.q01)} dimensions; set policy.state_size={len(stats.q01)}"
            )
        self.state_stats = stats

    # --- weights -----------------------------------------------------------------------------------------------

    def fill_companions(self, folders: Sequence[Path]) -> None:
        """Read the state's projector, which official folders keep in a pickle, as tensors alone.

        Raises:
            CheckpointError: it is missing or damaged, or does not fit.
        """
        if self.proprio_projector is None:
            return
        own = self.proprio_projector.state_dict()
        path = first(folders, PROPRIO)
        if path is None:
            raise CheckpointError(f"{folders[-1]} has no {PROPRIO}--N_checkpoint.pt, which policy.state_size asks for")
        stored = read_tensors(path, {name: tuple(tensor.shape) for name, tensor in own.items()})
        self.proprio_projector.load_state_dict(stored)
        self._projector_file = path.name

    def write_companions(self, folder: Path) -> None:
        """Write the state's projector beside adapters: it may have come with other adapters, not with their base."""
        if self.proprio_projector is not None:
            state = {key: value.cpu() for key, value in self.proprio_projector.state_dict().items()}
            torch.save(state, folder / self._projector_file)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role; the state's projector is of the trunk, frozen under adapters."""
        groups = super().parameter_groups()
        if self.proprio_projector is not None and self.base is None:
            groups["trunk"] += self.proprio_projector.parameters()
        return groups

    def sharding_units(self) -> list[nn.Module]:
        """Those of OpenVLA, and the state's projector."""
        units = super().sharding_units()
        return units if self.proprio_projector is None else [*units, self.proprio_projector]
