import json
import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn import metrics as sk

from hotdog_hf import machine, metrics
from hotdog_hf.classification import ClassificationReport
from hotdog_hf.config import TrainConfig, to_dict
from hotdog_hf.metrics import class_scores, most_confused, quality
from hotdog_hf.training.card import CardFacts, write_card
from hotdog_hf.training.records import epoch_scores


def random_case(classes, count=101):
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(classes), count)
    return scores, np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])


@pytest.mark.parametrize("positive", ["hotdog", "not-hotdog"])
def test_two_classes_agree_with_scikit_learn_for_the_named_class(positive):
    scores, labels = random_case(2)
    values = ClassificationReport(["hotdog", "not-hotdog"], positive).compute(
        predictions=scores, references=labels
    )
    index = ["hotdog", "not-hotdog"].index(positive)
    chosen = scores.argmax(axis=1)
    truth, score = labels == index, scores[:, index]
    assert values.pop("confusion_matrix") == sk.confusion_matrix(labels, chosen).tolist()
    assert values == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, chosen),
            "loss": sk.log_loss(labels, scores),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, chosen),
            "balanced_loss": np.mean([-np.log(scores[labels == label, label]).mean() for label in (0, 1)]),
            "precision": sk.precision_score(labels, chosen, pos_label=index),
            "recall": sk.recall_score(labels, chosen, pos_label=index),
            "f1": sk.f1_score(labels, chosen, pos_label=index),
            "roc_auc": sk.roc_auc_score(truth, score),
            "average_precision": sk.average_precision_score(truth, score),
        },
        rel=1e-5,
    )


def test_beyond_two_classes_the_means_over_classes_are_macro_values():
    scores, labels = random_case(4)
    values = ClassificationReport(list("abcd"), "b").compute(predictions=scores, references=labels)
    chosen = scores.argmax(axis=1)
    assert values["macro_f1"] == pytest.approx(sk.f1_score(labels, chosen, average="macro"))
    assert values["macro_recall"] == pytest.approx(sk.recall_score(labels, chosen, average="macro"))
    assert values["macro_roc_auc"] == pytest.approx(
        sk.roc_auc_score(labels, scores, multi_class="ovr"), rel=1e-5
    )
    assert values["recall"] == pytest.approx(sk.recall_score(labels == 1, chosen == 1))
    assert values["balanced_accuracy"] == pytest.approx(values["macro_recall"])


def test_without_a_positive_class_there_are_macro_values_only():
    scores, labels = random_case(2)
    values = ClassificationReport(["cat", "dog"]).compute(predictions=scores, references=labels)
    assert "f1" not in values and "macro_f1" in values


def test_a_class_that_is_never_predicted_gives_zero_and_plain_json():
    scores = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    report = ClassificationReport(["hotdog", "not-hotdog"], "hotdog")
    values = report.compute(predictions=scores, references=[0, 1, 1])
    assert (values["precision"], values["recall"], values["f1"]) == (0, 0, 0)
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("table_size", [4_000_000, 10], ids=["at once", "in portions"])
def test_areas_are_scikit_learns_also_with_ties_and_weights(monkeypatch, table_size):
    monkeypatch.setattr(metrics, "AREA_TABLE", table_size)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    scores = rng.integers(1, 6, (90, 3)) / 10 + 0.1 * np.eye(3)[labels]
    weights = rng.integers(0, 3, (90, 7)).astype(np.float32)
    for samples in (None, weights):
        columns = class_scores(scores, labels, samples)
        for index in range(3):
            for number, weight in enumerate(np.ones((1, 90)) if samples is None else samples.T):
                truth, score = labels == index, scores[:, index]
                areas = [columns[name][index, number] for name in ("roc_auc", "average_precision")]
                assert areas == pytest.approx(
                    [
                        sk.roc_auc_score(truth, score, sample_weight=weight),
                        sk.average_precision_score(truth, score, sample_weight=weight),
                    ],
                    abs=1e-12,
                )
    alone = class_scores(scores, labels, weights, only=1)
    assert all(np.array_equal(column[0], columns[name][1]) for name, column in alone.items())


def test_many_classes_take_little_more_memory_than_their_probabilities():
    scores, labels = random_case(500, 1500)
    report = ClassificationReport([str(index) for index in range(500)])
    tracemalloc.start()
    report.compute(predictions=scores.astype(np.float32), references=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * scores.nbytes  # as Python objects they take 6 times as much


def test_nothing_is_written_to_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "file/cache"))
    scores, labels = random_case(2)
    report = ClassificationReport(["a", "b"])
    report.add_batch(predictions=scores, references=labels)
    assert report.compute() == report.compute(predictions=scores, references=labels)


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError):
        machine.cache_dir().mkdir(parents=True, exist_ok=True)


def test_the_most_frequent_confusions_come_first():
    assert most_confused([[9, 1, 0], [4, 0, 2], [0, 0, 7]], 2) == [(1, 0, 4), (1, 2, 2)]
    assert most_confused([[9, 0], [0, 3]], 5) == []


def test_the_card_of_many_classes_stays_short(tmp_path):
    names, right = [f"class {index}" for index in range(1000)], 20 * np.eye(1000, dtype=int)
    right[7, 7:9] = 17, 3
    scores = {"test_accuracy": 0.9, "test_confusion_matrix": right.tolist()}
    (tmp_path / "model").mkdir()
    facts = CardFacts(
        name="many",
        config=to_dict(TrainConfig()),
        counts={split: dict.fromkeys(names, 20) for split in ("train", "test")},
        scores=scores,
        positive_label=None,
        source="timm/resnet18",
        data_config={
            "input_size": (3, 9, 9),
            "interpolation": "bilinear",
            "crop_mode": "squash",
            "crop_pct": 1.0,
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        },
        hardware="",
        versions="",
        license="apache-2.0",
    )
    text = write_card(tmp_path, facts).read_text()
    assert "| **class 7** | class 8 | 3 |" in text and "| train | 20000 |" in text
    assert "(3 times) it took class 7 for class 8" in text and len(text) < 10_000


@pytest.mark.parametrize(("classes", "kept"), [(30, True), (31, False)])
def test_an_epoch_of_many_classes_keeps_no_confusion_matrix(classes, kept):
    scores = {"loss": 0.5, "confusion_matrix": np.eye(classes, dtype=int).tolist()}
    row = epoch_scores(scores, "test")
    assert row["test_loss"] == 0.5 and ("test_confusion_matrix" in row) is kept


def test_batches_add_up():
    scores, labels = random_case(3)
    report = ClassificationReport(list("abc"), "a")
    for start in range(0, len(labels), 10):
        report.add_batch(predictions=scores[start : start + 10], references=labels[start : start + 10])
    assert report.compute() == report.compute(predictions=scores, references=labels)


def test_an_epoch_is_better_by_its_loss_but_not_below_the_accuracy_of_a_solved_head():
    start = {"accuracy": 0.8, "loss": 0.5}
    worse, better = {"accuracy": 0.7, "loss": 0.1}, {"accuracy": 0.8, "loss": 0.4}
    ranked = [quality(scores, start) for scores in (worse, start, better)]
    assert ranked == sorted(ranked) and ranked[0] < ranked[1] < ranked[2]
    assert quality(worse) > quality(better)


def test_balanced_an_epoch_is_better_by_the_loss_of_classes_that_count_the_same():
    start = {"accuracy": 0.9, "loss": 0.3, "balanced_accuracy": 0.5, "balanced_loss": 0.9}
    rare = {"accuracy": 0.8, "loss": 0.4, "balanced_accuracy": 0.7, "balanced_loss": 0.6}
    assert quality(rare, start, balanced=True) > quality(start, start, balanced=True)
    assert quality(rare, start) < quality(start, start)
