"""Fine-tune a pretrained image classifier on a folder of photos with the Hugging Face ecosystem."""

import importlib
import os
from pathlib import Path

__version__ = "0.1.0"

try:
    Path.home()
except RuntimeError:
    # Before 3.11, matplotlib fails at import for a user without a home; it then takes a temporary folder.
    os.environ.setdefault("MPLCONFIGDIR", f"{os.devnull}/matplotlib")

# The public names and their modules, imported when first used: a script's --help must not wait for torch.
_HOMES = {
    "load_predictor": "hotdog_hf.model.predictor",
    "load_model": "hotdog_hf.model.saved",
    "decode_image": "hotdog_hf.data.images",
    "eval_transform": "hotdog_hf.data.transforms",
    "data_config_of": "hotdog_hf.model.network",
    "label_names_of": "hotdog_hf.model.network",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
