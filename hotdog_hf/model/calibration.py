"""Honest probabilities, and sets of classes that hold the true one as often as promised.

Both come from predictions for photos that the model has not learned. Imports no torch: an exported model
predicts sets of classes without it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from hotdog_hf.errors import UserError

# A temperature outside of these means that the held-out photos do not tell.
LIMITS = (1 / 20, 20.0)
# The prior on log(temperature) counts as much as one photo: a few photos that are all predicted right do not
# make a model certain.
PRIOR_PHOTOS = 1.0
FOLDS = 5
# Held-out photos whose scores are kept with the model; a random subset keeps the promise as well.
MAX_SCORES = 2000


class HeldOut(NamedTuple):
    """Logits [N, classes] of photos that were not learned, their labels [N], and where they come from."""

    logits: np.ndarray
    labels: np.ndarray
    # "out-of-fold" or "validation".
    source: str


def from_folds(logits: np.ndarray, labels: np.ndarray) -> HeldOut:
    """Return the photos that a fold held back: of very many, the logits [N, classes] of others are NaN."""
    known = ~np.isnan(logits).any(axis=1)
    return HeldOut(logits[known], labels[known], "out-of-fold")


def calibrate(held_out: HeldOut, rescale: bool, class_weights: np.ndarray | None = None) -> dict:
    """Return what config.json keeps: the temperature, the log-loss before and after, and the scores of sets.

    The temperature is 1 unless `rescale`, and if one that was fitted to four fifths of the photos makes the
    log-loss of the others higher. `class_weights` [classes] weight the photos, as they did in training.
    """
    logits, labels = np.asarray(held_out.logits, np.float64), np.asarray(held_out.labels)
    weights = np.ones(len(labels)) if class_weights is None else np.asarray(class_weights)[labels]
    temperature = _tested_temperature(logits, labels, weights) if rescale else 1.0
    before, after = (_loss(logits / value, labels, weights) for value in (1.0, temperature))
    probabilities = scipy.special.softmax(logits / temperature, axis=1)
    scores = 1 - probabilities[np.arange(len(labels)), labels]
    kept = np.random.default_rng(0).permutation(len(scores))[:MAX_SCORES]
    return {
        "temperature": temperature,
        "held_out": held_out.source,
        "photos": len(labels),
        "loss_before": before,
        "loss_after": after,
        "scores": np.sort(scores[kept]).tolist(),
    }


def _tested_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    gained = 0.0
    for number in range(min(FOLDS, len(labels))):
        fitted, tested = fold != number, fold == number
        if fitted.any():
            own = logits[tested], labels[tested], weights[tested]
            temperature = fit_temperature(logits[fitted], labels[fitted], weights[fitted])
            gained += own[2].sum() * (_loss(*own) - _loss(own[0] / temperature, *own[1:]))
    return fit_temperature(logits, labels, weights) if gained > 0 else 1.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return what to divide logits [N, classes] by for the lowest log-loss (Guo et al., arXiv 1706.04599)."""
    weights = np.ones(len(labels)) if weights is None else weights

    def penalised(log_temperature: float) -> float:
        loss = weights.sum() * _loss(logits / math.exp(log_temperature), labels, weights)
        return loss + PRIOR_PHOTOS / 2 * log_temperature**2

    import scipy.optimize  # takes a part of a second, and prediction does not fit

    bounds = tuple(map(math.log, LIMITS))
    found = scipy.optimize.minimize_scalar(
        penalised, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(found.x)


def _loss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    losses = -scipy.special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return float(np.average(losses, weights=weights))


def uncalibrated(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return what calibrated probabilities [N, classes] were before their logits were divided."""
    logs = np.log(np.asarray(probabilities, np.float64).clip(np.finfo(np.float32).tiny))
    return scipy.special.softmax(logs * temperature, axis=1)


def set_limit(calibration: dict | None, coverage: float, name: object) -> float:
    """Return the highest score, 1 - probability, of a class in the sets that hold the true one this often.

    Split conformal prediction with the least ambiguous sets (LAC; Sadinle et al., arXiv 1609.00451): of
    photos like the held-out ones, a share of at least `coverage` have their class in their set. Raises
    `UserError` if there are no held-out photos, or too few.
    """
    if not calibration:
        raise UserError(
            f"--coverage {coverage}: {name} was saved without predictions for held-out photos; train it with"
            " --val-fraction 0.1, or by --recipe best or probe"
        )
    limit = conformal_quantile(calibration["scores"], coverage)
    if limit is None:
        raise UserError(
            f"--coverage {coverage} needs {photos_needed(coverage)} held-out photos or more; {name} has"
            f" {len(calibration['scores'])}"
        )
    return limit


def conformal_quantile(scores: Sequence[float], share: float) -> float | None:
    """Return what another score of the same kind is at most, with a probability of `share` or more.

    `scores` are sorted; None if they are fewer than `photos_needed`.
    """
    # Rounded, as 20 * 0.95 may be a little more than 19.
    rank = math.ceil(round((len(scores) + 1) * share, 9))
    return float(scores[rank - 1]) if rank <= len(scores) else None


def photos_needed(share: float) -> int:
    """Return how many scores `conformal_quantile` needs."""
    return math.ceil(round(share / (1 - share), 9))


def classes_within(probabilities: np.ndarray, limit: float) -> np.ndarray:
    """Return which classes of each row [..., classes] are in its set, as a mask; there may be none."""
    return 1 - np.asarray(probabilities, np.float64) <= limit
