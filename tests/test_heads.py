"""Output layers that predict before training, and the recipes that start from them."""

import csv

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, network_inputs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_resume import numbers_of, train_here
from test_scripts import metrics_of

from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model import heads, network
from hotdog_hf.model.saved import load_model
from hotdog_hf.model.source import create_source, source_data_config

OURS = ["hotdog", "not-hotdog"]


@pytest.fixture
def source(tiny_weights):
    """The tiny model with 1000 classes that are as unlike as those of a trained one."""
    net = create_source(TINY_MODEL, str(tiny_weights)).eval()
    with torch.no_grad():
        net.get_classifier().weight.mul_(20)
        net.get_classifier().bias.normal_(generator=torch.Generator().manual_seed(0))
    return net


def photos_as(net, rows):
    """All photos of a split as one batch [N, 3, 64, 64], and their labels [N]."""
    photo_set = loaders.PhotoDataset(rows, transforms.eval_transform(network.data_config_of(net)))
    return network_inputs(photo_set), torch.as_tensor(photo_set.labels)


@pytest.fixture
def images(source, photos_dir):
    source.pretrained_cfg |= source_data_config(source, "chapter", 64)
    return photos_as(source, load_photos(photos_dir)["train"])[0]


@torch.no_grad()
def answers_of(source, images, sources):
    """Return the source's logits [N, classes] and those [N, len(sources)] of the layer made from its rows."""
    features = source.forward_head(source.forward_features(images), pre_logits=True)
    logits, source_head = source(images), source.get_classifier()
    names = [str(index) for index in range(len(sources))]
    net = network.replace_head(source, names, network.data_config_of(source)).eval()
    heads.set_head(net, *heads.class_vector_head(source_head, features.numpy(), sources))
    return logits, net(images)


@pytest.mark.parametrize("sources", [[934, None], [None, 934], [3, 934, 17], [0, None, 999]])
def test_a_class_vector_gives_the_sources_own_logit(source, images, sources):
    logits, ours = answers_of(source, images, sources)
    for column, index in enumerate(sources):
        if index is not None:
            torch.testing.assert_close(ours[:, column], logits[:, index], rtol=1e-5, atol=1e-5)


def test_the_row_of_all_others_is_the_tightest_linear_bound_on_their_log_sum_exp(source, images):
    logits, ours = answers_of(source, images, [934, None])
    others = logits[:, [index for index in range(1000) if index != 934]].double()
    gaps = others.logsumexp(dim=1) - ours[:, 1]
    assert gaps.min() > -1e-5, "a lower bound on every photo"
    mean = others.mean(dim=0)

    def mean_gap(q):
        return others.logsumexp(dim=1).mean() - (q @ mean - q @ q.log())

    best = mean.softmax(dim=0)
    torch.testing.assert_close(gaps.mean(), mean_gap(best), rtol=0, atol=1e-5)
    uniform = torch.full_like(mean, 1 / 999)
    assert mean_gap(uniform) > gaps.mean() + 0.1
    for other in (others[0].softmax(dim=0), 0.95 * best + 0.05 * uniform, (1.1 * mean).softmax(dim=0)):
        assert mean_gap(other) > gaps.mean()


def test_a_source_whose_every_class_is_ours_gives_its_whole_layer_in_our_order(source, images):
    head = source.get_classifier()
    features = np.zeros((4, head.in_features))
    weight, bias = heads.class_vector_head(head, features, list(reversed(range(1000))))
    assert np.array_equal(weight, head.weight.detach().numpy()[::-1])
    assert np.array_equal(bias, head.bias.detach().numpy()[::-1])


def test_a_source_layer_without_bias_counts_as_zero():
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 4, bias=False)
    weight, bias = heads.class_vector_head(head, np.ones((3, 5)), [1, None])
    logits = head.weight.detach().double().sum(dim=1)[[0, 2, 3]]
    assert np.array_equal(weight[0], head.weight.detach().numpy()[1]) and bias[0] == 0
    # Of equal photos the bound is the log-sum-exp itself.
    assert weight[1].sum() + bias[1] == pytest.approx(logits.logsumexp(dim=0).item())


@pytest.mark.parametrize(
    ("ours", "given", "expected"),
    [
        (OURS, [], [934, None]),
        (OURS, ["hotdog=934"], [934, None]),
        (OURS, ["hotdog=7", "not-hotdog=0"], [7, 0]),
        (OURS, ["not-hotdog=cheeseburger"], [934, 933]),
        (["Hot_Dog", "tiger cat", "TABBY"], [], [934, 282, 281]),
        (["cat", "dog"], ["cat=tabby cat"], [281, None]),
        (["cat", "dog"], ["dog=Siberian husky", "cat=Egyptian-cat"], [285, 250]),
        (["a=b", "hotdog"], ["a=b=999"], [999, 934]),
    ],
)
def test_source_classes_are_found_by_name_or_index(source, ours, given, expected):
    assert heads.match_classes(source, ours, given) == expected


def test_a_saved_models_own_names_are_found(source):
    saved = network.replace_head(source, ["Chili dog", "hot_dog", "salad"], network.data_config_of(source))
    assert heads.match_classes(saved, ["hot-dog", "not-hotdog"], []) == [1, None]
    assert heads.match_classes(saved, OURS, ["hotdog=chili-dog", "not-hotdog=2"]) == [0, 2]
    with pytest.raises(UserError, match="--source-class hotdog=934: the source has no class '934'"):
        heads.match_classes(saved, OURS, ["hotdog=934"])
    more = ["chili dog", "hot dog", "salad", "stew"]
    with pytest.raises(UserError, match="no source class is left to stand for stew"):
        heads.match_classes(saved, more, [])
    with pytest.raises(UserError, match="finds no source class for hotdog, not-hotdog"):
        heads.match_classes(saved, OURS, [])


@pytest.mark.parametrize(
    ("ours", "given", "message"),
    [
        (
            OURS,
            ["hotdgo=934"],
            "--source-class hotdgo=934: 'hotdgo' is none of the classes hotdog, not-hotdog",
        ),
        (OURS, ["hotdog=1000"], "--source-class hotdog=1000: the source has no class '1000'"),
        (OURS, ["hotdog=-1"], "--source-class hotdog=-1: the source has no class '-1'"),
        (OURS, ["hotdog=²"], "--source-class hotdog=²: the source has no class '²'"),
        (OURS, ["hotdog="], "--source-class hotdog=: the source has no class ''"),
        (OURS, ["hotdog=hotdgo"], "--source-class hotdog=hotdgo: the source has no class 'hotdgo'"),
        (["pie", "hotdog", "stew"], [], "finds no source class for pie, stew; .* --source-class pie="),
        (["pie", "stew"], [], "finds no source class for pie, stew; .* --source-class pie="),
        (OURS, ["not-hotdog=red hot"], "two classes share one source class: .*'not-hotdog': 934"),
    ],
)
def test_what_cannot_be_matched_is_named(source, ours, given, message):
    with pytest.raises(UserError, match=message):
        heads.match_classes(source, ours, given)


def features_of(classes, photos=20, size=6):
    """Features of overlapping classes, of very different scales, far from 0; and labels."""
    random = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), photos)
    centres = random.normal(size=(classes, size))
    features = (random.normal(size=(len(labels), size)) + centres[labels]) * 10.0 ** np.arange(-2, size - 2)
    return features.astype(np.float32) + 3, labels


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_is_the_logistic_regression_of_the_lowest_log_loss_in_cross_validation(classes):
    features, labels = features_of(classes)
    weight, bias = heads.probe_head(features, labels, seed=5)
    assert weight.shape == (classes, 6) and bias.shape == (classes,)

    def regression(strength):
        exact = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-9)  # another way than ours
        return make_pipeline(StandardScaler(), exact)

    double, folds = features.astype(float), StratifiedKFold(5, shuffle=True, random_state=5)
    losses = {
        strength: -cross_val_score(
            regression(strength), double, labels, scoring="neg_log_loss", cv=folds
        ).mean()
        for strength in heads.PROBE_STRENGTHS
    }
    best = min(losses, key=losses.get)
    assert min(heads.PROBE_STRENGTHS) < best < max(heads.PROBE_STRENGTHS)
    expected = regression(best).fit(double, labels).predict_proba(double)
    ours = torch.as_tensor(double @ weight.T + bias).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_probe():
    features, labels = features_of(3)
    (weight, bias), again = heads.probe_head(features, labels, 7), heads.probe_head(features, labels, 7)
    assert np.array_equal(weight, again[0]) and np.array_equal(bias, again[1])


def test_views_of_a_photo_that_is_judged_are_not_learned():
    """Labels by chance: with a view of the judged photos at hand, they would seem to be known."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 60)).astype(np.float32), np.arange(40) % 2
    views = [features + random.normal(scale=0.01, size=features.shape) for _ in range(3)]
    weight, bias = heads.probe_head(features, labels, 0, views)
    probabilities = torch.as_tensor(features @ weight.T + bias).softmax(dim=1)
    assert (probabilities - 0.5).abs().max() < 0.1


def test_views_are_learned_from():
    features, labels = features_of(2)
    weight, bias = heads.probe_head(np.zeros_like(features), labels, 0, [features])
    answers = (features @ weight.T + bias).argmax(axis=1)
    assert (answers == labels).mean() > 0.8


@pytest.mark.filterwarnings("error")  # scikit-learn's, of a fold without a class
def test_a_probe_needs_two_photos_of_every_class():
    features, labels = features_of(3)
    few = np.r_[0:20, 20:40, 40:42]
    weight, _ = heads.probe_head(features[few], labels[few], seed=0)
    assert np.isfinite(weight).all()
    with pytest.raises(UserError, match="--head-init probe needs at least 2 training photos of every class"):
        heads.probe_head(features[few[:-1]], labels[few[:-1]], seed=0)


def test_a_feature_that_is_the_same_on_every_photo_takes_no_part():
    features, labels = features_of(2)
    features[:, 3] = 0.1
    weight, bias = heads.probe_head(features, labels, seed=0)
    assert np.isfinite(weight).all() and np.isfinite(bias).all() and not weight[:, 3].any()


@torch.no_grad()
def scores_of(run_dir, rows):
    """Accuracy and loss of a run's saved model on these photos."""
    net = load_model(run_dir / "model")
    images, labels = photos_as(net, rows)
    logits = net(images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, torch.nn.functional.cross_entropy(logits.double(), labels).item()


def assert_scores(row, split, scores):
    assert (row[f"{split}_accuracy"], row[f"{split}_loss"]) == pytest.approx(scores, rel=1e-4, abs=1e-6)


def test_the_probe_recipe_solves_judges_and_saves_without_a_step(tiny_weights, photos_dir, tmp_path):
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--recipe", "probe")
    zero, final = numbers_of(tmp_path / "run")
    assert zero["epoch"] == 0 and final["final"]
    photos = load_photos(photos_dir)
    for row in (zero, final):
        assert_scores(row, "train", scores_of(tmp_path / "run", photos["train"]))
        assert_scores(row, "test", scores_of(tmp_path / "run", photos["test"]))
    with (tmp_path / "run/predictions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == Photos(photos, photos_dir).names("test")
    assert np.mean([line["true_label"] == line["predicted_label"] for line in lines]) == pytest.approx(
        final["test_accuracy"]
    )


def test_the_class_vector_recipe_is_judged_before_its_first_step(tiny_weights, photos_dir, tmp_path, images):
    flags = ("--recipe", "class-vector", "--source-class", "hotdog=934", "--epochs")
    train_here(tiny_weights, photos_dir, tmp_path / "zero", *flags, 0)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, 1)
    zero, one, final = numbers_of(tmp_path / "run")
    assert (zero["epoch"], one["epoch"], final["final"]) == (0, 1, True)
    speeds = [row["examples_per_second"] for row in metrics_of(tmp_path / "run")]
    assert speeds[2] == pytest.approx(speeds[1]) != speeds[0]  # not that of solving the head
    assert zero["learning_rate"] == 0 and one["learning_rate"] == pytest.approx(5e-4)
    assert zero == numbers_of(tmp_path / "zero")[0]
    assert_scores(zero, "test", scores_of(tmp_path / "zero", load_photos(photos_dir)["test"]))
    plain = create_source(TINY_MODEL, str(tiny_weights)).eval()
    net = load_model(tmp_path / "zero/model")
    with torch.no_grad():
        torch.testing.assert_close(net(images)[:, 0], plain(images)[:, 934], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [(("--learning-rate", 1), 0), (("--augmentation", "none", "--probe-views", 0), 1)],
)
def test_the_best_recipe_keeps_the_better_of_start_and_end(tiny_weights, photos_dir, tmp_path, flags, kept):
    flags = ("--recipe", "best", "--val-fraction", 0.3, "--epochs", 1, "--train-image-size", 64, *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags)
    *rows, final = numbers_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1] and "test_loss" not in rows[0]
    better = rows[1]["validation_loss"] < rows[0]["validation_loss"]
    assert (better and rows[1]["validation_accuracy"] >= rows[0]["validation_accuracy"]) is bool(kept)
    photos = load_photos(photos_dir, val_fraction=0.3)
    assert_scores(rows[kept], "validation", scores_of(tmp_path / "run", photos["validation"]))
    assert_scores(final, "test", scores_of(tmp_path / "run", photos["test"]))
