"""Spaces pushed to a Hub on this machine, and started from what it holds."""

import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import ROOT, run
from loopback_hub import LoopbackHub
from test_deploy import smooth
from test_hub import target
from test_reject import foreign, keep_for
from test_web import ORT_DIR, results_of, serving

from hotdog_hf.deploy import static_page
from hotdog_hf.model import saved
from hotdog_hf.model.predictor import load_predictor

PUSH = ROOT / "scripts/push.py"


@pytest.fixture(scope="module")
def server():
    with LoopbackHub({"hf_test_token": "tester"}) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model that has kept 40 smooth photos."""
    torch.manual_seed(0)
    folder = saved.save_model(target(), tmp_path_factory.mktemp("saved") / "model", license="mit")
    return keep_for(folder, [smooth(64, 64, seed) for seed in range(40)])


@pytest.fixture
def photos(tmp_path):
    """A photo like those that the model has kept, and one that is not."""
    files = [tmp_path / "photo.png", tmp_path / "unlike.png"]
    smooth(90, 60).save(files[0])
    foreign().save(files[1])
    return files


def push(server, model, tmp_path, name, *flags):
    env = server.environment(tmp_path / "home") | {"XDG_CACHE_HOME": str(ORT_DIR.parent.parent)}
    return run("python", PUSH, model, name, *flags, **env)


def download(server, name, folder):
    """Write the files of a Space as the Hub would before it starts it; return its card."""
    for path, file in server.repos["space", name].at("main").files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file.content)
    return huggingface_hub.SpaceCard.load(folder / "README.md").data


def test_a_static_space_runs_in_the_visitors_browser(server, model, photos, tmp_path, browser):
    if not all((ORT_DIR / file).is_file() for file in static_page.DIGESTS):
        pytest.skip("needs ONNX Runtime Web, which `make web` downloads once")
    done = push(server, model, tmp_path, "tester/page", "--space", "static")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {server.url}/spaces/tester/page" in done.stdout
    card = download(server, "tester/page", tmp_path / "space")
    assert (card.sdk, card.app_file, card.license) == ("static", "index.html", "mit")
    names = {path.name for path in (tmp_path / "space").iterdir()}
    assert names == {*static_page.FILES, "README.md", ".gitattributes"}

    with serving(tmp_path / "space") as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_text("Ready.").wait_for()
        page.set_input_files("#files", photos)
        found = results_of(page, 2)
    assert found["photo.png"][1] == pytest.approx(load_predictor(model)(photos[0]), abs=0.01)
    assert "Unknown" not in found["photo.png"][0] and found["unlike.png"][0].startswith("Unknown: ")


def test_a_gradio_space_starts_from_what_the_hub_holds_without_torch(server, model, photos, tmp_path):
    done = push(server, model, tmp_path, "tester/app", "--space", "gradio", "--private")
    assert done.returncode == 0, done.stderr
    card = download(server, "tester/app", tmp_path / "space")
    assert (card.sdk, card.app_file, card.title) == ("gradio", "app.py", "Hotdog or not-hotdog?")
    assert server.repos["space", "tester/app"].private
    assert (
        "numpy>=2.0\nonnxruntime>=1.18\npillow>=11.0\n" in (tmp_path / "space/requirements.txt").read_text()
    )
    # Nothing but what requirements.txt names, and their own requirements, is there.
    (tmp_path / "absent").mkdir()
    for name in ("torch", "timm", "safetensors", "datasets", "accelerate"):
        (tmp_path / f"absent/{name}.py").write_text("raise ModuleNotFoundError(__name__)")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "absent")}
    program = (
        "import sys; sys.path.insert(0, '.');"
        "from hotdog_hf.deploy import app; from hotdog_hf.model.predictor import load_predictor;"
        "model = load_predictor('model.onnx');"
        "print(*(app.answer(model, f'../{name}.png').sentence for name in ('photo', 'unlike')), sep='\\n');"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('hotdog_hf')))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path / "space", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    known, unknown, files = done.stdout.splitlines()
    assert re.search(r"hotdog \(\d+%\)$", known) and unknown.startswith("Unknown: ")
    assert all(file.startswith(str(tmp_path / "space")) for file in files.split())


@pytest.mark.app
def test_a_gradio_space_is_used_in_a_browser(server, model, tmp_path, browser):
    assert push(server, model, tmp_path, "tester/used", "--space", "gradio").returncode == 0
    download(server, "tester/used", tmp_path / "space")
    smooth(90, 60).save(tmp_path / "photo.png")
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-u", "app.py"]
    with subprocess.Popen(
        command, cwd=tmp_path / "space", env=env, stdout=subprocess.PIPE, text=True
    ) as space:
        lines = iter(space.stdout.readline, "")
        address = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in lines)))[0]
        page = browser.new_page()
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
        page.locator("#answer h2").wait_for()
        assert re.search(r"hotdog \(\d+%\)$", page.locator("#answer").inner_text())
        assert not page.get_by_text("This is wrong").is_visible()
        space.terminate()


def test_a_failed_upload_says_how_to_push_later(server, model, tmp_path):
    server.fail_next("POST", "tester/late/commit", status=500)
    done = push(server, model, tmp_path, "tester/late", "--space", "gradio")
    assert done.returncode == 2
    assert f"push it later with `python scripts/push.py {model} tester/late --space gradio`" in done.stderr
    done = push(server, model, tmp_path, "tester/late", "--space", "gradio", "--revision", "try")
    assert done.returncode == 2 and "--space goes with neither" in done.stderr
