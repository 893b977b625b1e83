"""A saved model judged on one split: numbers with intervals, a table, one page that needs no other file."""

import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import captum.attr
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from markupsafe import Markup
from PIL import Image
from sklearn import metrics as sk

import hotdog_hf
from hotdog_hf import templates
from hotdog_hf.card import CARD_METRICS
from hotdog_hf.errors import UserError, printable
from hotdog_hf.files import replacing_folder, writing_to
from hotdog_hf.metrics import ClassificationReport
from hotdog_hf.run import write_predictions

matplotlib.use("Agg")  # no window, also where a display exists
from matplotlib import pyplot as plt

FILES = ("metrics.json", "predictions.csv", "report.html")
CALIBRATION_BINS = 15
RESAMPLES = 1000
GALLERY_SIZE = 12
THUMBNAIL = 256
METRIC_NAMES = CARD_METRICS | {
    "loss": "Log-loss",
    "brier": "Brier score",
    "calibration_error": "Expected calibration error",
    **{f"macro_{key}": f"{name}, mean over classes" for key, name in CARD_METRICS.items()},
}
# Drawn in these and then named by the page's style sheet, which knows whether it is light or dark.
INK, SERIES = "#010203", [f"#0102{10 + index}" for index in range(8)]


def label_order(data_names: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """Return the model's index of every class of the data; `UserError` where they are not the same."""
    if only := sorted(set(data_names) ^ set(label_names)):
        where = [f"{name!r} (only in the {'data' if name in data_names else 'model'})" for name in only]
        raise UserError(f"the classes of the model and of the data do not agree: {', '.join(where)}")
    return np.array([list(label_names).index(name) for name in data_names])


def summarise(
    probabilities: np.ndarray, labels: np.ndarray, label_names: list[str], positive_label: str | None
) -> dict:
    """Return each number of a split as value, low and high, the confusion matrix, and each class's numbers.

    Low and high are the 95 % percentile bootstrap interval over photos: `RESAMPLES` draws from one seed.
    """
    known = ClassificationReport(label_names, positive_label).compute(
        predictions=probabilities, references=labels
    )
    confusion = known.pop("confusion_matrix")
    positive = None if positive_label is None else label_names.index(positive_label)
    scores = _normalised(probabilities)
    ones = np.ones((1, len(labels)))
    values = {name: float(value[0]) for name, value in _weighted(scores, labels, ones, positive).items()}
    rng, draws = np.random.default_rng(0), []
    for _ in range(0, RESAMPLES, 100):  # in portions: a resample is a weight for every photo
        drawn = rng.integers(0, len(labels), (100, len(labels)))
        weights = np.stack([np.bincount(row, minlength=len(labels)) for row in drawn])
        draws.append(_weighted(scores, labels, weights, positive))
    intervals = {}
    for name, value in (values | known).items():
        # A resample without any photo of a class has no ROC-AUC of it.
        low, high = np.nanquantile(np.concatenate([draw[name] for draw in draws]), (0.025, 0.975))
        intervals[name] = {"value": value, "low": float(low), "high": float(high)}
    chosen = scores.argmax(axis=1)
    classes = [_one_class(labels == i, chosen == i, scores[:, i], ones) for i in range(len(label_names))]
    by_class = [{name: float(value[0]) for name, value in column.items()} for column in classes]
    return {
        "photos": len(labels),
        "values": intervals,
        "confusion_matrix": confusion,
        "classes": dict(zip(label_names, by_class, strict=True)),
    }


def _normalised(probabilities: np.ndarray) -> np.ndarray:
    scores = np.asarray(probabilities, dtype=np.float64)
    return scores / scores.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only roughly


def _weighted(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, positive: int | None
) -> dict[str, np.ndarray]:
    """Return every number for each row of `weights` [R, N] at once: how often a photo counts."""
    chosen, every = scores.argmax(axis=1), range(scores.shape[1])
    truth, total = np.eye(len(every))[labels], weights.sum(axis=1)
    tiny = np.finfo(np.float64).eps  # where scikit-learn's log-loss cuts off too
    squares = ((scores - truth) ** 2).sum(axis=1)
    bins, gaps = _bins(scores), (chosen == labels) - scores.max(axis=1)
    in_bins = weights @ (gaps[:, None] * (bins[:, None] == np.arange(CALIBRATION_BINS)))
    values = {
        "accuracy": weights @ (chosen == labels) / total,
        "loss": weights @ -np.log((scores * truth).sum(axis=1).clip(tiny, 1 - tiny)) / total,
        # Of two classes the square of one class alone, as is usual (and scikit-learn's).
        "brier": weights @ (squares / 2 if len(every) == 2 else squares) / total,
        "calibration_error": np.abs(in_bins).sum(axis=1) / total,
    }
    macro = positive is None or len(every) > 2
    columns = {
        index: _one_class(labels == index, chosen == index, scores[:, index], weights)
        for index in (every if macro else [positive])
    }
    if positive is not None:
        values |= columns[positive]
    if macro:
        for name in columns[0]:
            values[f"macro_{name}"] = np.mean([column[name] for column in columns.values()], axis=0)
    return values


def _one_class(
    truth: np.ndarray, chosen: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return one class's numbers against the rest; NaN for an area where no photo of either kind counts."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=-np.inf))  # equal scores are passed in one step
    hits = np.cumsum(weights[:, order] * truth[order], axis=1)[:, ends]
    alarms = np.cumsum(weights[:, order] * ~truth[order], axis=1)[:, ends]
    right, said, there = weights @ (truth & chosen), weights @ chosen, weights @ truth
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = np.hstack([np.zeros((len(weights), 1)), hits / hits[:, -1:]])
        false_rates = np.hstack([np.zeros((len(weights), 1)), alarms / alarms[:, -1:]])
        precisions = np.where(hits > 0, hits / (hits + alarms), 0)
    return {
        "precision": right / np.maximum(said, 1),
        "recall": right / np.maximum(there, 1),
        "f1": 2 * right / np.maximum(said + there, 1),
        "roc_auc": (np.diff(false_rates) * (recalls[:, 1:] + recalls[:, :-1]) / 2).sum(axis=1),
        "average_precision": (np.diff(recalls) * precisions).sum(axis=1),
    }


def _bins(scores: np.ndarray) -> np.ndarray:
    """Return each photo's bin of equal width by the probability of the class chosen."""
    return np.minimum((scores.max(axis=1) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def choose_threshold(predicted: dict[str, tuple[np.ndarray, np.ndarray]], positive: int) -> dict:
    """Return from which probability on "positive" gives the highest F1 on validation, and what it then gives.

    `predicted` has the probabilities and labels of "validation", and of any split that is judged by it.
    """
    rows, labels = predicted["validation"]
    precision, recall, thresholds = sk.precision_recall_curve(labels == positive, rows[:, positive])
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    value = thresholds[f1[:-1].argmax()]
    chosen = {"value": float(value)}
    for split, (rows, labels) in predicted.items():
        *scores, _ = sk.precision_recall_fscore_support(
            labels == positive, rows[:, positive] >= value, average="binary", zero_division=0
        )
        chosen[split] = dict(zip(("precision", "recall", "f1"), map(float, scores), strict=True))
    return chosen


def grad_cam(net: torch.nn.Module, pixels: torch.Tensor, target: int) -> np.ndarray | None:
    """Return where in `pixels` [3, H, W] the network saw class `target`: a map [H, W] from 0 to 1.

    None where the last feature stage gives no [C, h, w], as in a vision transformer.
    """
    try:
        stage = net.feature_info[-1]
        layer, channels = net.get_submodule(stage["module"]), stage["num_chs"]
    except (AttributeError, IndexError, KeyError, TypeError):  # timm promises no feature_info
        return None
    shapes = [()]

    def note_shape(_layer: torch.nn.Module, _inputs: tuple, output: object) -> None:
        shapes.append(getattr(output, "shape", ()))  # HRNet's is a list of maps

    with layer.register_forward_hook(note_shape), torch.no_grad():
        net(pixels[None])
    if len(shapes[-1]) != 4 or shapes[-1][1] != channels:
        return None
    heat = captum.attr.LayerGradCam(net, layer).attribute(pixels[None], target, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), pixels.shape[1:], mode="bilinear")[0, 0].cpu().numpy()
    return heat / max(heat.max(), np.finfo(np.float32).tiny)


def overlay(pixels: torch.Tensor, heat: np.ndarray, data_config: dict) -> Image.Image:
    """Return what the network saw, coloured by the map."""
    mean, std = (np.array(data_config[name])[:, None, None] for name in ("mean", "std"))
    seen = (pixels.cpu().numpy() * std + mean).clip(0, 1).transpose(1, 2, 0)
    colours = matplotlib.colormaps["turbo"](heat)[..., :3]
    strength = 0.65 * heat[..., None] ** 0.7
    return Image.fromarray((255 * (seen * (1 - strength) + colours * strength)).astype(np.uint8))


def galleries(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """Return which photos are looked at: the most confident mistakes, and the least certain answers."""
    chosen, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    mistakes = [int(i) for i in np.argsort(-sure, kind="stable") if chosen[i] != labels[i]]
    unsure = np.argsort(sure, kind="stable")[:GALLERY_SIZE].tolist()
    return {"mistakes": mistakes[:GALLERY_SIZE], "unsure": unsure}


def image_uri(image: Image.Image) -> str:
    """Return a thumbnail as a JPEG data URI."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def run_knobs(model: str) -> list[tuple[str, str, object]]:
    """Return group, name and value of every knob of the run that a model folder lies in; none elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(model).resolve().parent / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "recipe" in config:  # else it is something else's config.json
            groups = {name: value for name, value in config.items() if isinstance(value, dict)}
            return [("", "recipe", config["recipe"])] + [
                (group, *knob) for group, knobs in groups.items() for knob in knobs.items()
            ]
    return []


def validation_cut(knobs: Sequence[tuple[str, str, object]], data_dir: str) -> tuple[float, int]:
    """Return the share of train that a run of these knobs held back, and its seed; none of other photos."""
    knob = {name: value for _, name, value in knobs}
    if "data_dir" in knob and Path(knob["data_dir"]).resolve() == Path(data_dir).resolve():
        return knob["val_fraction"], knob["seed"]
    return 0.0, 0


def check_output_dir(output_dir: str | os.PathLike) -> Path:
    """Return the folder to write; `UserError` where something that is no report of ours is there already."""
    folder = Path(output_dir).resolve()
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        has_report = names == set(FILES) and "hotdog_hf" in json.loads((folder / FILES[0]).read_text())
        ours = has_report or not names
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output-dir {output_dir} holds something else than a report; give another one")
    return folder


def describe(summary: dict) -> str:
    """Return a table of the numbers, a line each."""
    rows = [f"{'':<40}{'value':>8}{'low':>8}{'high':>8}"]
    for name, entry in summary["values"].items():
        rows.append(f"{METRIC_NAMES[name]:<40}" + "".join(f"{value:8.4f}" for value in entry.values()))
    return "\n".join(rows)


def write_report(
    folder: Path,
    summary: dict,
    *,
    files: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    pictures: dict[str, list[dict]],
    knobs: Sequence[tuple[str, str, object]],
    command: str,
) -> None:
    """Write metrics.json, predictions.csv and report.html beside `folder` and move them there whole.

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
    # Of very many classes the worst told apart.
    areas = [column["average_precision"] for column in summary["classes"].values()]
    shown = sorted(sorted(shown, key=areas.__getitem__)[: len(SERIES)])
    for picture in (picture for group in pictures.values() for picture in group):
        index = picture["index"]
        picture |= {"file": printable(files[index]), "label": names[labels[index]]}
        picture |= {"chosen": names[chosen[index]], "probability": probabilities[index].max()}
        picture["right"] = chosen[index] == labels[index]
    return templates.load("report.html.j2", autoescape=True).render(
        summary,
        title=printable(summary["model"]),
        shown_data_dir=printable(summary["data_dir"]),
        names=names,
        positive=positive and printable(positive),
        metric_names=METRIC_NAMES,
        headline=[f"{'' if positive else 'macro_'}{name}" for name in ("f1", "roc_auc")],
        plots=_plots(probabilities, labels, shown, positive and summary["label_names"].index(positive)),
        shown=shown,
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
    """Draw the four figures as SVG; the classes `shown` get a curve, `positive` is that of the scores."""
    scores, chosen = _normalised(probabilities), probabilities.argmax(axis=1)
    sure, right = scores.max(axis=1), chosen == labels
    bins = [_bins(scores) == index for index in range(CALIBRATION_BINS)]
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
        axes.set(xlabel="Probability of the class chosen", ylabel="Share right", xlim=(0, 1), ylim=(0, 1))

    def histogram(axes: plt.Axes) -> None:
        score, first = (sure, right) if positive is None else (scores[:, positive], labels == positive)
        axes.hist(
            [score[first], score[~first]], bins=20, range=(0, 1), stacked=True, color=SERIES[:2], alpha=0.85
        )
        named = "the class chosen" if positive is None else "the positive class"
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
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")  # from the XML's head on
    for number, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{number})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{draw.__name__}-", svg)  # four drawings in one page
    return Markup(svg.replace("<svg", '<svg aria-hidden="true"', 1))
