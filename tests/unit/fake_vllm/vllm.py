"""Stands for vLLM in the engine's process: the calls that are made of it, logits from a hash, and its traps.

`FAKE_VLLM_RECORD` names a file that it writes a line into for every call; a file `mode` beside it makes it misbehave.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "0.0-fake"
VOCABULARY = 1100


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    min_tokens: int
    max_tokens: int
    ignore_eos: bool
    logprobs: int
    allowed_token_ids: list[int]
    detokenize: bool


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass
class RequestOutput:
    outputs: list[Completion]


def mode() -> str:
    path = Path(os.environ["FAKE_VLLM_RECORD"]).with_name("mode")
    return path.read_text() if path.exists() else ""


def record(**what: Any) -> None:
    with open(os.environ["FAKE_VLLM_RECORD"], "a") as file:
        file.write(json.dumps(what) + "\n")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


class LLM:
    def __init__(self, logprobs_mode: str = "raw_logprobs", **options: Any) -> None:
        if mode() == "slow start":
            time.sleep(60)
        self.processed = logprobs_mode == "processed_logprobs"
        self.weights, self.encoder_cache_is_stale = 0.0, False
        self.llm_engine = self
        with open(f"{options['model']}/config.json") as file:
            record(call="start", options=options, config=json.load(file), pid=os.getpid())

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        shapes = {}
        for name, tensor in kwargs["weights_iterator"]:
            shapes[name] = list(tensor.shape)
            self.weights += float(tensor.double().abs().sum()) * (1 + len(name))
        self.encoder_cache_is_stale = True
        record(call="weights", shapes=shapes)

    def reset_encoder_cache(self) -> None:
        self.encoder_cache_is_stale = False

    def reset_mm_cache(self) -> None:
        pass

    def logits(self, ids: list[int], image: np.ndarray) -> np.ndarray:
        key = json.dumps([ids, hashlib.md5(image.tobytes()).hexdigest(), self.weights]).encode()
        seed = int.from_bytes(hashlib.md5(key).digest()[:8], "little")
        return np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 2

    def generate(self, prompts: list[dict], params: list[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        if mode() == "hang":
            time.sleep(60)
        if mode() == "die":
            print("the fake ran out of memory", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(3)
        if mode() == "fail":
            raise ValueError("the fake refuses")
        if self.encoder_cache_is_stale:
            raise RuntimeError("Encoder cache miss")
        record(call="generate", rows=len(prompts), params=[vars(one) | {"allowed_token_ids": 0} for one in params])
        return [
            RequestOutput([self.complete(prompt["prompt_token_ids"], prompt["multi_modal_data"]["image"], one)])
            for prompt, one in zip(prompts, params, strict=True)
        ]

    def complete(self, ids: list[int], image: np.ndarray, params: SamplingParams) -> Completion:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        allowed, chosen, steps = np.array(params.allowed_token_ids), [], []
        rng = np.random.default_rng(params.seed)
        for _ in range(params.max_tokens):
            logits = self.logits(ids + chosen, image)
            scores = log_softmax(logits[allowed] / (params.temperature or 1.0))
            place = rng.choice(len(allowed), p=np.exp(scores) / np.exp(scores).sum()) if params.temperature else None
            place = scores.argmax() if place is None else place
            if not self.processed:
                scores = log_softmax(logits)[allowed]
            chosen.append(int(allowed[place]) if mode() != "stray" else 3)
            shown = range(len(allowed)) if params.logprobs else [place]
            steps.append({int(allowed[i]): Logprob(float(scores[i])) for i in shown} | {3: Logprob(-1.0)})
        return Completion(chosen, steps)
