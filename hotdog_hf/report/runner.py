"""A report from start to end: the model, the photos, the predictions, and the galleries."""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from hotdog_hf.config import DataConfig
from hotdog_hf.data import images, loaders, transforms
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import Photos, resolve_positive
from hotdog_hf.errors import UserError, message_of
from hotdog_hf.model import gradcam, neighbors, network, saved
from hotdog_hf.model.predictor import load_predictor, predict_paths
from hotdog_hf.report.scores import (
    choose_threshold,
    label_order,
    summarise,
    summarise_calibration,
    summarise_rejection,
)
from hotdog_hf.training import engine, launch
from hotdog_hf.webpage import image_uri

GALLERY_SIZE = 12


@dataclass(frozen=True)
class Evaluation:
    """A saved model's predictions on the photos of a split, and on validation if it chooses a threshold."""

    net: torch.nn.Module
    data_config: dict
    photos: Photos
    split: str
    label_names: list[str]
    positive_label: str | None
    # Probabilities [N, classes] and labels [N] by split, in the model's order of classes.
    predicted: dict[str, tuple[np.ndarray, np.ndarray]]
    # What was kept with the model, see `model.calibration`; None without held-out photos.
    calibration: dict | None = None
    # What was kept of the training photos, see `model.neighbors`, and how far from them the split's are.
    kept: neighbors.Neighbors | None = None
    distances: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """The names of the split's photos."""
        return self.photos.names(self.split)


def load_model(accelerator: Accelerator, name: str) -> torch.nn.Module:
    """Load a saved model; one process of each machine downloads it."""
    with accelerator.local_main_process_first():
        return saved.load_model(name)


def load_photos(accelerator: Accelerator, config: DataConfig, split: str, seed: int) -> Photos:
    """Return the photos. Raises `UserError` if they have no such split."""
    photos = open_photos(config, seed, accelerator)
    if split not in photos.splits:
        found = ", ".join(photos.splits)
        raise UserError(f"{config.data_dir} has no {split} split, only {found}: add --val-fraction")
    return photos


def evaluate(
    accelerator: Accelerator,
    net: torch.nn.Module,
    photos: Photos,
    split: str,
    positive_label: str | None,
    batch_size: int,
    tta: str = "none",
) -> Evaluation:
    """Predict a split, and also validation if there is one to choose a threshold on.

    With `tta` "flip", probabilities are the mean of those of the photo and of its mirror image.
    """
    label_names, data_config = network.label_names_of(net), network.data_config_of(net)
    order = label_order(photos.label_names, label_names)
    positive_label = resolve_positive(label_names, positive_label)
    chooses = positive_label and "validation" in photos.splits
    # The temperature was fitted to the photos alone.
    calibration = net.pretrained_cfg.get("calibration") if tta == "none" else None
    kept = saved.neighbors_of(net)
    predicted, distances, transform = {}, None, transforms.eval_transform(data_config)
    bare = net.to(memory_format=transforms.MEMORY_FORMAT)
    net = accelerator.prepare(bare)
    for name in dict.fromkeys([split, *(["validation"] if chooses else [])]):
        photo_set = loaders.PhotoDataset(photos.splits[name], transform)
        loader = loaders.eval_loader(photo_set, batch_size, num_workers=launch.default_workers(accelerator))
        loader = accelerator.prepare(loader)
        if kept and name == split:
            probabilities, labels, features = engine.predict_with_features(accelerator, bare, loader, name)
            distances = neighbors.distances(neighbors.unit_roots(features.numpy()), kept.features)
        else:
            probabilities, labels = engine.predict(accelerator, net, loader, title=name)
        if tta == "flip":
            mirror = network.Mirrored(net)
            mirrored, _ = engine.predict(accelerator, mirror, loader, title=f"{name}, mirrored")
            probabilities = (probabilities + mirrored) / 2
        predicted[name] = probabilities.numpy(), order[labels.numpy()]
    return Evaluation(
        net,
        data_config,
        photos,
        split,
        label_names,
        positive_label,
        predicted,
        calibration,
        kept,
        distances,
    )


def check_can_reject(net: torch.nn.Module, model: str, foreign: str) -> None:
    """Raise `UserError` if the model cannot tell foreign photos, or there is no such folder."""
    if not Path(foreign).is_dir():
        raise UserError(f"--foreign {foreign}: no such folder")
    if saved.neighbors_of(net) is None:
        neighbors.distance_limit(None, neighbors.KEEP, model)  # says what to do


def foreign_distances(model: str, folder: str, batch_size: int) -> np.ndarray:
    """Return the distances [N] of all photos below a folder; what cannot be read is named and left out.

    Raises `UserError` if none can.
    """
    predictor, found = load_predictor(model), []
    results = predict_paths(predictor, [folder], np.argmax, batch_size, distance_limit=math.inf)
    for result in tqdm(results, desc="foreign photos", unit="img", leave=False, disable=None):
        if isinstance(result, UserError):
            tqdm.write(f"not used: {message_of(result)}", file=sys.stderr)
        else:
            found.append(result.distance)
    if not found:
        raise UserError(f"--foreign {folder} has no photo that can be read")
    return np.array(found)


def summary_of(evaluation: Evaluation, model: str, foreign: np.ndarray | None = None) -> dict:
    """Return all metrics of a report, as `page.write_report` expects them.

    `foreign` [N] are distances of other photos, see `foreign_distances`.
    """
    label_names, positive_label = evaluation.label_names, evaluation.positive_label
    probabilities, labels = evaluation.predicted[evaluation.split]
    threshold = None
    if positive_label and "validation" in evaluation.predicted:  # no other split may choose one
        threshold = choose_threshold(evaluation.predicted, label_names.index(positive_label))
    return {
        "model": model,
        "data_dir": evaluation.photos.data_dir,
        "split": evaluation.split,
        "label_names": label_names,
        "positive_label": positive_label,
        "threshold": threshold,
        "calibration": summarise_calibration(probabilities, labels, evaluation.calibration),
        "rejection": summarise_rejection(evaluation.kept, evaluation.distances, foreign),
        **summarise(probabilities, labels, label_names, positive_label),
    }


def draw_galleries(accelerator: Accelerator, evaluation: Evaluation) -> dict[str, list[dict]]:
    """Return the photos of each gallery, as `index`, `photo` and `overlay` (data URIs, or None)."""
    # One photo at a time, so with the bare network.
    net, data_config = accelerator.unwrap_model(evaluation.net), evaluation.data_config
    rows = evaluation.photos.splits[evaluation.split]
    transform = transforms.eval_transform(data_config)
    probabilities, labels = evaluation.predicted[evaluation.split]
    pictures: dict[str, list[dict]] = {}
    for name, indices in galleries(probabilities, labels).items():
        pictures[name] = []
        for index in tqdm(indices, desc=name, unit="img", leave=False, disable=None):
            photo = images.open_photo(rows[index])
            pixels = transform.pixels(photo)[None].to(accelerator.device)
            pixels = transform.normalize(pixels)[0]
            heat = gradcam.grad_cam(net, pixels, int(probabilities[index].argmax()))
            overlay = None if heat is None else image_uri(gradcam.overlay(pixels, heat, data_config))
            pictures[name].append({"index": index, "photo": image_uri(photo.decode()), "overlay": overlay})
    return pictures


def galleries(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """Return which photos are shown: the most confident mistakes, and the least certain predictions."""
    chosen, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    mistakes = [int(i) for i in np.argsort(-sure, kind="stable") if chosen[i] != labels[i]]
    unsure = np.argsort(sure, kind="stable")[:GALLERY_SIZE].tolist()
    return {"mistakes": mistakes[:GALLERY_SIZE], "unsure": unsure}


def run_knobs(model: str) -> list[tuple[str, str, object]]:
    """Return group, name and value of every knob of the run that the model belongs to, if any."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(model).resolve().parent / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "recipe" in config:  # otherwise it is not a run's config.json
            groups = {name: value for name, value in config.items() if isinstance(value, dict)}
            return [("", "recipe", config["recipe"])] + [
                (group, *knob) for group, knobs in groups.items() for knob in knobs.items()
            ]
    return []


def photos_of_run(
    knobs: Sequence[tuple[str, str, object]], model: str, data_dir: str | None
) -> tuple[str, float, int, tuple[str, ...]]:
    """Return the data folder, the share of train that the run split off, the seed, and its tables of labels.

    The folder is the run's if `data_dir` is None; the rest is 0 and no table if it used other photos. Raises
    `UserError` without a folder and without a run.
    """
    knob = {name: value for _, name, value in knobs}
    own = knob.get("data_dir")
    if data_dir is None and own is None:
        raise UserError(f"{model} is not in the folder of the run that trained it: add --data-dir my/photos")
    if own is not None and (data_dir is None or Path(own).resolve() == Path(data_dir).resolve()):
        return data_dir or own, knob["val_fraction"], knob["seed"], tuple(knob.get("labels", ()))
    return data_dir, 0.0, 0, ()


def older_cut(model: str, photos: Photos) -> str | None:
    """Return a warning if the model's run split off its validation photos by an older rule, else None.

    Versions that wrote no `cut_by_content` separated copies; some photos that are now validation were train.
    """
    with contextlib.suppress(OSError, ValueError):
        identity = json.loads((Path(model).resolve().parent / "identity.json").read_text(encoding="utf-8"))
        if photos.cut_by_content and not identity.get("cut_by_content", False):
            return (
                "warning: this run is older than the rule that keeps copies on one side, and has trained on"
                " some of these validation photos: its threshold is too optimistic. Train again to be sure."
            )
    return None
