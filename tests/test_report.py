import base64
import csv
import functools
import html.parser
import io
import json
import re
import runpy
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, draw_photos, run
from PIL import Image
from test_engine import TWO_PROCESSES
from test_hub import target

from hotdog_hf.classification import ClassificationReport
from hotdog_hf.config import DataConfig
from hotdog_hf.data import transforms
from hotdog_hf.data.images import decode_image, open_photo
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model import gradcam, network, saved
from hotdog_hf.model.predictor import load_predictor
from hotdog_hf.report import runner
from hotdog_hf.report.page import FILES, check_output_dir, write_report
from hotdog_hf.report.runner import galleries, older_cut, photos_of_run, run_knobs
from hotdog_hf.report.scores import _weighted, choose_threshold, label_order, normalise_rows, summarise
from hotdog_hf.training import launch
from hotdog_hf.webpage import image_uri

REPORT = ROOT / "scripts/report.py"
HOSTILE = "<img src=x onerror=alert(1)>"
VOID = frozenset("meta link img br".split())


class Page(html.parser.HTMLParser):
    """The elements of a page as (tag, attributes), and its text; fails where tags do not close in order."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += f"{text} "  # cells and lines apart

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @functools.cached_property
    def words(self):
        return " ".join(self.text.split())


def guesses(count, classes=2, seed=0):
    """Probabilities that are right more often than not, with ties, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    rows = np.exp(logits.round(1))
    return (rows / rows.sum(axis=1, keepdims=True)).astype(np.float32), labels


def write(folder, names, positive_label=None, count=40, files=None, threshold=None, seen="data:,"):
    """Write a report on guesses and return its page."""
    probabilities, labels = guesses(count, len(names))
    about = {"model": "some/model", "data_dir": "my/photos", "split": "test", "label_names": names}
    about |= {"positive_label": positive_label, "threshold": threshold}
    pictures = {
        group: [{"index": index, "photo": "data:,", "overlay": seen} for index in indices]
        for group, indices in galleries(probabilities, labels).items()
    }
    write_report(
        folder,
        about | summarise(probabilities, labels, names, positive_label),
        files=files or [f"{index}.jpg" for index in range(count)],
        probabilities=probabilities,
        labels=labels,
        pictures=pictures,
        knobs=[],
        command="python scripts/report.py some/model",
    )
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def table(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(
    ("classes", "positive"), [(2, "1"), (2, None), (3, "1"), (3, None)], ids=["2", "2 macro", "3", "3 macro"]
)
def test_the_values_are_those_of_training_and_lie_in_their_intervals(classes, positive):
    names = [str(index) for index in range(classes)]
    probabilities, labels = guesses(60, classes)
    summary = summarise(probabilities, labels, names, positive)
    expected = ClassificationReport(names, positive).compute(predictions=probabilities, references=labels)
    assert summary["confusion_matrix"] == expected.pop("confusion_matrix")
    values = summary["values"]
    assert set(values) == set(expected) | {"brier", "calibration_error"}
    for name, value in expected.items():
        assert values[name]["value"] == value
        assert values[name]["low"] < value < values[name]["high"], name
    # What is resampled is the same number: with every photo counted once it is scikit-learn's.
    once = _weighted(
        normalise_rows(probabilities), labels, np.ones((1, 60)), positive and names.index(positive)
    )
    np.testing.assert_allclose([once[name][0] for name in expected], list(expected.values()), atol=1e-12)
    for index, name in enumerate(names):
        alone = ClassificationReport(names, name).compute(predictions=probabilities, references=labels)
        for key, value in summary["classes"][names[index]].items():
            assert value == pytest.approx(alone[key], abs=1e-12)


def test_a_photo_of_weight_two_is_a_photo_seen_twice():
    probabilities, labels = guesses(30, 3)
    weights = np.random.default_rng(0).integers(0, 4, (5, 30))
    weighed = _weighted(normalise_rows(probabilities), labels, weights, None)
    for number, row in enumerate(weights):
        twice = np.repeat(probabilities, row, axis=0), np.repeat(labels, row)
        values = ClassificationReport(["a", "b", "c"]).compute(predictions=twice[0], references=twice[1])
        del values["confusion_matrix"]
        got = [weighed[name][number] for name in values]
        np.testing.assert_allclose(got, list(values.values()), atol=1e-9)


def test_brier_score_and_calibration_error_by_hand():
    rows, labels = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]), np.array([0, 1, 1, 0])
    values = summarise(rows, labels, ["a", "b"], "a")["values"]
    # Two classes: the square of one of them. Bins: 0.9 twice, half of them right; 0.6, right; 1.0, right.
    assert values["brier"]["value"] == pytest.approx((0.01 + 0.81 + 0.16 + 0) / 4)
    assert values["calibration_error"]["value"] == pytest.approx(abs(1 + 0 - 1.8) / 4 + 0.4 / 4 + 0)
    rows, labels = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]), np.array([0, 1, 2])
    values = summarise(rows, labels, ["a", "b", "c"], None)["values"]
    assert values["brier"]["value"] == pytest.approx((0.26 + (0.04 + 0.49 + 0.25) + (0.01 + 0.64 + 0.81)) / 3)
    assert values["calibration_error"]["value"] == pytest.approx((0.4 + 0.5 + 0.8) / 3)


def test_intervals_narrow_with_more_photos_and_repeat():
    few, many = (summarise(*guesses(count), ["a", "b"], "a")["values"] for count in (50, 1800))
    for name in few:
        widths = [values[name]["high"] - values[name]["low"] for values in (few, many)]
        assert 2.5 < widths[0] / widths[1] < 16, name  # about the square root of 36
    assert summarise(*guesses(50), ["a", "b"], "a")["values"] == few


@pytest.mark.parametrize(("classes", "photos"), [(40, 1), (100, 2)])
def test_many_classes_of_few_photos_each_have_intervals(tmp_path, classes, photos):
    names = [f"class {index}" for index in range(classes)]
    page = write(tmp_path / "report", names, count=classes * photos)
    assert "The most frequent mistakes" in page.words and f"({classes} classes)" in page.words
    assert "Photos by true class" not in page.words
    values = json.loads((tmp_path / "report/metrics.json").read_text())["values"]
    for name in ("macro_precision", "macro_recall", "macro_roc_auc", "macro_average_precision"):
        # No resample has photos of all classes: those that are missing do not count.
        assert 0 < values[name]["low"] < values[name]["high"] <= 1
        assert values[name]["low"] < values[name]["value"], name


def test_a_resample_without_a_class_is_left_out_of_its_area():
    rows, labels = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), np.array([0, 1, 1])
    values = summarise(rows, labels, ["a", "b"], "a")["values"]
    assert values["roc_auc"] == {"value": 1, "low": 1, "high": 1}


def test_the_label_order_is_the_models_and_other_classes_are_refused():
    assert label_order(["a", "b", "c"], ["c", "a", "b"]).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"'A' \(only in the model\), 'a' \(only in the data\)"):
        label_order(["a", "b"], ["A", "b"])


def test_the_threshold_is_validations():
    truth, score = np.array([0, 0, 1, 0, 0]), np.array([0.2, 0.3, 0.35, 0.9, 0.1])
    validation = np.stack([1 - score, score], axis=1), truth
    score = np.array([0.34, 0.35, 0.6])
    test = np.stack([1 - score, score], axis=1), np.array([1, 1, 0])
    chosen = choose_threshold({"test": test, "validation": validation}, positive=1)
    assert chosen["value"] == 0.35
    assert chosen["validation"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": 2 / 3})
    assert chosen["test"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2})
    on_test_alone = choose_threshold({"validation": test}, positive=1)
    assert on_test_alone["value"] == 0.34  # so the one above is not its


def test_the_galleries_are_the_surest_mistakes_and_the_least_sure_answers():
    sure = np.linspace(0.51, 0.99, 40)
    rows = np.stack([sure, 1 - sure], axis=1)
    labels = np.arange(40) % 2  # every other one a mistake
    chosen = galleries(rows, labels)
    assert chosen["mistakes"] == list(range(39, 15, -2))
    assert chosen["unsure"] == list(range(12))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_vit"]
)
def test_grad_cam_is_a_map_of_the_input_where_there_is_one(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    side = net.pretrained_cfg["input_size"][-1]
    maps = [gradcam.grad_cam(net, torch.randn(3, side, side), target) for target in range(3)]
    if name == "test_vit":
        assert maps == [None] * 3
        return
    for heat in maps:
        assert heat.shape == (side, side) and heat.min() >= 0 and heat.max() <= 1
    assert max(heat.max() for heat in maps) > 0.9
    assert not all(np.allclose(maps[0], heat) for heat in maps[1:])


def test_grad_cam_points_at_what_the_answer_comes_from():
    """A network of one convolution: its class 0 is what is red, class 1 what is blue."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1, bias=False), torch.nn.AdaptiveAvgPool2d(1))
    net = torch.nn.Sequential(net, torch.nn.Flatten())
    net[0][0].weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[..., None, None]
    net.feature_info = [{"module": "0.0", "num_chs": 2}]
    pixels = torch.zeros(3, 8, 10)
    pixels[0, :, :3] = pixels[2, :, 6:] = 1
    red, blue = (gradcam.grad_cam(net, pixels, target) for target in (0, 1))
    assert (red[:, :3] == 1).all() and (red[:, 3:] == 0).all()
    assert (blue[:, 6:] == 1).all() and (blue[:, :6] == 0).all()
    seen = gradcam.overlay(pixels, red, {"mean": (0, 0, 0), "std": (1, 1, 1)})
    assert seen.size == (10, 8) and seen.getpixel((8, 0)) == (0, 0, 255)  # left as it was
    net.feature_info = [{"module": "0.0", "num_chs": 8}]  # channels elsewhere than second, as Swin's are
    assert gradcam.grad_cam(net, pixels, 0) is None
    net.feature_info = [{"module": "gone", "num_chs": 2}]
    assert gradcam.grad_cam(net, pixels, 0) is None
    del net.feature_info
    assert gradcam.grad_cam(net, pixels, 0) is None


def test_an_image_is_a_small_jpeg():
    uri = image_uri(Image.new("RGB", (1200, 300)))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert image.format == "JPEG" and image.size == (256, 64)


@pytest.mark.parametrize(("names", "positive"), [(["hotdog", "other"], "hotdog"), (["a", "b", "c"], None)])
def test_the_page_stands_alone_and_says_what_it_must(tmp_path, names, positive):
    page = write(tmp_path / "report", names, positive)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert re.match(r"data:|#", attributes.get(name) or "#"), attributes
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in page.text and not re.search(r"url\((?!#)", page.text)
    assert page.all("img") and all(attributes.get("alt") for attributes in page.all("img"))
    assert len(page.all("table")) == len(page.all("caption")) >= 3
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    anchors = {attributes["href"] for attributes in page.all("a")}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {anchor[1:] for anchor in anchors} <= set(ids)
    assert len(page.all("svg")) == 4 and len(page.all("h1")) == 1
    shown = [positive] if positive else names
    assert [f"{name} – ROC-AUC" in page.words for name in names] == [name in shown for name in names]
    values = json.loads((tmp_path / "report/metrics.json").read_text())["values"]
    for name in ("accuracy", "f1" if positive else "macro_f1"):
        entry = values[name]
        assert f"{entry['value']:.3f} 95 % interval {entry['low']:.3f} to {entry['high']:.3f}" in page.words
    assert "None was chosen" in page.words and "python scripts/report.py some/model" in page.words


def test_the_threshold_is_told_with_what_it_does(tmp_path):
    scores = {"precision": 0.125, "recall": 0.25, "f1": 0.375}
    threshold = {"value": 0.4321, "test": scores, "validation": dict.fromkeys(scores, 0.625)}
    page = write(tmp_path / "report", ["hotdog", "other"], "hotdog", threshold=threshold)
    assert "None was chosen" not in page.words and "0.4321" in page.words
    assert "Threshold, on test 0.125 0.250 0.375" in page.words
    assert "where it was chosen 0.625 0.625 0.625" in page.words


def test_a_network_without_a_map_is_told(tmp_path):
    page = write(tmp_path / "report", ["hotdog", "other"], "hotdog", seen=None)
    assert "Without Grad-CAM" in page.words
    assert not any("Grad-CAM" in attributes["alt"] for attributes in page.all("img"))


def test_very_many_classes_get_the_curves_of_the_worst(tmp_path):
    names = [f"class {index}" for index in range(11)]
    page = write(tmp_path / "report", names, count=110)
    assert "of the 11 classes the 8 with the lowest average precision" in page.words
    classes = json.loads((tmp_path / "report/metrics.json").read_text())["classes"]
    best = sorted(names, key=lambda name: classes[name]["average_precision"])[8:]
    assert [name for name in names if f"{name} – ROC-AUC" not in page.words] == sorted(best, key=names.index)


def test_hostile_names_stay_text(tmp_path):
    names = [HOSTILE, "\"&'$\\frac$,\n"]
    files = [f'{HOSTILE}",{index}\n\udcff.jpg' for index in range(40)]
    page = write(tmp_path / "report", names, HOSTILE, files=files)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert all(attributes["src"] == "data:," for attributes in page.all("img"))
    assert page.text.count(HOSTILE) > 10
    header, *rows = table(tmp_path / "report")
    assert header[3:] == names and [row[0] for row in rows] == files
    assert {row[1] for row in rows} == set(names)


def test_the_runs_config_is_read_where_there_is_one(tmp_path):
    for text, expected in {
        '{"recipe": "scratch", "optim": {"epochs": 2}}': [("", "recipe", "scratch"), ("optim", "epochs", 2)],
        '{"architecture": "resnet18"}': [],
        "[]": [],
        "not JSON": [],
    }.items():
        (tmp_path / "config.json").write_text(text)
        assert run_knobs(str(tmp_path / "model")) == expected
    assert run_knobs("user/name") == []


def test_predictions_are_the_probabilities_to_the_last_digit(tmp_path):
    write(tmp_path / "report", ["a", "b", "c"])
    probabilities, labels = guesses(40, 3)
    header, *rows = table(tmp_path / "report")
    assert header == ["file", "true_label", "predicted_label", "a", "b", "c"]
    assert np.array_equal(np.array([row[3:] for row in rows], np.float32), probabilities)
    assert [row[1] for row in rows] == ["abc"[index] for index in labels]
    assert [row[2] for row in rows] == ["abc"[index] for index in probabilities.argmax(axis=1)]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    folder = tmp_path / "deep/report"
    write(check_output_dir(folder), ["a", "b"])
    (tmp_path / "deep/report.part").mkdir()  # of one that was killed while it wrote
    (tmp_path / "deep/report.part/metrics.json").write_text("")
    write(check_output_dir(folder), ["c", "d"])
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert table(folder)[0][3:] == ["c", "d"]
    for harm in (
        lambda: (folder / "notes.txt").write_text("mine"),
        lambda: (folder / "metrics.json").write_text("{}"),
        lambda: (folder / "metrics.json").write_text("5"),
        lambda: (folder / "metrics.json").write_text("not JSON"),
    ):
        shutil.rmtree(folder)
        write(check_output_dir(folder), ["a", "b"])
        harm()
        with pytest.raises(UserError, match="holds something other than a report"):
            check_output_dir(folder)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="holds something other"):
        check_output_dir(file)
    with pytest.raises(UserError, match=rf"new/report cannot be written in {file}; give another folder"):
        check_output_dir(file / "new/report")
    (tmp_path / "empty").mkdir()
    assert check_output_dir(tmp_path / "empty") == tmp_path / "empty"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder with validation and a hostile file name, and a run's folder with a model of it."""
    root = tmp_path_factory.mktemp("trained")
    for split, count in {"train": 2, "validation": 7, "test": 6}.items():
        draw_photos(root / "photos" / split, {"hotdog": count, "not-hotdog": count - 1})
    first = root / "photos/test/hotdog/000.png"
    first.rename(first.with_name(f"{HOSTILE}.png"))
    torch.manual_seed(0)
    net = target(label_names=["not-hotdog", "hotdog"])  # not the order of the data
    rows = load_photos(root / "photos")["test"]
    transform = transforms.eval_transform(network.data_config_of(net))
    with torch.no_grad():  # so that its answers differ from photo to photo
        net.get_classifier().weight.mul_(20)
        net.get_classifier().bias.sub_(
            net(torch.stack([transform(open_photo(row).decode()) for row in rows])).mean(dim=0)
        )
    saved.save_model(net, root / "run/model")
    (root / "run/config.json").write_text('{"recipe": "chapter", "optim": {"learning_rate": 0.03125}}')
    done = run(
        "python", REPORT, root / "run/model", "--data-dir", root / "photos", "--output-dir", root / "one"
    )
    assert done.returncode == 0, done.stderr
    return root, done


def test_the_script_writes_the_models_own_predictions(trained):
    root, done = trained
    header, *rows = table(root / "one")
    assert header[3:] == ["not-hotdog", "hotdog"] and len(rows) == 11
    photos = [*(f"00{index}.png" for index in range(1, 6)), f"{HOSTILE}.png"]
    assert [row[0] for row in rows[:6]] == [f"test/hotdog/{name}" for name in photos]
    net = saved.load_model(root / "run/model")
    transform = transforms.eval_transform(network.data_config_of(net))
    probabilities = []
    for name, label, predicted, *numbers in rows:
        assert name.split("/")[1] == label
        pixels = transform(decode_image(root / "photos" / name))
        with torch.no_grad():
            row = net(pixels[None]).softmax(dim=1)[0].numpy()
        np.testing.assert_allclose(np.array(numbers, float), row, atol=1e-5)
        assert predicted == header[3:][row.argmax()]
        probabilities.append(np.array(numbers, np.float32))
    assert {row[2] for row in rows} == {"hotdog", "not-hotdog"}  # else the order would not show
    labels = np.array([header[3:].index(row[1]) for row in rows])
    expected = ClassificationReport(header[3:], "hotdog").compute(
        predictions=np.array(probabilities), references=labels
    )
    written = json.loads((root / "one/metrics.json").read_text())
    assert written["confusion_matrix"] == expected.pop("confusion_matrix")
    for name, value in expected.items():
        assert written["values"][name]["value"] == pytest.approx(value, abs=1e-9)
    assert (written["split"], written["photos"], written["positive_label"]) == ("test", 11, "hotdog")
    assert set(written["threshold"]) == {"value", "test", "validation"}
    assert f"Accuracy{written['values']['accuracy']['value']:>40.4f}" in done.stdout
    assert done.stderr == "" and "report.html" in done.stdout


def test_with_flip_the_report_has_the_answers_of_predict(trained):
    root, _ = trained
    accelerator = launch.build_accelerator("no", num_threads=1)
    net, data = saved.load_model(root / "run/model"), DataConfig(data_dir=str(root / "photos"))
    photos = runner.load_photos(accelerator, data, "test", seed=0)
    rows, _ = runner.evaluate(accelerator, net, photos, "test", None, 4, "flip").predicted["test"]
    predictor = load_predictor(root / "run/model", tta="flip")
    paths = [str(root / "photos" / name) for name in photos.names("test")]
    np.testing.assert_allclose(rows, [list(row.values()) for row in predictor(paths)], atol=1e-5)
    plain = [list(row.values()) for row in load_predictor(root / "run/model")(paths)]
    assert np.abs(rows - plain).max() > 1e-3


def test_the_scripts_page_has_photos_maps_and_the_runs_config(trained):
    root, _ = trained
    page = Page((root / "one/report.html").read_text(encoding="utf-8"))
    images = page.all("img")
    assert len(images) >= 2 * 11 and all(
        re.match("data:image/jpeg;base64,.{200}", image["src"]) for image in images
    )
    assert sum(image["alt"].startswith("Grad-CAM") for image in images) == len(images) / 2
    assert "learning_rate 0.03125" in page.words and f"scripts/report.py {root}" in page.words
    assert f"{HOSTILE}.png" in page.text


def test_two_processes_write_the_same_numbers(trained):
    root, _ = trained
    flags = ("--data-dir", root / "photos", "--output-dir", root / "two", "--batch-size", 4)
    done = run(*TWO_PROCESSES, REPORT, root / "run/model", *flags)
    assert done.returncode == 0, done.stderr
    one, two = (table(root / name) for name in ("one", "two"))
    assert [row[:3] for row in one] == [row[:3] for row in two]
    numbers = [np.array([row[3:] for row in rows[1:]], float) for rows in (one, two)]
    np.testing.assert_allclose(*numbers, atol=1e-5)


@pytest.fixture
def script():
    """The script's names, to call in this process: a start of its own takes seconds."""
    yield runpy.run_path(str(REPORT))
    torch.set_num_threads(1)  # as conftest has it; the script takes all cores


def test_validation_is_what_the_run_held_back(photos_dir, tmp_path, script):
    saved.save_model(target(label_names=["hotdog", "not-hotdog"]), tmp_path / "run/model")
    knobs = {
        "recipe": "chapter",
        "data": {"data_dir": str(photos_dir), "val_fraction": 0.3},
        "run": {"seed": 4},
    }
    (tmp_path / "run/config.json").write_text(json.dumps(knobs))
    flags = {"output_dir": str(tmp_path / "report")}  # the photos are the run's, too
    script["main"](script["ReportConfig"](str(tmp_path / "run/model"), split="validation", **flags))
    held_back = load_photos(photos_dir, 0.3, 4)["validation"]
    names = Photos({"validation": held_back}, photos_dir).names("validation")
    assert [row[0] for row in table(tmp_path / "report")[1:]] == names
    other = photos_of_run(run_knobs(tmp_path / "run/model"), "run/model", str(tmp_path))
    assert other == (str(tmp_path), 0.0, 0, ())
    script["main"](script["ReportConfig"](str(tmp_path / "run/model"), val_fraction=0.0, **flags))
    assert json.loads((tmp_path / "report/metrics.json").read_text())["threshold"] is None
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(UserError, match="is not in the folder of the run that trained it: add --data-dir"):
        script["main"](script["ReportConfig"](str(tmp_path / "run/model"), **flags))


@pytest.mark.parametrize(("identity", "warned"), [({}, True), ({"cut_by_content": True}, False)])
def test_a_run_that_cut_its_validation_by_an_older_rule_is_named(tmp_path, identity, warned):
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    assert bool(older_cut(str(tmp_path / "model"), Photos({}, tmp_path, cut_by_content=True))) is warned
    assert older_cut(str(tmp_path / "model"), Photos({}, tmp_path)) is None
    assert older_cut("user/name", Photos({}, tmp_path, cut_by_content=True)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "OTHER"}, r"do not agree: 'cat' \(only in the data\), 'hotdog' \(only in the model\)"),
        ({"data_dir": "OTHER", "split": "validation"}, "has no validation split, only train, test"),
        ({"output_dir": "OTHER"}, "holds something other than a report"),
        ({"positive_label": "pizza"}, "'pizza' is none of the classes"),
    ],
)
def test_what_cannot_be_reported_leaves_nothing_behind(trained, tmp_path, script, options, message):
    root, _ = trained
    for split in ("train", "test"):
        draw_photos(tmp_path / "other" / split, {"cat": 1, "not-hotdog": 1})
    options = {"data_dir": str(root / "photos"), "output_dir": str(tmp_path / "report")} | options
    options = {
        name: str(tmp_path / "other") if value == "OTHER" else value for name, value in options.items()
    }
    with pytest.raises(UserError, match=message):
        script["main"](script["ReportConfig"](str(root / "run/model"), **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["test", "train"]


def test_help_and_a_mistyped_flag_answer_before_torch_is_loaded():
    tell = "import atexit, runpy, sys; sys.argv = sys.argv[1:];"
    tell += "atexit.register(lambda: print('torch:', 'torch' in sys.modules));"
    tell += "runpy.run_path(sys.argv[0], run_name='__main__')"
    for flags, code, message in (
        (["--help"], 0, "Class that precision, recall, F1 and the threshold are computed for"),
        (["model", "--batch-size", "0"], 2, "--batch-size must be at least 1, got 0"),
    ):
        done = run("python", "-c", tell, REPORT, *flags)
        printed = " ".join((done.stdout + done.stderr).replace("│", " ").split())
        assert done.returncode == code and message in printed and "torch: False" in printed


def test_a_phone_and_a_desktop_show_the_page_without_a_complaint(trained, faults_in_browser):
    root, _ = trained
    assert faults_in_browser(root / "one/report.html") == []
