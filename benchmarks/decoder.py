"""Our static-cache decoder against `LlamaForCausalLM.generate`: same prompts, same tokens, which is faster?

    python benchmarks/decoder.py > docs/benchmarks/decoder.md

All decode greedily over the 256 action tokens from the same embedded prompts, in alternation in one process; the
tokens must be equal. `generate` returns tokens only, ours log-probabilities and the value's hidden state as well. It
runs in its variants, each with PyTorch's fused attention, and the fastest of them is compared with: a cache that grows,
a static one, and with `--compile` its forward pass compiled for the static one (needs a C++ compiler).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.policies.decoding.decode import decode
from reachrl.policies.llama import build_llama

# language model, prompt positions (BOS, patches, text), action tokens
SIZES: dict[str, tuple[LanguageModelConfig, int, int]] = {
    "tiny": (LanguageModelConfig(), 1 + 36 + 11, 4),
    "openvla-shaped": (
        LanguageModelConfig(
            vocab_size=32064, hidden_size=256, intermediate_size=688, num_layers=6, num_heads=4, pad_token_id=32000
        ),
        1 + 256 + 32,
        7,
    ),
    "wide": (
        LanguageModelConfig(
            vocab_size=32064, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, pad_token_id=32000
        ),
        1 + 256 + 32,
        7,
    ),
}
VARIANTS: dict[str, dict[str, str]] = {"growing cache": {}, "static cache": {"cache_implementation": "static"}}


class OnlyActions(LogitsProcessor):
    """Forbids every token but the 256 action tokens."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        masked = torch.full_like(scores, -torch.inf)
        rows = slice(self.first, self.first + NUM_ACTION_BINS)
        masked[:, rows] = scores[:, rows]
        return masked  # pyright: ignore[reportReturnType]


@torch.no_grad()
def build(config: LanguageModelConfig, batch: int, length: int) -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]:
    """A random model whose logits differ clearly, and left-padded prompts: every third row is 4 tokens shorter."""
    torch.manual_seed(0)
    llama = build_llama(config).eval()
    llama.generation_config.pad_token_id = config.pad_token_id
    llama.lm_head.weight.mul_(20)
    embeds = torch.randn(batch, length, config.hidden_size)
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[::3, :4] = False
    return llama, embeds, valid


def measure(
    contenders: dict[str, Callable[[], torch.Tensor]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, float], bool]:
    """Median seconds of each contender, run in alternation, and whether all gave the same tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, torch.Tensor] = {name: run() for name, run in contenders.items()}  # warm up
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    first, *others = tokens.values()
    same = all(torch.equal(first, other) for other in others)
    return {name: statistics.median(times) for name, times in seconds.items()}, same


def compare(
    config: LanguageModelConfig,
    length: int,
    num_tokens: int,
    batch: int,
    *,
    rounds: int,
    compiled: bool,
    clock: Callable[[], float],
) -> str:
    """One row of the table."""
    llama, embeds, valid = build(config, batch, length)
    first = config.vocab_end - NUM_ACTION_BINS
    head = llama.lm_head.weight[first : config.vocab_end].detach()

    def ours() -> torch.Tensor:
        return decode(
            llama.model,
            head,
            embeds,
            valid,
            first_id=first,
            num_tokens=num_tokens,
            temperature=1.0,
            noise=None,
        ).token_ids

    def generate(model: LlamaForCausalLM, **options: str) -> Callable[[], torch.Tensor]:
        @torch.no_grad()
        def run() -> torch.Tensor:
            return model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                inputs_embeds=embeds,
                attention_mask=valid.long(),
                logits_processor=LogitsProcessorList([OnlyActions(first)]),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                **options,
            )

        return run

    contenders = {"ours": ours} | {name: generate(llama, **options) for name, options in VARIANTS.items()}
    if compiled:
        other = build(config, batch, length)[0]
        other.forward = torch.compile(other.forward)
        contenders["static cache, compiled"] = generate(other, **VARIANTS["static cache"])
    seconds, same = measure(contenders, rounds, clock)
    if not same:
        raise SystemExit(f"batch {batch}: the decoders disagree on the tokens")
    mine = seconds.pop("ours")
    best = min(seconds, key=lambda name: seconds[name])
    others = " | ".join(f"{each * 1e3:.1f}" for each in seconds.values())
    return f"{batch} | {mine * 1e3:.1f} | {others} | {seconds[best] / mine:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--compile", action="store_true", help="with a compiled variant; minutes for each row")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time; for a busy machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("# Decoder against `LlamaForCausalLM.generate`\n")
    print(f"`python benchmarks/decoder.py {' '.join(sys.argv[1:])}`: {arguments.threads} threads, ", end="")
    print(f"median of {arguments.rounds} alternating rounds; the tokens of all are equal.\n")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    options = {"rounds": arguments.rounds, "compiled": arguments.compile}
    names = [*VARIANTS, *(["static cache, compiled"] if arguments.compile else [])]
    heads = "".join(f" generate, {name} (ms) |" for name in names)
    print(f"| Model | Prompt + actions | Batch | Ours (ms) |{heads} Times faster than the best |")
    print("|---" * (5 + len(names)) + "|")
    for name in arguments.sizes:
        config, length, num_tokens = SIZES[name]
        for batch in arguments.batches:
            row = compare(config, length, num_tokens, batch, clock=clock, **options)
            print(f"| {name} | {length} + {num_tokens} | {row}", flush=True)


if __name__ == "__main__":
    main()
