"""The chapter's two figures: training curves, and sample photos."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from matplotlib import pyplot as plt

# Pixels a side of an image among the samples, and the white around it.
CELL, MARGIN = 160, ((4, 4), (4, 4), (0, 0))


def _pyplot() -> ModuleType:
    """Import matplotlib, which takes seconds, when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")  # no window, even if there is a display
    from matplotlib import pyplot as plt

    return plt


@contextlib.contextmanager
def figure_axes(size: tuple[float, float], path: str | os.PathLike) -> Iterator["plt.Axes"]:
    """Yield axes of `size` inches to draw in, then save them as `path`."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(rows: list[dict], eval_split: str, path: str | os.PathLike) -> None:
    """Draw train loss, train accuracy and `eval_split` accuracy over the epochs, as in the chapter.

    An epoch that was not evaluated has no `eval_split` accuracy; a single one is a point.
    """
    epochs = [row["epoch"] for row in rows]
    evaluated = [row for row in rows if f"{eval_split}_accuracy" in row]
    with figure_axes((5.5, 3.6), path) as axes:
        axes.plot(epochs, [row["train_loss"] for row in rows], label="train loss")
        axes.plot(epochs, [row["train_accuracy"] for row in rows], "m--", label="train acc")
        shown = [[row[name] for row in evaluated] for name in ("epoch", f"{eval_split}_accuracy")]
        axes.plot(*shown, "go" if len(evaluated) == 1 else "g-.", label=f"{eval_split} acc")
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
    """Draw two rows of images, each image in its own aspect ratio, the rows named by `titles`."""
    plt, columns = _pyplot(), max(len(first), len(last))
    # One picture per row: axes for each image would take longer than all else.
    figure, axes = plt.subplots(2, figsize=(1.4 * columns, 3.4), layout="constrained")
    for row, images, title in zip(axes, (first, last), titles, strict=True):
        cells = [ImageOps.pad(image, (CELL, CELL), color="white") for image in images]
        row.imshow(np.concatenate([np.pad(cell, MARGIN, constant_values=255) for cell in cells], axis=1))
        row.set_xlim(0, columns * (CELL + 2 * MARGIN[1][0]))
        row.axis("off")
        row.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
