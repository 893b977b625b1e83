"""Make the README's five pictures from a run, its photos, its report, its web page and its app.

python .github/pictures.py runs/demo data/sample report web .github/images
"""

import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# All have the same shape, so that they stand side by side; drawn large, saved small.
WIDTH, HEIGHT = 1080, 720
SAVED_SIZE, MAX_BYTES = (810, 540), 60_000
COLUMNS, ROWS = 6, 4


def main(run_dir: Path, data_dir: Path, report_dir: Path, web_dir: Path, images_dir: Path) -> None:
    """Draw sample.jpg, curves.png, report.jpg, web.jpg and app.jpg."""
    images_dir.mkdir(parents=True, exist_ok=True)
    save(draw_sample(data_dir / "test"), images_dir / "sample.jpg")
    curves = Image.open(run_dir / "curves.png").convert("RGB")
    ImageOps.pad(curves, (WIDTH, HEIGHT), color="white").quantize(256).save(images_dir / "curves.png")
    save(screenshot(report_dir / "report.html"), images_dir / "report.jpg")
    photos = [data_dir / "test" / name for name in ("not-hotdog/0003.jpg", "hotdog/0001.jpg")]
    save(use_page(web_dir, photos), images_dir / "web.jpg")
    save(use_app(run_dir / "model", photos[1]), images_dir / "app.jpg")


def save(picture: Image.Image, path: Path) -> None:
    """Save a JPEG of at most `MAX_BYTES`, as good as that allows."""
    picture = picture.resize(SAVED_SIZE, Image.Resampling.LANCZOS)
    for quality in range(90, 0, -5):
        picture.save(path, quality=quality)
        if path.stat().st_size <= MAX_BYTES:
            return


def draw_sample(split_dir: Path) -> Image.Image:
    """Return a grid of photos, half of the columns for each of the first two classes."""
    side, sheet = WIDTH // COLUMNS, Image.new("RGB", (WIDTH, HEIGHT), "white")
    half = COLUMNS // 2
    for number, class_dir in enumerate(sorted(split_dir.iterdir())[:2]):
        for index, path in enumerate(sorted(class_dir.iterdir())[: half * ROWS]):
            place = ((number * half + index % half) * side, index // half * side)
            sheet.paste(ImageOps.fit(Image.open(path).convert("RGB"), (side - 4, side - 4)), place)
    return sheet


def find_browser() -> str:
    """Return the first browser that is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"error: no browser found ({', '.join(BROWSERS)}): install chromium")
    return browser


def screenshot(page: Path) -> Image.Image:
    """Return the first screen of a page."""
    browser = find_browser()
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5"]
    flags.append(f"--window-size={WIDTH * 2 // 3},{HEIGHT * 2 // 3}")  # large letters in a small picture
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "page.png"
        subprocess.run(
            [browser, *flags, f"--screenshot={shot}", page.resolve().as_uri()],
            check=True,
            capture_output=True,
        )
        return Image.open(shot).convert("RGB")


def use_page(web_dir: Path, photos: list[Path]) -> Image.Image:
    """Return the first screen of an exported page that has classified photos."""

    def classify(page: "Page") -> None:
        page.set_input_files("#files", photos)
        page.locator(f"#results li:nth-child({len(photos)})[data-state=done]").wait_for()
        page.locator("#results:not(:has([data-state=waiting]))").wait_for()

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=web_dir)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shot = browse(f"http://127.0.0.1:{server.server_port}", classify)
    server.shutdown()
    return shot


def use_app(model: Path, photo: Path) -> Image.Image:
    """Return the first screen of the app that has classified a photo."""

    def classify(page: "Page") -> None:
        page.locator("input[type=file]").first.set_input_files(photo)
        page.get_by_text("What the answer depends on").wait_for()
        page.wait_for_timeout(2000)  # pictures and bars move in

    command = [sys.executable, "-u", "scripts/app.py", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
        shot = browse(next(filter(None, found))[0], classify)
        server.terminate()
    return shot


def browse(address: str, use: "Callable[[Page], None]") -> Image.Image:
    """Return the first screen of a page that was used."""
    from playwright.sync_api import sync_playwright

    size = {"width": WIDTH * 4 // 5, "height": HEIGHT * 4 // 5}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport=size, device_scale_factor=WIDTH / size["width"])
        page.goto(address)
        use(page)
        shot = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
