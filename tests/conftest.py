"""Offline, one thread, small drawn photos: what every test stands on."""

import atexit
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch or any Hugging Face library is imported, here and in every subprocess.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
# `accelerate` and its kind, also where the environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# The cache of the person who runs the tests, for ONNX Runtime Web alone. No other cache of theirs is read.
os.environ["HOTDOG_CACHE"] = os.environ.get("HOTDOG_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hotdog_hf-tests-")

import pytest
from forked import Process, run_forked

# torch and the like are imported below: pytest-xdist's first process, which needs none, starts the others.
if TYPE_CHECKING:
    import torch
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = "test_resnet.r160_in1k"

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Prepare the process that runs the tests; skip what is marked `gpu` or `app` where that is not."""
    import torch

    torch.set_num_threads(1)
    # What was imported stays: to look through it after every training here takes a third of a second.
    gc.freeze()
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs an NVIDIA GPU; this machine has none"
    if importlib.util.find_spec("gradio") is None:
        absent["app"] = "needs gradio: make test-app installs it"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def draw_photos(folder: Path, counts: dict[str, int], size: tuple[int, int] = (72, 56)) -> None:
    """Draw noisy one-coloured pictures, one hue a class, so that a tiny network can tell them apart."""
    import numpy as np
    from PIL import Image

    for number, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng([number, index, len(folder.name)])
            pixels = noise.integers(0, 120, (*size, 3), dtype=np.uint8)
            pixels[..., number % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")


def network_inputs(photo_set: "torch.utils.data.Dataset") -> "torch.Tensor":
    """All photos of a data set as a network takes them, one batch [N, 3, H, W]."""
    import torch

    return photo_set.network_input(torch.stack([row["pixel_values"] for row in photo_set]))


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory) -> Path:
    """A data folder of 2 classes: 13 + 12 photos to train, 6 + 5 to test."""
    folder = tmp_path_factory.mktemp("photos")
    draw_photos(folder / "train", {"hotdog": 13, "not-hotdog": 12})
    draw_photos(folder / "test", {"hotdog": 6, "not-hotdog": 5})
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The Chromium that is installed, with a camera; tests are skipped without it, or without playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra [test]")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs chromium; this machine has no browser")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def faults_in_browser(browser) -> Callable[[Path], list[str]]:
    """Opens a page as wide as a phone and a desktop: complaints, requests to elsewhere, sideways scroll."""

    def faults_at(file: Path, width: int, scheme: str) -> list[str]:
        found: list[str] = []
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: found.append(message.text))
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("request", lambda call: call.url.startswith(("file:", "data:")) or found.append(call.url))
        page.goto(file.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        page.close()
        return found + [f"{wide} pixels wide on {width}"] * (wide > width)

    return lambda file: [*faults_at(file, 390, "dark"), *faults_at(file, 1280, "light")]


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A file of "pretrained" weights for TINY_MODEL with 1000 classes."""
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(timm.create_model(TINY_MODEL, pretrained=False).state_dict(), path)
    return path


def _words(command: Sequence[object]) -> list[str]:
    words = [sys.executable if word == "python" else str(word) for word in command]
    return [sys.executable, shutil.which("accelerate"), *words[1:]] if words[0] == "accelerate" else words


def begin(*command: object, cwd: Path = ROOT, **env: str) -> Process:
    """Start a script or the launcher as `run` does, without waiting for its end."""
    return Process(_words(command)[1:], cwd, env)


def run(
    *command: object, cwd: Path = ROOT, timeout: float = 240, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess:
    """Run a command as a user would and return its output, whatever its exit code.

    Scripts and the launcher are forked from a process that has their imports behind it, unless to be `fresh`.
    """
    words = _words(command)
    if words[0] == sys.executable and not words[1].startswith("-") and not fresh:
        return run_forked(words[1:], cwd, timeout, env)
    return subprocess.run(
        words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="session")
def train(tiny_weights):
    """Run scripts/train.py on a tiny model: `train(data_dir, run_dir, *flags)`."""

    def run_train(data_dir: Path, run_dir: Path, *flags: object, launcher: tuple = ("python",), **env: str):
        defaults = [
            "--model",
            TINY_MODEL,
            "--weights",
            tiny_weights,
            "--image-size",
            64,
            "--batch-size",
            8,
            "--num-threads",
            1,
        ]
        given = {flag for flag in flags if str(flag).startswith("--")}
        for flag, value in zip(defaults[::2], defaults[1::2], strict=True):
            flags = flags if flag in given else (*flags, flag, value)
        script = (ROOT / "scripts/train.py", "--data-dir", data_dir, "--output-dir", run_dir, *flags)
        return run(*launcher, *script, **env)

    return run_train
