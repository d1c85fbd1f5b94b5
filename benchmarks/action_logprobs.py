"""Teacher-forced log-probabilities of 256 action tokens against full-vocabulary logits: time and peak memory.

    python benchmarks/action_logprobs.py > docs/benchmarks/action_logprobs.md

Forward and backward through a small Llama with OpenVLA's vocabulary (32064) and sequence (256 patches, 7 actions).
`restricted` is the policy's own `evaluate`; `full` computes logits over the whole vocabulary at every position, as
`LlamaForCausalLM.forward` does, and then picks the action positions. Each runs in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy

_TOWER = ViTTowerConfig(width=64, depth=2, num_heads=2, mlp_width=64)
_CONFIG = OpenVLAConfig(
    image_size=224,
    towers=(_TOWER, _TOWER),
    language_model=LanguageModelConfig(
        vocab_size=32064, hidden_size=256, intermediate_size=688, num_layers=4, num_heads=4, pad_token_id=32000
    ),
    tokenizer="folder",
    num_action_tokens=7,
)
_FIRST = _CONFIG.language_model.vocab_end - NUM_ACTION_BINS


def build(batch: int) -> tuple[OpenVLAPolicy, OpenVLAInputs, torch.Tensor]:
    """A random policy, cached vision features, prompts of 20 tokens and actions to score."""
    torch.manual_seed(0)
    policy = OpenVLAPolicy(_CONFIG)
    inputs = OpenVLAInputs(
        prompt_ids=torch.randint(3, 1000, (batch, 20)),
        prompt_mask=torch.ones(batch, 20, dtype=torch.bool),
        vision_features=torch.randn(batch, _CONFIG.num_patches, _CONFIG.vision_width),
    )
    return policy, inputs, torch.randint(_FIRST, _FIRST + NUM_ACTION_BINS, (batch, 7))


def restricted(policy: OpenVLAPolicy, inputs: OpenVLAInputs, token_ids: torch.Tensor) -> torch.Tensor:
    return policy.evaluate(inputs, token_ids).logprobs


def full(policy: OpenVLAPolicy, inputs: OpenVLAInputs, token_ids: torch.Tensor) -> torch.Tensor:
    llama = policy.language_model
    assert inputs.vision_features is not None
    text = llama.model.embed_tokens(torch.cat([inputs.prompt_ids, token_ids[:, :-1]], 1))
    embeds = torch.cat([text[:, :1], policy.projector(inputs.vision_features), text[:, 1:]], 1)
    logits = llama(inputs_embeds=embeds, use_cache=False).logits
    logprobs = F.log_softmax(logits.float(), -1)[:, -token_ids.shape[1] :]
    return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(variant: str, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward, and peak memory beyond the model and its gradients."""
    policy, inputs, token_ids = build(batch)
    score = {"restricted": restricted, "full": full}[variant]
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, seconds = resident("VmRSS"), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        score(policy, inputs, token_ids).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": resident("VmHWM") - before}


@torch.no_grad()
def check() -> None:
    """The two must agree once the full distribution is renormalised over the action tokens."""
    policy, inputs, token_ids = build(2)
    text = policy.language_model.model.embed_tokens(torch.cat([inputs.prompt_ids, token_ids[:, :-1]], 1))
    assert inputs.vision_features is not None
    embeds = torch.cat([text[:, :1], policy.projector(inputs.vision_features), text[:, 1:]], 1)
    logits = policy.language_model(inputs_embeds=embeds, use_cache=False).logits[:, -7:, _FIRST : _FIRST + 256]
    expected = logits.log_softmax(-1).gather(-1, (token_ids - _FIRST).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(restricted(policy, inputs, token_ids), expected, rtol=0, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", choices=["restricted", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.batches[0], arguments.rounds)))
        return
    check()
    print("# Restricted against full-vocabulary log-probabilities\n")
    print(f"`python benchmarks/action_logprobs.py {' '.join(sys.argv[1:])}`: {arguments.threads} threads, ", end="")
    print(f"forward and backward, median of {arguments.rounds} rounds; memory beyond weights and gradients.\n")
    print("| Batch | Head | Time (ms) | Peak memory (MB) |\n|---|---|---|---|")
    options = ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    for batch in arguments.batches:
        results = {}
        for variant in ("restricted", "full"):
            command = [sys.executable, __file__, "--variant", variant, "--batches", str(batch), *options]
            results[variant] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            row = results[variant]
            print(f"| {batch} | {variant} | {row['seconds'] * 1e3:.0f} | {row['peak_bytes'] / 1e6:.0f} |", flush=True)
        time_ratio, memory_ratio = (results["full"][k] / results["restricted"][k] for k in ("seconds", "peak_bytes"))
        print(f"| {batch} | full / restricted | {time_ratio:.2f}x | {memory_ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
