"""The page of a robustness measurement, and its card in a run's report."""

from pathlib import Path
from typing import Any

from reachrl.report import plots
from reachrl.report.embed import data_uri
from reachrl.report.formats import tenths
from reachrl.report.pages import drawn, write_page
from reachrl.report.verdict import SIGNIFICANT

PLAIN_FRAME = "plain.png"
_MOST_SENTENCES = 60  # on the page


def write_robust_page(folder: Path, result: dict[str, Any]) -> Path:
    """Write `robust.html` beside a `robust.json`.

    Args:
        folder: where the frames are and the page goes.
        result: what `reachrl.pipeline.robust.summary` found.
    """
    plain = _frame(folder, PLAIN_FRAME)

    def picture(level: dict[str, Any]) -> str | None:
        found = _frame(folder, level["frame"])
        return None if found == plain else found  # a delay cannot be seen

    return write_page(
        folder / "robust.html",
        "robust.html.j2",
        result=result,
        names=list(result["policies"]),
        words=verdict_of(result),
        chart=axes_chart(result),
        plain=plain,
        axes=[
            axis | {"levels": [level | {"picture": picture(level)} for level in axis["levels"]]}
            for axis in result["axes"]
        ],
        sentences=result["instructions"][:_MOST_SENTENCES],
        more=max(0, len(result["instructions"]) - _MOST_SENTENCES),
    )


def axes_chart(result: dict[str, Any]) -> Any:
    """One row for the plain episodes and one an axis, the first policy's rate and the last one's."""
    rows = {"unperturbed": result["plain"]} | {axis["axis"]: axis for axis in result["axes"]}
    names = list(result["policies"])
    last = {label: row["rates"][names[-1]] for label, row in rows.items()}
    if len(names) == 1:
        return drawn(plots.success_interval_chart([(label, rate, "c-after") for label, rate in last.items()]))
    return drawn(plots.task_chart({label: row["rates"][names[0]] for label, row in rows.items()}, last))


def verdict_of(result: dict[str, Any]) -> list[str]:
    """What the perturbations do to the last policy, and whether it withstands them better than the first, in words."""
    names = list(result["policies"])
    last, plain, perturbed = names[-1], result["plain"]["rates"], result["perturbed"]["rates"]
    said = [
        f"{tenths(plain[last]['rate'])} unperturbed ({plain[last]['k']} of {plain[last]['n']}), "
        f"{tenths(perturbed[last]['rate'])} over all perturbations ({perturbed[last]['k']} of {perturbed[last]['n']})."
    ]
    hurt = [axis["axis"] for axis in result["axes"] if worse(axis["against_plain"][last])]
    said.append(f"Success falls under: {', '.join(hurt)}." if hurt else "Under no axis was a fall shown.")
    if len(names) > 1:
        first = names[0]
        gains = [rates[last]["rate"] - rates[first]["rate"] for rates in (plain, perturbed)]
        said.append(
            f"From {first} to {last}: {100 * gains[0]:+.1f} points unperturbed, {100 * gains[1]:+.1f} points perturbed."
        )
    return said


def worse(test: dict[str, Any]) -> bool:
    """Whether a paired test shows a fall."""
    return test["p_value"] < SIGNIFICANT and test["worsened"] > test["improved"]


def card(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a run's report shows of its robustness; None where it was not measured."""
    if result is None:
        return None
    names = list(result["policies"])
    return {"chart": axes_chart(result), "words": verdict_of(result), "mode": result["mode"], "names": names}


def _frame(folder: Path, name: str) -> str | None:
    path = folder / "frames" / name
    return data_uri(path.read_bytes(), "image/png") if path.is_file() else None
