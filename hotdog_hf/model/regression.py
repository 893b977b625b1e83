"""A logistic regression on features that starts from what a layer of the source classifier already says."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
from tqdm import tqdm

from hotdog_hf.model import solver
from hotdog_hf.model.solver import log_losses, rows_of_photos, stratified_folds

FOLDS = 5
# Strengths of the L2 penalty on centred features of unit mean square, for a mean loss; the strongest first.
STRENGTHS = tuple(10.0**power for power in np.arange(1, -4.5, -0.5))
# Those below this, divided by the number of photos, are left out: few photos are told apart too easily
# to reject them, and the log-loss on other photos was higher with them.
WEAKEST_TOTAL = 0.3
# The one that is taken if a class has a single photo, so that no part of train can test the others.
UNTESTED_STRENGTH = 1.0
# Where the held-back photos are less likely by this factor's logarithm, weaker penalties are not tried.
UNLIKELY = 30.0
# A layer of a smaller share does not change the average.
NEGLIGIBLE = 1e-6
# The prior on the scale of the given logits and on the biases counts as much as this many photos.
PRIOR_PHOTOS = 1.0


class Layer(NamedTuple):
    """A linear layer: weight [classes, D] and bias [classes]."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the layer's outputs [N, classes] for features [N, D]."""
        return features @ self.weight.T + self.bias


class Prior(NamedTuple):
    """What is known before the regression: a layer, and whether its biases mean something."""

    layer: Layer
    calibrated: bool


def fit_regression(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: Callable[[np.ndarray, np.ndarray], Prior | None],
    seed: int,
    views: Sequence[np.ndarray] = (),
    class_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Layer:
    """Return the layer of `fit_with_held_out`."""
    return fit_with_held_out(features, labels, prior_of, seed, views, class_weights, groups)[0]


def fit_with_held_out(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: Callable[[np.ndarray, np.ndarray], Prior | None],
    seed: int,
    views: Sequence[np.ndarray] = (),
    class_weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[Layer, np.ndarray | None]:
    """Fit one linear layer on features [N, D] and on `views` of the same photos [N, D] each.

    The logits are `scale` times those of the prior's layer plus a regression on the features, which are
    centred but not standardised. `prior_of(features, labels)` makes the prior from the photos learned, in
    every fold anew; None means none. An L2 penalty holds the regression at 0, a weak one `scale` at 1 and the
    biases at 0 (only for calibrated priors), so that the photos overrule the prior as they become many.
    The returned layer averages those of all `STRENGTHS`, each weighted by the likelihood of the photos
    in stratified cross-validation, which scores a photo only by layers that learned no view of it, nor of
    another of the same of `groups` [N], which number photos that show the same.

    Also returns the logits [N, classes] of each photo by layers that did not learn it, NaN of photos that no
    fold held back; None without folds.
    """
    count = len(labels)
    everything, targets = np.concatenate([features, *views]), np.tile(labels, 1 + len(views))
    weights = np.ones(labels.max() + 1) if class_weights is None else class_weights
    folds = stratified_folds(labels, groups, FOLDS, seed)
    if not folds:
        path = _Path(everything, targets, prior_of, weights, count, solver.EXACT)
        return path.layer(UNTESTED_STRENGTH), None
    fitted = [rows_of_photos(learned, count, len(views)) for learned, _ in folds]
    paths = [
        _Path(everything[rows], targets[rows], prior_of, weights, len(rows) // (1 + len(views)), solver.ROUGH)
        for rows in fitted
    ]
    losses: list[float] = []
    held_logits: list[np.ndarray] = []
    strengths = [strength for strength in STRENGTHS if strength * count >= WEAKEST_TOTAL]
    for strength in tqdm(strengths, "probe", leave=False, disable=None):
        layers = [path.layer(strength) for path in paths]
        held_logits.append(np.full((count, len(weights)), np.nan, np.float32))
        losses.append(0.0)
        for layer, (_, held) in zip(layers, folds, strict=True):
            logits = layer.logits(features[held])
            held_logits[-1][held] = logits
            losses[-1] += float(weights[labels[held]] @ log_losses(logits, labels[held]))
        if losses[-1] > min(losses) + UNLIKELY:
            break
    shares = scipy.special.softmax(-np.array(losses))
    path, weight, bias = _Path(everything, targets, prior_of, weights, count, solver.EXACT), 0.0, 0.0
    for strength, share in zip(strengths, shares, strict=False):
        if share > NEGLIGIBLE:
            layer = path.layer(strength)
            weight, bias = weight + share * layer.weight, bias + share * layer.bias
    held_out = sum(share * logits for share, logits in zip(shares, held_logits, strict=True))
    return Layer(weight, bias), held_out


def cross_validate(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: Callable[[np.ndarray, np.ndarray], Prior | None],
    fold_of: np.ndarray,
    views: Sequence[np.ndarray] = (),
    class_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Layer]]:
    """Return log-probabilities [N, classes] of photos by layers that learned no photo of their fold.

    Also the layer of each fold, which learned the other folds. `fold_of` [N] numbers the folds from 0; every
    class must be in the rest of every fold. The rest is as in `fit_regression`, but for a cheaper choice of
    the strengths: those of a fold are weighted by the likelihood of the other folds.
    """
    weights = np.ones(labels.max() + 1) if class_weights is None else class_weights
    strengths = [strength for strength in STRENGTHS if strength * len(labels) >= WEAKEST_TOTAL]
    paths, losses = [], []
    for fold in range(fold_of.max() + 1):
        learned, held_back = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        everything = np.concatenate([each[learned] for each in (features, *views)])
        targets = np.tile(labels[learned], 1 + len(views))
        path = _Path(everything, targets, prior_of, weights, len(learned), solver.ROUGH)
        paths.append([path.layer(strength) for strength in strengths])
        own, outputs = labels[held_back], [layer.logits(features[held_back]) for layer in paths[-1]]
        losses.append([float(weights[own] @ log_losses(logits, own)) for logits in outputs])
    log_probabilities, layers = np.zeros((len(labels), len(weights))), []
    for fold, path in enumerate(paths):
        shares = scipy.special.softmax(np.array(losses[fold]) - np.sum(losses, axis=0))
        layers.append(
            Layer(
                sum(share * layer.weight for share, layer in zip(shares, path, strict=True)),
                sum(share * layer.bias for share, layer in zip(shares, path, strict=True)),
            )
        )
        held_back = fold_of == fold
        logits = layers[-1].logits(features[held_back])
        log_probabilities[held_back] = scipy.special.log_softmax(logits, axis=1)
    return log_probabilities, layers


class _Path:
    """The layers of one set of photos for several strengths, each fit starting from the one before."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        prior_of: Callable[[np.ndarray, np.ndarray], Prior | None],
        class_weights: np.ndarray,
        num_photos: int,
        accuracy: solver.Accuracy,
    ):
        classes, prior = len(class_weights), prior_of(features, labels)
        none = Layer(np.zeros((classes, features.shape[1])), np.zeros(classes))
        self.given, self.mean = prior.layer if prior else none, features.mean(axis=0, dtype=np.float64)
        centred = features - self.mean
        self.scale = np.sqrt(np.mean(centred**2)) or 1.0
        centred /= self.scale
        self.axes = solver.principal_axes(centred)
        rows = solver.Rows(
            centred @ self.axes.T,
            labels,
            class_weights[labels] / len(labels),
            self.given.logits(features) if prior else None,
        )
        calibrated = bool(prior and prior.calibrated)
        self.problem = solver.SoftmaxRegression(
            rows, classes, accuracy, PRIOR_PHOTOS / num_photos, calibrated
        )
        self.solution = self.problem.start()

    def layer(self, strength: float) -> Layer:
        """Return the layer of a penalty."""
        self.solution = self.problem.solve(strength, self.solution)
        coefficients, bias, factor = self.solution
        weight = coefficients.T @ self.axes / self.scale
        bias = factor * self.given.bias + bias - weight @ self.mean
        return Layer(factor * self.given.weight + weight, bias)
