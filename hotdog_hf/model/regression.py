"""A logistic regression on features that starts from what a layer of the source classifier already says."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tqdm import tqdm

from hotdog_hf.errors import UserError

FOLDS = 5
# Strengths of the L2 penalty on centred features of unit mean square, for a mean loss; the strongest first.
STRENGTHS = tuple(10.0**power for power in np.arange(1, -4.5, -0.5))
# Those below this, divided by the number of photos, are left out: few photos are told apart too easily
# to reject them, and the log-loss on other photos was higher with them.
WEAKEST_TOTAL = 0.3
# The one that is taken if a class has a single photo, so that no part of train can test the others.
UNTESTED_STRENGTH = 1.0
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
    """Fit one linear layer on features [N, D] and on `views` of the same photos [N, D] each.

    The logits are `scale` times those of the prior's layer plus a regression on the features, which are
    centred but not standardised. `prior_of(features, labels)` makes the prior from the photos learned, in
    every fold anew; None means none. An L2 penalty holds the regression at 0, a weak one `scale` at 1 and the
    biases at 0 (only for calibrated priors), so that the photos overrule the prior as they become many.
    The returned layer averages those of all `STRENGTHS`, each weighted by the likelihood of the photos
    in stratified cross-validation, which scores a photo only by layers that learned no view of it, and no
    photo of its group if there are `groups` [N].
    """
    count, starts = len(labels), np.arange(1 + len(views))[:, None] * len(labels)
    everything = np.concatenate([features, *views]).astype(np.float64)
    targets = np.tile(labels, 1 + len(views))
    weights = np.ones(labels.max() + 1) if class_weights is None else class_weights
    fewest = int(np.bincount(labels).min())
    if fewest < 2:
        return _fit_path(everything, targets, prior_of, weights, count, (UNTESTED_STRENGTH,))[0]
    folds = stratified_folds(labels, groups, seed)
    strengths = [strength for strength in STRENGTHS if strength * count >= WEAKEST_TOTAL]
    losses = np.zeros(len(strengths))
    for learned, held_back in tqdm(folds, "folds", leave=False, disable=None):
        rows = (starts + learned).ravel()
        layers = _fit_path(everything[rows], targets[rows], prior_of, weights, len(learned), strengths)
        losses += [_loss(layer, features[held_back], labels[held_back], weights) for layer in layers]
    shares = scipy.special.softmax(-losses)
    layers = _fit_path(everything, targets, prior_of, weights, count, strengths)
    return Layer(
        sum(share * layer.weight for share, layer in zip(shares, layers, strict=True)),
        sum(share * layer.bias for share, layer in zip(shares, layers, strict=True)),
    )


def stratified_folds(
    labels: np.ndarray, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `FOLDS` stratified folds as (learned, held out) indices, fewer if a class has fewer photos.

    Photos of the same group [N] stay in one fold; None: every photo for itself. Raises `UserError` if all
    photos of a class are in one group.
    """
    if groups is None:
        fewest = int(np.bincount(labels).min())
        splitter = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    else:
        fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
        if fewest < 2:
            raise UserError("a probe's folds need two groups or more of every class: see the column group")
        splitter = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    return list(splitter.split(labels, labels, groups))


def _loss(layer: Layer, features: np.ndarray, labels: np.ndarray, class_weights: np.ndarray) -> float:
    """Return the sum of the log-loss over photos, weighted by their classes."""
    log_probabilities = scipy.special.log_softmax(layer.logits(features), axis=1)
    return -float(class_weights[labels] @ log_probabilities[np.arange(len(labels)), labels])


def _fit_path(
    features: np.ndarray,
    labels: np.ndarray,
    prior_of: Callable[[np.ndarray, np.ndarray], Prior | None],
    class_weights: np.ndarray,
    num_photos: int,
    strengths: Sequence[float],
) -> list[Layer]:
    """Return a layer for every strength, each fit starting from the one before."""
    classes, prior = len(class_weights), prior_of(features, labels)
    given = prior.layer if prior else Layer(np.zeros((classes, features.shape[1])), np.zeros(classes))
    mean = features.mean(axis=0)
    centred = features - mean
    scale = np.sqrt(np.mean(centred**2)) or 1.0
    # The penalty does not change if the axes are turned; those without any deviation need no coefficient.
    left, singular, axes = np.linalg.svd(centred / scale, full_matrices=False)
    kept = singular > 1e-9 * max(singular[0], 1e-300)
    coordinates, axes = left[:, kept] * singular[kept], axes[kept]
    problem = _Problem(
        coordinates,
        np.eye(classes)[labels],
        given.logits(features) if prior else np.zeros((len(labels), classes)),
        class_weights[labels] / len(labels),
        PRIOR_PHOTOS / num_photos,
        bool(prior and prior.calibrated),
    )
    solution, layers = problem.start(), []
    for strength in strengths:
        solution = problem.solve(strength, solution)
        coefficients, bias, factor = problem.unpack(solution)
        weight = coefficients.T @ axes / scale
        layers.append(Layer(factor * given.weight + weight, factor * given.bias + bias - weight @ mean))
    return layers


class _Problem(NamedTuple):
    """The penalised mean loss of one set of photos, as a function of one vector."""

    coordinates: np.ndarray
    targets: np.ndarray
    given_logits: np.ndarray
    weights: np.ndarray
    prior_strength: float
    calibrated: bool

    def start(self) -> np.ndarray:
        """Return the vector that changes nothing about the given logits."""
        size = (self.coordinates.shape[1] + 1) * self.targets.shape[1]
        return np.append(np.zeros(size), 1.0)

    def unpack(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the coefficients [D, classes], the biases [classes], and the factor of the given logits."""
        classes = self.targets.shape[1]
        return vector[: -classes - 1].reshape(-1, classes), vector[-classes - 1 : -1], vector[-1]

    def solve(self, strength: float, start: np.ndarray) -> np.ndarray:
        """Return the vector of the lowest loss."""
        options = {"maxiter": 1000, "gtol": 1e-5, "maxcor": 20}
        found = scipy.optimize.minimize(
            self.loss_and_gradient, start, strength, "L-BFGS-B", jac=True, options=options
        )
        return found.x

    def loss_and_gradient(self, vector: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        """Return the penalised loss and its gradient."""
        coefficients, bias, factor = self.unpack(vector)
        logits = self.coordinates @ coefficients + bias + factor * self.given_logits
        log_sum = scipy.special.logsumexp(logits, axis=1, keepdims=True)
        loss = self.weights @ (log_sum[:, 0] - (logits * self.targets).sum(axis=1))
        loss += strength / 2 * (coefficients**2).sum() + self.prior_strength / 2 * (factor - 1) ** 2
        error = (np.exp(logits - log_sum) - self.targets) * self.weights[:, None]
        bias_gradient = error.sum(axis=0)
        if self.calibrated:
            loss += self.prior_strength / 2 * (bias**2).sum()
            bias_gradient += self.prior_strength * bias
        gradient = self.coordinates.T @ error + strength * coefficients
        factor_gradient = (error * self.given_logits).sum() + self.prior_strength * (factor - 1)
        return loss, np.concatenate([gradient.ravel(), bias_gradient, [factor_gradient]])
