"""The page that runs a model in the browser, in a real Chromium."""

import contextlib
import functools
import hashlib
import io
import json
import os
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image, ImageCms
from test_deploy import smooth
from test_hub import target
from test_reject import foreign, keep_for

from hotdog_hf.deploy import static_page
from hotdog_hf.errors import UserError
from hotdog_hf.model import saved
from hotdog_hf.model.predictor import load_predictor

ORT_DIR = Path(os.environ["HOTDOG_CACHE"], "hotdog_hf", static_page.RUNTIME_FOLDER).expanduser()
LABELS = ("hotdog", "not-hotdog", "<img src=x onerror=alert(1)>", "ü", "a b", "c", "d")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    """Serve a folder as `python -m http.server` does; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    server.handle_error = lambda *_: None  # a browser that goes away while it reads
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def model_of(folder, labels):
    torch.manual_seed(0)
    net = target(label_names=labels)
    with torch.no_grad():
        net.get_classifier().weight.mul_(40)  # so that photos differ
    return saved.save_model(net, folder / "model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    if not all((ORT_DIR / file).is_file() for file in static_page.DIGESTS):
        pytest.skip("needs ONNX Runtime Web, which `make web` downloads once")
    folder = tmp_path_factory.mktemp("web")
    model = model_of(folder, LABELS)
    flags = ("--web", "--ort-dir", ORT_DIR)
    done = run("python", ROOT / "scripts/export.py", model, folder / "page", *flags)
    assert done.returncode == 0, done.stderr
    assert f"--directory {folder / 'page'}" in done.stdout and "total" in done.stdout
    return folder / "page"


@pytest.fixture
def page(browser, exported):
    """The page at a phone's width, ready; at the end, no request has gone elsewhere."""
    with serving(exported) as address:
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
        requests, errors = [], []
        context.on("request", lambda request: requests.append(request.url.removeprefix("blob:")))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_text("Ready.").wait_for()
        yield page
        assert len(requests) >= 7 and all(url.startswith(address) for url in requests) and not errors
        context.close()


def results_of(page, count):
    """Wait for a number of results; return their words and probabilities by the photo's name."""
    page.locator(f"#results > li:nth-child({count})").wait_for()
    page.locator("#results:not(:has([data-state=waiting]))").wait_for()
    found = {}
    for result in page.locator("#results > li").all():
        bars = [
            (bar.locator("span").first.inner_text(), float(bar.get_attribute("data-probability")))
            for bar in result.locator(".bars li").all()
        ]
        found[result.get_attribute("data-name")] = result.inner_text(), dict(bars)
    return found


def draw_every_kind(folder):
    """Write photos of the kinds that browsers and Pillow could decode differently."""
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = turn
        smooth(90, 70, turn).save(folder / f"turned-{turn}.jpg", exif=exif)
    see_through = smooth(60, 80, 9)
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    see_through.save(folder / "transparent.png")
    see_through.save(folder / "transparent.webp", lossless=True, exact=True)
    for name, size in {"tall": (700, 20), "wide": (20, 700), "dot": (1, 1)}.items():
        smooth(*size, seed=len(name)).save(folder / f"{name}.png")
    smooth(1200, 1600, 10).save(folder / "large.jpg")  # which `resize_and_crop` decodes at a smaller size
    smooth(64, 64, 11).convert("L").save(folder / "gray.png")
    smooth(64, 64, 12).quantize(16).save(folder / "palette.gif")
    smooth(64, 64, 13).save(folder / "lossy.webp")
    red = Image.new("RGB", (70, 60), (250, 40, 10))
    red.save(folder / "profile.png", icc_profile=swapped_profile())
    return sorted(folder.iterdir())


def swapped_profile():
    """A colour profile in which red is blue. Pillow ignores profiles, and so must the page."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"swap").replace(b"bXYZ", b"rXYZ").replace(b"swap", b"bXYZ")


def test_the_page_says_what_the_predictor_says(page, exported, tmp_path):
    photos = draw_every_kind(tmp_path)
    page.set_input_files("#files", photos)
    found = results_of(page, len(photos))
    predictor = load_predictor(exported / "model.onnx")
    expected = {photo.name: predictor(photo) for photo in photos}
    assert np.ptp([row["hotdog"] for row in expected.values()]) > 0.1
    for name, row in expected.items():
        probabilities = found[name][1]
        assert len(probabilities) == 5 and "and 2 more classes" in found[name][0]
        assert sorted(probabilities.values(), reverse=True) == list(probabilities.values())
        for label, probability in probabilities.items():
            assert probability == pytest.approx(row[label], abs=1e-3), (name, label)
        assert max(row, key=row.get).lower() in found[name][0].splitlines()[0].lower()


def test_what_is_no_image_gets_a_sentence_and_the_next_photo_an_answer(page, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    smooth(60, 60).save(tmp_path / "good.png")
    page.set_input_files("#files", [tmp_path / "broken.jpg", tmp_path / "good.png"])
    found = results_of(page, 2)
    assert "This browser cannot read the file as an image." in found["broken.jpg"][0]
    assert len(found["good.png"][1]) == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_role("status").inner_text().startswith("good.png: ")


def test_a_photo_unlike_the_training_photos_is_unknown(browser, exported, tmp_path):
    model = keep_for(model_of(tmp_path, LABELS[:2]), [smooth(64, 64, seed) for seed in range(40)])
    static_page.export_page(model, tmp_path / "page", ORT_DIR)
    smooth(64, 64, 100).save(tmp_path / "like.png")
    foreign().save(tmp_path / "unlike.png")
    with serving(tmp_path / "page") as address:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        page.set_input_files("#files", [tmp_path / "like.png", tmp_path / "unlike.png"])
        found = results_of(page, 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()
    assert found["unlike.png"][0].startswith("Unknown: unlike all training photos\n")
    assert len(found["unlike.png"][1]) == 2 and "nknown" not in found["like.png"][0]


def test_it_works_offline_after_the_first_load(browser, exported, tmp_path):
    smooth(60, 60).save(tmp_path / "photo.png")
    context = browser.new_context()
    page = context.new_page()
    with serving(exported) as address:
        page.goto(address)
        page.get_by_text("works offline too").wait_for()
    page.reload()
    page.get_by_text("Ready.").wait_for()
    page.set_input_files("#files", tmp_path / "photo.png")
    assert len(results_of(page, 1)["photo.png"][1]) == 5
    context.close()


def test_photos_come_from_the_camera_the_keyboard_and_the_mouse(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    assert page.get_by_label("Choose photos").count() and page.get_by_role("heading", level=1).count() == 1
    page.get_by_role("button", name="Use the camera").press("Enter")
    page.locator("#take-photo:focus").press("Enter")
    assert len(results_of(page, 1)["photo from the camera"][1]) == 5
    page.get_by_role("button", name="Close the camera").click()
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(30, 20);
            canvas.getContext("2d").fillRect(0, 0, 10, 10);
            const file = new File([await canvas.convertToBlob()], "dropped.png", {type: "image/png"});
            const data = new DataTransfer();
            data.items.add(file);
            document.querySelector("#drop").dispatchEvent(
                new DragEvent("drop", {dataTransfer: data, bubbles: true}));
            const pasted = new DataTransfer();
            pasted.items.add(new File([file], "pasted.png"));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: pasted}));
        }"""
    )
    assert set(results_of(page, 3)) == {"photo from the camera", "dropped.png", "pasted.png"}


def test_the_browser_lets_nothing_out(page):
    with serving(ROOT / "tests") as elsewhere:
        send = (
            "fetch(%r, {method: 'POST', body: 'photo', mode: 'no-cors'}).then(() => 'sent', () => 'refused')"
        )
        assert page.evaluate(send % elsewhere) == "refused"
        assert page.workers[0].evaluate(send % elsewhere) == "refused"


@pytest.fixture
def small_runtime(monkeypatch):
    """Small files in place of ONNX Runtime Web, as npm packs them."""
    contents = {file: f"content of {file}".encode() for file in static_page.DIGESTS}
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(static_page, "DIGESTS", digests)
    return contents


def fake_npm(tmp_path, monkeypatch, script):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_npm_downloads_the_runtime_once(tmp_path, monkeypatch, small_runtime):
    with tarfile.open(tmp_path / "packed", "w:gz") as archive:
        for file, content in small_runtime.items():
            about = tarfile.TarInfo(f"package/dist/{file}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    fake_npm(
        tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/packed onnxruntime-web.tgz'
    )
    assert static_page.find_runtime() == static_page.find_runtime() == small_runtime
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"pack onnxruntime-web@{static_page.RUNTIME_VERSION} ")
    [folder] = (tmp_path / "cache/hotdog_hf").iterdir()
    (folder / static_page.WASM).write_text("changed")
    with pytest.raises(UserError, match="its SHA-256 differs; delete it"):
        static_page.find_runtime()


def test_without_npm_or_a_network_the_page_is_not_written(tmp_path, monkeypatch, small_runtime):
    model = model_of(tmp_path, LABELS[:2])
    fake_npm(tmp_path, monkeypatch, "echo 'npm error getaddrinfo' >&2; exit 1")
    with pytest.raises(UserError, match=r"\(npm error getaddrinfo\): try again with a network, or give"):
        static_page.export_page(model, tmp_path / "page")
    (tmp_path / "bin/npm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"install Node\.js, or give the folder dist/ of"):
        static_page.export_page(model, tmp_path / "page")
    with pytest.raises(UserError, match="--ort-dir is the folder dist/ of onnxruntime-web"):
        static_page.export_page(model, tmp_path / "page", tmp_path)
    assert not (tmp_path / "page").exists()


def test_a_page_replaces_a_page_and_nothing_else(tmp_path, small_runtime):
    for file, content in small_runtime.items():
        (tmp_path / file).write_bytes(content)
    model = model_of(tmp_path, LABELS[:2])
    for _ in range(2):
        static_page.export_page(model, tmp_path / "page", tmp_path)
    about = json.loads((tmp_path / "page/model.json").read_text())
    assert about["label_names"] == list(LABELS[:2])
    assert {path.name for path in (tmp_path / "page").iterdir()} == set(static_page.FILES)
    (tmp_path / "page/mine.txt").touch()
    with pytest.raises(UserError, match="holds something other than an exported page"):
        static_page.export_page(model, tmp_path / "page", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("page.onnx", "--web"), "with --web, OUT is a folder; got 'page.onnx'"),
        (("page",), "OUT.onnx must end in .onnx, got 'page'; for a folder"),
        (("model.onnx", "--ort-dir", "dist"), "--ort-dir is for --web"),
    ],
)
def test_flags_that_contradict_each_other_are_said_at_once(tmp_path, flags, message):
    done = run("python", ROOT / "scripts/export.py", "model", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in " ".join(done.stderr.replace("│", " ").split())
