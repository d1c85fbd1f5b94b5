"""What a 4-bit base takes and costs on this machine, beside a plain one: memory held and at the peak, and time.

    python benchmarks/four_bit.py > docs/benchmarks/four_bit.md

A random policy is written to disk; each case then loads it with adapters in a process of its own. Memory is the
process's anonymous memory (`RssAnon`: without the file's pages, which the system may drop), less that of a process that
has loaded the libraries alone; the peak is that of a thread that looks every millisecond. The C library is told to give
freed pieces above 1 MiB back at once (MALLOC_MMAP_THRESHOLD_): else it keeps some, by chance up to 170 MB here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch

from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.plan.outline import outline_of
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy

ROWS = 4
SIZES: dict[str, object] = {
    "image_size": 96,
    "towers": ({"kind": "vit", "width": 64, "depth": 3, "num_heads": 2, "mlp_width": 128, "patch_size": 12},) * 2,
    "language_model": {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 8, "num_heads": 8},
    "prompt_length": 32,
    "num_action_tokens": 7,
}
CASES = {
    f"{dtype}, {base}": {"dtype": dtype, "base": base} for dtype in ("float32", "bfloat16") for base in ("plain", "nf4")
}


def anonymous() -> float:
    """MB of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024 / 1e6


class Peak(threading.Thread):
    """The most anonymous memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._end = 0.0, threading.Event()

    def run(self) -> None:
        while not self._end.wait(1e-3):
            self.most = max(self.most, anonymous())

    def stop(self) -> float:
        self._end.set()
        self.join()
        return max(self.most, anonymous())


def configure(folder: Path, dtype: str, base: str) -> OpenVLAConfig:
    changes = {"checkpoint": folder, "dtype": dtype, "lora": {"rank": 32, "alpha": 16.0, "base": base}}
    return OpenVLAConfig.model_validate({**SIZES, **changes})


def given(policy: OpenVLAPolicy) -> tuple[OpenVLAInputs, torch.Tensor]:
    """Random features of a frozen vision tower, prompts and action tokens."""
    torch.manual_seed(2)
    config, shape = policy.config, (ROWS, policy.config.prompt_length)
    inputs = OpenVLAInputs(
        prompt_ids=torch.randint(3, 500, shape),
        prompt_mask=torch.ones(shape, dtype=torch.bool),
        vision_features=torch.randn(ROWS, config.num_patches, config.vision_width),
    )
    return inputs, torch.randint(0, 256, (ROWS, config.num_action_tokens)) + policy.first_action_id


def one_case(folder: Path, dtype: str, base: str, rounds: int) -> dict[str, float]:
    """One case in this process: loading it alone, or with `rounds` how long it takes to act and to train."""
    config = configure(folder, dtype, base)
    if base == "nf4":
        from reachrl.policies.lora.four_bit import library

        library()
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # starts the library's pools
    before, peak = anonymous(), Peak()
    peak.start()
    start = time.perf_counter()
    policy = OpenVLAPolicy(config)
    seconds = time.perf_counter() - start
    most = peak.stop()
    result = {"load s": seconds, "peak MB": most - before, "held MB": anonymous() - before}
    if not rounds:
        return result
    inputs, ids = given(policy)
    result = {}

    def train() -> None:
        policy.zero_grad()
        policy.evaluate(inputs, ids).logprobs.sum().backward()

    for name, run in (("act s", lambda: policy.act(inputs)), ("train s", train)):
        times = []
        for _ in range(rounds + 1):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        result[name] = median(times[1:])
    with torch.no_grad():
        result["logprobs"] = policy.evaluate(inputs, ids).logprobs.flatten().tolist()  # pyright: ignore
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs=3, metavar=("FOLDER", "DTYPE", "BASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        folder, dtype, base = arguments.case
        print(json.dumps(one_case(Path(folder), dtype, base, arguments.rounds)))
        return
    results, planned = {}, {}
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        OpenVLAPolicy(OpenVLAConfig.model_validate(SIZES)).save_pretrained(Path(place) / "base")
        for name, case in CASES.items():
            results[name] = {}
            for rounds, changes in ((0, {"MALLOC_MMAP_THRESHOLD_": str(2**20)}), (arguments.rounds, {})):
                command = [sys.executable, __file__, "--rounds", str(rounds), "--case", f"{place}/base", *case.values()]
                done = subprocess.run(
                    command, env=os.environ | changes, stdout=-1, text=True, check=True, encoding="utf-8"
                )
                results[name] |= json.loads(done.stdout.splitlines()[-1])
            config = configure(Path(place) / "base", **case)
            run = load_config("toy").model_copy(update={"policy": config})
            parts = outline_of(run, accelerator=False).weights
            planned[name] = sum(part.bytes for part in parts) / 1e6
            counts = {part.name: part.count / 1e6 for part in parts}
    report(results, planned, arguments.rounds, config, counts)


def report(
    results: dict, planned: dict[str, float], rounds: int, config: OpenVLAConfig, counts: dict[str, float]
) -> None:
    maps, adapters = counts["language model, 4 bits"], counts["adapters of the language model"]
    print("# A 4-bit base\n")
    tokens = config.num_patches + config.prompt_length + config.num_action_tokens - 1
    print(f"`python benchmarks/four_bit.py --rounds {rounds}`: 8 layers of width 1,024 ({maps:.0f} M weights in their")
    print(f"maps, {adapters:.1f} M in adapters of rank 32), {ROWS} rows of {tokens} positions, one thread. Seconds of")
    print("acting and training are CPU seconds, medians. Each case in a process of its own.\n")
    print("| Case | Planned (MB) | Held (MB) | Peak of loading (MB) | Loading (s) | Acting (s) | Training pass (s) |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        figures = (found["held MB"], found["peak MB"])
        times = (found["load s"], found["act s"], found["train s"])
        print(f"| {name} | {planned[name]:.0f} | ", end="")
        print(" | ".join([*(f"{value:.0f}" for value in figures), *(f"{value:.2f}" for value in times)]), "|")
    for dtype in ("float32", "bfloat16"):
        plain, packed = (torch.tensor(results[f"{dtype}, {base}"]["logprobs"]) for base in ("plain", "nf4"))
        print(f"\nLog-probabilities on the 4-bit base differ from those on the plain one by "
              f"{(plain - packed).abs().mean():.3f} nats a token in the mean ({dtype}; random weights).")  # fmt: skip


if __name__ == "__main__":
    main()
