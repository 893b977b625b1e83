"""The saved model: one folder that timm and transformers load, with class names and preprocessing inside."""

import copy
import json
import os
import shutil
from pathlib import Path

import safetensors
import timm
import torch

from hotdog_hf.errors import UserError


def save_model(model: torch.nn.Module, folder: str | os.PathLike) -> Path:
    """Write `model.safetensors` and `config.json` (architecture, class names, preprocessing) as `folder`.

    The folder is written beside its place and moved there whole, replacing an earlier one.
    """
    folder = Path(folder)
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    # safetensors takes plain memory only, not channels_last; the copy leaves the model in training as it is.
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    cfg = plain.pretrained_cfg
    # The weights are no longer the source's: neither are its tag, licence and address.
    plain.pretrained_cfg = {key: value for key, value in cfg.items() if key not in _SOURCE_KEYS} | {
        "tag": "hotdog_hf"
    }
    timm.models.save_for_hf(
        plain,
        str(part),
        model_config={"label_names": cfg["label_names"]},
        data_config=timm.data.resolve_model_data_config(model),
        safe_serialization=True,
    )
    _drop_doubled_num_classes(part / "config.json")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


_SOURCE_KEYS = frozenset(
    "url file hf_hub_id hf_hub_filename source state_dict tag license origin_url paper_name paper_ids notes"
    " description label_offset label_names".split()
)


def _drop_doubled_num_classes(config_file: Path) -> None:
    """Keep `num_classes` at the root only: in `model_args` too (timm 1.0.31) it breaks transformers 5."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(name: str | os.PathLike) -> torch.nn.Module:
    """Load a saved folder, ready for evaluation; the model carries its class names and preprocessing.

    Raises `UserError` where the folder holds no such model.
    """
    folder = Path(name)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is no saved model: it has no {file}")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot load the model in {folder}: {str(error).splitlines()[0]}") from error
    if not model.pretrained_cfg.get("label_names"):
        raise UserError(f"{folder}/config.json names no classes (label_names)")
    return model
