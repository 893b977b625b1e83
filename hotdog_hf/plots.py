"""Pictures: the chapter's two, training curves and a look at the data, and those of the study."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no window, also where a display exists
from matplotlib import pyplot as plt


@contextlib.contextmanager
def _axes(size: tuple[float, float], path: str | os.PathLike) -> Iterator[plt.Axes]:
    """Yield axes of so many inches to draw in, and save them as `path`."""
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(rows: list[dict], eval_split: str, path: str | os.PathLike) -> None:
    """Draw train loss, train accuracy and `eval_split` accuracy over the epochs, as the chapter's figure."""
    epochs = [row["epoch"] for row in rows]
    with _axes((5.5, 3.6), path) as axes:
        axes.plot(epochs, [row["train_loss"] for row in rows], label="train loss")
        axes.plot(epochs, [row["train_accuracy"] for row in rows], "m--", label="train acc")
        axes.plot(epochs, [row[f"{eval_split}_accuracy"] for row in rows], "g-.", label=f"{eval_split} acc")
        axes.set(xlabel="epoch", xlim=(epochs[0], max(epochs[-1], epochs[0] + 1)), ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.4)
        axes.legend()


def plot_samples(
    first: Sequence[Image.Image],
    last: Sequence[Image.Image],
    titles: tuple[str, str],
    path: str | os.PathLike,
) -> None:
    """Draw one row of images over another, each in its own aspect ratio, the rows named by `titles`."""
    columns = max(len(first), len(last))
    figure, axes = plt.subplots(2, columns, figsize=(1.4 * columns, 3.4), squeeze=False, layout="constrained")
    for row, images, title in zip(axes, (first, last), titles, strict=True):
        for cell, image in zip(row, images, strict=False):
            cell.imshow(np.asarray(image))
        for cell in row:
            cell.axis("off")
        row[0].set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_arms(rows: dict[str, dict], path: str | os.PathLike) -> None:
    """Draw each arm's mean test accuracy with its interval, best above; nothing where there is no arm."""
    if not rows:
        return
    arms = sorted(rows.values(), key=lambda row: row["mean"])
    with _axes((7, 0.6 + 0.5 * len(arms)), path) as axes:
        for height, row in enumerate(arms):
            low, high = row["interval"] or (row["mean"], row["mean"])
            axes.plot([low, high], [height, height], color="tab:blue", linewidth=3, alpha=0.5)
            axes.plot(row["mean"], height, "o", color="tab:blue")
        axes.set_yticks(range(len(arms)), [row["title"] for row in arms])
        axes.set(xlabel="test accuracy, mean and 95 % interval", ylim=(-0.5, len(arms) - 0.5))
        axes.grid(axis="x", alpha=0.4)


def plot_arm_curves(curves: dict[str, tuple[list[int], list[float]]], path: str | os.PathLike) -> None:
    """Draw the accuracies of all arms over the epochs; nothing where there is no arm."""
    if not curves:
        return
    with _axes((7, 4), path) as axes:
        for title, (epochs, accuracies) in curves.items():
            axes.plot(epochs, accuracies, "o-", markersize=4, label=title)
        axes.set(xlabel="epoch", ylabel="accuracy, mean over seeds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.4)
        axes.legend(fontsize=8)


def plot_rates(rates: Sequence[tuple[float, float | None]], path: str | os.PathLike) -> None:
    """Draw accuracy against the factor on the learning rate; a rate at which the loss diverged is a cross."""
    if not rates:
        return
    with _axes((6, 3.6), path) as axes:
        whole = [(factor, accuracy) for factor, accuracy in rates if accuracy is not None]
        if whole:
            axes.plot(*zip(*whole, strict=True), "o-")
        floor = axes.get_ylim()[0]
        axes.plot([f for f, accuracy in rates if accuracy is None], [floor] * (len(rates) - len(whole)), "rx")
        axes.set(xscale="log", xlabel="times the book's learning rate", ylabel="test accuracy (seed 0)")
        axes.grid(alpha=0.4)
