"""Runs side by side: what is read of them, paired tests, and the page."""

import csv
import dataclasses
import json
import math
import runpy

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image
from test_report import Page

from hotdog_hf.compare import page, runs
from hotdog_hf.errors import UserError

NAMES = ["hotdog", "not-hotdog"]


def write_run(folder, seed, photos=40, data_dir="photos", learning_rate=0.1, split="test"):
    """Write what a finished run leaves, with predictions that are mostly right; return its folder."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    config = {"recipe": "chapter", "data": {"data_dir": str(data_dir)}}
    config |= {"optim": {"learning_rate": learning_rate}, "run": {"output_dir": str(folder)}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"epoch": n, "train_loss": 1 / n, f"{split}_accuracy": 1 - 0.5 / n} for n in (1, 2, 3)]
    rows.append({"final": True, "test_accuracy": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "true_label", "predicted_label", *NAMES])
        for index in rng.permutation(photos):
            given = rng.beta(3, 1)
            row = [given, 1 - given] if index % 2 == 0 else [1 - given, given]
            name = f"test/{NAMES[index % 2]}/<i>{index:02}.png"
            writer.writerow([name, NAMES[index % 2], NAMES[int(np.argmax(row))], *row])
    return folder


@pytest.fixture
def two(tmp_path):
    (tmp_path / "photos/test/hotdog").mkdir(parents=True)
    for index in range(0, 40, 2):
        Image.new("RGB", (40, 30), (index, 90, 10)).save(tmp_path / f"photos/test/hotdog/<i>{index:02}.png")
    write_run(tmp_path / "a", 1, data_dir=tmp_path / "photos")
    write_run(tmp_path / "b", 2, data_dir=tmp_path / "photos", learning_rate=0.2, split="validation")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_photos_are_paired_by_name_and_not_by_line(two):
    first, second = runs.read_runs(two)
    assert first.files == second.files == sorted(first.files) and len(first.files) == 40
    lost = sum(one and not other for one, other in zip(first.right, second.right, strict=True))
    won = sum(other and not one for one, other in zip(first.right, second.right, strict=True))
    assert lost + won > 5
    pair = runs.paired(first, second)
    assert (pair["lost"], pair["won"]) == (lost, won)
    assert pair["accuracy"]["value"] == pytest.approx((won - lost) / 40)
    # McNemar's exact test: both tails of a fair coin.
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    assert pair["p_value"] == pytest.approx(min(1, 2 * tail))
    assert pair["accuracy"]["low"] < pair["accuracy"]["value"] < pair["accuracy"]["high"]
    assert (
        sorted(runs.differing_photos([first, second])) == np.flatnonzero(first.right ^ second.right).tolist()
    )


def test_a_run_against_itself_differs_in_nothing(two):
    [first, _] = runs.read_runs(two)
    pair = runs.paired(first, first)
    assert (pair["lost"], pair["won"], pair["p_value"]) == (0, 0, 1.0)
    assert set(pair["accuracy"].values()) == set(pair["loss"].values()) == {0.0}
    assert runs.differing_knobs([first, first]) == {} and runs.differing_photos([first, first]) == []


def test_the_script_writes_one_page_that_needs_no_other_file(two, tmp_path):
    script = ("python", ROOT / "scripts/compare.py", *two)
    done = run(*script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of 40 test photos are classified correctly by only some of the runs" in done.stdout
    written = json.loads((tmp_path / "compare/compare.json").read_text())
    assert written["against"] == two[0] and list(written["paired"]) == [two[1]]
    assert written["knobs"] == {"learning_rate": [0.1, 0.2]}
    shown = Page((tmp_path / "compare/compare.html").read_text(encoding="utf-8"))
    assert shown.all("i") == [] and "<i>" in shown.words  # the name of a file, not an element
    for _, attributes in shown.elements:
        assert all(attributes.get(name, "#").startswith(("data:", "#")) for name in ("src", "href"))
    assert len(shown.all("img")) == sum("/hotdog/" in name for name in written["photos"][: page.SHOWN])
    assert len(shown.all("svg")) == 2 and "Accuracy on test or validation" in shown.words


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "predictions.csv").unlink(), "not the folder of a finished run"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n'),
            "not the folder of a finished run",
        ),
        (lambda run: (run / "config.json").write_text("5"), "not the folder of a finished run"),
        (
            lambda run: (run / "predictions.csv").write_text("file,true_label,predicted_label,a,b\n\n"),
            "not the folder of a finished run",
        ),
        (
            lambda run: (run / "predictions.csv").write_text("file,true_label," + "x" * 200_000),
            "not the folder of a finished run",
        ),
        (
            lambda run: (run / "predictions.csv").write_text(
                (run / "predictions.csv").read_text().replace("test/hotdog/<i>00", "test/hotdog/other")
            ),
            "other test photos",
        ),
        (
            lambda run: (run / "predictions.csv").write_text(
                (run / "predictions.csv").read_text().replace("not-hotdog", "salad")
            ),
            "other classes",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(two, tmp_path, spoil, message):
    spoil(tmp_path / "b")
    with pytest.raises(UserError, match=f"{two[1]}.*{message}"):
        runs.read_runs(two)


def test_the_run_of_a_saved_model_is_named(two):
    with pytest.raises(UserError, match=f"model is not the folder .*; {two[1]} is one$"):
        runs.read_runs([two[0], f"{two[1]}/model"])


def test_a_run_is_not_compared_with_itself(two):
    with pytest.raises(ValueError, match="give runs that differ"):
        runpy.run_path(str(ROOT / "scripts/compare.py"))["CompareConfig"]((*two, f"{two[0]}/../a"))


def test_a_p_value_is_never_said_to_be_zero(tmp_path):
    found = runs.read_runs([str(write_run(tmp_path / name, 1, photos=400)) for name in ("a", "b")])
    wrong = found[1].probabilities[:, ::-1]
    found[1] = dataclasses.replace(found[1], probabilities=wrong)
    assert "p < 0.001" in page.describe(found, page.summarise(found))


def test_a_phone_and_a_desktop_show_the_page_without_a_complaint(two, tmp_path, faults_in_browser):
    assert run("python", ROOT / "scripts/compare.py", *two, cwd=tmp_path).returncode == 0
    assert faults_in_browser(tmp_path / "compare/compare.html") == []
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<!DOCTYPE html><p style='width: 500px'>wide</p><script>none()</script>")
    found = faults_in_browser(faulty)  # the check sees what it looks for
    assert any("none is not defined" in fault for fault in found) and any("wide on 390" in f for f in found)
