"""A logistic regression on features that starts from what a layer of the source classifier already says."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
from tqdm import tqdm

from hotdog_hf.data.groups import stratified_folds
from hotdog_hf.model import solver
from hotdog_hf.model.solver import log_losses

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


def average(layers: Sequence[Layer], shares: np.ndarray) -> Layer:
    """Return the weighted sum of layers, whose shares [n] add up to 1."""
    weights, biases = (np.stack(parts) for parts in zip(*layers, strict=True))
    return Layer(np.tensordot(shares, weights, 1), shares @ biases)


class Prior(NamedTuple):
    """What is known before the regression: a layer, and whether its biases mean something."""

    layer: Layer
    calibrated: bool


# Makes the prior from the features [n, D] and labels [n] that are learned.
PriorOf = Callable[[np.ndarray, np.ndarray], Prior | None]


@solver.one_blas_thread()
def fit_regression(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: PriorOf,
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
    photos = _Photos(features, labels, views, class_weights, prior_of)
    folds = stratified_folds(labels, groups, FOLDS, seed, solver.ENOUGH_HELD_BACK)
    if not folds:
        return photos.path(np.arange(len(labels)), solver.EXACT).layer(UNTESTED_STRENGTH), None
    layers, losses = photos.layers_of_folds(folds)
    path = photos.path(np.arange(len(labels)), solver.EXACT)
    shares = scipy.special.softmax(-losses.sum(axis=1))
    used = [number for number, share in enumerate(shares) if share > NEGLIGIBLE]
    layer = average([path.layer(STRENGTHS[number]) for number in used], shares[used])
    held_out = np.full((len(labels), len(photos.weights)), np.nan, np.float32)
    for number, (_, held_back) in enumerate(folds):
        averaged = average([of_strength[number] for of_strength in layers], shares)
        held_out[held_back] = averaged.logits(features[held_back])
    return layer, held_out


@solver.one_blas_thread()
def cross_validate(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: PriorOf,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    views: Sequence[np.ndarray] = (),
    class_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Layer]]:
    """Return log-probabilities [N, classes] of photos by layers that learned no photo of their fold.

    Also the layer of each fold, which learned the other folds. `folds` are (learned, held-back) indices, and
    hold back every photo. The rest is as in `fit_regression`, but for a cheaper choice of the strengths:
    those of a fold are weighted by the likelihood of the other folds.
    """
    photos = _Photos(features, labels, views, class_weights, prior_of)
    candidates, losses = photos.layers_of_folds(folds)
    log_probabilities, layers = np.zeros((len(labels), len(photos.weights))), []
    for number, (_, held_back) in enumerate(folds):
        shares = scipy.special.softmax(losses[:, number] - losses.sum(axis=1))
        layers.append(average([of_strength[number] for of_strength in candidates], shares))
        logits = layers[-1].logits(features[held_back])
        log_probabilities[held_back] = scipy.special.log_softmax(logits, axis=1)
    return log_probabilities, layers


class _Photos:
    """What a regression learns from: features and views of photos, their labels, and a prior."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        views: Sequence[np.ndarray],
        class_weights: np.ndarray | None,
        prior_of: PriorOf,
    ):
        self.features, self.labels, self.views, self.prior_of = features, labels, views, prior_of
        self.weights = np.ones(labels.max() + 1) if class_weights is None else class_weights

    def path(self, learned: np.ndarray, accuracy: solver.Accuracy) -> "_Path":
        """Return the regression on some photos [n] and their views."""
        everything = np.concatenate([each[learned] for each in (self.features, *self.views)])
        targets = np.tile(self.labels[learned], 1 + len(self.views))
        return _Path(everything, targets, self.prior_of, self.weights, len(learned), accuracy)

    def layers_of_folds(
        self, folds: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[list[list[Layer]], np.ndarray]:
        """Return the layer of each strength and fold, and its log-loss on what the fold held back.

        The losses [strengths, folds] are weighted sums over photos. Strengths that are far too weak are not
        tried.
        """
        paths = [self.path(learned, solver.ROUGH) for learned, _ in folds]
        strengths = [strength for strength in STRENGTHS if strength * len(self.labels) >= WEAKEST_TOTAL]
        layers, losses = [], []
        for strength in tqdm(strengths, "probe", leave=False, disable=None):
            layers.append([path.layer(strength) for path in paths])
            losses.append([])
            for layer, (_, held_back) in zip(layers[-1], folds, strict=True):
                own = self.labels[held_back]
                photo_losses = log_losses(layer.logits(self.features[held_back]), own)
                losses[-1].append(float(self.weights[own] @ photo_losses))
            if sum(losses[-1]) > min(map(sum, losses)) + UNLIKELY:
                break
        return layers, np.array(losses)


class _Path:
    """The layers of one set of photos for several strengths, each fit starting from the one before."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        prior_of: PriorOf,
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
