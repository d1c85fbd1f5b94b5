"""A policy of random weights, the clock, and the table of what its cases took: for `gpu_openvla.py`."""

import argparse
import datetime
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_floors import training_flops
from reachrl.config.language_model import NUM_ACTION_BINS, LoRAConfig
from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.openvla.policy import OpenVLAPolicy

HEADER = "| Section | Case | Time (ms) | Rows/s | Peak (GiB) | Notes |\n|---|---|---|---|---|---|"


@dataclass(frozen=True, slots=True)
class Result:
    """What one case took for how many rows."""

    seconds: float
    rows: int
    note: str = ""


class Bench:
    """The policy, the options, and the table so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.began, self.rows, self.highest = time.perf_counter(), list[str](), 0.0
        self.flops = arguments.tflops and arguments.tflops * 1e12
        self.bandwidth = arguments.gbps and arguments.gbps * 1e9
        torch.manual_seed(0)
        options: dict[str, Any] = {"tokenizer": "folder"}  # prompts come as ids
        make = OpenVLAConfig.openvla_7b if arguments.size == "7b" else OpenVLAConfig
        config = make(**options)
        with self.device:
            self.policy = OpenVLAPolicy(config)
        self.policy.requires_grad_(False)
        first = self.policy.first_action_id
        head = self.policy.language_model.lm_head.weight[first : first + NUM_ACTION_BINS]
        head.normal_(std=0.02)  # neighbours begin nearly alike: the greedy token would be a matter of rounding
        self.synchronize()
        count = sum(parameter.numel() for parameter in self.policy.parameters())
        took = time.perf_counter() - self.began
        self.add("build", f"{count / 1e6:.1f} M parameters, {config.dtype}", Result(took, 0))
        self.release()

    def configure(self, **changes: object) -> None:
        """Change options of the policy that are read at every call, or when a copy is made for decoding."""
        self.policy.config = self.policy.config.model_copy(update=changes)
        self.policy._rollout = None
        self.release()

    def adapt(self) -> None:
        """Add the actor's and the critic's adapters, once."""
        if self.policy.base is None:
            self.configure(lora=LoRAConfig(), critic="adapter")
            self.policy.add_adapters(Path("random"))  # the name of the base matters to saving only

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give cached memory back, and count the peak from here."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def median(self, run: Callable[[], object]) -> float:
        """Median seconds of several calls after one to warm up."""
        run()
        return statistics.median(self.once(run) for _ in range(self.arguments.rounds))

    def add(self, section: str, case: str, result: Result | str) -> None:
        """Put a row into the table and print it."""
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else 0.0
        self.highest = max(self.highest, peak)
        memory = f"{peak:.1f}" if self.cuda else "-"
        if isinstance(result, str):
            row = f"| {section} | {case} | - | - | {memory} | {result} |"
        else:
            rate = f"{result.rows / result.seconds:.1f}" if result.rows else "-"
            row = f"| {section} | {case} | {1e3 * result.seconds:.1f} | {rate} | {memory} | {result.note} |"
        self.rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if self.arguments.out:  # what is measured stays, whatever ends this program
            self.arguments.out.write_text(self.table() + "\n", encoding="utf-8")

    def case(self, section: str, name: str, run: Callable[[], Result]) -> Result | None:
        """Measure one case; one that fails or comes too late leaves a line that says so."""
        if time.perf_counter() - self.began > 60 * self.arguments.minutes:
            self.add(section, name, f"not begun: {self.arguments.minutes:g} minutes are over")
            return None
        self.release()
        result = None
        try:
            result = run()
            self.add(section, name, result)
        except torch.cuda.OutOfMemoryError:
            self.add(section, name, "out of memory")
        except Exception as error:  # the other cases are worth having all the same
            traceback.print_exc()
            first_line = next(iter(str(error).splitlines()), "")
            self.add(section, name, f"failed: {type(error).__name__}: {first_line}")
        return result

    def useful(self, rows: int, seconds: float) -> str:
        """How fast rows were trained on, and the shares of the peaks."""
        rate = rows * training_flops(self.policy) / seconds
        note = f"{rate / 1e12:.3g} useful TFLOP/s"
        if self.flops:
            nominal = self.arguments.nominal_tflops
            note += f": {rate / nominal / 1e12:.1%} of {nominal:g}, {rate / self.flops:.1%} of {self.flops / 1e12:g}"
        return note

    def table(self) -> str:
        """All rows so far, and what they were measured on."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else "CPU"
        return "\n".join(
            [
                "# OpenVLA on an accelerator\n",
                f"`python benchmarks/gpu_openvla.py {' '.join(sys.argv[1:])}`: {name}, torch {torch.__version__}, "
                f"transformers {transformers.__version__}, {datetime.date.today()}; median of "
                f"{self.arguments.rounds} rounds; peak memory {self.highest:.1f} GiB; "
                f"{time.perf_counter() - self.began:.0f} s in all.\n",
                HEADER,
                *self.rows,
            ]
        )
