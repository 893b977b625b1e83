"""Make the README's four pictures from a run, its photos, its report and its web page.

python .github/pictures.py runs/demo data/sample report web .github/images
"""

import functools
import io
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image, ImageOps

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# All have the same shape, so that they stand side by side.
WIDTH, HEIGHT = 1080, 720
COLUMNS, ROWS = 6, 4


def main(run_dir: Path, data_dir: Path, report_dir: Path, web_dir: Path, images_dir: Path) -> None:
    """Draw sample.jpg, curves.png, report.jpg and web.jpg."""
    images_dir.mkdir(parents=True, exist_ok=True)
    draw_sample(data_dir / "test").save(images_dir / "sample.jpg", quality=80)
    curves = Image.open(run_dir / "curves.png").convert("RGB")
    ImageOps.pad(curves, (WIDTH, HEIGHT), color="white").quantize(256).save(images_dir / "curves.png")
    screenshot(report_dir / "report.html").save(images_dir / "report.jpg", quality=85)
    photos = [data_dir / "test" / name for name in ("not-hotdog/0003.jpg", "hotdog/0001.jpg")]
    use_page(web_dir, photos).save(images_dir / "web.jpg", quality=85)


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
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=web_dir)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    size = {"width": WIDTH * 4 // 5, "height": HEIGHT * 4 // 5}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport=size, device_scale_factor=WIDTH / size["width"])
        page.goto(f"http://127.0.0.1:{server.server_port}")
        page.set_input_files("#files", photos)
        page.locator(f"#results li:nth-child({len(photos)})[data-state=done]").wait_for()
        page.locator("#results:not(:has([data-state=waiting]))").wait_for()
        shot = page.screenshot()
        browser.close()
    server.shutdown()
    return Image.open(io.BytesIO(shot)).convert("RGB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
