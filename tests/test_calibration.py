"""Honest confidence: the temperature, what keeps it in a model, sets of classes that keep a promise."""

import json

import numpy as np
import pytest
import scipy.special
import torch
from conftest import ROOT, TINY_MODEL, run
from test_resume import train_here

from hotdog_hf.errors import UserError
from hotdog_hf.metrics import calibration_error
from hotdog_hf.model import calibration, network, saved, source
from hotdog_hf.model.predictor import (
    Predictor,
    format_header,
    format_prediction,
    load_predictor,
    predict_paths,
)
from hotdog_hf.report.scores import summarise_calibration
from hotdog_hf.training import loop


def drawn(count, classes=3, sharpness=1.0, seed=0):
    """Logits whose softmax is the chance of each label, times `sharpness`, and the labels drawn from it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    chances = scipy.special.softmax(logits, axis=1)
    labels = (rng.random((count, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, classes - 1)
    return logits * sharpness, labels


def test_the_temperature_undoes_what_sharpened_the_logits():
    for sharpness in (0.5, 3.0):
        logits, labels = drawn(4000, sharpness=sharpness)
        assert calibration.fit_temperature(logits, labels) == pytest.approx(sharpness, rel=0.08)
        facts = calibration.calibrate(calibration.HeldOut(logits, labels, "validation"), rescale=True)
        assert facts["loss_after"] < facts["loss_before"] and facts["photos"] == 4000
        before = scipy.special.softmax(logits, axis=1)
        after = scipy.special.softmax(logits / facts["temperature"], axis=1)
        assert calibration_error(after, labels) < 0.4 * calibration_error(before, labels)
        assert calibration.uncalibrated(after, facts["temperature"]) == pytest.approx(before, abs=1e-9)


def test_a_temperature_that_does_not_help_other_photos_is_not_used():
    unused = 0
    for seed in range(20):
        logits, labels = drawn(30, seed=seed)
        held_out = calibration.HeldOut(logits, labels, "validation")
        facts = calibration.calibrate(held_out, rescale=True)
        assert facts["loss_after"] <= facts["loss_before"]  # never worse on what it was fitted to
        unused += facts["temperature"] == 1
        assert calibration.calibrate(held_out, rescale=False)["temperature"] == 1
    assert unused >= 10
    # A few photos that are all right do not make a model certain.
    right = np.eye(2)[[0, 1] * 10] * 2
    assert 0.2 < calibration.fit_temperature(right, np.array([0, 1] * 10)) < 1


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_are_those_of_mapie(coverage):
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.linear_model import LogisticRegression

    features, labels = drawn(400, seed=4)
    model = LogisticRegression().fit(features[:100], labels[:100])
    theirs = mapie.SplitConformalClassifier(
        model, confidence_level=coverage, conformity_score="lac", prefit=True
    )
    theirs.conformalize(features[100:190], labels[100:190])
    _, sets = theirs.predict_set(features[190:])
    logits = np.log(model.predict_proba(features[100:190]))
    kept = calibration.calibrate(calibration.HeldOut(logits, labels[100:190], "validation"), rescale=False)
    limit = calibration.set_limit(kept, coverage, "it")
    expected = float(np.ravel(theirs._mapie_classifier.quantiles_)[0])
    assert limit == pytest.approx(expected, abs=1e-12)
    ours = calibration.classes_within(model.predict_proba(features[190:]), limit)
    assert ours.tolist() == sets[..., 0].tolist()


def test_sets_hold_the_true_class_as_often_as_promised():
    reached = []
    for seed in range(40):
        logits, labels = drawn(160, seed=seed)
        facts = calibration.calibrate(
            calibration.HeldOut(logits[:80], labels[:80], "validation"), rescale=True
        )
        rows = scipy.special.softmax(logits[80:] / facts["temperature"], axis=1)
        summary = summarise_calibration(rows, labels[80:], facts)
        reached.append([row["reached"] for row in summary["sets"]])
    low, high = np.mean(reached, axis=0)
    assert 0.89 < low < 0.92 and 0.94 < high < 0.97
    assert summarise_calibration(rows, labels[80:], None) is None
    few = facts | {"scores": facts["scores"][:9]}  # just enough for 0.9
    assert [row["promised"] for row in summarise_calibration(rows, labels[80:], few)["sets"]] == [0.9]
    with pytest.raises(UserError, match="needs 99 held-out photos or more; m has 80"):
        calibration.set_limit(facts, 0.99, "m")
    with pytest.raises(UserError, match="m was saved without predictions for held-out photos"):
        calibration.set_limit(None, 0.9, "m")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A saved model, its folder, and the logits that it had before it was calibrated with temperature 4."""
    torch.manual_seed(0)
    net = source.create_source(TINY_MODEL, "none")
    config = source.source_data_config(net, "chapter", 32)
    net = network.replace_head(net, ["cat", "dog"], config, "linear").eval()
    folder = saved.save_model(net, tmp_path_factory.mktemp("saved") / "model", "apache-2.0")
    assert saved.calibration_of(folder) is None
    facts = {
        "temperature": 4.0,
        "held_out": "validation",
        "photos": 9,
        "scores": [0.1 * i for i in range(1, 10)],
    }
    saved.calibrate_saved(network.to_meta(net), folder, "apache-2.0", facts)
    return net, folder, facts


def test_every_loader_of_the_folder_gets_calibrated_probabilities(calibrated):
    net, folder, facts = calibrated
    photos = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        expected = net(photos) / 4
        again = saved.load_model(folder)
        assert torch.allclose(again(photos), expected, atol=1e-6)
    assert again.pretrained_cfg["calibration"] == facts == saved.calibration_of(folder)
    # A model that is trained further has no calibration.
    assert saved.calibration_of(saved.save_model(again, folder.parent / "again")) is None
    from transformers import AutoModelForImageClassification

    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.allclose(theirs(pixel_values=photos).logits, expected, atol=1e-5)


def test_predictions_print_their_sets(photos_dir):
    names, rows = ["cat", "dog"], np.array([[0.35, 0.65], [0.01, 0.99], [0.5, 0.5]], np.float32)
    config = {"input_size": (3, 8, 8), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    predictor = Predictor(names, config, lambda images: rows[: len(images)])
    paths = [str(path) for path in sorted((photos_dir / "test/hotdog").iterdir())[:3]]
    within = [p.classes for p in predict_paths(predictor, paths, np.argmax, set_limit=0.7)]
    assert within == [("dog", "cat"), ("dog",), ("cat", "dog")]
    none = list(predict_paths(predictor, paths, np.argmax, set_limit=0.3))
    assert [p.classes for p in none] == [(), ("dog",), ()]
    assert json.loads(format_prediction("jsonl", none[1]))["set"] == ["dog"]
    assert format_header("csv", names, True).endswith(",set")
    assert format_prediction("csv", none[1]).endswith(",dog")
    head, line = format_header("table", names, True), format_prediction("table", none[0])
    assert head.index("set") == line.index("(none)") and head.index("path") == line.index(paths[0])
    assert next(predict_paths(predictor, paths, np.argmax)).classes is None


def test_a_probe_is_calibrated_by_its_folds_and_resumes_as_it_is(photos_dir, tiny_weights, tmp_path):
    command = ["python", ROOT / "scripts/train.py", "--recipe", "probe", "--model", TINY_MODEL]
    command += ["--weights", tiny_weights, "--data-dir", photos_dir, "--output-dir", tmp_path / "run"]
    done = run(*command)
    assert done.returncode == 0 and "calibrated with temperature" in done.stdout, done.stderr
    final = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    facts = saved.calibration_of(tmp_path / "run/model")
    assert facts["temperature"] == final["temperature"] and facts["held_out"] == "out-of-fold"
    assert len(facts["scores"]) == facts["photos"] == 25
    card = (tmp_path / "run/model/README.md").read_text()
    assert "Log-loss before calibration" in card and "seed 0: the output layer was fitted to features" in card
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    again = run(*command, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights
    predictor = load_predictor(tmp_path / "run/model")
    limit = calibration.set_limit(predictor.calibration, 0.9, "it")
    assert limit == sorted(facts["scores"])[23]  # ceil(26 * 0.9) = 24


@pytest.mark.parametrize(("temperature", "evaluations"), [(1.0, 1), (2.0, 2)])
def test_the_saved_model_is_evaluated_again_only_if_calibration_changed_it(
    photos_dir, tiny_weights, tmp_path, monkeypatch, temperature, evaluations
):
    evaluated, evaluate = [], loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda *args, **options: evaluated.append(1) or evaluate(*args, **options)
    )
    monkeypatch.setattr(calibration, "_tested_temperature", lambda *_: temperature)
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--recipe", "probe")
    assert len(evaluated) == evaluations
    assert saved.calibration_of(tmp_path / "run/model")["temperature"] == temperature
