"""One self-contained page, report.html, beside metrics.json and predictions.csv."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib import pyplot as plt
from sklearn import metrics as sk

import hotdog_hf
from hotdog_hf import templates, webpage
from hotdog_hf.errors import printable
from hotdog_hf.files import replacing_folder, writing_to
from hotdog_hf.metrics import CARD_METRICS, MAX_TABLE_CLASSES, most_confused
from hotdog_hf.model.calibration import uncalibrated
from hotdog_hf.report.scores import CALIBRATION_BINS, RESAMPLES, confidence_bins, normalise_rows
from hotdog_hf.training.records import write_predictions
from hotdog_hf.webpage import INK, SERIES

FILES = ("metrics.json", "predictions.csv", "report.html")
METRIC_NAMES = CARD_METRICS | {
    "loss": "Log-loss",
    "balanced_accuracy": "Accuracy, mean over classes",
    "balanced_loss": "Log-loss, mean over classes",
    "brier": "Brier score",
    "calibration_error": "Expected calibration error",
    **{f"macro_{key}": f"{name}, mean over classes" for key, name in CARD_METRICS.items()},
}
check_output_dir = functools.partial(webpage.check_output_dir, files=FILES, what="a report")


def describe(summary: dict) -> str:
    """Return a table of the metrics, one line each."""
    rows = [f"{'with the 95 % interval from low to high':<40}{'value':>8}{'low':>8}{'high':>8}"]
    for name, entry in summary["values"].items():
        rows.append(f"{METRIC_NAMES[name]:<40}" + "".join(f"{value:8.4f}" for value in entry.values()))
    if positive := summary["positive_label"]:
        rows.append(f"precision, recall, F1, ROC-AUC, average precision: of the class {printable(positive)}")
    for level in (summary["rejection"] or {"levels": []})["levels"]:
        foreign = "" if level["caught"] is None else f", {level['caught']:.1%} of the foreign ones"
        unknown = f"{1 - level['kept']:.1%} of these photos{foreign}"
        rows.append(f"predict.py --reject --keep {level['promised']}: unknown are {unknown}")
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
    distances: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> None:
    """Write metrics.json, predictions.csv and report.html to `folder` atomically.

    `summary` is that of `summarise` with `model`, `data_dir`, `split`, `label_names`, `positive_label`,
    `threshold`, `calibration` and `rejection` (a dict, or None); a picture has `index`, `photo` and `overlay`
    (data URIs or None). `distances` are those of the split's photos and of foreign ones, None without.
    """
    with writing_to(folder), replacing_folder(folder) as part:
        text = json.dumps({"hotdog_hf": hotdog_hf.__version__, **summary}, indent=2, allow_nan=False)
        (part / FILES[0]).write_text(text + "\n", encoding="utf-8")
        write_predictions(part / FILES[1], files, probabilities, labels, summary["label_names"])
        page = _page(summary, files, probabilities, labels, pictures, knobs, command, distances)
        (part / FILES[2]).write_text(page, encoding="utf-8")


def _page(
    summary: dict,
    files: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    pictures: dict[str, list[dict]],
    knobs: Sequence[tuple[str, str, object]],
    command: str,
    distances: tuple[np.ndarray | None, np.ndarray | None],
) -> str:
    names, positive = [printable(name) for name in summary["label_names"]], summary["positive_label"]
    chosen, calibration = probabilities.argmax(axis=1), summary.get("calibration")
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
        plots=_plots(
            probabilities,
            labels,
            shown,
            positive and summary["label_names"].index(positive),
            (calibration or {}).get("temperature", 1.0),
        ),
        calibration=calibration,
        rejection=summary.get("rejection"),
        distances=distances[0] is not None and _distances(*distances, summary["rejection"]["levels"]),
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
    probabilities: np.ndarray,
    labels: np.ndarray,
    shown: Sequence[int],
    positive: int | None,
    temperature: float,
) -> dict[str, Markup]:
    """Draw the four figures as SVG; the classes `shown` get curves, `positive` the histogram.

    Reliability is shown with and without the division by `temperature`, if it is not 1.
    """
    scores, chosen = normalise_rows(probabilities), probabilities.argmax(axis=1)
    sure, right = scores.max(axis=1), chosen == labels

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
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        curves = [(scores, SERIES[0])]
        if temperature != 1:
            curves.insert(0, (uncalibrated(scores, temperature), SERIES[1]))
        for rows, colour in curves:
            bins = [confidence_bins(rows) == index for index in range(CALIBRATION_BINS)]
            filled = [members for members in bins if members.any()]
            x, y = ([values[members].mean() for members in filled] for values in (rows.max(axis=1), right))
            sizes = [12 + 160 * members.mean() for members in filled]
            axes.plot(x, y, color=colour, linewidth=1)
            axes.scatter(x, y, s=sizes, color=colour, alpha=0.75, linewidths=0, clip_on=False)
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

    return {draw.__name__: webpage.svg(draw) for draw in (roc, precision_recall, reliability, histogram)}


def _distances(own: np.ndarray, foreign: np.ndarray | None, levels: Sequence[dict]) -> Markup:
    """Draw the distances of a split's photos, and of foreign ones, with the limit of each level."""

    def distances(axes: plt.Axes) -> None:
        shown = [own] if foreign is None else [own, foreign]
        bins = np.linspace(0, max(values.max() for values in shown), 31)
        for values, colour in zip(shown, SERIES, strict=False):
            shares = np.full(len(values), 1 / len(values))
            axes.hist(values, bins=bins, weights=shares, color=colour, alpha=0.6)
        for level in levels:
            axes.axvline(level["limit"], color=INK, linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="Distance to the nearest training photos", ylabel="Share of the photos", xlim=(0, None)
        )

    return webpage.svg(distances)
