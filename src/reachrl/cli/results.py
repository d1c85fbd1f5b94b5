"""The result of a run as a small table, and where its report is."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reachrl.cli.terminal import Terminal, print_line, print_table
from reachrl.errors import StorageError
from reachrl.report.formats import task_labels
from reachrl.report.verdict import advice
from reachrl.run.records import BestPoint, EvalStage, WholeEvaluation, read_record

FIGURES = "k/n, rate and 95 % Wilson interval; +starts won -starts lost by the second of the two, p of the paired test."
_LABEL_LENGTH = 34  # leaves room for two columns of figures on 100


def show_evaluations(run_dir: Path) -> None:
    """Print success on held-out start states before and after training.

    Args:
        run_dir: A run folder whose `eval` stage is finished.
    """
    remedy = "delete it and evaluate again"
    before, after = (
        read_record(run_dir / "eval" / f"{when}.json", WholeEvaluation, remedy=remedy) for when in ("before", "after")
    )
    if any(before.get(mode, {}).get("per_task", {}).keys() != after[mode]["per_task"].keys() for mode in after):
        raise StorageError(f"{run_dir / 'eval'}: before.json and after.json hold other modes or tasks; {remedy}")
    modes = list(after)
    totals = [(f"all tasks, {mode}", success(before[mode]), success(after[mode])) for mode in modes]
    labels = task_labels(list(after[modes[0]]["per_task"]), _LABEL_LENGTH)
    tasks = [
        (f"{labels[task]}, {modes[0]}", success(before[modes[0]]["per_task"][task]), success(record))
        for task, record in after[modes[0]]["per_task"].items()
    ]
    console = Terminal()
    print_figures(console, "Success on held-out start states", ("before", "after"), totals, tasks)
    for line in [*_paired_lines(before, after), *_best_lines(run_dir, after)]:
        print_line(console, Text(line))
    print_line(console, Text(f"{FIGURES} One run is one seed: its interval holds no other seed's luck."))
    mode = next(iter(after))
    if (said := advice(before.get(mode), after[mode])) is not None:
        print_line(console, Text(f"warning: {said}"), "yellow")
    stages = read_record(run_dir / "stages.json", EvalStage, remedy="delete it and run the stages again")
    _print_caveats(stages["eval"]["info"]["caveats"])


def _paired_lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The same starts before and after, and at the headline's temperature and another, compared one by one."""
    from reachrl.evaluation import compare

    first, *others = after
    pairs = [(f"before and after, {mode}", before[mode], after[mode]) for mode in after]
    pairs += [(f"after, {first} and {mode}", after[first], after[mode]) for mode in others]
    return [f"{name}: {paired(asdict(compare(*records)))}" for name, *records in pairs if records[0].get("episodes")]


def _best_lines(run_dir: Path, after: dict[str, Any]) -> list[str]:
    """The weights that validation chose, on the same starts, where they are not the last."""
    file = run_dir / "eval" / "best.json"
    if not file.is_file():
        return []
    from reachrl.evaluation import compare

    best = read_record(file, WholeEvaluation, remedy="delete it and evaluate again")
    point = read_record(run_dir / "checkpoints" / "best" / "validation.json", BestPoint, remedy=f"delete {file}")
    return [
        f"best by validation (iteration {point['iteration']}), {mode}: {success(best[mode])}; against the last: "
        f"{paired(asdict(compare(after[mode], best[mode])))}"
        for mode in after
        if mode in best
    ]


def show_result(result: dict[str, Any] | None, folder: Path) -> None:
    """Print the success of one policy, or that other shards have to end first.

    Args:
        result: What `reachrl.pipeline.measure.measure` returned.
        folder: Where it lies.
    """
    console = Terminal()
    if result is None:
        console.print(f"This shard is done; the one that ends last writes {folder / 'result.json'}", soft_wrap=True)
        return
    records = list(result["modes"].values())
    totals = [("all tasks", *map(success, records))]
    first = next(iter(result["modes"]))
    tests = result["against_headline"]
    if tests:
        totals.append((f"against {first}, same starts", *(paired(tests.get(mode)) for mode in result["modes"])))
    labels = task_labels(list(records[0]["per_task"]), _LABEL_LENGTH)
    tasks = [(label, *(success(record["per_task"][task]) for record in records)) for task, label in labels.items()]
    print_figures(console, f"Success, protocol {result['protocol']}", tuple(result["modes"]), totals, tasks)
    print_line(console, Text(FIGURES if tests else "k/n, rate and 95 % Wilson interval."))
    _print_caveats(result["caveats"])
    page = (folder / "result.html").resolve()
    console.print(f"Page: {page}", soft_wrap=True, highlight=False)


def print_figures(
    console: Console,
    title: str,
    columns: Sequence[str],
    totals: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
) -> None:
    """Print a table of figures; where the terminal is too narrow for it, each figure on a line of its own, whole.

    Args:
        console: Where.
        title: Stands above it.
        columns: Names of the columns of figures.
        totals: A label and a figure for each column; in bold, above the others.
        rows: The same, one a task.
    """
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, no_wrap=True)
    for row in totals:
        table.add_row(*row, style="bold")
    table.add_section()
    for row in rows:
        table.add_row(*row)
    print_table(console, table)


def _print_caveats(caveats: list[str]) -> None:
    for caveat in caveats:
        print_line(Terminal(), Text(f"Note: {caveat}"), "yellow")


def success(record: dict[str, Any]) -> str:
    """Write one rate as `k/n  rate % [low, high]`.

    Args:
        record: `k`, `n`, `rate` and `wilson95`, the latter two as fractions.
    """
    low, high = (100 * bound for bound in record["wilson95"])
    return f"{record['k']}/{record['n']}  {100 * record['rate']:.0f} % [{low:.0f}, {high:.0f}]"


def show_best_of(result: dict[str, Any], folder: Path) -> None:
    """Print success and time by the number of candidates.

    Args:
        result: What `reachrl.pipeline.best_of.measure_best_of` returned.
        folder: Where it lies.
    """
    label = " (oracle look-ahead)" if result["oracle_look_ahead"] else ""
    title = f"Best of N actions, {result['mode']}, ranked by {result['rank']}{label}"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in ("N", "success", "against N = 1, same starts", "ms per decision"):
        table.add_column(column, no_wrap=True)
    for row in result["rows"]:
        against = paired(row["against_one"]) if row["best_of"] > 1 else ""
        table.add_row(str(row["best_of"]), success(row["outcomes"]), against, f"{row['ms_per_decision']:.1f}")
    console = Terminal()
    print_table(console, table)
    console.print("k/n, rate and 95 % Wilson interval. Rank and N were chosen before: the best row is not the result.")
    if result["oracle_look_ahead"]:
        console.print(
            "Oracle look-ahead: candidates are tried in a copy of the simulator, which a robot does not have."
        )
    _print_caveats(result["caveats"])
    file = (folder / f"best-of-{result['rank']}.json").resolve()
    console.print(f"Result: {file}", soft_wrap=True, highlight=False)


def show_robustness(result: dict[str, Any], folder: Path) -> None:
    """Print success by axis.

    Args:
        result: What `reachrl.pipeline.robust.measure_robustness` returned.
        folder: Where it lies.
    """
    names, several = list(result["policies"]), len(result["policies"]) > 1
    columns = [*names, *([f"{names[-1]} against {names[0]}"] if several else []), f"{names[-1]} against unperturbed"]

    def row(label: str, found: dict[str, Any]) -> list[str]:
        rates = [success(found["rates"][name]) for name in names]
        tests = [paired(found["paired_test"])] if several else []
        return [label, *rates, *tests, paired(found["against_plain"][names[-1]])]

    totals = [[*row("unperturbed", result["plain"])[:-1], ""], row("all perturbations", result["perturbed"])]
    rows = [row(axis["axis"], axis) for axis in result["axes"]]
    console = Terminal()
    title = f"Success under perturbation, {result['suite']}, {result['mode']}"
    print_figures(console, title, columns, totals, rows)
    console.print("k/n, rate and 95 % Wilson interval over all levels; paired on the same episodes.")
    _print_caveats(result["caveats"])
    console.print(f"Page: {(folder / 'robust.html').resolve()}", soft_wrap=True, highlight=False)


def paired(test: dict[str, Any] | None) -> str:
    """Write a paired test as `+improved -worsened, p = ...`; nothing where there is none."""
    return "" if test is None else f"+{test['improved']} -{test['worsened']}, p = {test['p_value']:.2g}"


def show_report(run_dir: Path) -> None:
    """Print where the report is; it opens in a browser without a network."""
    # Plain print-out, unwrapped: the path is there to be clicked or copied.
    Terminal().print(f"Report: {(run_dir / 'report.html').resolve()}", soft_wrap=True, highlight=False)
