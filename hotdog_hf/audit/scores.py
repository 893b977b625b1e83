"""What features and labels say about photos, in numpy and scikit-learn alone: no page, no files, no network.

Every function takes features [N, D] of N photos, their labels [N] as class indices, or probabilities
[N, classes] that were predicted for each photo by a classifier that was fitted without it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from hotdog_hf.errors import UserError

FOLDS = 5
# Inverse strengths of the L2 penalty to choose from, on standardised features.
STRENGTHS = tuple(10.0**power for power in np.arange(-4, 0.5, 0.5))
# The learning curve: shares of the training part of each fold, and how often folds and shares are drawn.
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
DRAWS = 5
# Twice the photos gain less than this in accuracy: the curve is flat.
FLAT_GAIN = 0.01
RESAMPLES = 1000
NEIGHBOURS = 5
# Photos whose similarities to all others are held at a time.
CHUNK = 1024


def folds_of(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return stratified folds as (training, held-out) indices; the photos of a group stay in one fold.

    There are `FOLDS`, or as many as the class in the fewest groups allows. Raises `UserError` if that is one.
    """
    in_groups = [len(np.unique(groups[labels == label])) for label in np.unique(labels)]
    if min(in_groups) < 2:
        raise UserError("an audit needs at least 2 photos of every class that are not copies of each other")
    splitter = StratifiedGroupKFold(min(FOLDS, *in_groups), shuffle=True, random_state=seed)
    return list(splitter.split(labels, labels, groups))


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, float]:
    """Return the out-of-fold probabilities [N, classes] of a logistic regression, and the strength it took.

    The strength (of `STRENGTHS`) is the one with the lowest log-loss on the held-out photos.
    """
    candidates = {
        strength: _cross_validate(strength, features, labels, folds, np.ones(len(labels)))
        for strength in STRENGTHS
    }
    best = min(candidates, key=lambda strength: log_losses(candidates[strength], labels).mean())
    return candidates[best], best


def out_of_fold_by_trust(
    features: np.ndarray,
    labels: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    strength: float,
    first: np.ndarray,
) -> np.ndarray:
    """Return out-of-fold probabilities [N, classes] by probes that trust photos as far as their labels fit.

    A photo counts as much as the probability that the `first` ones give its label. So wrong labels spoil the
    probe less, and more of them stand out.
    """
    trust = first[np.arange(len(labels)), labels]
    return _cross_validate(strength, features, labels, folds, trust / trust.mean())


def _cross_validate(
    strength: float,
    features: np.ndarray,
    labels: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: np.ndarray,
) -> np.ndarray:
    probabilities = np.zeros((len(labels), labels.max() + 1))
    for training, held_out in folds:
        probe = _probe(strength).fit(
            features[training], labels[training], logisticregression__sample_weight=weights[training]
        )
        probabilities[np.ix_(held_out, probe.classes_)] = probe.predict_proba(features[held_out])
    return probabilities


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log-loss [N] of every photo."""
    tiny = np.finfo(np.float64).eps  # as scikit-learn's log-loss
    return -np.log(probabilities[np.arange(len(labels)), labels].clip(tiny, 1))


def mean_and_interval(values: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """Return the mean of one value per photo with its 95 % bootstrap interval over groups of photos."""
    means = np.concatenate(
        [weights @ values / weights.sum(axis=1) for weights in _resamples(groups, RESAMPLES, seed)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def _resamples(groups: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each photo counts in `count` resamples of groups, [100, N] at a time."""
    rng, (_, group_of) = np.random.default_rng(seed), np.unique(groups, return_inverse=True)
    size = group_of.max() + 1
    for _ in range(0, count, 100):
        drawn = rng.integers(0, size, (100, size))
        yield np.stack([np.bincount(row, minlength=size) for row in drawn])[:, group_of]


def suspicious_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which photos confident learning takes for wrongly labelled (Northcutt et al., arXiv 1911.00068).

    A class is confidently predicted for a photo if its probability is at least the mean probability of that
    class among the photos labelled so. A photo is wrongly labelled if the most probable class of those
    confidently predicted for it is another than its label, and so is the most probable class of all. Returns
    a mask [N].
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, own, minlength=probabilities.shape[1])
    thresholds = np.where(counts, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    differs = (confident.argmax(axis=1) != labels) & (probabilities.argmax(axis=1) != labels)
    return differs & np.isfinite(confident).any(axis=1)


def by_suspicion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return all photos' indices, those whose label has the lowest probability first."""
    return np.argsort(probabilities[np.arange(len(labels)), labels], kind="stable")


@dataclass(frozen=True)
class LearningCurve:
    """Accuracies by the number of training photos, the curve fitted to them, and what it forecasts."""

    # Training photos at each share, and the mean accuracy on held-out photos there with its interval.
    sizes: list[int]
    accuracies: list[dict[str, float]]
    # 1 - accuracy = scale * photos ** -power + floor.
    scale: float
    power: float
    floor: float
    # The accuracy by twice as many photos as the last size, and what that gains over the fit at that size.
    forecast: dict[str, float]
    gain: dict[str, float]

    @property
    def is_flat(self) -> bool:
        """Whether twice the photos are expected to gain less than `FLAT_GAIN`."""
        return self.gain["value"] < FLAT_GAIN

    def accuracy(self, photos: np.ndarray) -> np.ndarray:
        """Return the fitted accuracy for numbers of training photos."""
        return 1 - self.scale * photos**-self.power - self.floor


def learning_curve(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, strength: float, seed: int
) -> LearningCurve:
    """Return the accuracy of the probe by the number of training photos, and what twice as many would give.

    A share of each fold's training part is drawn per class; the held-out photos are the same for all shares.
    The intervals (95 %) come from resamples of the draws and of the photos (by group), for each of which the
    curve is fitted anew. No more than twice the photos is forecast: further on, the curve says little. Raises
    `UserError` if there are so few photos that every share has as many.
    """
    wrong, sizes = np.zeros((DRAWS, len(SHARES), len(labels))), np.zeros(len(SHARES))
    for draw in range(DRAWS):
        rng, folds = np.random.default_rng([seed, draw]), folds_of(labels, groups, seed + draw)
        for training, held_out in folds:
            # One order for all shares, so that a smaller part lies within a larger one.
            order = rng.permutation(training)
            for number, share in enumerate(SHARES):
                part = _share_of(order, labels, share)
                probe = _probe(strength).fit(features[part], labels[part])
                wrong[draw, number, held_out] = probe.predict(features[held_out]) != labels[held_out]
                sizes[number] += len(part) / len(folds) / DRAWS
    sizes = sizes.round()
    if len(set(sizes)) < 2:
        raise UserError(
            "too few photos for an audit: a class needs at least 3 that are not copies of each other"
        )
    errors = _resampled_errors(wrong, groups, seed)
    ahead = np.array([sizes[-1], 2 * sizes[-1]])
    scale, power, floor = _fit(wrong.mean(axis=(0, 2))[None], sizes)[0]
    now, twice = 1 - scale * ahead**-power - floor
    fits = _fit(errors, sizes)
    drawn = 1 - fits[:, :1] * ahead ** -fits[:, 1:2] - fits[:, 2:]
    accuracies = [
        _interval(1 - wrong[:, number].mean(), 1 - errors[:, number]) for number in range(len(SHARES))
    ]
    forecast, gain = _interval(twice, drawn[:, 1]), _interval(twice - now, drawn[:, 1] - drawn[:, 0])
    return LearningCurve(sizes.astype(int).tolist(), accuracies, scale, power, floor, forecast, gain)


def _share_of(order: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Return the first photos of each class, as many as its share, at least one."""
    parts = []
    for label in np.unique(labels[order]):
        members = order[labels[order] == label]
        parts.append(members[: max(round(share * len(members)), 1)])
    return np.concatenate(parts)


def _resampled_errors(wrong: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return error rates [resamples, sizes] of [draws, sizes, N] for resampled draws and groups of photos."""
    rng, rows = np.random.default_rng([seed, len(wrong)]), []
    for weights in _resamples(groups, RESAMPLES, seed):
        for row in weights:
            mean = wrong[rng.integers(0, len(wrong), len(wrong))].mean(axis=0)
            rows.append(mean @ row / row.sum())
    return np.array(rows)


def _fit(errors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Fit scale * size ** -power + floor to each row of [R, sizes] by least squares: [R, 3].

    Neither scale nor floor is below 0. The power comes from a grid, for each of which the rest is linear.
    """
    best, least = np.zeros((len(errors), 3)), np.full(len(errors), np.inf)
    for power in np.linspace(0.05, 2, 40):
        x = sizes**-power
        deviation = x - x.mean()
        scale = (errors @ deviation / (deviation @ deviation)).clip(0)
        floor = errors.mean(axis=1) - scale * x.mean()
        scale = np.where(floor < 0, errors @ x / (x @ x), scale)
        floor = floor.clip(0)
        loss = ((errors - scale[:, None] * x - floor[:, None]) ** 2).sum(axis=1)
        better = loss < least
        best[better] = np.stack([scale, np.full_like(scale, power), floor], axis=1)[better]
        least = np.minimum(least, loss)
    return best


def _interval(value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high)}


def nearest(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each photo's nearest others, indices [N, K], and their cosine similarities [N, K].

    K is `NEIGHBOURS`, or one less than there are photos. Features are standardised before they are compared.
    """
    scaled = StandardScaler().fit_transform(features)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)
    count, indices, similarities = min(NEIGHBOURS, len(scaled) - 1), [], []
    for start in range(0, len(scaled), CHUNK):
        rows = scaled[start : start + CHUNK] @ scaled.T
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = -np.inf  # not itself
        chosen = np.argpartition(-rows, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(rows, chosen, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        indices.append(np.take_along_axis(chosen, order, axis=1))
        similarities.append(np.take_along_axis(values, order, axis=1))
    return np.concatenate(indices), np.concatenate(similarities)


def distances(similarities: np.ndarray) -> np.ndarray:
    """Return how far each photo is from all others, [N]: the mean cosine distance to its nearest ones."""
    return 1 - similarities.mean(axis=1)
