"""The penalised softmax regression: its loss, L-BFGS on it in variables that fit the data, and its folds."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import threadpoolctl
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)

# Rows whose logits are in memory at a time.
CHUNK = 2048
# Axes whose share of the features' deviation is smaller are left out: none of it is more than rounding.
SMALLEST_AXIS = 1e-7
# More held-back photos than this tell no more about the penalty: further folds are left out.
ENOUGH_HELD_BACK = 2000
# Smaller probabilities change no sum.
NEARLY_ZERO = 1e-30


class Accuracy(NamedTuple):
    """How exactly a loss is minimised: the numbers, the relative decrease and the gradient to stop at."""

    dtype: torch.dtype
    decrease: float
    gradient: float


# Losses to choose from differ by more than 1e-3; the layer that is kept is exact.
ROUGH = Accuracy(torch.float32, 1e-5, 1e-4)
# As far as float32 goes, which is twice as fast: few steps are then left for the exact one.
FINE = Accuracy(torch.float32, 1e-7, 1e-5)
EXACT = Accuracy(torch.float64, 1e-11, 1e-6)


class Rows(NamedTuple):
    """What is learned from: coordinates [N, R], labels [N], weights [N] with a sum of 1."""

    coordinates: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    # Logits [N, classes] that a factor near 1 scales; None: there are none.
    given_logits: np.ndarray | None = None


class Solution(NamedTuple):
    """Coefficients [R, classes], biases [classes], and the factor of the given logits."""

    coefficients: np.ndarray
    bias: np.ndarray
    factor: float

    def to_vector(self) -> np.ndarray:
        """Return all numbers as one vector."""
        return np.concatenate([self.coefficients.ravel(), self.bias, [self.factor]])


class SoftmaxRegression:
    """The mean log-loss of rows plus an L2 penalty, as a function of one vector.

    `strength` penalises the coefficients; `prior_strength` holds the factor at 1, and the biases at 0 if they
    are penalised.
    """

    def __init__(
        self,
        rows: Rows,
        classes: int,
        accuracy: Accuracy,
        prior_strength: float = 1.0,
        penalised_bias: bool = False,
    ):
        self.accuracy, self.classes, self.size = accuracy, classes, rows.coordinates.shape[1]
        self.coordinates, self.weights = (self._tensor(part) for part in (rows.coordinates, rows.weights))
        self.given = None if rows.given_logits is None else self._tensor(rows.given_logits)
        self.labels = torch.as_tensor(rows.labels)
        self.prior_strength, self.penalised_bias = prior_strength, penalised_bias
        self.mean_squares = np.asarray(self.weights @ self.coordinates**2, np.float64)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array).to(self.accuracy.dtype)

    def start(self) -> Solution:
        """Return what changes nothing about the given logits."""
        return Solution(np.zeros((self.size, self.classes)), np.zeros(self.classes), 1.0)

    def unpack(self, vector: np.ndarray) -> Solution:
        """Return the parts of a vector."""
        coefficients = vector[: self.size * self.classes].reshape(self.size, self.classes)
        return Solution(coefficients, vector[coefficients.size : -1], float(vector[-1]))

    def solve(self, strength: float, start: Solution) -> Solution:
        """Return the solution of the lowest loss.

        L-BFGS sees each number multiplied by the root of the loss's second derivative, or what it would be if
        the coordinates had nothing to do with the probabilities: its steps then fit all axes.
        """
        scale = self._scale(strength, start)

        def scaled(vector: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = self.loss_and_gradient(vector / scale, strength)
            return loss, gradient / scale

        options = {
            "maxiter": 1000,
            "maxcor": 10,
            "ftol": self.accuracy.decrease,
            "gtol": self.accuracy.gradient,
        }
        import scipy.optimize  # only a fitted head needs it

        first = start.to_vector() * scale
        found = scipy.optimize.minimize(scaled, first, method="L-BFGS-B", jac=True, options=options)
        return self.unpack(found.x / scale)

    def _scale(self, strength: float, start: Solution) -> np.ndarray:
        curvature, factor_curvature = np.zeros(self.classes), self.prior_strength
        for chunk, probabilities in self._probabilities(start):
            weights = self.weights[chunk]
            curvature += (weights @ (probabilities * (1 - probabilities))).numpy()
            if self.given is not None:
                given = self.given[chunk]
                mean = (probabilities * given).sum(dim=1)
                factor_curvature += float(weights @ ((probabilities * given**2).sum(dim=1) - mean**2))
        curvature = np.maximum(curvature, 1e-3 / self.classes)  # not 0 if all are sure
        of_bias = curvature + self.prior_strength * self.penalised_bias
        squares = np.outer(self.mean_squares, curvature) + strength
        return np.sqrt(np.concatenate([squares.ravel(), of_bias, [factor_curvature]]))

    def _chunks(self, solution: Solution) -> Iterator[tuple[slice, torch.Tensor]]:
        coefficients, bias = self._tensor(solution.coefficients), self._tensor(solution.bias)
        for first in range(0, len(self.labels), CHUNK):
            chunk = slice(first, first + CHUNK)
            logits = torch.addmm(bias, self.coordinates[chunk], coefficients)
            if self.given is not None:
                logits.add_(self.given[chunk], alpha=solution.factor)
            yield chunk, logits

    def _probabilities(self, solution: Solution) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((chunk, logits.softmax(dim=1)) for chunk, logits in self._chunks(solution))

    def loss_and_gradient(self, vector: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        """Return the penalised loss and its gradient."""
        solution = self.unpack(vector)
        coefficients, bias, factor = solution
        loss = strength / 2 * np.square(coefficients).sum()
        loss += self.prior_strength / 2 * ((factor - 1) ** 2 + self.penalised_bias * np.square(bias).sum())
        gradient = torch.zeros(self.size, self.classes, dtype=self.accuracy.dtype)
        bias_gradient = self.prior_strength * self.penalised_bias * bias
        factor_gradient = self.prior_strength * (factor - 1)
        for chunk, logits in self._chunks(solution):
            labels, weights = self.labels[chunk, None], self.weights[chunk]
            logits -= logits.logsumexp(dim=1, keepdim=True)
            loss -= float(weights.double() @ logits.gather(1, labels)[:, 0].double())
            # Smaller ones would lead to denormal numbers, with which a processor takes 10 times as long.
            probabilities = F.threshold_(logits.exp_(), NEARLY_ZERO, 0.0)
            error = probabilities.scatter_add_(1, labels, -torch.ones_like(logits[:, :1]))
            error *= weights[:, None]
            gradient.addmm_(self.coordinates[chunk].T, error)
            bias_gradient = bias_gradient + error.sum(dim=0, dtype=torch.float64).numpy()
            if self.given is not None:
                factor_gradient += float((error * self.given[chunk]).sum(dtype=torch.float64))
        gradient = gradient.double().numpy() + strength * coefficients
        return loss, np.concatenate([gradient.ravel(), bias_gradient, [factor_gradient]])


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let NumPy and SciPy compute in one thread.

    The threads of their BLAS spin for a while after each product, and take the cores from those of torch:
    small fits would take 20 times as long.
    """
    import scipy.optimize  # noqa: F401  has a BLAS of its own, which must be loaded to be limited

    with _thread_pools().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def principal_axes(features: np.ndarray) -> np.ndarray:
    """Return the axes [R, D] on which features [N, D] deviate, those of the largest deviation last.

    The loss and its penalty do not change if the features are turned; L-BFGS needs fewer steps on these axes.
    """
    if len(features) < features.shape[1]:  # fewer photos than features: a singular value for each photo
        _, singular, axes = np.linalg.svd(features, full_matrices=False)
    else:
        squares, axes = np.linalg.eigh(features.T @ features)
        singular, axes = np.sqrt(np.maximum(squares, 0)), axes.T
    return axes[singular > SMALLEST_AXIS * max(singular.max(), 1e-300)]


def rows_of_photos(photos: np.ndarray, num_photos: int, num_views: int) -> np.ndarray:
    """Return the rows of photos and of their views, where all photos come first, then all of every view."""
    return (np.arange(1 + num_views)[:, None] * num_photos + photos).ravel()


def log_losses(logits: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Return the log-loss [N] of each row of logits [N, classes]."""
    return torch.nn.functional.cross_entropy(
        torch.as_tensor(logits), torch.as_tensor(labels), reduction="none"
    ).numpy()
