"""The numbers of a report: metrics with bootstrap intervals, and a threshold chosen on validation."""

from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from hotdog_hf.errors import UserError
from hotdog_hf.metrics import ClassificationReport

CALIBRATION_BINS = 15
RESAMPLES = 1000


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
    scores = normalise_rows(probabilities)
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


def normalise_rows(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities [N, classes] in float64, each row divided by its sum."""
    scores = np.asarray(probabilities, dtype=np.float64)
    return scores / scores.sum(axis=1, keepdims=True)


def _weighted(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, positive: int | None
) -> dict[str, np.ndarray]:
    """Return every number for each row of `weights` [R, N] at once: how often a photo counts."""
    chosen, every = scores.argmax(axis=1), range(scores.shape[1])
    truth, total = np.eye(len(every))[labels], weights.sum(axis=1)
    tiny = np.finfo(np.float64).eps  # where scikit-learn's log-loss cuts off too
    squares = ((scores - truth) ** 2).sum(axis=1)
    bins, gaps = confidence_bins(scores), (chosen == labels) - scores.max(axis=1)
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


def confidence_bins(scores: np.ndarray) -> np.ndarray:
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
