"""The figures of the study."""

import os
from collections.abc import Sequence

from hotdog_hf.training.plots import figure_axes


def plot_arms(rows: dict[str, dict], path: str | os.PathLike) -> None:
    """Draw each arm's mean test accuracy with its interval, the best at the top; nothing without an arm."""
    if not rows:
        return
    arms = sorted(rows.values(), key=lambda row: row["mean"])
    with figure_axes((7, 0.6 + 0.5 * len(arms)), path) as axes:
        for height, row in enumerate(arms):
            low, high = row["interval"] or (row["mean"], row["mean"])
            axes.plot([low, high], [height, height], color="tab:blue", linewidth=3, alpha=0.5)
            axes.plot(row["mean"], height, "o", color="tab:blue")
        axes.set_yticks(range(len(arms)), [row["title"] for row in arms])
        axes.set(xlabel="test accuracy, mean and 95 % interval", ylim=(-0.5, len(arms) - 0.5))
        axes.grid(axis="x", alpha=0.4)


def plot_arm_curves(curves: dict[str, tuple[list[int], list[float]]], path: str | os.PathLike) -> None:
    """Draw the accuracies of all arms over the epochs; nothing without an arm."""
    if not curves:
        return
    with figure_axes((7, 4), path) as axes:
        for title, (epochs, accuracies) in curves.items():
            axes.plot(epochs, accuracies, "o-", markersize=4, label=title)
        axes.set(xlabel="epoch", ylabel="accuracy, mean over seeds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.4)
        axes.legend(fontsize=8)


def plot_rates(rates: Sequence[tuple[float, float | None]], path: str | os.PathLike) -> None:
    """Draw accuracy against the factor on the learning rate; crosses are rates with a diverged loss."""
    if not rates:
        return
    with figure_axes((6, 3.6), path) as axes:
        whole = [(factor, accuracy) for factor, accuracy in rates if accuracy is not None]
        if whole:
            axes.plot(*zip(*whole, strict=True), "o-")
        floor = axes.get_ylim()[0]
        axes.plot([f for f, accuracy in rates if accuracy is None], [floor] * (len(rates) - len(whole)), "rx")
        axes.set(xscale="log", xlabel="times the book's learning rate", ylabel="test accuracy (seed 0)")
        axes.grid(alpha=0.4)
