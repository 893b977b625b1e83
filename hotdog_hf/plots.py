"""The chapter's two pictures: the training curves, and a look at the data."""

import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no window, also where a display exists
from matplotlib import pyplot as plt


def plot_curves(rows: list[dict], eval_split: str, path: str | os.PathLike) -> None:
    """Draw train loss, train accuracy and `eval_split` accuracy over the epochs, as the chapter's figure."""
    epochs = [row["epoch"] for row in rows]
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    axes.plot(epochs, [row["train_loss"] for row in rows], label="train loss")
    axes.plot(epochs, [row["train_accuracy"] for row in rows], "m--", label="train acc")
    axes.plot(epochs, [row[f"{eval_split}_accuracy"] for row in rows], "g-.", label=f"{eval_split} acc")
    axes.set(xlabel="epoch", xlim=(1, max(len(rows), 2)), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.4)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
