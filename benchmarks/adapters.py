"""What adapters cost in decoding, and what the merged, fused copy gives back.

    python benchmarks/adapters.py > docs/benchmarks/adapters.md

The same random trunk decodes in alternation in one process: whole weights, the same with adapters beside them
(rank 32), and adapters with `policy.rollout_copy`. The tokens of the last two must be equal.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy

_LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_layers": 6, "num_heads": 4}
SIZES: dict[str, dict[str, object]] = {
    "tiny": {},
    "256 patches": {"image_size": 96, "towers": ({"kind": "vit", "width": 64, "depth": 3, "num_heads": 2,
                    "mlp_width": 128, "patch_size": 6},) * 2, "language_model": _LLAMA,
                    "prompt_length": 32, "num_action_tokens": 7},
}  # fmt: skip


def build(size: str, folder: Path) -> dict[str, OpenVLAPolicy]:
    """The three contenders on the same weights; the adapters change what is decoded."""
    torch.manual_seed(0)
    OpenVLAPolicy(OpenVLAConfig.model_validate(SIZES[size])).save_pretrained(folder / "base")
    sections = {**SIZES[size], "checkpoint": folder / "base"}
    policies = {"whole weights": OpenVLAPolicy(OpenVLAConfig.model_validate(sections))}
    for name, copy in (("adapters", False), ("adapters, copy", True)):
        torch.manual_seed(1)
        changes = {"lora": {"rank": 32, "alpha": 16.0}, "rollout_copy": copy}
        policies[name] = OpenVLAPolicy(OpenVLAConfig.model_validate(sections | changes))
        for key, parameter in policies[name].named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=0.02)
    return policies


def prompts(policy: OpenVLAPolicy, batch: int) -> OpenVLAInputs:
    """Random features of a frozen vision tower and a prompt without padding."""
    torch.manual_seed(2)
    config = policy.config
    shape = (batch, config.prompt_length)
    features = torch.randn(batch, config.num_patches, config.vision_width)
    return OpenVLAInputs(
        prompt_ids=torch.randint(3, 500, shape),
        prompt_mask=torch.ones(shape, dtype=torch.bool),
        vision_features=features,
    )


def compare(size: str, batch: int, rounds: int) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        policies = build(size, Path(folder))
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    samples = {name: policy.act(prompts(policy, batch)) for name, policy in policies.items()}  # warm up
    if not torch.equal(samples["adapters"].token_ids, samples["adapters, copy"].token_ids):
        raise SystemExit(f"{size}, batch {batch}: the copy decodes other tokens")
    for _ in range(rounds):
        for name, policy in policies.items():
            inputs = prompts(policy, batch)
            start = time.perf_counter()
            policy.act(inputs)
            seconds[name].append(time.perf_counter() - start)
    whole, plain, copied = (1e3 * statistics.median(times) for times in seconds.values())
    update = update_ms(policies["adapters, copy"])
    return f"| {size} | {batch} | {whole:.1f} | {plain:.1f} | {copied:.1f} | {plain / copied:.2f}x | {update:.1f} |"


def update_ms(policy: OpenVLAPolicy) -> float:
    """Milliseconds to bring the copy up to date after a change of the adapters."""
    times = []
    for _ in range(5):
        with torch.no_grad():
            policy.parameter_groups()["trunk"][0].add_(0)
        start = time.perf_counter()
        policy._copy()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    print("# Decoding with adapters\n")
    print(f"`python benchmarks/adapters.py {' '.join(sys.argv[1:])}`: {torch.get_num_threads()} threads, ", end="")
    print(f"rank 32, median of {arguments.rounds} alternating rounds; adapters and copy decode the same tokens.\n")
    print(
        "| Model | Batch | Whole weights (ms) | Adapters (ms) | Copy (ms) | Adapters / copy | Update of the copy (ms) |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        for batch in arguments.batches:
            print(compare(size, batch, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
