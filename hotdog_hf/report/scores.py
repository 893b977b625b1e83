"""The metrics of a report: values with bootstrap intervals, and a threshold chosen on validation."""

from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from hotdog_hf.classification import ClassificationReport
from hotdog_hf.errors import UserError
from hotdog_hf.metrics import (
    CALIBRATION_BINS,
    balanced_scores,
    calibration_error,
    class_scores,
    confidence_bins,
    log_loss,
    sum_by,
)
from hotdog_hf.model.calibration import (
    classes_within,
    conformal_quantile,
    photos_needed,
    set_limit,
    uncalibrated,
)
from hotdog_hf.model.neighbors import Neighbors

RESAMPLES = 1000
# What the sets of classes promise in a report.
COVERAGES = (0.9, 0.95)
# The shares of photos that keep their answer in a report, if a model can say `unknown`.
KEPT = (0.9, 0.95, 0.99)
# Photos times resamples per chunk of weights, 4 bytes each.
MAX_WEIGHTS = 2_000_000


def label_order(data_names: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """Return the model's index of every class of the data; `UserError` if they are not the same."""
    if only := sorted(set(data_names) ^ set(label_names)):
        where = [f"{name!r} (only in the {'data' if name in data_names else 'model'})" for name in only]
        raise UserError(
            f"the classes of the model and of the data do not agree: {', '.join(where)};"
            " give --data-dir photos of the model's classes"
        )
    return np.array([list(label_names).index(name) for name in data_names])


def summarise(
    probabilities: np.ndarray, labels: np.ndarray, label_names: list[str], positive_label: str | None
) -> dict:
    """Return each metric of a split as value, low and high, the confusion matrix, and each class's metrics.

    Low and high are the 95 % percentile bootstrap interval over photos: `RESAMPLES` draws from one seed.
    """
    known = ClassificationReport(label_names, positive_label).compute(
        predictions=probabilities, references=labels
    )
    confusion = known.pop("confusion_matrix")
    positive = None if positive_label is None else label_names.index(positive_label)
    scores = normalise_rows(probabilities)
    ones = np.ones((1, len(labels)), np.float32)
    values = {name: float(value[0]) for name, value in _weighted(scores, labels, ones, positive).items()}
    rng, draws = np.random.default_rng(0), []
    portion = max(min(MAX_WEIGHTS // len(labels), RESAMPLES), 1)
    for start in range(0, RESAMPLES, portion):
        weights = np.empty((min(portion, RESAMPLES - start), len(labels)), np.float32)
        for row in weights:  # a resample is one weight per photo
            row[:] = np.bincount(rng.integers(0, len(labels), len(labels)), minlength=len(labels))
        draws.append(_weighted(scores, labels, weights, positive))
    intervals = {}
    for name, value in (values | known).items():
        # A resample without any photo of a class has no ROC-AUC for it.
        low, high = np.nanquantile(np.concatenate([draw[name] for draw in draws]), (0.025, 0.975))
        intervals[name] = {"value": value, "low": float(low), "high": float(high)}
    columns = class_scores(scores, labels)
    by_class = [
        {name: float(column[index, 0]) for name, column in columns.items()}
        for index in range(len(label_names))
    ]
    return {
        "photos": len(labels),
        "values": intervals,
        "confusion_matrix": confusion,
        "classes": dict(zip(label_names, by_class, strict=True)),
    }


def normalise_rows(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities [N, classes] in float64, each row divided by its sum."""
    scores = np.array(probabilities, dtype=np.float64)
    scores /= scores.sum(axis=1, keepdims=True)  # in place: with many classes a copy is large
    return scores


def _weighted(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, positive: int | None
) -> dict[str, np.ndarray]:
    """Return every metric, [R], for each row of `weights`, float32 [R, N]: how often each photo counts.

    Means over classes leave out those without a photo: with few photos of many classes no resample has them
    all.
    """
    chosen, classes = scores.argmax(axis=1), scores.shape[1]
    tiny = np.finfo(np.float64).eps  # scikit-learn's log-loss cuts off there too
    true_score = scores[np.arange(len(labels)), labels]
    squares = np.maximum(np.einsum("nc,nc->n", scores, scores) - 2 * true_score + 1, 0)
    bins, gaps = confidence_bins(scores), (chosen == labels) - scores.max(axis=1)
    by_photo = [chosen == labels, -np.log(true_score.clip(tiny, 1 - tiny))]
    # With two classes the square of one class only, as usual (and in scikit-learn).
    by_photo += [squares / 2 if classes == 2 else squares]
    by_photo += [gaps * (bins == index) for index in range(CALIBRATION_BINS)]
    accuracy, loss, brier, *in_bins = (
        weights @ np.stack(by_photo, axis=1) / weights.sum(axis=1, keepdims=True)
    ).T
    values = {
        "accuracy": accuracy,
        "loss": loss,
        "brier": brier,
        "calibration_error": np.abs(in_bins).sum(axis=0),
    }
    macro = positive is None or classes > 2
    by_resample = np.ascontiguousarray(weights.T)
    values |= balanced_scores(scores, labels, by_resample)
    columns = class_scores(scores, labels, by_resample, None if macro else positive)
    if positive is not None:
        values |= {name: column[positive if macro else 0] for name, column in columns.items()}
    if macro:
        counts = sum_by(labels, classes, by_resample) > 0
        for name, column in columns.items():
            values[f"macro_{name}"] = np.where(counts, column, 0).sum(axis=0) / counts.sum(axis=0)
    return values


def summarise_calibration(
    probabilities: np.ndarray, labels: np.ndarray, calibration: dict | None
) -> dict | None:
    """Return log-loss and calibration error before and after a model's calibration, and what its sets hold.

    The sets are those of `COVERAGES` that the model has enough held-out photos for. None for a model without
    calibration.
    """
    if not calibration:
        return None
    scores, kept = normalise_rows(probabilities), len(calibration["scores"])
    both = {"before": uncalibrated(scores, calibration["temperature"]), "after": scores}
    sets = []
    for coverage in COVERAGES:
        if kept >= photos_needed(coverage):
            within = classes_within(scores, set_limit(calibration, coverage, "the model"))
            sizes = within.sum(axis=1)
            sets.append(
                {
                    "promised": coverage,
                    "reached": float(within[np.arange(len(labels)), labels].mean()),
                    "classes": float(sizes.mean()),
                    "single": float((sizes == 1).mean()),
                    "empty": float((sizes == 0).mean()),
                }
            )
    return {
        **{name: calibration[name] for name in ("temperature", "held_out", "photos")},
        "loss": {name: log_loss(rows, labels) for name, rows in both.items()},
        "calibration_error": {name: calibration_error(rows, labels) for name, rows in both.items()},
        "sets": sets,
    }


def summarise_rejection(
    kept: Neighbors | None, distances: np.ndarray | None, foreign: np.ndarray | None
) -> dict | None:
    """Return how many photos are unknown at each share that a model promises to keep; None if it cannot tell.

    `distances` [N] are those of a split's photos, `foreign` [M] those of photos of other things, None without
    any; for these also how well the distance tells them from the split's (ROC-AUC).
    """
    if kept is None:
        return None
    levels = []
    for keep in KEPT:
        limit = conformal_quantile(kept.held_out_distances, keep)
        if limit is not None:
            caught = None if foreign is None else float((foreign > limit).mean())
            levels.append(
                {
                    "promised": keep,
                    "limit": limit,
                    "kept": float((distances <= limit).mean()),
                    "caught": caught,
                }
            )
    auc = None
    if foreign is not None:
        is_foreign = np.repeat([0, 1], [len(distances), len(foreign)])
        auc = float(sk.roc_auc_score(is_foreign, np.concatenate([distances, foreign])))
    return {
        "training_photos": len(kept.features),
        "held_out": kept.held_out,
        "photos": len(kept.held_out_distances),
        "levels": levels,
        "foreign_photos": None if foreign is None else len(foreign),
        "roc_auc": auc,
    }


def choose_threshold(predicted: dict[str, tuple[np.ndarray, np.ndarray]], positive: int) -> dict:
    """Return the threshold on the positive class's probability with the highest F1 on validation, and scores.

    `predicted` has the probabilities and labels of "validation", and of any split to evaluate with it.
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
