"""Runs side by side: one self-contained page, and a table for the terminal. No torch here."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib import pyplot as plt

import hotdog_hf
from hotdog_hf import templates, webpage
from hotdog_hf.compare.runs import Run, differing_knobs, differing_photos, metrics, paired
from hotdog_hf.data.images import decode_image
from hotdog_hf.errors import UserError, printable
from hotdog_hf.files import replacing_folder, writing_to

FILES = ("compare.json", "compare.html")
# A colour of the style sheet for each run.
MAX_RUNS = len(webpage.SERIES)
SHOWN = 24
check_output_dir = functools.partial(webpage.check_output_dir, files=FILES, what="a comparison")


def write_comparison(folder: Path, runs: Sequence[Run], summary: dict, command: str) -> None:
    """Write compare.json and compare.html beside `folder` and move them there whole.

    `summary` is that of `summarise`.
    """
    with writing_to(folder), replacing_folder(folder) as part:
        content = {"hotdog_hf": hotdog_hf.__version__, **summary}
        (part / FILES[0]).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (part / FILES[1]).write_text(_page(runs, summary, command), encoding="utf-8")


def summarise(runs: Sequence[Run]) -> dict:
    """Return each run's metrics, its difference to the first, and the knobs and photos that differ."""
    first, *others = runs
    return {
        "runs": {run.name: metrics(run) for run in runs},
        "against": first.name,
        "paired": {run.name: paired(first, run) for run in others},
        "knobs": differing_knobs(runs),
        "photos": [first.files[index] for index in differing_photos(runs)],
    }


def describe(runs: Sequence[Run], summary: dict) -> str:
    """Return the table for the terminal: one line per run, compared with the first."""
    names = [printable(run.name) for run in runs]
    width = max(map(len, names))
    lines = [f"{'run':<{width}}  accuracy  log-loss  accuracy against the first (95 % interval), McNemar's p"]
    for name, run in zip(names, runs, strict=True):
        accuracy, loss = (entry["value"] for entry in summary["runs"][run.name].values())
        line = f"{name:<{width}}  {accuracy:8.3f}  {loss:8.3f}"
        if run is not runs[0]:
            pair = summary["paired"][run.name]
            gain, low, high = pair["accuracy"].values()
            p_value = "p < 0.001" if pair["p_value"] < 0.0005 else f"p = {pair['p_value']:.3f}"
            line += f"  {gain:+.3f} ({low:+.3f} to {high:+.3f}), {p_value}"
        lines.append(line)
    differing = f"{len(summary['photos'])} of {len(runs[0].files)} test photos"
    return "\n".join([*lines, f"{differing} are classified correctly by only some of the runs"])


def _page(runs: Sequence[Run], summary: dict, command: str) -> str:
    photos = differing_photos(runs)
    return templates.load("compare/page.html.j2", autoescape=True).render(
        runs=[printable(run.name) for run in runs],
        metrics=list(summary["runs"].values()),
        pairs=list(summary["paired"].values()),
        knobs=summary["knobs"],
        test_photos=len(runs[0].files),
        plots={draw: _curves(runs, draw) for draw in ("train_loss", "accuracy")},
        accuracy_splits=sorted({_eval_split(run) for run in runs}),
        differing=len(photos),
        photos=[_picture(runs, index) for index in photos[:SHOWN]],
        command=printable(command),
        version=hotdog_hf.__version__,
    )


def _eval_split(run: Run) -> str:
    """Return the split that the run's epochs were evaluated on."""
    return "validation" if any("validation_accuracy" in row for row in run.epochs) else "test"


def _curves(runs: Sequence[Run], which: str) -> Markup:
    """Draw one measure of all runs over their epochs."""

    def draw(axes: plt.Axes) -> None:
        for colour, run in zip(webpage.SERIES, runs, strict=False):
            key = which if which == "train_loss" else f"{_eval_split(run)}_accuracy"
            points = [(row["epoch"], row[key]) for row in run.epochs if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4)
        axes.set(xlabel="Epoch", ylabel="Train loss" if which == "train_loss" else "Accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)

    draw.__name__ = which
    return webpage.svg(draw)


def _picture(runs: Sequence[Run], index: int) -> dict:
    first = runs[0]
    answers = []
    for run in runs:
        best = int(run.probabilities[index].argmax())
        answers.append(
            {
                "run": printable(run.name),
                "label": printable(run.label_names[best]),
                "probability": float(run.probabilities[index, best]),
                "right": best == first.labels[index],
            }
        )
    return {
        "photo": _thumbnail(first, index),
        "file": printable(first.files[index]),
        "label": printable(first.label_names[first.labels[index]]),
        "answers": answers,
    }


def _thumbnail(run: Run, index: int) -> str | None:
    """Return a photo of the run's data folder as a data URI; None if it is not there any more."""
    try:
        return webpage.image_uri(decode_image(Path(run.config["data"]["data_dir"], run.files[index])))
    except (UserError, KeyError, TypeError):
        return None
