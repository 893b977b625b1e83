"""A web app around a model: photos in, the answer and its reason out, corrections kept for training.

No torch at import: an exported model (.onnx) runs without it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from hotdog_hf.data.images import IMAGE_SUFFIXES, Photo, decode_image, normalize
from hotdog_hf.errors import UserError
from hotdog_hf.model import neighbors
from hotdog_hf.model.predictor import Predictor

if TYPE_CHECKING:
    import gradio

NEEDS_GRADIO = 'this needs gradio: pip install -e ".[app]"'
MAX_EXAMPLES, MAX_BARS = 8, 5
# Below these probabilities the answer is "probably ..." and "not sure". As in page/app.js.
SURE, LIKELY = 0.9, 0.6
# The answer for a photo that may be none of the classes. As in page/app.js.
UNKNOWN = "Unknown: unlike all training photos"
# Uploaded photos are deleted after so many seconds.
KEEP_UPLOADS = 3600
# As many columns of answers as fit, whole captions, and a title in one line, on a phone too.
CSS = """
@media (max-width: 30rem) { h1 { font-size: 1.4rem !important; } }
#answers .grid-container { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) !important; }
#answers .caption-label { max-width: 100%; white-space: normal; }
"""


class Answer(NamedTuple):
    """What the app shows for one photo."""

    sentence: str
    probabilities: dict[str, float] | None = None
    # The network's input coloured by Grad-CAM, if there is a network that allows it.
    heat: Image.Image | None = None


def answer(predictor: Predictor, path: str, explain: bool = True) -> Answer:
    """Classify one photo; a file that is none gets a sentence too."""
    try:
        prepared = predictor.prepare(Photo(path))
    except UserError:
        return Answer(f"{Path(path).name} cannot be read as an image. Try a JPEG, PNG or WebP file.")
    limit = neighbors.usual_limit(predictor.held_out_distances)
    [row], [distance] = predictor.predict(np.stack([prepared]), measure=limit is not None)
    best = int(row.argmax())
    heat = explain_answer(predictor, prepared, best) if explain else None
    probabilities = dict(zip(predictor.label_names, row.tolist(), strict=True))
    unknown = limit is not None and distance > limit
    sentence = UNKNOWN if unknown else describe(predictor.label_names[best], float(row[best]))
    return Answer(sentence, probabilities, heat)


def title_of(label_names: Sequence[str]) -> str:
    """Return the question that a model answers."""
    return "What is in this photo?" if len(label_names) > 3 else _capitalized(f"{' or '.join(label_names)}?")


def describe(label: str, probability: float) -> str:
    """Return the answer as a person would say it."""
    caution = "" if probability >= SURE else "probably " if probability >= LIKELY else "not sure, perhaps "
    return f"{_capitalized(caution + label)} ({probability:.0%})"


def explain_answer(predictor: Predictor, prepared: np.ndarray, target: int) -> Image.Image | None:
    """Return the network's input, uint8 [H, W, 3], coloured by what counts for a class, if that is known."""
    if predictor.net is None:
        return None
    import torch

    from hotdog_hf.model import gradcam

    device = next(predictor.net.parameters()).device
    pixels = torch.from_numpy(normalize(prepared[None], predictor.data_config)[0]).to(device)
    heat = gradcam.grad_cam(predictor.net, pixels, target)
    return None if heat is None else gradcam.overlay(pixels, heat, predictor.data_config)


def save_feedback(feedback_dir: str | os.PathLike, path: str, label: str, label_names: Sequence[str]) -> Path:
    """Keep a photo as `<feedback_dir>/<label>/`, the layout of train/; return its file.

    A photo has one label: saved again with another, it moves. Raises `UserError` if it is no photo.
    """
    from hotdog_hf.files import replacing_file, writing_to

    if label not in label_names:
        raise UserError(f"{label!r} is none of the classes: {', '.join(label_names)}")
    decode_image(path)
    content = Path(path).read_bytes()
    suffix = Path(path).suffix.lower()
    name = hashlib.sha256(content).hexdigest()[:16] + (suffix if suffix in IMAGE_SUFFIXES else ".jpg")
    file = Path(feedback_dir) / label / name
    with writing_to(Path(feedback_dir)):
        with replacing_file(file) as part:
            part.write_bytes(content)
        for other in label_names:
            if other != label:
                (Path(feedback_dir) / other / name).unlink(missing_ok=True)
    return file


def find_examples(model: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> list[Path]:
    """Return test photos of every class: of a data folder, or of the one a run trained on, if it is there."""
    from hotdog_hf.data.folder import list_classes, list_photos

    if data_dir is None:
        try:
            data_dir = json.loads((Path(model).parent / "config.json").read_text())["data"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if not Path(data_dir, "test").is_dir():
            return []
        classes = list_classes(Path(data_dir, "test")).values()
    else:
        classes = list_photos(data_dir)["test"].values()
    each = max(MAX_EXAMPLES // max(len(classes), 1), 1)
    return [photo for photos in classes for photo in photos[:each]][:MAX_EXAMPLES]


def build_app(
    predictor: Predictor, examples: Sequence[Path] = (), feedback_dir: str | os.PathLike | None = None
) -> "gradio.Blocks":
    """Return the app; with a `feedback_dir`, wrong answers can be corrected.

    Raises `UserError` if gradio is not installed.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UserError(NEEDS_GRADIO) from error

    labels = predictor.label_names
    title = title_of(labels)

    # A photo arrives as it was uploaded (preprocess=False): gradio would convert it otherwise than training
    # does, and answer a file that is no image with a bare "Error".
    def answer_one(upload: dict | None) -> tuple:
        found = answer(predictor, upload["path"]) if upload else Answer("")
        known = found.probabilities is not None
        return (
            f"## {_escape(found.sentence)}" if found.sentence else "",
            gr.update(value=found.probabilities, visible=known),
            gr.update(value=found.heat, visible=found.heat is not None),
            gr.update(visible=known and feedback_dir is not None),
            "",
        )

    def answer_several(paths: list[str] | None) -> tuple[list, str]:
        answers = [(path, answer(predictor, path, explain=False)) for path in paths or []]
        shown = [(path, found.sentence) for path, found in answers if found.probabilities]
        return shown, "\n\n".join(_escape(found.sentence) for _, found in answers if not found.probabilities)

    def keep(upload: dict | None, label: str | None) -> str:
        if not upload or not label:
            return "Choose what it is first."
        try:
            file = save_feedback(feedback_dir, upload["path"], label, labels)
        except UserError as error:
            return _escape(str(error))
        return f"Thank you: saved as {_escape(str(file))}"

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_UPLOADS, KEEP_UPLOADS)) as app:
        gr.Markdown(f"# {_escape(title)}")
        with gr.Tab("One photo") as one, gr.Row():
            with gr.Column():
                photo = gr.Image(type="filepath", label="Photo", height=360, buttons=["fullscreen"])
            with gr.Column():
                sentence = gr.Markdown(elem_id="answer")
                bars = gr.Label(num_top_classes=MAX_BARS, show_label=False, show_heading=False, visible=False)
                heat = gr.Image(
                    label="What the answer depends on (Grad-CAM)",
                    height=300,
                    buttons=["fullscreen"],
                    visible=False,
                    interactive=False,
                )
                with gr.Group(visible=False) as correction:
                    label = gr.Dropdown(labels, value=None, label="This is wrong, it is a …")
                    save = gr.Button("Save the photo for training")
                saved = gr.Markdown(elem_id="saved")
        if examples:
            with one:  # below the answer, which a phone shows right after the photo
                gr.Examples(_copies(examples), photo, label="Examples", examples_per_page=MAX_EXAMPLES)
        with gr.Tab("Several photos"):
            files = gr.File(file_count="multiple", label="Photos", height=180)
            problems = gr.Markdown(elem_id="problems")
            gallery = gr.Gallery(label="Answers", height=600, elem_id="answers", buttons=[])
        shown = [sentence, bars, heat, correction, saved]
        photo.change(answer_one, photo, shown, concurrency_id="model", preprocess=False)
        files.change(answer_several, files, [gallery, problems], concurrency_id="model")
        save.click(keep, [photo, label], saved, preprocess=False)
    return app


def launch_options(max_megabytes: int = 30) -> dict:
    """Return how gradio serves the app: its style, and the largest upload."""
    return {"max_file_size": f"{max_megabytes}mb", "footer_links": [], "ssr_mode": False, "css": CSS}


def launch_app(app: "gradio.Blocks", host: str, port: int | None, share: bool, max_megabytes: int) -> None:
    """Serve the app until Ctrl-C; `UserError` if the port is taken."""
    try:
        app.launch(server_name=host, server_port=port, share=share, **launch_options(max_megabytes))
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}, port {port or 'any'}: {error}; try another --port"
        ) from error


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _copies(examples: Sequence[Path]) -> list[str]:
    """Copy photos to a folder of their own: gradio may then show these, and nothing beside them."""
    folder = Path(tempfile.mkdtemp(prefix="hotdog_hf-examples-"))
    return [
        str(shutil.copyfile(path, folder / f"{number}{path.suffix}")) for number, path in enumerate(examples)
    ]


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+-.!|~&$" else letter for letter in text)
