"""One self-contained page, report.html, beside metrics.json and predictions.csv."""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from PIL import Image
from sklearn import metrics as sk

import hotdog_hf
from hotdog_hf import templates
from hotdog_hf.errors import UserError, printable
from hotdog_hf.files import replacing_folder, writing_to
from hotdog_hf.metrics import CARD_METRICS, MAX_TABLE_CLASSES, most_confused
from hotdog_hf.report.scores import CALIBRATION_BINS, RESAMPLES, confidence_bins, normalise_rows
from hotdog_hf.training.records import write_predictions

matplotlib.use("Agg")  # no window, even if there is a display
from matplotlib import pyplot as plt

FILES = ("metrics.json", "predictions.csv", "report.html")
THUMBNAIL = 256
METRIC_NAMES = CARD_METRICS | {
    "loss": "Log-loss",
    "brier": "Brier score",
    "calibration_error": "Expected calibration error",
    **{f"macro_{key}": f"{name}, mean over classes" for key, name in CARD_METRICS.items()},
}
# Placeholder colours, replaced by variables of the page's style sheet, which knows light from dark mode.
INK, SERIES = "#010203", [f"#0102{10 + index}" for index in range(8)]


def image_uri(image: Image.Image) -> str:
    """Return a thumbnail as a JPEG data URI."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_output_dir(output_dir: str | os.PathLike) -> Path:
    """Return the folder to write; `UserError` if it holds anything but an earlier report."""
    folder = Path(output_dir).resolve()
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        has_report = names == set(FILES) and "hotdog_hf" in json.loads((folder / FILES[0]).read_text())
        ours = has_report or not names
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output-dir {output_dir} holds something other than a report; give another folder")
    return folder


def describe(summary: dict) -> str:
    """Return a table of the metrics, one line each."""
    rows = [f"{'':<40}{'value':>8}{'low':>8}{'high':>8}"]
    for name, entry in summary["values"].items():
        rows.append(f"{METRIC_NAMES[name]:<40}" + "".join(f"{value:8.4f}" for value in entry.values()))
    return "\n".join(rows)


def write_report(
    folder: Path,
    summary: dict,
    files: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    pictures: dict[str, list[dict]],
    knobs: Sequence[tuple[str, str, object]],
    command: str,
) -> None:
    """Write metrics.json, predictions.csv and report.html to `folder` atomically.

    `summary` is that of `summarise` with `model`, `data_dir`, `split`, `label_names`, `positive_label` and
    `threshold` (a dict, or None); a picture has `index`, `photo` and `overlay` (data URIs or None).
    """
    with writing_to(folder), replacing_folder(folder) as part:
        text = json.dumps({"hotdog_hf": hotdog_hf.__version__, **summary}, indent=2, allow_nan=False)
        (part / FILES[0]).write_text(text + "\n", encoding="utf-8")
        write_predictions(part / FILES[1], files, probabilities, labels, summary["label_names"])
        page = _page(summary, files, probabilities, labels, pictures, knobs, command)
        (part / FILES[2]).write_text(page, encoding="utf-8")


def _page(
    summary: dict,
    files: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    pictures: dict[str, list[dict]],
    knobs: Sequence[tuple[str, str, object]],
    command: str,
) -> str:
    names, positive = [printable(name) for name in summary["label_names"]], summary["positive_label"]
    chosen = probabilities.argmax(axis=1)
    shown = [summary["label_names"].index(positive)] if positive and len(names) == 2 else range(len(names))
    # Of very many classes, those with the lowest average precision.
    areas = [column["average_precision"] for column in summary["classes"].values()]
    shown = sorted(sorted(shown, key=areas.__getitem__)[: len(SERIES)])
    for picture in (picture for group in pictures.values() for picture in group):
        index = picture["index"]
        picture |= {"file": printable(files[index]), "label": names[labels[index]]}
        picture |= {"chosen": names[chosen[index]], "probability": probabilities[index].max()}
        picture["right"] = chosen[index] == labels[index]
    return templates.load("report/page.html.j2", autoescape=True).render(
        summary,
        title=printable(summary["model"]),
        shown_data_dir=printable(summary["data_dir"]),
        names=names,
        positive=positive and printable(positive),
        metric_names=METRIC_NAMES,
        headline=[f"{'' if positive else 'macro_'}{name}" for name in ("f1", "roc_auc")],
        plots=_plots(probabilities, labels, shown, positive and summary["label_names"].index(positive)),
        shown=shown,
        max_table=MAX_TABLE_CLASSES,
        confused=most_confused(summary["confusion_matrix"], MAX_TABLE_CLASSES),
        pictures=pictures,
        knobs=knobs,
        command=printable(command),
        version=hotdog_hf.__version__,
        bins=CALIBRATION_BINS,
        resamples=RESAMPLES,
    )


def _plots(
    probabilities: np.ndarray, labels: np.ndarray, shown: Sequence[int], positive: int | None
) -> dict[str, Markup]:
    """Draw the four figures as SVG; the classes `shown` get curves, `positive` the histogram."""
    scores, chosen = normalise_rows(probabilities), probabilities.argmax(axis=1)
    sure, right = scores.max(axis=1), chosen == labels
    bins = [confidence_bins(scores) == index for index in range(CALIBRATION_BINS)]
    filled = [members for members in bins if members.any()]

    def roc(axes: plt.Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for colour, index in zip(SERIES, shown, strict=False):
            false_rates, true_rates, _ = sk.roc_curve(labels == index, scores[:, index])
            axes.plot(false_rates, true_rates, color=colour, clip_on=False)
        axes.set(xlabel="False positive rate", ylabel="True positive rate", xlim=(0, 1), ylim=(0, 1))

    def precision_recall(axes: plt.Axes) -> None:
        for colour, index in zip(SERIES, shown, strict=False):
            precision, recall, _ = sk.precision_recall_curve(labels == index, scores[:, index])
            axes.plot(recall, precision, color=colour, drawstyle="steps-post", clip_on=False)
        axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1))

    def reliability(axes: plt.Axes) -> None:
        x, y = ([values[members].mean() for members in filled] for values in (sure, right))
        sizes = [12 + 160 * members.mean() for members in filled]
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        axes.plot(x, y, color=SERIES[0], linewidth=1)
        axes.scatter(x, y, s=sizes, color=SERIES[0], alpha=0.75, linewidths=0, clip_on=False)
        axes.set(xlabel="Probability of the predicted class", ylabel="Share correct")
        axes.set(xlim=(0, 1), ylim=(0, 1))

    def histogram(axes: plt.Axes) -> None:
        score, first = (sure, right) if positive is None else (scores[:, positive], labels == positive)
        axes.hist(
            [score[first], score[~first]], bins=20, range=(0, 1), stacked=True, color=SERIES[:2], alpha=0.85
        )
        named = "the predicted class" if positive is None else "the positive class"
        axes.set(xlabel=f"Probability of {named}", ylabel="Photos", xlim=(0, 1))
        axes.yaxis.get_major_locator().set_params(integer=True)

    return {draw.__name__: _svg(draw) for draw in (roc, precision_recall, reliability, histogram)}


def _svg(draw: Callable[[plt.Axes], None]) -> Markup:
    style = {"svg.fonttype": "none", "svg.hashsalt": draw.__name__, "font.size": 9, "lines.linewidth": 1.8}
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK}
    buffer = io.StringIO()
    with matplotlib.rc_context(style | {"grid.alpha": 0.12, "axes.axisbelow": True}):
        figure, axes = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
        draw(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")  # without the XML header
    for number, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{number})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{draw.__name__}-", svg)  # four drawings in one page
    return Markup(svg.replace("<svg", '<svg aria-hidden="true"', 1))
