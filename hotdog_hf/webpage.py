"""Parts that our HTML pages share: pictures and figures inside the page, and the folder it is written to."""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from markupsafe import Markup
from PIL import Image

from hotdog_hf.errors import UserError

matplotlib.use("Agg")  # no window, even if there is a display
from matplotlib import pyplot as plt

THUMBNAIL = 256
# Placeholder colours, replaced by variables of the page's style sheet, which knows light from dark mode.
INK, SERIES = "#010203", [f"#0102{10 + index}" for index in range(8)]


def image_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    """Return a thumbnail of at most `size` pixels a side as a JPEG data URI."""
    image = image.copy()
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_output_dir(
    output_dir: str | os.PathLike, files: Sequence[str], what: str, flag: str = "--output-dir"
) -> Path:
    """Return the folder to write `files` to; the first of them is JSON that names this package's version.

    Raises `UserError` if something other than an earlier such folder is there, or if it cannot be written;
    `what` is it called, and `flag` is how the user gave it.
    """
    folder = Path(output_dir).resolve()
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        earlier = names == set(files) and "hotdog_hf" in json.loads((folder / files[0]).read_text())
        ours = earlier or not names
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{flag} {output_dir} holds something other than {what}; give another folder")
    place = next(path for path in folder.parents if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"{flag} {output_dir} cannot be written in {place}; give another folder")
    return folder


def svg(draw: Callable[[plt.Axes], None]) -> Markup:
    """Return a figure that `draw` draws, named after it, as SVG in the colours of the page's style sheet."""
    style = {"svg.fonttype": "none", "svg.hashsalt": draw.__name__, "font.size": 9, "lines.linewidth": 1.8}
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK}
    buffer = io.StringIO()
    with matplotlib.rc_context(style | {"grid.alpha": 0.12, "axes.axisbelow": True}):
        figure, axes = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
        draw(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")  # without the XML header
    for number, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{number})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{draw.__name__}-", text)  # several in one page
    return Markup(text.replace("<svg", '<svg aria-hidden="true"', 1))
