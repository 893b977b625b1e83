"""What the name of weights or of a saved model means: a file, a folder, the Hub. Imports no torch."""

import os
import re
from pathlib import Path

from hotdog_hf.errors import UserError

MODEL_FILES = ("config.json", "model.safetensors")
HUB_PREFIX = "hf-hub:"


def is_saved_model(name: str) -> bool:
    """Return whether `name` means a saved model: an existing folder, or `hf-hub:user/name`."""
    return name.startswith(HUB_PREFIX) or Path(name).is_dir()


def is_on_hub(name: str | os.PathLike) -> bool:
    """Return whether a model's name means one on the Hub: `user/name` that is no path, or `hf-hub:...`."""
    return not Path(name).exists() and bool(re.fullmatch(rf"({HUB_PREFIX})?[^/:]+/[^/]+", str(name)))


def check_model(name: str | os.PathLike) -> None:
    """Raise `UserError` for a name that is neither a saved model's folder nor one on the Hub."""
    if not is_on_hub(name):
        check_model_folder(name, name)


def check_model_folder(folder: str | os.PathLike, name: str | os.PathLike) -> None:
    """Raise `UserError` for a folder that is no saved model; the message calls it `name`."""
    if not Path(folder).exists():
        raise UserError(f"{name} is not a saved model: there is no such folder")
    for file in MODEL_FILES:
        if not (Path(folder) / file).is_file():
            inside = Path(folder) / "model"
            hint = f"; give {inside}" if (inside / file).is_file() else "; give the folder model/ of a run"
            raise UserError(f"{name} is not a saved model: it has no {file}{hint}")


def check_weights(weights: str) -> None:
    """Raise `UserError` for --weights that name no file or saved model, before anything is loaded."""
    if weights not in ("auto", "bundled", "none") and not is_saved_model(weights):
        check_weights_file(weights)


def check_weights_file(path: str | os.PathLike) -> None:
    """Raise `UserError` for a file of weights that is not there."""
    if not Path(path).is_file():
        raise UserError(
            f"--weights {path}: no such file (a file, a saved model's folder, hf-hub:user/name, or auto,"
            " bundled, none)"
        )
