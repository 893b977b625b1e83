"""Output layers that predict before training, and the recipes that start from them."""

import csv
import functools
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, draw_photos, network_inputs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_resume import numbers_of, train_here
from test_scripts import metrics_of

from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.groups import stratified_folds
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model import calibration, heads, network, regression, solver
from hotdog_hf.model.regression import fit_regression
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


@pytest.mark.parametrize(
    "sources", [[(934,), None], [None, (934,)], [(3,), (934,), (17,)], [(0,), None, (999,)]]
)
def test_a_class_vector_gives_the_sources_own_logit(source, images, sources):
    logits, ours = answers_of(source, images, sources)
    for column, indices in enumerate(sources):
        if indices is not None:
            torch.testing.assert_close(ours[:, column], logits[:, indices[0]], rtol=1e-5, atol=1e-5)


def test_several_source_classes_of_one_class_give_a_bound_on_their_log_sum_exp(source, images):
    logits, ours = answers_of(source, images, [(151, 152, 268), None])
    dogs = logits[:, [151, 152, 268]].double()
    gaps = dogs.logsumexp(dim=1) - ours[:, 0]
    assert gaps.min() > -1e-5
    q = dogs.mean(dim=0).softmax(dim=0)
    torch.testing.assert_close(gaps.mean(), (dogs.logsumexp(dim=1) - (dogs @ q - q @ q.log())).mean())
    assert (dogs.logsumexp(dim=1) - dogs.max(dim=1).values).mean() > gaps.mean() > 0


def test_the_row_of_all_others_is_the_tightest_linear_bound_on_their_log_sum_exp(source, images):
    logits, ours = answers_of(source, images, [(934,), None])
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
    weight, bias = heads.class_vector_head(head, features, [(index,) for index in reversed(range(1000))])
    assert np.array_equal(weight, head.weight.detach().numpy()[::-1])
    assert np.array_equal(bias, head.bias.detach().numpy()[::-1])


def test_a_source_layer_without_bias_counts_as_zero():
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 4, bias=False)
    weight, bias = heads.class_vector_head(head, np.ones((3, 5)), [(1,), None])
    logits = head.weight.detach().double().sum(dim=1)[[0, 2, 3]]
    assert np.array_equal(weight[0], head.weight.detach().numpy()[1]) and bias[0] == 0
    # Of equal photos the bound is the log-sum-exp itself.
    assert weight[1].sum() + bias[1] == pytest.approx(logits.logsumexp(dim=0).item())


@pytest.mark.parametrize(
    ("ours", "given", "expected"),
    [
        (OURS, [], [(934,), None]),
        (OURS, ["hotdog=934"], [(934,), None]),
        (OURS, ["hotdog=7", "not-hotdog=0"], [(7,), (0,)]),
        (OURS, ["not-hotdog=cheeseburger"], [(934,), (933,)]),
        (["Hot_Dog", "tiger cat", "TABBY"], [], [(934,), (282,), (281,)]),
        (["cat", "dog"], ["cat=tabby cat"], [(281,), None]),
        (["cat", "dog"], ["dog=Siberian husky", "cat=Egyptian-cat"], [(285,), (250,)]),
        (
            ["cat", "dog"],
            ["dog=151-154,tabby", "dog=268", "cat=Egyptian cat, 282"],
            [(285, 282), (151, 152, 153, 154, 281, 268)],
        ),
        (["a=b", "hotdog"], ["a=b=999"], [(999,), (934,)]),
    ],
)
def test_source_classes_are_found_by_name_or_index(source, ours, given, expected):
    assert heads.match_classes(source, ours, given) == expected


@pytest.mark.parametrize(
    ("known", "ours", "expected"),
    [
        (["A", "a"], ["a", "A"], [(1,), (0,)]),
        (["c", "c#", "c++"], ["c", "c++", "d"], [(0,), (2,), None]),
        (["🌭", "🍕"], ["🌭", "🍣"], [(0,), None]),
        (["caf\u00e9", "tea"], ["cafe\u0301", "Tea"], [(0,), (1,)]),
    ],
)
def test_classes_of_a_saved_model_are_found_by_their_own_names(known, ours, expected):
    saved = create_source(TINY_MODEL, "none")
    saved.pretrained_cfg["label_names"] = known
    assert heads.match_classes(saved, ours, []) == expected


@pytest.mark.parametrize(
    ("head_init", "ours", "given"),
    [
        ("source-probe", ["pie", "stew", "hotdog"], []),
        ("source-probe", OURS, ["auto"]),
        ("class-vector", OURS, ["auto"]),
    ],
)
def test_source_classes_may_be_left_to_the_photos(source, head_init, ours, given):
    assert heads.match_classes(source, ours, given, head_init) is None


def test_source_classes_are_described_by_name(source):
    said = heads.describe_sources(source, OURS, [(934,), None])
    assert said == "source classes: hotdog = hotdog, not-hotdog = all others"
    said = heads.describe_sources(source, ["cat", "dog"], [(281, 285), tuple(range(151, 269))])
    assert said == "source classes: cat = tabby + egyptian cat, dog = 118 classes"


def test_source_classes_that_the_photos_look_like():
    """Photos of our class 0 are the source's class 3 or 4, those of class 1 its class 0."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 6)
    with torch.no_grad():
        head.weight.copy_(8 * torch.eye(6))
    labels = np.repeat([0, 1], 10)
    features = np.eye(6)[np.r_[[3, 4] * 5, [0] * 10]]
    weight, bias = heads.similar_head(head, features, labels)
    assert ((features @ weight.T + bias).argmax(axis=1) == labels).all()
    assert weight[0].argsort()[-2:].tolist() in ([3, 4], [4, 3]) and weight[1].argmax() == 0


def test_a_saved_models_own_names_are_found(source):
    saved = network.replace_head(source, ["Chili dog", "hot_dog", "salad"], network.data_config_of(source))
    assert heads.match_classes(saved, ["hot-dog", "not-hotdog"], []) == [(1,), None]
    assert heads.match_classes(saved, OURS, ["hotdog=chili-dog", "not-hotdog=2"]) == [
        (0,),
        (2,),
    ]
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
        (OURS, ["hotdog=5-1"], "--source-class hotdog=5-1: the source has no class '5-1'"),
        (OURS, ["hotdog=990-1000"], "--source-class hotdog=990-1000: the source has no class '990-1000'"),
        (OURS, ["hotdog=1,hotdgo"], "--source-class hotdog=1,hotdgo: the source has no class 'hotdgo'"),
        (["a", "b"], ["a=1-3", "b=3-5"], r"two classes share one source class: .*'b': \[3, 4, 5\]"),
        (["pie", "hotdog", "stew"], [], "finds no source class for pie, stew; .* --source-class pie="),
        (["pie", "stew"], [], "finds no source class for pie, stew; .* --source-class pie="),
        (OURS, ["not-hotdog=red hot"], "two classes share one source class: .*'not-hotdog': .934"),
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


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_a_probe_is_the_logistic_regression_of_the_lowest_log_loss_in_cross_validation(classes):
    features, labels = features_of(classes)
    weight, bias = heads.fit_probe(features, labels, seed=5)[0]
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
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_probe():
    features, labels = features_of(3)
    (weight, bias), again = heads.fit_probe(features, labels, 7)[0], heads.fit_probe(features, labels, 7)[0]
    assert np.array_equal(weight, again[0]) and np.array_equal(bias, again[1])


def test_views_of_a_photo_that_is_judged_are_not_learned():
    """Labels by chance: with a view of the judged photos at hand, they would seem to be known."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 60)).astype(np.float32), np.arange(40) % 2
    views = [features + random.normal(scale=0.01, size=features.shape) for _ in range(3)]
    weight, bias = heads.fit_probe(features, labels, 0, views)[0]
    probabilities = torch.as_tensor(features @ weight.T + bias).softmax(dim=1)
    assert (probabilities - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("head_init", ["probe", "source-probe"])
def test_copies_of_a_photo_that_is_held_back_are_not_learned(source, photos_dir, head_init, monkeypatch):
    """Labels by chance: with a copy of the photos held back at hand, they would seem to be known."""
    random = np.random.default_rng(0)
    copies = np.tile(np.arange(40), 2)
    features, labels = random.normal(size=(40, 60)).astype(np.float32)[copies], copies % 2
    rows = load_photos(photos_dir)["train"].select(np.zeros(80, int))
    rows = rows.remove_columns("label").add_column("label", labels)
    split_features = loaders.FeatureDataset(
        loaders.PhotoDataset(rows, transforms.eval_transform(network.data_config_of(source))),
        torch.as_tensor(features),
    )
    monkeypatch.setattr(heads, "content_groups", lambda found: copies[: len(found)])
    source_head = torch.nn.Linear(60, 3)
    torch.nn.init.zeros_(source_head.weight)
    net = torch.nn.Linear(60, 2)
    net.get_classifier = lambda: net
    heads.fit_head(net, head_init, split_features, [], source_head, [(0,), (1,)])
    probabilities = net(torch.as_tensor(features)).softmax(dim=1)
    assert (probabilities - 0.5).abs().max() < 0.2


@pytest.mark.parametrize(
    ("enough", "groups", "folds"),
    [(8, None, 1), (31, None, 4), (100, None, 5), (100, np.arange(40) // 2, 5)],
)
def test_folds_divide_groups_and_end_when_enough_is_held_back(enough, groups, folds):
    labels = np.repeat([0, 1], 20)
    split = stratified_folds(labels, groups, 5, 0, enough)
    assert len(split) == folds
    for learned, held_back in split:
        assert sorted([*learned, *held_back]) == list(range(40)) and len(held_back) == 8
        if groups is not None:
            assert not set(groups[learned]) & set(groups[held_back])
    assert stratified_folds(labels, labels, 5, 0) == []  # all photos of a class are copies


@pytest.mark.parametrize(
    "fit", [heads.fit_probe, functools.partial(fit_regression, prior_of=lambda *_: None)]
)
def test_photos_that_no_fold_held_back_take_no_part_in_the_calibration(fit, monkeypatch):
    monkeypatch.setattr(solver, "ENOUGH_HELD_BACK", 20)
    features, labels = features_of(2)
    _, logits = fit(features=features, labels=labels, seed=0)
    _, held_back = zip(*stratified_folds(labels, None, 5, 0, solver.ENOUGH_HELD_BACK), strict=True)
    found = calibration.from_folds(logits, labels)
    assert len(held_back) == 3 and len(found.labels) == 24
    assert np.array_equal(found.labels, labels[np.sort(np.concatenate(held_back))])


def test_impossible_classes_make_no_denormal_numbers():
    coordinates = np.ones((4, 1), np.float32)
    rows = solver.Rows(coordinates, np.array([0, 0, 1, 1]), np.full(4, 0.25))
    problem = solver.SoftmaxRegression(rows, 3, solver.ROUGH)
    impossible = solver.Solution(np.array([[0.0, 0.0, -90.0]]), np.zeros(3), 1.0)  # e^-90 is denormal
    _, gradient = problem.loss_and_gradient(impossible.to_vector(), 0.0)
    assert problem.unpack(gradient).coefficients.tolist() == [[0, 0, 0]]


def test_views_are_learned_from():
    features, labels = features_of(2)
    weight, bias = heads.fit_probe(np.zeros_like(features), labels, 0, [features])[0]
    answers = (features @ weight.T + bias).argmax(axis=1)
    assert (answers == labels).mean() > 0.8


@pytest.mark.filterwarnings("error")  # scikit-learn's, of a fold without a class
@pytest.mark.parametrize("photos_of_the_last", [2, 1])
def test_a_probe_takes_classes_of_two_photos_and_of_one(photos_of_the_last):
    features, labels = features_of(3)
    features /= features.std(axis=0)
    few = np.r_[0:20, 20:40, 40 : 40 + photos_of_the_last]
    weight, bias = heads.fit_probe(features[few], labels[few], seed=0)[0]
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    answers = (features @ weight.T + bias).argmax(axis=1)
    assert (answers == labels)[:40].mean() > 0.6


def test_balanced_classes_count_the_same_in_a_probe():
    features, labels = features_of(2, photos=100)
    few = np.r_[0:100, 100:110]

    def recall(balanced):
        weight, bias = heads.fit_probe(features[few], labels[few], 0, balanced=balanced)[0]
        return ((features @ weight.T + bias).argmax(axis=1) == 1)[110:].mean()

    assert recall(True) > recall(False) + 0.1


def test_a_feature_that_is_the_same_on_every_photo_takes_no_part():
    features, labels = features_of(2)
    features[:, 3] = 0.1
    weight, bias = heads.fit_probe(features, labels, seed=0)[0]
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
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--recipe", "probe", "--no-calibrate")
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
    assert "share_of_limit" not in (tmp_path / "zero/metrics.jsonl").read_text(), "nothing was trained"
    assert_scores(zero, "test", scores_of(tmp_path / "zero", load_photos(photos_dir)["test"]))
    plain = create_source(TINY_MODEL, str(tiny_weights)).eval()
    net = load_model(tmp_path / "zero/model")
    with torch.no_grad():
        torch.testing.assert_close(net(images)[:, 0], plain(images)[:, 934], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [(("--learning-rate", 0.1), 0), (("--augmentation", "none", "--probe-views", 0), 1)],
)
def test_the_better_of_a_fitted_head_and_a_trained_one_is_kept(
    tiny_weights, photos_dir, tmp_path, flags, kept
):
    flags = ("--val-fraction", 0.3, "--keep", "best", "--epochs", 1, "--no-calibrate", *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--recipe", "light", *flags)
    *rows, final = numbers_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1] and "test_loss" not in rows[0]
    better = rows[1]["validation_loss"] < rows[0]["validation_loss"]
    assert (better and rows[1]["validation_accuracy"] >= rows[0]["validation_accuracy"]) is bool(kept)
    photos = load_photos(photos_dir, val_fraction=0.3)
    assert_scores(rows[kept], "validation", scores_of(tmp_path / "run", photos["validation"]))
    assert_scores(final, "test", scores_of(tmp_path / "run", photos["test"]))


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_source_probe_starts_from_the_classes_it_names(tiny_weights, photos_dir, tmp_path, capsys):
    """With weights by chance the source knows nothing: what counts is that its rows have been asked."""
    flags = ("--recipe", "source-probe", "--no-calibrate", "--source-class")
    train_here(tiny_weights, photos_dir, tmp_path / "named", *flags, "hotdog=934,3")
    assert "source classes: hotdog = hotdog + tiger shark, not-hotdog = all others" in lines_of(capsys)
    train_here(tiny_weights, photos_dir, tmp_path / "found", *flags, "auto")
    assert "source classes: those that the training photos look like" in lines_of(capsys)
    photos, source = load_photos(photos_dir), create_source(TINY_MODEL, str(tiny_weights)).eval()
    for name, sources in (("named", [(934, 3), None]), ("found", None)):
        zero, final = numbers_of(tmp_path / name)
        assert_scores(zero, "train", scores_of(tmp_path / name, photos["train"]))
        assert_scores(final, "test", scores_of(tmp_path / name, photos["test"]))
        net = load_model(tmp_path / name / "model")
        images, labels = photos_as(net, photos["train"])
        with torch.no_grad():
            features = net.forward_head(net.forward_features(images), pre_logits=True).numpy()
        prior_of = functools.partial(heads.source_prior, source.get_classifier(), sources)
        expected = regression.fit_regression(features, labels.numpy(), prior_of, seed=0)[0]
        ours = net.get_classifier().weight.detach().numpy()
        np.testing.assert_allclose(ours, expected.weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("recipe", ["probe", "source-probe"])
def test_a_single_photo_of_a_class_is_enough(tiny_weights, photos_dir, tmp_path, capsys, recipe):
    draw_photos(tmp_path / "photos/train", {"hotdog": 1, "not-hotdog": 3})
    shutil.copytree(photos_dir / "test", tmp_path / "photos/test")
    train_here(tiny_weights, tmp_path / "photos", tmp_path / "run", "--recipe", recipe)
    assert any(line.startswith("warning: one training photo of hotdog:") for line in lines_of(capsys))
    assert numbers_of(tmp_path / "run")[-1]["train_accuracy"] == 1


@pytest.mark.parametrize(
    ("recipe", "flags"), [("frozen", ("--epochs", 1)), ("class-vector", ("--epochs", 0))]
)
def test_balanced_class_weights_make_the_loss_the_mean_over_classes(
    tiny_weights, photos_dir, tmp_path, recipe, flags
):
    draw_photos(tmp_path / "photos/train", {"hotdog": 12, "not-hotdog": 3})
    shutil.copytree(photos_dir / "test", tmp_path / "photos/test")
    flags = ("--recipe", recipe, "--class-weights", "balanced", "--learning-rate", 1e-12, *flags)
    train_here(tiny_weights, tmp_path / "photos", tmp_path / "run", *flags)
    net = load_model(tmp_path / "run/model")
    images, labels = photos_as(net, load_photos(tmp_path / "photos")["train"])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(net(images).double(), labels, reduction="none")
    expected = np.mean([losses[labels == label].mean().item() for label in (0, 1)])
    assert numbers_of(tmp_path / "run")[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(losses.mean() - expected) > 1e-3 * expected
