"""The saved model: one folder that timm, transformers and this project load."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import safetensors.torch
import timm
import torch

from hotdog_hf.errors import UserError
from hotdog_hf.files import replacing_folder
from hotdog_hf.hub import hub_errors
from hotdog_hf.model import neighbors
from hotdog_hf.model.licenses import choose_license
from hotdog_hf.model.places import HUB_PREFIX, MODEL_FILES, check_model_folder, is_on_hub

# What a source's config says about its weights, which is not true of the trained model.
SOURCE_KEYS = frozenset(
    "url file hf_hub_id hf_hub_filename source state_dict tag license origin_url paper_name paper_ids notes"
    " description label_offset label_names calibration neighbors test_input_size test_crop_pct"
    " test_pool_size".split()
)


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    license: str | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    calibration: dict | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json` (architecture, class names, preprocessing) as `folder`.

    `license` and `weights` are the model's own unless given (as full tensors, if the model is sharded). The
    folder is written atomically, replacing an earlier one. `calibration` is kept in `config.json`, see
    `model.calibration`.
    """
    folder = Path(folder)
    # safetensors supports only contiguous tensors, not channels_last.
    weights = {name: value.cpu().contiguous() for name, value in (weights or model.state_dict()).items()}
    plain = copy.copy(model)  # shallow, so that the model in training stays unchanged
    plain.state_dict = lambda: weights
    cfg = plain.pretrained_cfg
    ours = {"tag": "hotdog_hf", "license": license or choose_license(None, cfg.get("license"))}
    plain.pretrained_cfg = {key: value for key, value in cfg.items() if key not in SOURCE_KEYS} | ours
    with replacing_folder(folder) as part:
        timm.models.save_for_hf(
            plain,
            str(part),
            model_config={"label_names": cfg["label_names"]},
            safe_serialization=True,
        )
        _amend_config(part / "config.json", {"calibration": calibration} if calibration else {})
    return folder


def calibrate_saved(model: torch.nn.Module, folder: Path, license: str, calibration: dict) -> None:
    """Divide the output layer of the saved `folder` by the temperature, and keep the calibration with it.

    `model` has the architecture of what is saved, see `save_model`.
    """
    weights = safetensors.torch.load_file(folder / MODEL_FILES[1])
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    if calibration["temperature"] != 1:
        for name, parameter in model.named_parameters():
            if id(parameter) in head:
                weights[name] = weights[name] / calibration["temperature"]
    save_model(model, folder, license, weights, calibration)


def calibration_of(folder: str | os.PathLike) -> dict | None:
    """Return the calibration of a saved folder, None if it has none."""
    return json.loads((Path(folder) / MODEL_FILES[0]).read_text(encoding="utf-8")).get("calibration")


def neighbors_of(model: torch.nn.Module) -> neighbors.Neighbors | None:
    """Return the features of training photos that were kept with a loaded model, None without any."""
    file = model.pretrained_cfg.get("neighbors")
    return neighbors.load(file) if file else None


def _amend_config(config_file: Path, more: dict) -> None:
    """Add to a config, and keep `num_classes` at its root only.

    In `model_args` too (timm 1.0.31) it breaks transformers 5.
    """
    config = json.loads(config_file.read_text(encoding="utf-8")) | more
    config.get("model_args", {}).pop("num_classes", None)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(name: str | os.PathLike, image_size: int | None = None) -> torch.nn.Module:
    """Load a saved folder or a Hub model, ready for evaluation, carrying its class names and preprocessing.

    `name` is a folder, or `user/name` or `hf-hub:user/name` with an optional `@revision`. A network whose
    weights depend on the input's size (a vision transformer) is fitted to `image_size` pixels, if given.
    Raises `UserError` if there is no such model.
    """
    folder = Path(name)
    if is_on_hub(name):
        repo, _, revision = str(name).removeprefix(HUB_PREFIX).partition("@")
        patterns = [*MODEL_FILES, neighbors.FILE]
        try:
            with hub_errors(repo):
                found = huggingface_hub.snapshot_download(
                    repo, revision=revision or None, allow_patterns=patterns
                )
        except UserError as error:
            here = "" if str(name).startswith(HUB_PREFIX) else f"; nor is there a folder {name}"
            raise UserError(f"{error}{here}") from error
        folder = Path(found)
    check_model_folder(folder, name)
    options = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fixed = config.get("pretrained_cfg", {}).get("fixed_input_size")
        options = {"img_size": image_size} if image_size and fixed else {}
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    except (RuntimeError, KeyError, ValueError, safetensors.SafetensorError) as error:
        hint = f"; without --image-size {image_size} it may load" if options else ""
        raise UserError(f"cannot load the model in {name}: {str(error).splitlines()[0]}{hint}") from error
    model.pretrained_cfg["calibration"] = config.get("calibration")
    model.pretrained_cfg["neighbors"] = str(folder / neighbors.FILE)
    if not model.pretrained_cfg.get("label_names"):
        raise UserError(f"{name}: config.json names no classes (label_names)")
    return model
