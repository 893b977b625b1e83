"""A regression that starts from what the source says: exact, fair to held-back photos, overruled by many."""

import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression
from test_heads import features_of
from threadpoolctl import threadpool_info, threadpool_limits

from hotdog_hf.data.groups import stratified_folds
from hotdog_hf.model import heads, regression, solver
from hotdog_hf.model.regression import Layer, Prior, fit_regression


def no_prior(features, labels):
    return None


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_prior_it_is_scikit_learns_on_centred_features_of_one_scale(classes, monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (0.01,))
    features, labels = features_of(classes)
    layer = fit_regression(features, labels, no_prior, seed=0)[0]
    centred = features.astype(float) - features.mean(axis=0, dtype=float)
    centred /= np.sqrt((centred**2).mean())
    # Of two classes scikit-learn fits one difference of logits, whose penalty is half of that of both.
    strength = 0.01 / 2 if classes == 2 else 0.01
    exact = LogisticRegression(C=1 / (len(labels) * strength), tol=1e-9, max_iter=10000).fit(centred, labels)
    np.testing.assert_allclose(
        softmax(layer.logits(features)), exact.predict_proba(centred), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_gradient_is_that_of_the_loss(calibrated, monkeypatch):
    random = np.random.default_rng(0)
    rows = solver.Rows(
        random.normal(size=(7, 4)),
        random.integers(0, 3, 7),
        random.uniform(0.5, 1, 7) / 7,
        random.normal(size=(7, 3)),
    )
    problem = solver.SoftmaxRegression(rows, 3, solver.EXACT, 0.3, calibrated)
    monkeypatch.setattr(solver, "CHUNK", 3)
    point = random.normal(size=(4 + 1) * 3 + 1)
    error = scipy.optimize.check_grad(
        lambda vector: problem.loss_and_gradient(vector, 0.1)[0],
        lambda vector: problem.loss_and_gradient(vector, 0.1)[1],
        point,
    )
    assert error < 1e-5


def hidden_prior(features, classes, right=True):
    """A layer that tells classes apart by the last feature; or takes each for the other."""
    weight = np.zeros((classes, features.shape[1]))
    weight[:, -1] = np.linspace(-4, 4, classes) * (1 if right else -1)
    return lambda *_: Prior(Layer(weight, np.zeros(classes)), calibrated=True)


def noise_with_one_good_feature(photos):
    random = np.random.default_rng(1)
    labels = np.arange(photos) % 2
    features = random.normal(size=(photos, 30))
    features[:, -1] = random.normal(size=photos) + np.where(labels, 1.5, -1.5)
    return features, labels


@pytest.mark.parametrize("photos", [2, 4, 10, 20])
def test_few_photos_keep_what_the_prior_knows(photos):
    features, labels = noise_with_one_good_feature(500)
    with_prior = fit_regression(features[:photos], labels[:photos], hidden_prior(features, 2), seed=0)[0]
    alone = fit_regression(features[:photos], labels[:photos], no_prior, seed=0)[0]

    def accuracy(layer):
        return (layer.logits(features[photos:]).argmax(axis=1) == labels[photos:]).mean()

    assert accuracy(with_prior) > 0.9 and accuracy(with_prior) > accuracy(alone) + 0.02


def test_many_photos_overrule_a_prior_that_is_wrong():
    features, labels = noise_with_one_good_feature(500)
    layer = fit_regression(features[:300], labels[:300], hidden_prior(features, 2, right=False), seed=0)[0]
    assert (layer.logits(features[300:]).argmax(axis=1) == labels[300:]).mean() > 0.85


def test_the_prior_of_a_fold_knows_nothing_of_the_photos_held_back():
    features, labels = features_of(2)
    features[:, 0] = np.arange(len(labels))  # names the photo
    asked = []

    def prior_of(learned, _labels):
        asked.append(set(learned[:, 0].astype(int)))

    fit_regression(features, labels, prior_of, 0, [features])
    everything = set(range(len(labels)))
    *folds, last = asked
    assert len(folds) == regression.FOLDS and last == everything
    assert sorted(photo for fold in folds for photo in everything - fold) == sorted(everything)


def test_views_of_a_photo_that_is_held_back_are_not_learned():
    """Labels by chance: with a view of the photos held back at hand, they would seem to be known."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 60)).astype(np.float32), np.arange(40) % 2
    views = [features + random.normal(scale=0.01, size=features.shape) for _ in range(3)]
    layer = fit_regression(features, labels, no_prior, 0, views)[0]
    assert np.abs(softmax(layer.logits(features)) - 0.5).max() < 0.2


def test_views_are_learned_from():
    features, labels = features_of(2)
    layer = fit_regression(np.zeros_like(features), labels, no_prior, 0, [features])[0]
    assert (layer.logits(features).argmax(axis=1) == labels).mean() > 0.6


@pytest.mark.parametrize(
    "fit",
    [
        lambda *photos: heads.fit_probe(*photos, 0),
        lambda *photos: fit_regression(*photos, lambda *_: None, 0),
        lambda *photos: regression.cross_validate(
            *photos, lambda *_: None, stratified_folds(photos[1], None, 4, 0)
        ),
    ],
)
def test_a_fit_leaves_the_cores_to_torch(fit, monkeypatch):
    """Two pools of threads on the same cores make a fit many times slower."""
    threads = set()

    def minimize(*args, **knobs):
        threads.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return found(*args, **knobs)

    found = scipy.optimize.minimize
    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    with threadpool_limits(2, user_api="blas"):
        fit(*features_of(40, 10))
        assert threads == {1}
        after = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    assert after == {2}


def test_the_same_seed_gives_the_same_layer():
    features, labels = features_of(3)
    one, two = (fit_regression(features, labels, no_prior, 7)[0] for _ in range(2))
    assert np.array_equal(one.weight, two.weight) and np.array_equal(one.bias, two.bias)


def test_class_weights_let_a_rare_class_count():
    features, labels = features_of(2, photos=100)
    few = np.r_[0:100, 100:110]

    def recall(weights):
        layer = fit_regression(features[few], labels[few], no_prior, 0, class_weights=weights)[0]
        return (layer.logits(features[110:]).argmax(axis=1) == 1).mean()

    assert recall(np.array([110 / 200, 110 / 20])) > recall(None) + 0.1
