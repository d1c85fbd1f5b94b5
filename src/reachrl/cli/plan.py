"""`reachrl plan`: memory and time of a configuration on a device; its policy is traced without reading weights."""

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reachrl.cli.display import format_duration
from reachrl.cli.stages import OverridesArgument, PresetArgument
from reachrl.cli.terminal import Terminal, print_table
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.config.train import TrainConfig
    from reachrl.plan.advice import Change
    from reachrl.plan.device import Device
    from reachrl.plan.memory import MemoryPlan
    from reachrl.plan.timing import TimePlan

GIB = 2**30
WIDTH = 100


def plan(
    preset: PresetArgument,
    overrides: OverridesArgument = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu (measured), h200, h100, a100-80, a100-40, l40s or 4090.")
    ] = "cpu",
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", help="Memory to plan for.", show_default="the device's")
    ] = None,
    decisions_per_second: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Of all simulators together, without a policy.",
            show_default="360, Meta-World on two cores",
        ),
    ] = None,
) -> None:
    """Predict memory and time from the configuration alone, without its weights; exit with 1 if it does not fit."""
    from reachrl.config.loading import load_config
    from reachrl.config.train import refuse_training
    from reachrl.plan.advice import advise
    from reachrl.plan.device import find_device
    from reachrl.plan.memory import plan_memory
    from reachrl.plan.timing import DECISIONS_PER_SECOND, plan_time

    rate = DECISIONS_PER_SECOND if decisions_per_second is None else decisions_per_second
    if not 0 < rate < math.inf:  # nor is it NaN
        raise ConfigError(f"--decisions-per-second {rate:g}: expected a finite number above 0.")
    config = load_config(preset, overrides or [])
    refuse_training(config)
    machine = find_device(device, memory)
    try:
        needed = plan_memory(config, machine)
        changes = advise(config, machine)
        time = plan_time(config, machine, rate)
        verdict = _verdict(needed, changes, time, machine)
    except OverflowError as error:
        raise ConfigError(
            "a number of the configuration or of an option is too large or too small to compute a plan with: "
            "check those that you changed"
        ) from error
    console = Terminal(width=min(Terminal().width, WIDTH))
    print_table(console, _parameters(config, machine))
    for title, part in _devices(needed, config, machine):
        print_table(console, _memory(title, part))
    print_table(console, _time(time, config))
    console.print(
        f"Assumed: {_reached(machine)}; {rate:g} decisions/s of the simulators; arithmetic and memory of the learner, "
        f"not of the process reward.{_not_counted(config)}",
        style="dim",
    )
    if changes:
        print_table(console, _advice(changes))
    console.print(verdict, style="bold")
    if not needed.fits(machine):
        raise typer.Exit(1)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    return table


def _parameters(config: "TrainConfig", device: "Device") -> Table:
    from reachrl.plan.outline import outline_of

    table = _table("Parameters", "part", "count", "bytes each", "trained by")
    for part in outline_of(config, accelerator=not device.is_cpu).weights:
        table.add_row(part.name, f"{part.count:,}", f"{part.width:.3g}", part.trained_by or "frozen")
    return table


def _devices(plan: "MemoryPlan", config: "TrainConfig", device: "Device") -> "list[tuple[str, MemoryPlan]]":
    """The plan of each kind of device with its title."""
    from reachrl.plan.layout import layout_of

    layout = layout_of(config)
    if layout.alone or device.is_cpu:
        return [("Memory", plan)]
    if plan.actor is None:
        return [(f"Memory of each of {layout.learners} GPUs with a learner and an actor", plan)]
    actors = f"Memory of each of {layout.actors} GPUs with an actor"
    return [(f"Memory of each of {layout.learners} GPUs with a learner", plan), (actors, plan.actor)]


def _not_counted(config: "TrainConfig") -> str:
    """What the plan for several processes does not count."""
    from reachrl.plan.layout import layout_of

    if not layout_of(config).alone:
        return (
            " Time is that of one learner's and one actor's share: communication, waiting for the slowest process and "
            "work done meanwhile are not modelled."
        )
    if config.backend.sharding == "full":
        return (
            " backend.sharding=full has no effect on this plan: how many learners torchrun starts is not in the "
            "configuration (backend.kind=ray says it)."
        )
    return ""


def _memory(title: str, plan: "MemoryPlan") -> Table:
    from reachrl.plan.memory import PHASES

    table = _table(title, "part", "when", "size")
    for phase in ("always", *PHASES):
        counts = phase in ("always", plan.worst)
        for part in plan.parts:
            if part.phase == phase:
                table.add_row(part.name, phase, _size(part.bytes), style="" if counts else "dim")
    table.add_section()
    table.add_row("peak", f"always + {plan.worst}", _size(plan.own_peak), style="bold")
    return table


def _time(plan: "TimePlan", config: "TrainConfig") -> Table:
    decisions = config.rollout.num_steps * config.env.num_envs
    table = _table(f"Time of an iteration of {decisions:,} decisions", "part", "TFLOP", "GB moved", "seconds", "share")
    for part in plan.stretches:
        work = ("", "") if not part.flops else (_figure(part.flops / 1e12), _figure(part.bytes / 1e9))
        table.add_row(part.name, *work, f"{part.seconds:,.1f}", f"{part.seconds / plan.seconds:.0%}")
    table.add_section()
    table.add_row("iteration", "", "", f"{plan.seconds:,.1f}", "", style="bold")
    return table


def _advice(changes: "list[Change]") -> Table:
    table = _table("Changes that would help, each on top of those above it", "change", "saves", "leaves")
    for change in changes:
        table.add_row(
            Text.assemble((change.text, "bold"), f"\n  {change.reason}"), _size(change.saves), _size(change.leaves)
        )
    return table


def _verdict(needed: "MemoryPlan", changes: "list[Change]", time: "TimePlan", device: "Device") -> str:
    from reachrl.plan.memory import usable

    size = f"{needed.peak / GIB:.1f} of {device.memory:.1f} GiB on {device.name}"
    if needed.fits(device):
        return f"\nFits: {size}, {format_duration(time.seconds)} an iteration."
    left = changes[-1].leaves if changes else needed.peak
    if changes and left <= usable(device):
        return f"\nDoes not fit: {size}; with the changes above it would, at {left / GIB:.1f} GiB."
    return f"\nDoes not fit: {size}; the least that is known to be possible is {left / GIB:.1f} GiB."


def _reached(device: "Device") -> str:
    shares = (device.forward_share, device.training_share, device.bandwidth_share)
    forward, training, bandwidth = (f"{100 * share:.0f} %" for share in shares)
    return (
        f"{forward} of the peak of {device.name} forward ({device.bf16:.3g} TFLOP/s bfloat16, {device.fp32:.3g} "
        f"float32), {training} in training, {bandwidth} of {device.bandwidth:,.0f} GB/s"
    )


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB else f"{size / 2**20:,.1f} MiB"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
