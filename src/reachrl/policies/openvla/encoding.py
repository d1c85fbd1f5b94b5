"""From observations to the model-ready rows of OpenVLA."""

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from reachrl.config.policy import PrismaticConfig
from reachrl.errors import CheckpointError
from reachrl.policies.base import Policy
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.preprocess import fit_frames, normalise_pixels
from reachrl.policies.openvla.sequence import pad
from reachrl.policies.openvla.tokenizer import PROMPT, PromptTokenizer, build_tokenizer
from reachrl.policies.storage.saved import SavedPolicy
from reachrl.types import Observation


class PromptAndPixels(Policy):
    """One camera's frames as the towers see them, and the instruction as OpenVLA's question."""

    config: PrismaticConfig
    tokenizer: PromptTokenizer | None
    """None: the folder that the policy came from holds no `tokenizer.json`."""
    first_action_id: int
    """The vocabulary id of the first action token."""

    def _tokenizer(self, saved: SavedPolicy[PrismaticConfig] | None) -> PromptTokenizer | None:
        llm = self.config.language_model
        if self.config.tokenizer == "built_in":
            return PromptTokenizer(build_tokenizer(llm), llm)
        return None if saved is None or saved.tokenizer is None else PromptTokenizer.from_file(saved.tokenizer, llm)

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

    def noise_inputs(self, rng: np.random.Generator, rows: int) -> OpenVLAInputs:
        """Rows of noise in the shape of what is seen, for comparing two policies; no tokenizer is needed."""
        config = self.config
        images = rng.integers(0, 256, (rows, config.image_size, config.image_size, 3), dtype=np.uint8)
        prompts = rng.integers(0, self.first_action_id, (rows, config.prompt_length))
        prompts[:, 0] = config.language_model.bos_token_id
        return OpenVLAInputs(
            prompt_ids=torch.from_numpy(prompts).to(self.device),
            prompt_mask=torch.ones(prompts.shape, dtype=torch.bool, device=self.device),
            pixel_values=normalise_pixels(images, config.image_mean, config.image_std, self.device),
        )

    def example_inputs(self, observation: Observation) -> OpenVLAInputs:
        """Rows of zeros: planning has no tokenizer."""
        rows, config = len(observation), self.config
        ids = torch.zeros(rows, config.prompt_length, dtype=torch.long, device=self.device)
        size = (rows, 3 * len(config.towers), config.image_size, config.image_size)
        return OpenVLAInputs(prompt_ids=ids, prompt_mask=ids == 0, pixel_values=torch.zeros(size, device=self.device))

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
