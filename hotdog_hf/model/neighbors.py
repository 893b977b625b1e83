"""Photos unlike all that a model has learned: their distance to the nearest training photos.

The distance is 1 minus the mean cosine similarity to the `NEIGHBORS` nearest training photos, between
square roots of the features that the output layer takes: k-nearest-neighbour rejection (Sun et al., arXiv
2204.06507) with Hellinger's kernel (as in RootSIFT; Arandjelovic and Zisserman, 2012). The roots keep a few
large features from deciding alone, by which fine-tuned networks reject better. Imports no torch: an exported
model measures the distance without it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hotdog_hf.errors import UserError
from hotdog_hf.model.calibration import conformal_quantile, photos_needed

FILE = "neighbors.safetensors"
NEIGHBORS = 5
# What is kept of the training photos: their features fit into 5 MB, so that a model stays quick to download.
MAX_PHOTOS, MAX_BYTES = 5000, 5_000_000
# Photos whose distances are kept: a random subset keeps the promise as well.
MAX_HELD_OUT = 2000
# With fewer validation photos, the distances of training photos to the others tell more.
MIN_VALIDATION = 200
# The share of photos like the held-back ones that keep their answer, unless another is asked for.
KEEP = 0.95
# The label of the others.
UNKNOWN = "unknown"
# Photos per chunk of similarities, at most MAX_PHOTOS times 4 bytes each.
CHUNK = 512


class Neighbors(NamedTuple):
    """The `unit_roots` of training photos, float16 [N, D], and how far from them other photos were."""

    features: np.ndarray
    # Distances of held-back photos, sorted, float32 [M].
    held_out_distances: np.ndarray
    # "validation", or "train": the distances of training photos to the others.
    held_out: str


def photos_to_keep(labels: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    """Return the training photos whose features are kept, sorted indices: all, or as many as fit.

    `labels` is [N]. Of too many, the classes get the same number, drawn from the seed; small ones stay whole.
    """
    most = min(MAX_PHOTOS, MAX_BYTES // (2 * dimensions))
    by_class, rank = _ranks(labels, seed)
    # The first photo of every class comes before the second of any.
    return np.sort(by_class[np.argsort(rank, kind="stable")[:most]])


def _ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the photos [N] by class, in an order drawn from the seed, and each one's rank in its class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    return by_class, np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)


def with_usual_shares(labels: np.ndarray, chosen: np.ndarray, seed: int) -> np.ndarray:
    """Return which of the `photos_to_keep` stand for all photos, sorted places in `chosen` [n].

    As many as have every class as often as among all `labels` [N]: the distances of others would promise
    something about photos of another kind, with more of the rare classes.
    """
    kept, counts = labels[chosen], np.bincount(labels)
    share = (np.bincount(kept, minlength=len(counts)) / np.maximum(counts, 1))[counts > 0].min()
    by_class, rank = _ranks(kept, seed)
    return np.sort(by_class[rank < np.maximum(share * counts, 1).round()[kept[by_class]]])


def unit_roots(features: np.ndarray) -> np.ndarray:
    """Return the square roots of features [N, D], with their signs, scaled to a length of 1; float32."""
    roots = np.sign(features) * np.sqrt(np.abs(features, dtype=np.float32))
    lengths = np.linalg.norm(roots, axis=1, keepdims=True)
    return roots / np.maximum(lengths, np.finfo(np.float32).tiny)


def distances(features: np.ndarray, kept: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Return the distance, float32 [M], of `unit_roots` [M, D] to those kept with the model [N, D].

    `groups` [N] says that `features` are those kept themselves: a photo's own group is then left out, and a
    photo that all others share a group with is infinitely far.
    """
    found, kept = np.empty(len(features), np.float32), kept.astype(np.float32).T
    for start in range(0, len(features), CHUNK):
        chunk = slice(start, start + CHUNK)
        similarities = features[chunk] @ kept
        if groups is not None:
            similarities[groups[chunk, None] == groups] = -np.inf
        nearest = np.partition(similarities, -min(NEIGHBORS, kept.shape[1]), axis=1)[:, -NEIGHBORS:]
        others = np.isfinite(nearest)
        counts, sums = others.sum(axis=1), np.where(others, nearest, 0).sum(axis=1)
        found[chunk] = np.where(counts, 1 - sums / np.maximum(counts, 1), np.inf)
    return found


def distance_limit(held_out_distances: Sequence[float] | None, keep: float, name: object) -> float:
    """Return the distance beyond which a photo is unknown, so that a share of `keep` has its answer.

    Split conformal prediction: of photos like the held-back ones. Raises `UserError` if the model `name` was
    saved without them (None), or too few photos were held back.
    """
    if held_out_distances is None:
        raise UserError(
            f"--reject: {name} was saved without features of its training photos; train it again, or add them"
            " by resuming its finished run: scripts/train.py with the same flags and --resume auto"
        )
    limit = conformal_quantile(held_out_distances, keep)
    if limit is None:
        raise UserError(
            f"--keep {keep} needs {photos_needed(keep)} held-back photos or more; {name} has"
            f" {len(held_out_distances)}"
        )
    return limit


def usual_limit(held_out_distances: Sequence[float] | None) -> float | None:
    """Return the `distance_limit` for `KEEP`, None if a model has none."""
    return None if held_out_distances is None else conformal_quantile(held_out_distances, KEEP)


def save(neighbors: Neighbors, file: Path) -> None:
    """Write neighbours atomically as a .safetensors file."""
    from safetensors.numpy import save_file

    from hotdog_hf.files import replacing_file

    with replacing_file(file) as part:
        tensors = {"features": neighbors.features, "held_out_distances": neighbors.held_out_distances}
        save_file(tensors, part, {"held_out": neighbors.held_out})
        part.chmod(file.parent.stat().st_mode & 0o666)  # safetensors restricts it to the user


def load(file: str | os.PathLike) -> Neighbors | None:
    """Read the neighbours of a saved model, None without such a file; `UserError` if it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        return None
    try:
        with safe_open(file, "numpy") as content:
            names = "features", "held_out_distances"
            return Neighbors(*map(content.get_tensor, names), content.metadata()["held_out"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file}: {error}; train the model again") from error
