"""Accuracy, precision, recall, F1, ROC-AUC, log-loss and calibration error: their names and formulas."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse, special

# Names of the metrics: on the Hub, and for people.
CARD_METRICS = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "average_precision": "Average precision",
}

# With more classes, a page lists the most frequent confusions instead of the whole table.
MAX_TABLE_CLASSES = 30
# Bins of equal width of the calibration error.
CALIBRATION_BINS = 15
# Entries of the largest table that areas are computed from, 8 bytes each.
AREA_TABLE = 1_000_000


def quality(scores: dict, start: dict | None = None, balanced: bool = False) -> list[float]:
    """Return what makes one epoch better than another: a lower log-loss, `balanced` or over all photos.

    It tells epochs apart where accuracy, on a few photos, counts some by chance. No epoch is better than the
    `start`, a fitted head's scores, that is less accurate.
    """
    prefix = "balanced_" if balanced else ""
    accuracy, loss = scores[f"{prefix}accuracy"], scores[f"{prefix}loss"]
    return [float(start is None or accuracy >= start[f"{prefix}accuracy"]), -loss]


def most_confused(confusion_matrix: Sequence[Sequence[int]], count: int) -> list[tuple[int, int, int]]:
    """Return the most frequent mistakes as (true class, predicted class, photos), most frequent first."""
    mistakes = np.array(confusion_matrix)
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [(int(i), int(j), int(mistakes[i, j])) for i, j in pairs if mistakes[i, j]]


def log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return scikit-learn's log-loss of probabilities [N, classes], without its copies of them."""
    return float(_losses(scores, labels).mean())


def confidence_bins(scores: np.ndarray) -> np.ndarray:
    """Return the bin, of equal width, of each photo's highest probability."""
    return np.minimum((scores.max(axis=1) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error of probabilities [N, classes]: how far the mean of the highest is
    from the share that is correct, over bins.
    """
    gaps = (scores.argmax(axis=1) == labels) - scores.max(axis=1)
    return float(np.abs(np.bincount(confidence_bins(scores), gaps)).sum() / len(labels))


def balanced_scores(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return accuracy and log-loss, [R] each, as means over the classes of each class's own.

    `weights`, [N, R], say how often each photo counts in R samples of them (None: once, R = 1). A class
    without a photo that counts is left out of the mean.
    """
    classes = scores.shape[1]
    weights = np.ones((len(labels), 1)) if weights is None else weights
    counts = sum_by(labels, classes, weights)
    each = {"accuracy": scores.argmax(axis=1) == labels, "loss": _losses(scores, labels)}
    sums = {name: sum_by(labels, classes, weights * values[:, None]) for name, values in each.items()}
    return {
        f"balanced_{name}": (values / np.maximum(counts, 1)).sum(axis=0) / (counts > 0).sum(axis=0)
        for name, values in sums.items()
    }


def _losses(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log-loss of each photo, cut off as scikit-learn does."""
    tiny = np.finfo(np.float64).eps
    return -special.xlogy(1, scores[np.arange(len(labels)), labels].clip(tiny, 1 - tiny))


def class_scores(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, only: int | None = None
) -> dict[str, np.ndarray]:
    """Return the metrics of each class against the rest by name, [classes, R], or of `only` one, [1, R].

    `scores` are probabilities [N, classes]; `weights`, float32 [N, R], say how often each photo counts in R
    samples of them (None: once, R = 1). An area is NaN if no photo of either kind counts.
    """
    classes, chosen = scores.shape[1], scores.argmax(axis=1)
    wanted = np.arange(classes) if only is None else np.array([only])
    there, said = (sum_by(rows, classes, weights)[wanted] for rows in (labels, chosen))
    right = sum_by(np.where(labels == chosen, labels, classes), classes + 1, weights)[wanted]
    areas = [_areas(labels == index, scores[:, index], weights) for index in wanted]
    return {
        "precision": right / np.maximum(said, 1),
        "recall": right / np.maximum(there, 1),
        "f1": 2 * right / np.maximum(said + there, 1),
        "roc_auc": np.stack([roc_auc for roc_auc, _ in areas]),
        "average_precision": np.stack([average_precision for _, average_precision in areas]),
    }


def _areas(truth: np.ndarray, score: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ROC-AUC and average precision, [R] each, of a class whose photos are those of `truth` [N].

    Only the scores of the class's own photos are thresholds. The others are counted between them, so that
    many classes of few photos each take no longer than a few classes of many.
    """
    steps = np.unique(score[truth])
    # 2k + 1 for a photo whose score is the k-th threshold, 2k for one just below it.
    place = np.searchsorted(steps, score, "left") + np.searchsorted(steps, score, "right")
    samples = 1 if weights is None else weights.shape[1]
    # Samples that are counted at a time: a class of many photos has a table of 2 x photos x samples.
    portion, areas = max(AREA_TABLE // (2 * len(steps) + 1), 1), []
    for start in range(0, samples, portion):
        part = None if weights is None else weights[:, start : start + portion]
        hits = sum_by(place[truth] // 2, len(steps), None if part is None else part[truth])
        others = sum_by(place, 2 * len(steps) + 1, part)
        others[1::2] -= hits
        below = others[0::2].cumsum(axis=0) + np.vstack(
            [np.zeros_like(others[:1]), others[1::2].cumsum(axis=0)]
        )
        positives, negatives = hits.sum(axis=0), below[-1]
        hits_from = hits[::-1].cumsum(axis=0)[::-1]
        counted_from = hits_from + negatives - below[:-1]
        precisions = hits_from / np.maximum(counted_from, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            roc_auc = (hits * (below[:-1] + others[1::2] / 2)).sum(axis=0) / (positives * negatives)
            areas.append((roc_auc, (hits * precisions).sum(axis=0) / positives))
    return tuple(np.concatenate(parts) for parts in zip(*areas, strict=True))


def sum_by(rows: np.ndarray, count: int, weights: np.ndarray | None) -> np.ndarray:
    """Return the sums of weights [N, R] by the row, 0 to count - 1, of each photo: float64 [count, R]."""
    if weights is None:
        return np.bincount(rows, minlength=count)[:, None].astype(np.float64)
    photos, ones = np.arange(len(rows)), np.ones(len(rows), np.float32)
    return (sparse.csr_array((ones, (rows, photos)), (count, len(rows))) @ weights).astype(np.float64)
