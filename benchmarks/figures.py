"""Tables and pictures of the runs of a benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the head, the first column text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def tuning_table(tuning: Mapping[str, Sequence[dict[str, Any]]], form: str = ".4g") -> str:
    """The training loss that every setting of every method reached, as `best_of` records it."""
    rows = [("method", "settings", "steps", "training loss")]
    for name, records in tuning.items():
        for record in records:
            loss = record["train_loss"]
            shown = "diverged" if loss is None else f"{loss:{form}}"
            rows.append((name, record["settings"], str(record["steps"]), shown))
    return table(rows)


def results_table(records: Sequence[dict[str, Any]], goal: float, form: str) -> str:
    """What every run reached at its end, and when it reached a training loss; losses in a format."""
    rows: list[tuple[str, ...]] = [
        (
            "method",
            "settings",
            f"training loss at {records[0]['curve'][-1]['step']}",
            "test loss",
            "ms per step",
            f"steps to {goal:{form}}",
            f"seconds to {goal:{form}}",
        )
    ]
    for record in records:
        end, reached = record["curve"][-1], steps_to_reach(record, goal)
        seconds = next((p["seconds"] for p in record["curve"] if p["step"] == reached), None)
        rows.append(
            (
                record["method"],
                record["settings"],
                f"{end['train_loss']:{form}}",
                f"{end['test_loss']:{form}}",
                f"{record['median_step_ms']:.0f}",
                "not reached" if reached is None else str(reached),
                "" if seconds is None else f"{seconds:.0f}",
            )
        )
    return table(rows)


def steps_to_reach(record: dict[str, Any], loss: float, figure: str = "train_loss") -> int | None:
    """The first evaluated step at which a figure is at most `loss`; None if it never is."""
    return next((p["step"] for p in record["curve"] if p[figure] <= loss), None)


def goals_table(
    records: Sequence[dict[str, Any]],
    goals: Sequence[float],
    figures: Mapping[str, str],
    *,
    lowest: bool = False,
) -> str:
    """Steps and seconds of every run until each of some figures was first at most each of some goals.

    Args:
      records: the runs, as `Run.record` gives them.
      goals: the goals.
      figures: from a key of the curves' points to what is said of it behind the method's name.
      lowest: whether a last column has the lowest that was reached.
    """
    head = ("method", "settings", "ms per step", *(f"to {goal:g}" for goal in goals))
    head += ("lowest",) if lowest else ()
    rows: list[tuple[str, ...]] = [head]
    for record in records:
        for figure, said in figures.items():
            if figure not in record["curve"][-1]:
                continue
            reached = [
                next((p for p in record["curve"] if p[figure] <= goal), None) for goal in goals
            ]
            rows.append(
                (
                    record["method"] + said,
                    record["settings"],
                    f"{record['median_step_ms']:.3g}",
                    *(
                        "not reached" if p is None else f"{p['step']} steps, {p['seconds']:.3g} s"
                        for p in reached
                    ),
                    *([f"{min(p[figure] for p in record['curve']):.2g}"] if lowest else []),
                )
            )
    return table(rows)


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """The mean in a format and, of several values, their sample standard deviation."""
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):{form}}"


def mean_curve(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """The means of all figures of several runs, at the steps at which all were evaluated."""
    points = [{point["step"]: point for point in curve} for curve in curves]
    shared = sorted(set.intersection(*map(set, points)))
    return [
        {name: float(np.mean([run[step][name] for run in points])) for name in points[0][step]}
        for step in shared
    ]


def mean_record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of a method as one, with their mean curve and the mean of their times of a step."""
    times = [record["median_step_ms"] for record in records]
    curve = mean_curve([record["curve"] for record in records])
    return {**records[0], "curve": curve, "median_step_ms": float(np.mean(times))}


def plot_curves(
    records: Sequence[dict[str, Any]],
    steps_per_epoch: int | None,
    figures: dict[str, str],
    path: Path,
    *,
    log: bool = True,
) -> None:
    """Draws each figure against epochs or steps and against seconds of training.

    Args:
      records: the runs, as `Run.record` gives them.
      steps_per_epoch: steps of one epoch; None counts steps.
      figures: from a key of the curves' points to its label; a row of two panels each.
      path: the PNG file.
      log: whether losses have a logarithmic axis.
    """
    drawing, panels = plt.subplots(
        len(figures), 2, figsize=(10, 3.6 * len(figures)), squeeze=False, sharey="row"
    )
    for (figure, label), (by_step, by_second) in zip(figures.items(), panels, strict=True):
        for record in records:
            points = [point for point in record["curve"] if point["step"] > 0]
            values = [point[figure] for point in points]
            name = f"{record['method']} ({record['settings']})"
            by_step.plot(
                [point["step"] / (steps_per_epoch or 1) for point in points], values, label=name
            )
            by_second.plot([point["seconds"] for point in points], values, label=name)
        by_step.set(xlabel="epochs" if steps_per_epoch else "steps", ylabel=label)
        by_second.set(xlabel="seconds of training")
        for panel in (by_step, by_second):
            panel.grid(alpha=0.3)
            if log and "loss" in figure:
                panel.set_yscale("log")
    panels[0][1].legend(fontsize=7)
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)
