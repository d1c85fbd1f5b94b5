"""`reachrl plan` against measurement: memory, products and time of acting and of a training step.

    python benchmarks/plan.py > docs/benchmarks/plan.md

Two policies run on this machine (or its GPU), each case in a process of its own: one rollout pass, then forward,
backward and AdamW over the same number of rows. Memory is the growth of the peak resident set, or what CUDA's allocator
says; products are counted by PyTorch's `FlopCounterMode`. Times on a CPU are CPU seconds, so that other programs
disturb less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reachrl.config.env import MetaworldConfig
from reachrl.config.language_model import LanguageModelConfig
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.rollout import RolloutSection
from reachrl.config.towers import ViTTowerConfig
from reachrl.config.train import TrainConfig
from reachrl.plan.device import Device, find_device
from reachrl.plan.memory import plan_memory
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy

_TOWER = ViTTowerConfig(width=384, depth=8, num_heads=6, mlp_width=1536)
_SHAPED = OpenVLAConfig(
    image_size=224,
    towers=(_TOWER, _TOWER),
    language_model=LanguageModelConfig(
        vocab_size=32064, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, pad_token_id=32000
    ),
    tokenizer="folder",
    prompt_length=32,
    num_action_tokens=7,
    value_hidden_size=768,
)
_WARM = _SHAPED.model_copy(
    update={
        "towers": (ViTTowerConfig(width=8, depth=2, num_heads=1, mlp_width=8),) * 2,
        "language_model": LanguageModelConfig(hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1),
    }
)
_LORA = {"lora": {"rank": 16}, "critic": "adapter", "checkpoint": "in memory"}
# name -> (base, changes, rows)
CASES: dict[str, tuple[OpenVLAConfig, dict[str, object], int]] = {
    "tiny": (OpenVLAConfig(), {}, 128),
    "openvla-shaped": (_SHAPED, {}, 2),
    "openvla-shaped, checkpointing": (_SHAPED, {"gradient_checkpointing": True}, 2),
    "openvla-shaped, separate critic": (_SHAPED, {"critic": "separate"}, 2),
    "openvla-shaped, bfloat16 LoRA": (_SHAPED, {**_LORA, "dtype": "bfloat16"}, 2),
}


def configure(base: OpenVLAConfig, changes: dict[str, object]) -> OpenVLAConfig:
    return OpenVLAConfig.model_validate({**base.model_dump(), **changes})


def build(config: OpenVLAConfig) -> OpenVLAPolicy:
    """Random weights; adapters beside them where the configuration has some."""
    torch.manual_seed(0)
    plain = config.model_copy(update={"lora": None, "critic": "shared", "checkpoint": None})
    policy = OpenVLAPolicy(config if config.lora is None else plain)
    if config.lora is not None:
        policy.config = config
        policy.add_adapters(Path("in memory"))
    policy.freeze(["vision"])
    return policy


def rows_of(policy: OpenVLAPolicy, rows: int) -> tuple[OpenVLAInputs, OpenVLAInputs, Tensor]:
    """Frames to act on, their vision features, and actions to score; one prompt is shorter, so that masks are used."""
    config = policy.config
    mask = torch.ones(rows, config.prompt_length, dtype=torch.bool)
    mask[0, -2:] = False
    ids = torch.randint(3, 300, mask.shape)
    pixels = torch.randn(rows, 3 * len(config.towers), config.image_size, config.image_size)
    features = torch.randn(rows, config.num_patches, config.vision_width, dtype=policy.projector.fc1.weight.dtype)
    actions = torch.randint(0, 256, (rows, config.num_action_tokens)) + policy.first_action_id
    seen = OpenVLAInputs(prompt_ids=ids, prompt_mask=mask, pixel_values=pixels)
    cached = OpenVLAInputs(prompt_ids=ids, prompt_mask=mask, vision_features=features)
    return seen, cached, actions


class Meter:
    """Memory now and at its peak since `reset`, of the GPU or of this process."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def reset(self) -> int:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again
        return self._resident("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")

    def _resident(self, field: str) -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def seconds(run: Callable[[], object], rounds: int, cuda: bool) -> float:
    """Median seconds: on the clock with a GPU, of each thread's processor time without."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter() if cuda else time.process_time() / torch.get_num_threads()
        run()
        if cuda:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() if cuda else time.process_time() / torch.get_num_threads()) - start)
    return statistics.median(taken)


def products(run: Callable[[], object]) -> int:
    """FLOPs of all matrix products; attention unfused, since the counter does not know the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(name: str, rounds: int) -> dict[str, float]:
    """Memory and products of one case, or with `rounds` its time."""
    base, changes, rows = CASES[name]
    cuda = torch.cuda.is_available()
    meter, device = Meter(cuda), torch.device("cuda" if cuda else "cpu")
    with device:
        _, warm, tokens = rows_of(first := build(configure(_WARM, changes)), 2)
        first.evaluate(warm, tokens).logprobs.sum().backward()  # libraries are loaded
        before = meter.reset()
        policy = build(configure(base, changes))
        seen, cached, actions = rows_of(policy, rows)
    trained = [parameter for group in policy.parameter_groups().values() for parameter in group]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad])

    def act() -> None:
        assert seen.pixel_values is not None
        fresh = replace(seen, pixel_values=seen.pixel_values.clone())  # as freshly encoded frames
        policy.act(fresh, with_values=False)

    def backward() -> None:
        out = policy.evaluate(cached, actions)
        assert out.values is not None
        (out.logprobs.mean() + out.entropy.mean() + out.values.square().mean()).backward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward()
        optimizer.step()

    found: dict[str, float] = {}
    step()  # allocates gradients and Adam's states
    if rounds:
        act()
        return {"act s": seconds(act, rounds, cuda), "step s": seconds(step, rounds, cuda)}
    found["held"] = meter.reset() - before
    act()
    resident = meter.reset()
    act()
    found["rollout"] = meter.peak() - resident
    resident = meter.reset()
    backward()  # adds to the gradients that are there
    found["update"] = meter.peak() - resident
    resident = meter.reset()
    optimizer.step()
    found["optimiser"] = meter.peak() - resident
    found["act flops"], found["step flops"] = products(act), products(backward)
    return found


def run_of(policy: OpenVLAConfig, rows: int) -> TrainConfig:
    """A run whose iteration is one decision in each of `rows` environments, and a pass over all of them."""
    return TrainConfig(
        env=MetaworldConfig(num_envs=rows),
        rollout=RolloutSection(num_steps=1),
        policy=policy,
        algorithm=PPOConfig(epochs=1, minibatch_size=rows, micro_batch_size=rows),
    )


def predict(name: str, device: Device) -> dict[str, float]:
    """The same figures from the configuration."""
    base, changes, rows = CASES[name]
    policy = configure(base, changes)
    config = run_of(policy, rows)
    plan, taken = plan_memory(config, device), {part.name: part for part in plan_time(config, device).stretches}
    held = ("frozen weights", "trainable weights", "gradients", "Adam states")
    outline = outline_of(config, accelerator=not device.is_cpu)
    return {
        "held": sum(part.bytes for part in plan.parts if part.name in held),
        "rollout": plan.of("rollout"),
        "update": outline.training[0].peak(rows),
        "optimiser": plan.of("optimiser step"),
        "act s": taken["acting"].seconds,
        "step s": taken["PPO, 1 epochs"].seconds,
        "act flops": taken["acting"].flops,
        "step flops": taken["PPO, 1 epochs"].flops,
    }


def table_measured(arguments: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "OPENBLAS_NUM_THREADS": str(arguments.threads)}
    # For memory, what is freed goes back to the system at once, so that a peak is one of live tensors. That costs time.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("| Policy | Rows | What | Predicted | Measured | Ratio |\n|---|---|---|---|---|---|")
    for name in arguments.cases:
        measured: dict[str, float] = {}
        for rounds, settings in ((0, returned), (arguments.rounds, {})):
            command = [sys.executable, __file__, "--measure", name, "--rounds", str(rounds)]
            environment = {**os.environ, **threads, **settings}
            measured |= json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
        device = find_device(arguments.device if cuda else "cpu")
        predicted = predict(name, device)
        for key, (label, unit, size) in {
            "held": ("weights, gradients, Adam states", "MB", 1e6),
            "rollout": ("acting: cache, working memory", "MB", 1e6),
            "update": ("training: activations", "MB", 1e6),
            "optimiser": ("AdamW's temporaries", "MB", 1e6),
            "act flops": ("acting: products", "GFLOP", 1e9),
            "step flops": ("training: products", "GFLOP", 1e9),
            "act s": ("acting", "ms", 1e-3),
            "step s": ("training step", "ms", 1e-3),
        }.items():
            ours, theirs = predicted[key], measured[key]
            cells = f"{ours / size:,.1f} {unit} | {theirs / size:,.1f} {unit} | {ours / theirs:.2f}"
            print(f"| {name} | {CASES[name][2]} | {label} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--device", default="h200", help="name of the GPU, where there is one")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
        return
    print("# Plans against measurement\n")
    print(f"`python benchmarks/plan.py {' '.join(sys.argv[1:])}`: {arguments.threads} threads, ", end="")
    print(f"median of {arguments.rounds} rounds.\n")
    table_measured(arguments)


if __name__ == "__main__":
    main()
