"""The web app: its answers, the corrections it keeps, and the app itself in a real Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, draw_photos, run
from PIL import Image
from test_deploy import smooth
from test_hub import target
from test_reject import foreign, keep_for

from hotdog_hf.data.splits import load_photos
from hotdog_hf.deploy import app
from hotdog_hf.deploy.export import export_onnx
from hotdog_hf.errors import UserError
from hotdog_hf.model import saved
from hotdog_hf.model.predictor import load_predictor

LABELS = ["hotdog", "not-hotdog"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, photos_dir):
    """A run's folder: a model, and the config that names its photos."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    saved.save_model(target(), folder / "model")
    (folder / "config.json").write_text(json.dumps({"data": {"data_dir": str(photos_dir)}}))
    return folder


@pytest.fixture(scope="module")
def onnx_model(run_dir):
    export_onnx(run_dir / "model", run_dir / "model.onnx", takes_photos=True)
    return run_dir / "model.onnx"


def test_an_answer_is_the_predictors_with_its_reason(run_dir, onnx_model, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    smooth(90, 60).save(tmp_path / "turned.jpg", exif=exif)
    predictor = load_predictor(run_dir / "model")
    found = app.answer(predictor, str(tmp_path / "turned.jpg"))
    assert found.probabilities == pytest.approx(predictor(tmp_path / "turned.jpg"))
    assert found.heat.size == (64, 64) and np.ptp(np.asarray(found.heat)) > 50
    small = app.answer(load_predictor(onnx_model), str(tmp_path / "turned.jpg"))
    assert small.probabilities == pytest.approx(found.probabilities, abs=0.01) and small.heat is None
    (tmp_path / "broken.jpg").write_text("no image")
    broken = app.answer(predictor, str(tmp_path / "broken.jpg"))
    assert broken == ("broken.jpg cannot be read as an image. Try a JPEG, PNG or WebP file.", None, None)


def test_a_photo_unlike_the_training_photos_is_unknown(tmp_path):
    model = keep_for(
        saved.save_model(target(), tmp_path / "model"), [smooth(64, 64, seed) for seed in range(40)]
    )
    smooth(64, 64, 100).save(tmp_path / "like.png")
    foreign().save(tmp_path / "unlike.png")
    export_onnx(model, tmp_path / "model.onnx", takes_photos=True)
    for name in ("model", "model.onnx"):
        predictor = load_predictor(tmp_path / name)
        like, unlike = (app.answer(predictor, str(tmp_path / f"{each}.png")) for each in ("like", "unlike"))
        assert unlike.sentence == "Unknown: unlike all training photos" and len(unlike.probabilities) == 2
        assert re.search(r"hotdog \(\d+%\)$", like.sentence)


@pytest.mark.parametrize(
    ("probability", "sentence"),
    [(0.984, "Hot dog (98%)"), (0.7, "Probably hot dog (70%)"), (0.51, "Not sure, perhaps hot dog (51%)")],
)
def test_an_answer_says_how_sure_it_is(probability, sentence):
    assert app.describe("hot dog", probability) == sentence


def test_corrections_can_be_trained_on_and_a_photo_has_one_label(tmp_path, photos_dir):
    feedback = tmp_path / "photos/train"
    draw_photos(tmp_path / "photos/test", dict.fromkeys(LABELS, 1))
    first, second = (str(photos_dir / "test/hotdog" / name) for name in ("000.png", "001.png"))
    app.save_feedback(feedback, first, "not-hotdog", LABELS)
    wrong = app.save_feedback(feedback, second, "not-hotdog", LABELS)
    right = app.save_feedback(feedback, second, "hotdog", LABELS)
    assert right.parent == feedback / "hotdog" and right.suffix == ".png" and not wrong.exists()
    assert load_photos(tmp_path / "photos")["train"]["label"] == [0, 1]
    with pytest.raises(UserError, match=r"'\.\./elsewhere' is none of the classes: hotdog, not-hotdog"):
        app.save_feedback(feedback, first, "../elsewhere", LABELS)
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read .*broken\.jpg"):
        app.save_feedback(feedback, str(tmp_path / "broken.jpg"), "hotdog", LABELS)
    assert len(list(feedback.rglob("*.*"))) == 2


def test_examples_are_test_photos_of_every_class(run_dir, photos_dir, tmp_path):
    found = app.find_examples(run_dir / "model")
    assert [path.parent.name for path in found] == ["hotdog"] * 4 + ["not-hotdog"] * 4
    assert found == app.find_examples(tmp_path / "model.onnx", photos_dir)
    assert app.find_examples(tmp_path / "model.onnx") == []
    with pytest.raises(UserError, match="no such data folder"):
        app.find_examples(run_dir / "model", tmp_path / "nothing")


def test_examples_are_what_is_left_of_the_runs_photos_and_have_short_names(photos_dir, tmp_path):
    shutil.copytree(photos_dir / "test", tmp_path / "photos/test")  # no train/ any more
    first = tmp_path / "photos/test/hotdog/000.png"
    first.rename(first.with_name(f"0{'x' * 250}.png"))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"data_dir": str(tmp_path / "photos")}}))
    found = app.find_examples(tmp_path / "model")
    assert len(found) == 8 and len(app._copies(found)) == 8


def test_without_gradio_the_app_says_what_to_install(onnx_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[app\]"'):
        app.build_app(load_predictor(onnx_model))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", 70000), "--port must be from 1 to 65535, got 70000"),
        (("--max-megabytes", 0), "--max-megabytes must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_clear_line(flags, message):
    done = run("python", ROOT / "scripts/app.py", "model", *flags)
    assert done.returncode == 2 and message in " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def served(run_dir, tmp_path_factory):
    """The address of the app of a run, and the folder of its corrections."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-u", ROOT / "scripts/app.py", run_dir / "model", "--feedback-dir", "kept"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as server:
        lines = iter(server.stdout.readline, "")
        yield next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in lines)))[0], folder
        server.terminate()


@pytest.fixture
def page(browser, served):
    """The app in a browser; at the end, no request has gone elsewhere."""
    address, urls = served[0], []
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.on("request", lambda request: urls.append(request.url.removeprefix("blob:")))
    page = context.new_page()
    page.goto(address)
    yield page
    assert len(urls) > 10 and all(url.startswith((address, "data:")) for url in urls)
    context.close()


@pytest.mark.app
def test_a_photo_is_answered_and_corrected(page, served, photos_dir):
    photo = photos_dir / "test/hotdog/001.png"
    page.locator("input[type=file]").first.set_input_files(photo)
    page.locator("#answer h2").wait_for()
    assert re.search(r"hotdog \(\d+%\)$", page.locator("#answer").inner_text())
    page.get_by_text("What the answer depends on").wait_for()
    page.get_by_label("This is wrong, it is a …").click()
    page.get_by_role("option", name="not-hotdog").click()
    page.get_by_role("button", name="Save the photo for training").click()
    page.get_by_text("Thank you: saved as").wait_for()
    [kept] = (served[1] / "kept").rglob("*.png")
    assert kept.parent.name == "not-hotdog" and kept.read_bytes() == photo.read_bytes()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.app
def test_examples_and_broken_files_get_a_sentence_and_several_photos_a_caption(page, photos_dir, tmp_path):
    page.locator(".gallery button").first.click()
    page.locator("#answer h2").wait_for()
    (tmp_path / "broken.jpg").write_text("no image")
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    page.get_by_text("broken.jpg cannot be read as an image.").wait_for()
    page.get_by_role("tab", name="Several photos").click()
    files = [photos_dir / "test/hotdog/000.png", photos_dir / "test/hotdog/001.png", tmp_path / "broken.jpg"]
    page.locator("input[type=file]:visible, input[type=file]").last.set_input_files(files)
    page.locator("#problems").get_by_text("broken.jpg cannot be read as an image.").wait_for()
    assert len(re.findall(r"hotdog \(\d+%\)", page.locator("body").inner_text())) >= 2


@pytest.mark.app
def test_only_what_was_uploaded_is_read(served, run_dir):
    address, secret = served[0], run_dir / "config.json"
    photo = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/answer_one"
    event = requests.post(call, json={"data": [photo]}, timeout=30).json()["event_id"]
    assert "event: error" in requests.get(f"{call}/{event}", timeout=30).text
    assert requests.get(f"{address}/gradio_api/file={secret}", timeout=30).status_code == 403
