"""One PPO iteration of any policy by stages, on frames, prompts and rewards of noise: for `gpu_openvla.py`."""

import argparse

import numpy as np
import torch
from torch import Tensor

from reachrl.algorithms.base import Batch
from reachrl.algorithms.minibatches import FIRST_RATIO_TOLERANCE
from reachrl.algorithms.ppo import PPO
from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.config.ppo import PPOConfig
from reachrl.functional.gae import gae
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import normalise_pixels
from reachrl.testing.policies import given_noise

SCORE_ROWS = 256  # rows per no-gradient forward pass, as the learner's default


def make_inputs(policy: OpenVLAPolicy, batch: int, *, cached: bool) -> OpenVLAInputs:
    """Prompts without padding and random pixels, or random vision features in their place."""
    config, device = policy.config, policy.device
    prompt_ids = torch.randint(3, policy.first_action_id, (batch, config.prompt_length), device=device)
    prompt_ids[:, 0] = config.language_model.bos_token_id
    size = (batch, 3 * len(config.towers), config.image_size, config.image_size)
    patches = (batch, config.num_patches, config.vision_width)
    return OpenVLAInputs(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
        pixel_values=None if cached else torch.randn(size, device=device),
        vision_features=torch.randn(patches, device=device, dtype=dtype_of(policy)) if cached else None,
    )


def dtype_of(policy: OpenVLAPolicy) -> torch.dtype:
    return policy.language_model.lm_head.weight.dtype


class Iteration:
    """One PPO iteration by stages: random frames and rewards, everything else as in training."""

    def __init__(self, policy: OpenVLAPolicy, arguments: argparse.Namespace) -> None:
        self.policy = policy
        self.steps, self.envs = arguments.steps, arguments.envs
        self.config = PPOConfig(
            epochs=arguments.epochs,
            minibatch_size=arguments.minibatch,
            micro_batch_size=arguments.micro_batches[0],
            warmup_iterations=0,
        )
        # Adapters are float32 on a trunk that may be rounded to bfloat16: the ratio is measured below instead.
        FIRST_RATIO_TOLERANCE[torch.float32] = FIRST_RATIO_TOLERANCE[dtype_of(self.policy)]
        self.algorithm = PPO(self.config, self.policy, seed=0, temperature=1.0)
        self.rng = np.random.default_rng(0)
        self.prompt = make_inputs(self.policy, 1, cached=True)
        size = self.policy.config.image_size
        self.images = np.zeros((self.steps + 1, self.envs, size, size, 3), np.uint8)
        shape = (self.steps, self.envs, self.policy.num_action_tokens)
        self.ids, self.behaviour = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)

    def pixels(self, images: np.ndarray) -> OpenVLAInputs:
        """Frames and the one prompt as the policy's own `encode` makes them."""
        config, rows = self.policy.config, len(images)
        return OpenVLAInputs(
            prompt_ids=self.prompt.prompt_ids.expand(rows, -1),
            prompt_mask=self.prompt.prompt_mask.expand(rows, -1),
            pixel_values=normalise_pixels(images, config.image_mean, config.image_std, self.policy.device),
        )

    def collect(self) -> None:
        """Frames, noise, actions."""
        for t in range(self.steps):
            self.images[t] = self.rng.integers(0, 256, self.images[t].shape, np.uint8)
            noise = self.rng.gumbel(size=(*self.ids.shape[1:], NUM_ACTION_BINS)).astype(np.float32)
            gumbel = torch.from_numpy(noise).to(self.policy.device)
            sample = self.policy.act(self.pixels(self.images[t]), noise=given_noise(gumbel))
            self.policy.decode_actions(sample.token_ids)
            self.ids[t], self.behaviour[t] = sample.token_ids.cpu(), sample.logprobs.float().cpu()
        self.images[-1] = self.rng.integers(0, 256, self.images[-1].shape, np.uint8)

    @torch.no_grad()
    def score(self) -> None:
        """Old log-probs and values; vision features are kept."""
        count = self.steps * self.envs
        images, ids = self.images.reshape(-1, *self.images.shape[2:]), self.ids.reshape(count, -1)
        logprobs, values, features = [], [], []
        for first in range(0, count, SCORE_ROWS):
            rows = slice(first, min(first + SCORE_ROWS, count))
            inputs = self.cached(self.pixels(images[rows]))
            out = self.policy.evaluate(inputs, ids[rows].to(self.policy.device))
            assert out.values is not None
            logprobs.append(out.logprobs.float().cpu())
            values.append(out.values.float().cpu())
            features.append(inputs.vision_features)
        values.append(self.policy.values(self.cached(self.pixels(self.images[-1]))).float().cpu())
        self.old_logprobs, self.values = torch.cat(logprobs), torch.cat(values).reshape(self.steps + 1, self.envs)
        self.features = torch.cat(features)

    def cached(self, inputs: OpenVLAInputs) -> OpenVLAInputs:
        """Vision features in place of pixels."""
        assert inputs.pixel_values is not None
        features = self.policy.vision_features(inputs.pixel_values)
        return OpenVLAInputs(prompt_ids=inputs.prompt_ids, prompt_mask=inputs.prompt_mask, vision_features=features)

    def rows(self, rows: Tensor) -> OpenVLAInputs:
        """Model-ready rows of the batch."""
        expand = (len(rows), -1)
        return OpenVLAInputs(
            prompt_ids=self.prompt.prompt_ids.expand(expand),
            prompt_mask=self.prompt.prompt_mask.expand(expand),
            vision_features=self.features[rows],
        )

    @torch.no_grad()
    def first_ratio(self) -> float:
        """Largest probability ratio of a micro-batch before anything was trained; rounding alone parts it from 1."""
        rows = torch.arange(min(self.config.micro_batch_size, self.steps * self.envs))
        ids = self.ids.reshape(-1, self.ids.shape[-1])[rows].to(self.policy.device)
        logprobs = self.policy.evaluate(self.rows(rows), ids).logprobs.float().cpu()
        return (logprobs - self.old_logprobs[rows]).sum(-1).exp().max().item()

    def advantages(self) -> None:
        """Advantages and returns of random rewards, and the batch."""
        shape = (self.steps, self.envs)
        advantages, returns = gae(
            self.rng.random(shape, np.float32),
            self.values.numpy(),
            np.zeros(shape, np.float32),
            self.rng.random(shape) < 0.05,
            np.zeros(shape, bool),
            np.ones(shape, bool),
            np.ones(shape, np.int32),
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        self.batch = Batch(
            rows=torch.arange(self.steps * self.envs),
            inputs=self.rows,
            token_ids=self.ids.flatten(0, 1),
            token_mask=torch.ones_like(self.ids.flatten(0, 1), dtype=torch.bool),
            malformed=torch.zeros(self.steps * self.envs, dtype=torch.bool),
            behaviour_logprobs=self.behaviour.flatten(0, 1),
            old_logprobs=self.old_logprobs,
            old_values=self.values[:-1].flatten(),
            advantages=torch.from_numpy(advantages.reshape(-1)),
            returns=torch.from_numpy(returns.reshape(-1)),
        )

    def update(self) -> str:
        """Train the actor and the critic; how it went."""
        stats = self.algorithm.update(self.batch, iteration=0)
        return f"{stats['policy_steps']} steps, KL {stats['kl']:.1e}"
