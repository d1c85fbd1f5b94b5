"""Read a run's metrics and plot its learning curve (needs matplotlib).

    python examples/train_on_tasks.py
    python examples/plot_metrics.py

The records are flat dicts: `pandas.DataFrame(records)` takes them too.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window

from matplotlib import pyplot as plt

from reachrl.run.metrics import read_metrics

RUN = Path("runs/tasks")


def main() -> None:
    """Write `learning_curve.png` beside the report."""
    records = read_metrics(RUN / "metrics.jsonl", "train")
    known = [record for record in records if record["success"] is not None]  # iterations in which an episode ended
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([record["env_steps"] for record in known], [100 * record["success"] for record in known], marker="o")
    axes.set(xlabel="environment steps", ylabel="success while training, %", ylim=(0, 100))
    figure.savefig(RUN / "learning_curve.png", dpi=150)
    print(f"{len(records)} iterations in {RUN / 'learning_curve.png'}")


if __name__ == "__main__":
    main()
