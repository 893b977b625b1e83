"""Which photos belong together: copies and near duplicates, which no cut of a data set may separate."""

import collections
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import imagehash
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from hotdog_hf.data import check
from hotdog_hf.data.images import decode_image
from hotdog_hf.data.similar import similar_groups
from hotdog_hf.errors import UserError
from hotdog_hf.machine import allowed_cores

if TYPE_CHECKING:  # it takes a second
    import datasets

# Rows that are in memory at a time: those of the Hub hold whole files.
BATCH = 256


def content_groups(rows: "datasets.Dataset", *, progress: bool = False) -> np.ndarray:
    """Return the group of each photo, int64 [N], by what the photos show.

    Exact copies and near duplicates, as `scripts/check_data.py` finds them, have the same number, whatever
    their labels, and so have photos of one group in a table of labels.
    `sklearn.model_selection.StratifiedGroupKFold` takes these as its groups. Files that were checked before
    are not read again; photos of the Hub are decoded.
    """
    batches = (rows[start : start + BATCH]["image"] for start in range(0, len(rows), BATCH))
    if rows[0]["image"]["bytes"] is None:
        groups = file_groups([Path(image["path"]) for batch in batches for image in batch], progress=progress)
    else:
        with ThreadPoolExecutor(allowed_cores()) as pool:
            hashes = [text for batch in batches for text in pool.map(_hash_image, batch)]
        groups = _hash_groups(hashes)
    return merge_groups(groups, rows["group"][:]) if "group" in rows.column_names else groups


def file_groups(paths: Sequence[Path], *, progress: bool = False) -> np.ndarray:
    """Return the group of each file, int64 [N], as `content_groups` does."""
    records = check.inspect_files(paths, cache_file=check.default_cache_file(), progress=progress)
    return _hash_groups([records[path].phash for path in paths])


def _hash_groups(hashes: Sequence[str]) -> np.ndarray:
    """Return the group of each perceptual hash, int64 [N]; an empty one has a group of its own."""
    known = np.array([bool(text) for text in hashes])
    groups = np.empty(len(hashes), np.int64)
    groups[known] = similar_groups(np.array([int(text, 16) for text in hashes if text], np.uint64))
    # What cannot be read is like nothing else; training names it.
    groups[~known] = len(hashes) + np.arange((~known).sum())
    return groups


def merge_groups(groups: np.ndarray, names: Sequence[str | None]) -> np.ndarray:
    """Return groups [N] of all photos that share a group [N] or a name [N]; None is no name."""
    named = {name: len(names) + number for number, name in enumerate(sorted({*names} - {None}))}
    # Every photo is tied to the first one of its group, and to its name.
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    photos = np.array([index for index, name in enumerate(names) if name is not None], np.int64)
    ends = np.array([named[names[index]] for index in photos], np.int64)
    sources = np.concatenate([np.arange(len(groups)), photos])
    ties = sparse.coo_array(
        (np.ones(len(sources)), (sources, np.concatenate([first[place], ends]))),
        shape=(len(names) + len(named),) * 2,
    )
    return csgraph.connected_components(ties, directed=False)[1][: len(groups)].astype(np.int64)


def _hash_image(image: dict) -> str:
    try:
        source = image["path"] if image["bytes"] is None else image["bytes"]
        return str(imagehash.phash(decode_image(source, check.HASH_SIDE)))
    except UserError:
        return ""


def stratified_folds(
    labels: np.ndarray, groups: np.ndarray | None, most: int, seed: int, enough: float = math.inf
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (learned, held-back) indices of folds with the classes spread evenly, every group in one fold.

    As many folds as the smallest class has groups, up to `most`; of very many photos only as many folds as
    hold back `enough` photos. No folds at all if one would leave nothing of a class to learn. `groups` [N]
    number photos that stay together, such as copies; None: every photo is alone.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # a second to import

    together = groups is not None and len(np.unique(groups)) < len(groups)
    classes = np.unique(labels)
    sizes = [len(np.unique(groups[labels == label])) for label in classes] if together else None
    number = min(most, *(sizes or np.bincount(labels)[classes].tolist()))
    if number < 2:
        return []
    splitter = StratifiedGroupKFold if together else StratifiedKFold
    folds = splitter(number, shuffle=True, random_state=seed)
    folds = list(folds.split(labels, labels, groups if together else None))
    # A group with photos of several classes may take the last of a class along.
    if any(len(np.unique(labels[learned])) < len(classes) for learned, _ in folds):
        return []
    held_back = np.cumsum([len(held) for _, held in folds])
    return folds[: 1 + int(np.searchsorted(held_back, enough))]


def hold_back(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray | None:
    """Return a share of each class to hold back, sorted indices, with every group on one side.

    `labels` and `groups` are int64 [N]. Groups are taken in an order drawn from the seed, as long as they fit
    into the shares of their classes; the shares are exact if there are enough single photos. None if every
    group is a single photo, so that any stratified cut will do. Raises `ValueError` if a class has too few
    groups for two sides.
    """
    sizes = np.bincount(groups)
    if sizes.max() == 1:
        return None
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    members = [group for group in members if len(group)]
    by_class = [collections.Counter(labels[group].tolist()) for group in members]
    counts = np.bincount(labels)
    targets = np.clip((fraction * counts).round().astype(int), 1, np.maximum(counts - 1, 1))
    left, chosen = dict(enumerate(targets.tolist())), set()
    order = np.random.default_rng(seed).permutation(len(members)).tolist()
    for number in order:
        if all(count <= left[label] for label, count in by_class[number].items()):
            chosen.add(number)
            left.update({label: left[label] - count for label, count in by_class[number].items()})
    kept = collections.Counter(labels.tolist())
    for number in chosen:
        kept.subtract(by_class[number])
    # A class whose groups are all larger than its share: its smallest, if others are left to train on.
    for label in [label for label, room in left.items() if room == targets[label] and counts[label]]:
        # A group may hold the last photos of another class.
        own = [n for n in order if label in by_class[n] and all(kept[k] > m for k, m in by_class[n].items())]
        if not own:
            raise ValueError(f"the {counts[label]} photos of class {label} are copies of one another")
        smallest = min(own, key=lambda n: len(members[n]))
        chosen.add(smallest)
        kept.subtract(by_class[smallest])
    if gone := [label for label, count in kept.items() if not count]:
        raise ValueError(f"class {gone[0]} has too few photos for two sides: {counts[gone[0]]}")
    return np.sort(np.concatenate([members[number] for number in chosen]))
