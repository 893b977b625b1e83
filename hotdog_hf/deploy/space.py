"""A Space of the Hugging Face Hub around a model: the web app, or the page that runs in the browser."""

import ast
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

import huggingface_hub

from hotdog_hf import hub
from hotdog_hf.deploy import quantize
from hotdog_hf.deploy.app import title_of
from hotdog_hf.deploy.export import export_onnx
from hotdog_hf.deploy.static_page import MODEL, export_page
from hotdog_hf.files import write_text
from hotdog_hf.model.licenses import card_license, saved_license
from hotdog_hf.model.predictor import load_predictor

Sdk = Literal["gradio", "static"]
# The version of gradio that the app is tested with.
GRADIO_VERSION = "6.31.0"
PACKAGE = Path(__file__).parent.parent
# What the app and the modules that it imports need, by the name it is imported by.
REQUIREMENTS = {
    "numpy": "numpy>=2.0",
    "onnxruntime": "onnxruntime>=1.18",
    "PIL": "pillow>=11.0",
    "scipy": "scipy>=1.11",
}
APP = f'''"""The app of this Space; made by hotdog_hf."""

from hotdog_hf.deploy.app import build_app, launch_options
from hotdog_hf.model.predictor import load_predictor

build_app(load_predictor("{MODEL}")).launch(**launch_options())
'''


def push_space(model: str | os.PathLike, repo: str, sdk: Sdk, *, private: bool = False) -> str:
    """Upload a saved model's folder as a Space in one commit, creating it if needed; return its URL.

    Raises `UserError` if the model cannot be exported, or the Hub refuses the upload.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "space"
        write_space(model, folder, sdk)
        return hub.push_folder(folder, repo, private=private, space_sdk=sdk, source=model)


def write_space(model: str | os.PathLike, folder: Path, sdk: Sdk) -> None:
    """Write the files of a Space: the exported model, what shows it, and the card that says how it starts."""
    metadata = {"sdk": sdk, "app_file": "index.html"}
    if sdk == "static":
        shrink = functools.partial(quantize.shrink, precision="fp16")
        export_page(model, folder, shrink=shrink, tolerance=quantize.TOLERANCES["fp16"])
    else:
        metadata = {"sdk": sdk, "sdk_version": GRADIO_VERSION, "app_file": "app.py"}
        export_onnx(model, folder / MODEL, takes_photos=True)
        files, libraries = app_files()
        for file in files:
            copy = folder / "hotdog_hf" / file.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        write_text(folder / "app.py", APP)
        needed = sorted(REQUIREMENTS[name] for name in {*libraries, "onnxruntime"})
        write_text(folder / "requirements.txt", "\n".join([*needed, ""]))
    title = title_of(load_predictor(folder / MODEL).label_names)
    about = {"title": title, **metadata, **card_license(saved_license(model)), "tags": ["hotdog_hf"]}
    where = "in your browser: no photo is uploaded" if sdk == "static" else "on the machine of this Space"
    card = huggingface_hub.SpaceCard(
        f"---\n{huggingface_hub.SpaceCardData(**about).to_yaml()}\n---\n\nThe model runs {where}.\n"
    )
    write_text(folder / "README.md", str(card))


def app_files() -> tuple[set[Path], set[str]]:
    """Return the files of this package that the app imports when it starts, and other libraries' names.

    What functions import when they are called (torch for Grad-CAM, gradio itself) is not among them.
    """
    files, libraries, waiting = set(), set(), [PACKAGE / "deploy/app.py"]
    while waiting:
        file = waiting.pop()
        if file in files or not file.is_file():  # a name within a module is no file
            continue
        files.add(file)
        waiting += [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(PACKAGE)]
        for name in _imports(file):
            if name.startswith("hotdog_hf"):
                waiting.append(PACKAGE.parent / f"{name.replace('.', '/')}.py")
            elif name.partition(".")[0] not in sys.stdlib_module_names:
                libraries.add(name.partition(".")[0])
    return files, libraries


def _imports(file: Path) -> set[str]:
    """Return the modules, and the names within them, that a file imports at its top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
