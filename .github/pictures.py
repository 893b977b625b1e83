"""Make the README's three pictures from a run, its photos and its report.

python .github/pictures.py runs/demo data/sample report .github/images
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# All three have the same shape, so that they stand side by side.
WIDTH, HEIGHT = 1080, 720
COLUMNS, ROWS = 6, 4


def main(run_dir: Path, data_dir: Path, report_dir: Path, images_dir: Path) -> None:
    """Draw sample.jpg, curves.png and report.jpg."""
    images_dir.mkdir(parents=True, exist_ok=True)
    draw_sample(data_dir / "test").save(images_dir / "sample.jpg", quality=80)
    curves = Image.open(run_dir / "curves.png").convert("RGB")
    ImageOps.pad(curves, (WIDTH, HEIGHT), color="white").quantize(256).save(images_dir / "curves.png")
    screenshot(report_dir / "report.html").save(images_dir / "report.jpg", quality=85)


def draw_sample(split_dir: Path) -> Image.Image:
    """Return a grid of photos, half of the columns for each of the first two classes."""
    side, sheet = WIDTH // COLUMNS, Image.new("RGB", (WIDTH, HEIGHT), "white")
    half = COLUMNS // 2
    for number, class_dir in enumerate(sorted(split_dir.iterdir())[:2]):
        for index, path in enumerate(sorted(class_dir.iterdir())[: half * ROWS]):
            place = ((number * half + index % half) * side, index // half * side)
            sheet.paste(ImageOps.fit(Image.open(path).convert("RGB"), (side - 4, side - 4)), place)
    return sheet


def screenshot(page: Path) -> Image.Image:
    """Return the first screen of a page, in the first browser that is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"error: no browser found ({', '.join(BROWSERS)}): install chromium")
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


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
