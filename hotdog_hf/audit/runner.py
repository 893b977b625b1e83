"""An audit from start to end: features of photos, what they say about labels and photos, pictures to show."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

from hotdog_hf.audit import appearance, scores
from hotdog_hf.config import DataConfig
from hotdog_hf.data import check
from hotdog_hf.data.groups import content_groups
from hotdog_hf.data.images import open_photo
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import HUB_DATA_PREFIX, Photos
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.errors import UserError
from hotdog_hf.machine import allowed_cores
from hotdog_hf.model import network, source
from hotdog_hf.model.places import is_saved_model
from hotdog_hf.training import features


@dataclass(frozen=True)
class Audit:
    """Everything found about the photos of a split; photos are numbered as in `rows`."""

    data_dir: str
    split: str
    # The photos, their paths within the folder, labels, and groups of copies.
    rows: datasets.Dataset
    files: list[str]
    labels: np.ndarray
    groups: np.ndarray
    # What accuracy to expect: of a probe, out of fold.
    accuracy: dict[str, float]
    loss: dict[str, float]
    confusion: list[list[int]]
    # Labels: probabilities [N, classes], all photos most suspicious first, which of them look wrong.
    probabilities: np.ndarray
    order: np.ndarray
    suspicious: np.ndarray
    curve: scores.LearningCurve
    # Nearest other photos [N, K], and the mean distance to them [N].
    neighbours: np.ndarray
    distances: np.ndarray
    appearances: list[appearance.Appearance]
    # The check's findings; none for data of the Hub.
    findings: list[check.Finding]

    @property
    def label_names(self) -> list[str]:
        """Return the class names in the order of the labels."""
        return self.rows.features["label"].names


def load_photos(accelerator: Accelerator, config: DataConfig, split: str, seed: int) -> Photos:
    """Return the photos. Raises `UserError` if they have no such split ("all" are all)."""
    photos = open_photos(config, seed, accelerator)
    if split != "all" and split not in photos.splits:
        raise UserError(f"{config.data_dir} has no {split} split, only {', '.join(photos.splits)}")
    return photos


def load_extractor(
    accelerator: Accelerator, photos: Photos, config: DataConfig, model: str, weights: str
) -> features.FeatureExtractor:
    """Return the body of a timm `model` with its `weights`, or of a saved model, to give the photos to."""
    with accelerator.local_main_process_first():
        net = source.load_source(model, weights, config.image_size)
    if is_saved_model(weights):
        data_config = network.data_config_of(net)  # as it was trained
    else:
        data_config = source.source_data_config(net, config.preprocessing, config.image_size)
    net = net.to(accelerator.device, memory_format=MEMORY_FORMAT)
    return features.FeatureExtractor(accelerator, net, photos, data_config)


def audit_photos(
    extractor: features.FeatureExtractor, split: str, seed: int, labels: Sequence[str] = ()
) -> Audit:
    """Audit the photos of a split ("train", "validation", "test") or of all of them ("all").

    `labels` are the tables of labels that the photos were loaded with.

    Raises `UserError` if a class has fewer than two photos that are not copies of each other, or all have.
    """
    photos = extractor.photos
    chosen = list(photos.splits) if split == "all" else [split]
    vectors = torch.cat([extractor.split(name).features for name in chosen]).double().numpy()
    rows = datasets.concatenate_datasets([photos.splits[name] for name in chosen])
    appearances = _appearances(rows)
    groups = content_groups(rows)
    numbers = np.asarray(rows["label"][:], np.int64)
    return Audit(
        data_dir=photos.data_dir,
        split=split,
        rows=rows,
        files=[file for name in chosen for file in photos.names(name)],
        labels=numbers,
        groups=groups,
        appearances=appearances,
        findings=_findings(photos.data_dir, labels),
        **_scores(vectors, numbers, groups, seed, len(photos.label_names)),
    )


def _scores(vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int, classes: int) -> dict:
    """Return the fields of an `Audit` that follow from features and labels."""
    if missing := [index for index in range(classes) if not (labels == index).any()]:
        raise UserError(f"class number {missing[0]} has no photo to audit")
    folds = scores.folds_of(labels, groups, seed)
    probabilities, strength = scores.out_of_fold(vectors, labels, folds)
    right, losses = probabilities.argmax(axis=1) == labels, scores.log_losses(probabilities, labels)
    trusted = scores.out_of_fold_by_trust(vectors, labels, folds, strength, probabilities)
    neighbours, similarities = scores.nearest(vectors)
    return {
        "accuracy": scores.mean_and_interval(right, groups, seed),
        "loss": scores.mean_and_interval(losses, groups, seed),
        "confusion": confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(classes)).tolist(),
        "probabilities": trusted,
        "order": scores.by_suspicion(trusted, labels),
        "suspicious": scores.suspicious_labels(trusted, labels),
        "curve": scores.learning_curve(vectors, labels, groups, strength, seed),
        "neighbours": neighbours,
        "distances": scores.distances(similarities),
    }


def _appearances(rows: datasets.Dataset) -> list[appearance.Appearance]:
    with ThreadPoolExecutor(allowed_cores()) as pool:  # Pillow works without the interpreter's lock
        work = pool.map(lambda index: appearance.measure(open_photo(rows[index])), range(len(rows)))
        return list(tqdm(work, total=len(rows), desc="measuring", unit="img", leave=False, disable=None))


def _findings(data_dir: str, labels: Sequence[str]) -> list[check.Finding]:
    if data_dir.startswith(HUB_DATA_PREFIX):
        return []
    cache_file = check.default_cache_file()
    return check.check_folder(data_dir, labels, cache_file=cache_file, progress=False).findings


def is_trained_on(weights: str, data_dir: str) -> bool:
    """Tell whether `weights` is the model of a run on this data folder."""
    if not Path(weights).is_dir():
        return False  # "auto", a file, or a model on the Hub: what is next to them is no run's
    try:
        config = json.loads((Path(weights).resolve().parent / "config.json").read_text(encoding="utf-8"))
        return Path(config["data"]["data_dir"]).resolve() == Path(data_dir).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no run of ours


def copies(groups: np.ndarray) -> list[np.ndarray]:
    """Return the photos of every group of more than one, the largest group first."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: -len(part))


def differing(audit: Audit) -> list[int]:
    """Return the photos whose most probable class is not their label, most suspicious first."""
    wrong = audit.probabilities.argmax(axis=1) != audit.labels
    return [int(index) for index in audit.order if wrong[index]]


def suggestions(audit: Audit) -> list[tuple[str, str, str, float]]:
    """Return path, label, most probable class and its probability of the photos that are `differing`."""
    names, rows = audit.label_names, []
    for index in differing(audit):
        best = int(audit.probabilities[index].argmax())
        probability = float(audit.probabilities[index, best])
        rows.append((audit.files[index], names[audit.labels[index]], names[best], probability))
    return rows


def with_fault(audit: Audit, fault: str) -> Sequence[int]:
    """Return the photos that are "tiny", "dark" or "blurred", the worst first."""
    measure = {"tiny": "side", "dark": "brightness", "blurred": "sharpness"}[fault]
    found = [index for index, photo in enumerate(audit.appearances) if fault in photo.faults()]
    return sorted(found, key=lambda index: getattr(audit.appearances[index], measure))
