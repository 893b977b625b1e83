"""The audit: what features say about labels and photos, its page and its list of labels, on drawn photos."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY_MODEL, draw_photos, run
from PIL import Image, ImageFilter
from test_report import Page

from hotdog_hf.audit import appearance, page, runner, scores
from hotdog_hf.data.images import Photo, open_photo
from hotdog_hf.data.splits import load_photos
from hotdog_hf.errors import UserError

AUDIT = ROOT / "scripts/audit.py"


def clouds(count, classes=2, distance=4.0, seed=0, dimensions=8):
    """Features in one cloud per class, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(size=(count, dimensions))
    features[np.arange(count), labels] += distance
    return features, labels


@pytest.mark.parametrize("classes", [2, 5])
def test_suspicious_labels_are_those_of_cleanlab(classes):
    cleanlab = pytest.importorskip("cleanlab.filter")
    rng = np.random.default_rng(classes)
    labels = np.arange(300) % classes
    logits = rng.normal(size=(300, classes)) + 2 * np.eye(classes)[rng.permutation(labels)]
    logits += 2 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = cleanlab.find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert 10 < expected.sum() < 250
    assert scores.suspicious_labels(probabilities, labels).tolist() == expected.tolist()
    ranked = cleanlab.find_label_issues(
        *(labels, probabilities),
        filter_by="confident_learning",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    order = scores.by_suspicion(probabilities, labels)
    assert [i for i in order if expected[i]] == ranked.tolist()


def test_flipped_labels_come_first():
    features, truth = clouds(200)
    labels, flipped = truth.copy(), np.arange(0, 200, 21)
    labels[flipped] = 1 - labels[flipped]
    folds = scores.folds_of(labels, np.arange(200), seed=0)
    probabilities, strength = scores.out_of_fold(features, labels, folds)
    assert strength in scores.STRENGTHS
    trusted = scores.out_of_fold_by_trust(features, labels, folds, strength, probabilities)
    assert set(scores.by_suspicion(trusted, labels)[: len(flipped)]) == set(flipped)
    # Wrong labels spoil the trusting probe less: it is surer of the true classes.
    right = np.setdiff1d(np.arange(200), flipped)
    losses = [scores.log_losses(rows[right], truth[right]).mean() for rows in (probabilities, trusted)]
    assert losses[1] < losses[0]


def test_every_photo_is_held_out_once_and_groups_are_never_divided():
    labels, groups = np.arange(60) % 3, np.arange(60) // 6
    folds = scores.folds_of(labels, groups, seed=1)
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(60))
    for training, held_out in folds:
        assert not set(groups[training]) & set(groups[held_out])
    with pytest.raises(UserError, match="at least 2 photos of every class"):
        scores.folds_of(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2]), seed=0)


def test_copies_across_folds_would_have_shown_in_the_accuracy():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(60, 100)), 2, axis=0)  # of no class at all, each photo twice
    labels, twice = np.repeat(np.arange(60) % 2, 2), np.repeat(np.arange(60), 2)
    accuracies = []
    for groups in (np.arange(120), twice):
        probabilities, _ = scores.out_of_fold(features, labels, scores.folds_of(labels, groups, seed=0))
        accuracies.append((probabilities.argmax(axis=1) == labels).mean())
    assert accuracies[0] > 0.8 > 0.7 > accuracies[1]


def test_the_fit_finds_a_known_curve_and_neither_part_is_negative():
    sizes = np.array([50.0, 100, 200, 400])
    falling = 1.5 * sizes**-0.5 + 0.04
    constant, rising = np.full(4, 0.2), np.linspace(0.1, 0.2, 4)
    fits = scores._fit(np.stack([falling, constant, rising]), sizes)
    np.testing.assert_allclose(fits[0], [1.5, 0.5, 0.04], rtol=1e-6)
    np.testing.assert_allclose(fits[1:, 2], [0.2, 0.15])
    assert (fits >= 0).all() and fits[1:, 0].max() < 1e-9


def test_the_learning_curve_rises_where_photos_help_and_is_flat_where_they_do_not():
    groups = np.arange(160)
    hard, labels = clouds(160, distance=1.0, dimensions=40)
    rising = scores.learning_curve(hard, labels, groups, strength=0.1, seed=0)
    assert rising.sizes == [16, 32, 64, 128]
    means = [entry["value"] for entry in rising.accuracies]
    assert means[-1] > means[0] and rising.gain["value"] > 0
    for entry in (*rising.accuracies, rising.forecast):
        assert 0 < entry["low"] <= entry["value"] <= entry["high"] <= 1
    easy, labels = clouds(160, distance=9.0)
    flat = scores.learning_curve(easy, labels, groups, strength=0.1, seed=0)
    assert flat.is_flat and flat.forecast["value"] > 0.97
    assert rising.is_flat == (rising.gain["value"] < 0.01)


def test_too_few_photos_for_a_learning_curve_are_no_perfect_forecast():
    features, labels = clouds(4)
    with pytest.raises(UserError, match="too few photos for an audit: a class needs at least 3"):
        scores.learning_curve(features, labels, np.arange(4), strength=0.1, seed=0)


def test_many_classes_get_their_most_frequent_confusions(tmp_path):
    draw_photos(tmp_path / "photos/train", {f"class {index}": 3 for index in range(31)}, size=(8, 8))
    draw_photos(tmp_path / "photos/test", {f"class {index}": 1 for index in range(31)}, size=(8, 8))
    rows = load_photos(tmp_path / "photos")["train"]
    features, labels = clouds(93, 31, distance=2.0, dimensions=32)
    found = runner.Audit(
        data_dir="photos",
        split="train",
        rows=rows,
        files=[f"{index}.png" for index in range(93)],
        labels=labels,
        groups=np.arange(93),
        appearances=[appearance.measure(open_photo(row)) for row in rows],
        findings=[],
        **runner._scores(features, labels, np.arange(93), 0, 31),
    )
    for trained_here in (True, False):
        command = "python scripts/audit.py photos"
        page.write_audit(tmp_path / "audit", found, "a network", trained_here, command)
        shown = Page((tmp_path / "audit/audit.html").read_text(encoding="utf-8"))
        for text in (shown.words, page.describe(found, trained_here)):
            assert (page.TRAINED_HERE in text) == trained_here
    assert "The most frequent mistakes; audit.json has all of them." in shown.words
    assert "Photos by label" not in shown.words


def test_an_interval_is_wider_where_photos_come_in_groups():
    values = np.repeat(np.random.default_rng(0).random(20) < 0.5, 10)
    alone, grouped = (scores.mean_and_interval(values, g, 0) for g in (np.arange(200), np.arange(200) // 10))
    assert alone["value"] == grouped["value"] == values.mean()
    assert grouped["high"] - grouped["low"] > 2 * (alone["high"] - alone["low"])


def test_nearest_photos_are_those_of_a_full_comparison(monkeypatch):
    features = np.random.default_rng(0).normal(size=(30, 5)) * [1, 10, 1, 1, 100] + 3
    monkeypatch.setattr(scores, "CHUNK", 7)
    indices, similarities = scores.nearest(features)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    full = scaled @ scaled.T - 3 * np.eye(30)
    assert indices.tolist() == np.argsort(-full, axis=1)[:, : scores.NEIGHBOURS].tolist()
    np.testing.assert_allclose(similarities, -np.sort(-full, axis=1)[:, : scores.NEIGHBOURS])
    features[11] = -features.mean(axis=0) * [50, 0, 0, -50, 0]
    assert scores.distances(scores.nearest(features)[1]).argmax() == 11


def test_faults_of_a_photo_are_told_from_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    good = Image.fromarray(pixels)
    assert appearance.measure(Photo(good)).faults() == []
    assert appearance.measure(Photo(good.resize((90, 60)))).faults() == ["tiny"]
    assert appearance.measure(Photo(good.point(lambda value: value // 5))).faults() == ["dark"]
    assert appearance.measure(Photo(good.filter(ImageFilter.GaussianBlur(9)))).faults() == ["blurred"]
    large = good.resize((3000, 2000), Image.Resampling.NEAREST)
    assert appearance.measure(Photo(large)).faults() == []


@pytest.fixture(scope="module")
def audited(tmp_path_factory, photos_dir, tiny_weights):
    """A folder with a wrong label, a copy and a hostile name, its audit, and what the script printed."""
    root = tmp_path_factory.mktemp("audit")
    folder = shutil.copytree(photos_dir, root / "photos")
    train = folder / "train"
    (train / "hotdog/000.png").rename(train / "not-hotdog/wrong.png")
    shutil.copy(train / "hotdog/001.png", train / "hotdog/<b>&'.png")
    flags = ("--model", TINY_MODEL, "--weights", tiny_weights, "--image-size", 64)
    fixes = ("--write-fixes", root / "fixes.csv", "--output-dir", root / "audit")
    done = run("python", AUDIT, folder, *flags, *fixes, cwd=root)
    assert done.returncode == 0, done.stderr
    return root, done.stdout, json.loads((root / "audit/audit.json").read_text())


def test_the_script_finds_the_wrong_label_and_the_copy(audited):
    root, printed, found = audited
    assert found["photos"] == 26 and sum(map(sum, found["confusion_matrix"])) == 26
    assert found["suspicious_labels"][0] == "train/not-hotdog/wrong.png"
    assert found["copies"] == [[f"train/hotdog/{name}.png" for name in ("001", "<b>&'")]]
    assert len(found["tiny"]) == 26  # 56 pixels
    with (root / "fixes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "suggested", "confidence"]
    assert (rows[0]["path"], rows[0]["label"]) == ("train/not-hotdog/wrong.png", "not-hotdog")
    assert rows[0]["suggested"] == "hotdog" and 0.5 < float(rows[0]["confidence"]) <= 1
    assert "accuracy to expect" in printed and f"audit: {root / 'audit/audit.html'}" in printed
    assert f"{len(rows)} labels to look through" in printed


def test_the_page_is_whole_and_needs_no_other_file(audited):
    root, _, found = audited
    shown = Page((root / "audit/audit.html").read_text(encoding="utf-8"))
    for _, attributes in shown.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert all(image["alt"] for image in shown.all("img")) and len(shown.all("img")) > 20
    assert "train/hotdog/<b>&'.png" in shown.words and shown.all("b") == []
    assert "labelled not-hotdog" in shown.words and "train/not-hotdog/wrong.png" in shown.words
    assert f"{found['accuracy']['value']:.3f}" in shown.words
    assert "the same file several times in a class (1)" in shown.words  # the check's finding


def test_an_audit_replaces_an_earlier_one_and_nothing_else(audited, tiny_weights, tmp_path):
    root, *_ = audited
    flags = ("--model", TINY_MODEL, "--weights", tiny_weights, "--image-size", 64, "--split", "all")
    done = run("python", AUDIT, root / "photos", *flags, "--output-dir", root / "audit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((root / "audit/audit.json").read_text())["photos"] == 26 + 11
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for more, message in (
        (("--output-dir", tmp_path / "mine"), "holds something other than an audit"),
        (("--output-dir", tmp_path / "new", "--split", "validation"), "has no validation split"),
    ):
        done = run("python", AUDIT, root / "photos", *flags, *more, cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False) and message in done.stderr
    assert not (tmp_path / "new").exists() and (tmp_path / "mine/notes.txt").exists()


def test_a_phone_and_a_desktop_show_the_page_without_a_complaint(audited, faults_in_browser):
    root, _, _ = audited
    assert faults_in_browser(root / "audit/audit.html") == []


def test_only_the_model_of_a_run_brings_its_photos(tmp_path, monkeypatch):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(json.dumps({"data": {"data_dir": str(tmp_path)}}))
    (tmp_path / "run/mine.safetensors").touch()
    assert runner.is_trained_on(str(tmp_path / "run/model"), str(tmp_path))
    assert not runner.is_trained_on(str(tmp_path / "run/model"), str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path / "run")  # where a config.json is no matter of these
    assert not any(runner.is_trained_on(name, "..") for name in ("auto", "bundled", "mine.safetensors"))
    assert runner.is_trained_on("model", "..")
