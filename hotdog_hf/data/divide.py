"""A data folder made from one folder per class: which photo becomes train, test or validation."""

import collections
import csv
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hotdog_hf.data import labels as label_tables
from hotdog_hf.data.folder import Photos, find_photos, heic_hint, list_classes, unused_files
from hotdog_hf.data.groups import file_groups, hold_back, merge_groups
from hotdog_hf.errors import UserError
from hotdog_hf.files import replacing_folder, writing_to

# Written if a table of labels gives groups, so that a validation split keeps them whole, too.
GROUPS_FILE = "labels.csv"


def split_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    shares: dict[str, float],
    seed: int,
    labels: Sequence[str] = (),
) -> tuple[Photos, list[Path]]:
    """Create the data folder `target` from the photos in `source/<class>/*`, with these shares besides train.

    Returns the photos of the new folder, and the files of the source that were left out.

    Files are hard-linked if possible, else copied. The split depends on the files' contents; copies and near
    duplicates are in one split. The tables `labels` override the folders; the photos of one of their groups
    are in one split, and `labels.csv` in the new folder has the groups. Raises `UserError` for a folder of
    another structure, a wrong table, a class of too few photos, or a target that exists.
    """
    root, made = Path(source), Path(target)
    if made.exists():
        raise UserError(f"{made} already exists; give another target folder")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    classes = {name: files for name, files in list_classes(root).items() if files}
    if {"train", "test"} <= classes.keys():
        raise UserError(f"{root} already has train/ and test/; use it as it is")
    classes, group_of = label_tables.relabel(classes, labels, root)
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise UserError(
            f"{root} needs at least two folders of photos, one per class; found {found}{heic_hint(root)}"
        )
    with writing_to(made), replacing_folder(made) as part:
        digests = {
            name: {
                path: _digest(path, seed)
                for path in tqdm(files, desc=name, unit="img", leave=False, disable=None)
            }
            for name, files in classes.items()
        }
        groups = _groups(digests, group_of)
        if len(np.unique(groups)) < len({digest for own in digests.values() for digest in own.values()}):
            split_of = _split_groups(root, digests, groups, shares, seed)
        else:  # no group has more than copies of one photo
            split_of = {
                path: split
                for name, own in digests.items()
                for path, split in _split_class(root / name, own, shares).items()
            }
        rows = []
        for name, files in classes.items():
            for path in files:
                place = _place(part / split_of[path] / name, path, root)
                _link(path, place)
                if path in group_of:
                    rows.append([place.relative_to(part).as_posix(), name, split_of[path], group_of[path]])
        if rows:
            with (part / GROUPS_FILE).open(
                "w", encoding="utf-8", errors="surrogateescape", newline=""
            ) as file:
                csv.writer(file).writerows([["path", "label", "split", "group"], *rows])
    used = {path for files in classes.values() for path in files}
    tables = {Path(file).resolve() for file in labels}
    left_out = sorted(path for _, path in unused_files(root, used) if path.resolve() not in tables)
    return find_photos(made), left_out


def _digest(path: Path, seed: int) -> bytes:
    return hashlib.sha256(str(seed).encode() + path.read_bytes()).digest()


def _split_class(folder: Path, digests: Mapping[Path, bytes], shares: dict[str, float]) -> dict[Path, str]:
    """Return the split of each photo of a class, copies in the same one."""
    order = sorted(set(digests.values()))
    counts = {split: max(round(share * len(order)), 1) for split, share in shares.items()}
    if sum(counts.values()) >= len(order):
        raise UserError(f"{folder} has too few photos to split: {len(order)}")
    splits = [split for split, count in counts.items() for _ in range(count)]
    split_of = dict(zip(order, splits, strict=False))
    return {path: split_of.get(digest, "train") for path, digest in digests.items()}


def _groups(digests: Mapping[str, Mapping[Path, bytes]], group_of: Mapping[Path, str]) -> np.ndarray:
    """Return the group of each photo [N]: of copies, near duplicates, and those of one group in a table.

    The groups are numbered by their contents, so that the names of the files do not matter.
    """
    paths = [path for own in digests.values() for path in own]
    contents = np.array([digest.hex() for own in digests.values() for digest in own.values()])
    numbers = np.unique(contents, return_inverse=True)[1]
    groups = merge_groups(file_groups(paths, progress=True), [group_of.get(path) for path in paths])
    groups = merge_groups(groups, [str(number) for number in numbers])  # copies of what cannot be read
    smallest = np.full(groups.max() + 1, len(paths))
    np.minimum.at(smallest, groups, numbers)
    return np.unique(smallest[groups], return_inverse=True)[1]


def _split_groups(
    root: Path,
    digests: Mapping[str, Mapping[Path, bytes]],
    groups: np.ndarray,
    shares: dict[str, float],
    seed: int,
) -> dict[Path, str]:
    """Return the split of each photo, with the photos of a group in the same one."""
    paths = [path for own in digests.values() for path in own]
    labels = np.repeat(np.arange(len(digests)), [len(own) for own in digests.values()])
    split_of, left, share_left = dict.fromkeys(paths, "train"), np.arange(len(paths)), 1.0
    for split, share in shares.items():
        try:
            chosen = hold_back(labels[left], groups[left], share / share_left, seed)
        except ValueError as error:
            raise UserError(f"{root} has too few groups to split: {error}") from error
        if chosen is None:  # every group is a single photo
            chosen = _stratified(labels[left], share / share_left, seed)
        split_of |= {paths[index]: split for index in left[chosen]}
        left, share_left = np.delete(left, chosen), share_left - share
    for name in digests:
        counts = collections.Counter(split_of[path] for path in digests[name])
        if len(counts) <= len(shares):
            raise UserError(f"class {name!r} in {root} has too few groups for {len(shares) + 1} splits")
    return split_of


def _stratified(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = [order[labels[order] == label] for label in np.unique(labels)]
    return np.concatenate([part[: max(round(share * len(part)), 1)] for part in parts])


def _place(folder: Path, path: Path, root: Path) -> Path:
    """Return where a photo goes: below its class, as it lay below the folder of a class, or of all."""
    inside = path.relative_to(root).parts
    return folder.joinpath(*(inside[1:] or inside))


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        raise UserError(f"two photos would become {place.name} in one class: rename {path}")
    try:
        os.link(path.resolve(), place)
    except OSError:  # another disk, or one without links
        shutil.copy2(path, place)
