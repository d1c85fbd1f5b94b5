"""Decoding with a vLLM engine: the policy's inputs go out, action tokens and their log-probs come back."""

import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from reachrl.config.policy import NUM_ACTION_BINS, OpenVLAConfig
from reachrl.errors import ConfigError, StorageError, WorkerError
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.vllm_process import FILE_BYTES, EngineProcess
from reachrl.policies.openvla.vllm_weights import PARTS, versions, write_description, write_weights

if TYPE_CHECKING:
    from reachrl.policies.openvla.policy import OpenVLAPolicy

logger = logging.getLogger(__name__)

_BLOCK = 128  # tokens; vLLM's blocks of the cache are at most so long


class VllmDecoder:
    """Decodes for one policy, with weights that are sent whenever they have changed.

    Noise is not added to vLLM's logits: a row's seed is made from its noise. So a sampled row is another sample of the
    same distribution than the own decoder draws, but like that one it repeats, and does not depend on the rows it was
    batched with. The engine starts when it is first needed, and after an error or `close` again. It has no value head.

    Args:
        config: the policy's.

    Raises:
        ConfigError: vLLM cannot decode this policy.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        check(config)
        self._config = config
        self._engine: EngineProcess | None = None
        self._sent: dict[str, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[type["VllmDecoder"], tuple[OpenVLAConfig]]:
        return VllmDecoder, (self._config,)  # a copy of a policy, in whichever process, has an engine of its own

    @property
    def pid(self) -> int | None:
        """The engine's process, if it runs."""
        return self._engine.pid if self._engine is not None and self._engine.close.alive else None

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._sent = None, {}

    def forget(self) -> None:
        """Send all weights again before the next batch: they were changed in a way that leaves no trace."""
        self._sent = {}

    def act(
        self, policy: "OpenVLAPolicy", inputs: OpenVLAInputs, temperature: float, gumbel: Float[Tensor, "B A V"] | None
    ) -> tuple[Int64[Tensor, "B A"], Float[Tensor, "B A"]]:
        """Decode all rows; greedy when `gumbel` is None.

        Returns:
            Vocabulary ids, and their log-probs under the sampling distribution.

        Raises:
            WorkerError: the engine failed, died or took too long.
        """
        rows = prompts(inputs, self._config)
        job = {"prompts": rows, "frames": list(range(len(rows))), "num_tokens": policy.num_action_tokens}
        if gumbel is None:  # vLLM knows no temperature then: all log-probs come, and are divided by it here
            answer = self._decode(policy, inputs, job | {"temperature": 0.0, "seeds": None, "all": temperature != 1})
        else:
            sampled = {"temperature": temperature, "seeds": row_seeds(gumbel), "all": False}
            answer = self._decode(policy, inputs, job | sampled)
        ids = torch.tensor(answer["ids"], device=policy.device)
        logprobs = torch.tensor(answer["logprobs"], dtype=torch.float32, device=policy.device)
        if logprobs.ndim == 3:
            chosen = (ids - policy.first_action_id).unsqueeze(-1)
            logprobs = (logprobs / temperature).log_softmax(-1).gather(-1, chosen).squeeze(-1)
        return ids, logprobs

    def score(
        self, policy: "OpenVLAPolicy", inputs: OpenVLAInputs, action_ids: Int64[Tensor, "B A"], temperature: float
    ) -> Float[Tensor, "B A"]:
        """Log-probs of given tokens under the sampling distribution.

        vLLM cannot be made to choose them, so each is asked for as the first token behind those before it.

        Raises:
            WorkerError: the engine failed, died or took too long.
        """
        given, num_tokens = action_ids.tolist(), action_ids.shape[1]
        behind = [ids + chosen[:k] for ids, chosen in zip(prompts(inputs, self._config), given, strict=True)
                  for k in range(num_tokens)]  # fmt: skip
        job = {"prompts": behind, "frames": [row for row in range(len(given)) for _ in range(num_tokens)]}
        answer = self._decode(policy, inputs, job | {"num_tokens": 1, "temperature": 0.0, "seeds": None, "all": True})
        logprobs = torch.tensor(answer["logprobs"], dtype=torch.float32, device=policy.device)
        logprobs = (logprobs.view(*action_ids.shape, NUM_ACTION_BINS) / temperature).log_softmax(-1)
        return logprobs.gather(-1, (action_ids - policy.first_action_id).unsqueeze(-1)).squeeze(-1)

    def _decode(self, policy: "OpenVLAPolicy", inputs: OpenVLAInputs, job: dict[str, Any]) -> dict[str, Any]:
        frames = frames_of(inputs, self._config)
        allowed = (policy.first_action_id, policy.first_action_id + NUM_ACTION_BINS)
        job |= {"op": "decode", "shape": list(frames.shape), "allowed": allowed}
        answer = self._ready(policy).ask(job, frames.tobytes())
        ids = np.array(answer["ids"])
        if ids.shape != (len(job["prompts"]), job["num_tokens"]) or not (
            (ids >= allowed[0]).all() and (ids < allowed[1]).all()
        ):
            self.close()
            raise WorkerError(
                f"vLLM answered tokens of shape {ids.shape} where {len(job['prompts'])} rows of {job['num_tokens']} "
                f"from {allowed[0]} to {allowed[1] - 1} were asked for; this version of vLLM cannot be used"
            )
        return answer

    def _ready(self, policy: "OpenVLAPolicy") -> EngineProcess:
        """The engine, running and with the policy's current weights."""
        if self.pid is None:
            self.close()
            self._engine = EngineProcess(
                self._config.vllm, policy.device.index if policy.device.type == "cuda" else None
            )
            write_description(self._config, self._engine.folder)
            self._engine.start(self._options(policy))
        engine = self._engine
        assert engine is not None
        now = versions(policy)
        changed = tuple(part for part in PARTS if self._sent.get(part) != now[part])
        if changed:
            self._sent = {}  # what an engine holds that was interrupted is not known
            began = time.monotonic()
            size = self._send(engine, policy, changed)
            self._sent = now
            took = time.monotonic() - began
            logger.info("vLLM has new weights of %s: %.2f GB, %.1f s", ", ".join(changed), size / 1e9, took)
        return engine

    @staticmethod
    def _send(engine: EngineProcess, policy: "OpenVLAPolicy", parts: tuple[str, ...]) -> int:
        engine.tell({"op": "weights"})
        try:
            size = write_weights(
                policy,
                parts,
                engine.weights_folder,
                lambda path: engine.ask({"op": "file", "path": str(path)}),
                FILE_BYTES,
            )
            engine.ask({"op": "done"})
        except (OSError, SafetensorError) as error:
            engine.close()
            raise StorageError(
                f"weights for vLLM could not be written to {engine.weights_folder}: {error}; make room for "
                f"{FILE_BYTES / 2**30:g} GiB there"
            ) from error
        except BaseException:  # it waits for files that do not come
            engine.close()
            raise
        return size

    def _options(self, policy: "OpenVLAPolicy") -> dict[str, Any]:
        """Of `vllm.LLM`."""
        assert self._engine is not None
        config, llm = self._config.vllm, self._config.language_model
        longest = self._config.num_patches + config.max_prompt + policy.num_action_tokens
        row = -(-longest // _BLOCK) * _BLOCK  # whole blocks
        heads = llm.num_kv_heads or llm.num_heads
        numbers = 2 * llm.num_layers * heads * (llm.hidden_size // llm.num_heads) * row
        return {
            "model": str(self._engine.folder),
            "load_format": "dummy",  # weights are sent afterwards
            "dtype": str(policy.compute_dtype).removeprefix("torch."),
            "max_model_len": min(longest, llm.max_positions),
            "max_num_seqs": config.max_batch,
            # The cache is as large as it must be and no larger, beside whatever else is on the device.
            "kv_cache_memory_bytes": (config.max_batch + 1) * numbers * policy.compute_dtype.itemsize,
            "gpu_memory_utilization": 0.01,
            "max_logprobs": NUM_ACTION_BINS,
            "enforce_eager": config.eager,
            # Only BOS comes before the image, and frames do not come twice: there is nothing to be had from caches.
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "limit_mm_per_prompt": {"image": 1},
            "disable_log_stats": True,
        }


def check(config: OpenVLAConfig) -> None:
    """Whether vLLM can decode this policy, also where a configuration was changed after it was validated.

    Raises:
        ConfigError: it cannot.
    """
    try:
        OpenVLAConfig.model_validate(config.model_dump())
    except ValidationError as error:
        raise ConfigError(f"policy: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def row_seeds(gumbel: Float[Tensor, "B A V"]) -> list[int]:
    """A seed for each row, 0..2**63 - 1, from the row's noise alone."""
    rows = gumbel.detach().float().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") >> 1 for row in rows]


def prompts(inputs: OpenVLAInputs, config: OpenVLAConfig) -> list[list[int]]:
    """The rows' tokens without padding; the image comes behind the first.

    Raises:
        ValueError: a row does not begin with BOS, behind which vLLM puts the image, or is too long.
    """
    rows = [ids[mask].tolist() for ids, mask in zip(inputs.prompt_ids.cpu(), inputs.prompt_mask.cpu(), strict=True)]
    if any(row[:1] != [config.language_model.bos_token_id] for row in rows):
        raise ValueError(f"each prompt must begin with BOS ({config.language_model.bos_token_id}) to decode with vLLM")
    if (longest := max(map(len, rows), default=0)) > config.vllm.max_prompt:
        raise ConfigError(
            f"a prompt has {longest} tokens, but policy.vllm.max_prompt={config.vllm.max_prompt}; set it to {longest}"
        )
    return rows


def frames_of(inputs: OpenVLAInputs, config: OpenVLAConfig) -> UInt8[np.ndarray, "B S S 3"]:
    """The frames that `normalise_pixels` made the pixels of: vLLM wants to normalise them itself.

    Raises:
        ValueError: there are no pixels, or they are not those of 8-bit frames.
    """
    if inputs.pixel_values is None:
        raise ValueError(
            'policy.decoder="vllm" looks at frames itself: OpenVLAInputs needs pixel_values, vision_features cannot be '
            "handed over"
        )
    pixels = inputs.pixel_values[:, :3].float()
    mean = torch.tensor(config.image_mean[0], device=pixels.device).view(3, 1, 1)
    std = torch.tensor(config.image_std[0], device=pixels.device).view(3, 1, 1)
    levels = (pixels * std + mean) * 255
    frames = levels.round().clamp(0, 255)
    if (frames - levels).abs().max() > 0.1:
        raise ValueError(
            "pixel_values are not those of 8-bit frames normalised as this policy does, which is all that vLLM takes; "
            "make them with policy.encode"
        )
    return np.ascontiguousarray(frames.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
