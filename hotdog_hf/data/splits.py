"""A data folder, or a data set of the Hub, as a `datasets` DatasetDict, with its counts and identity.

A data folder is `train/<class>/*` and `test/<class>/*`, optionally `validation/` (`val`, `valid`).
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
from PIL import Image

from hotdog_hf.data import labels as label_tables
from hotdog_hf.data.decoded import DecodedCache
from hotdog_hf.data.folder import SPLIT_FOLDERS
from hotdog_hf.data.groups import content_groups, hold_back
from hotdog_hf.data.images import thumbnail
from hotdog_hf.errors import UserError
from hotdog_hf.hub import hub_errors

HUB_DATA_PREFIX = "hf://datasets/"
# Pixels a side of the sample photos, twice those of their places in the picture.
SAMPLE_SIDE = 336


class StreamedSplit:
    """A split that is streamed: its classes, its size, and an iterator over its photos."""

    def __init__(
        self,
        name: str,
        stream: datasets.IterableDataset,
        counts: list[int],
        fingerprint: str,
        sorted_by_class: bool = False,
    ):
        """Takes rows of `image` (undecoded) and `label`, the photos per class, and a fingerprint."""
        self.name, self.stream, self.counts, self._fingerprint = name, stream, counts, fingerprint
        self.sorted_by_class = sorted_by_class
        self.features, self.num_shards = stream.features, stream.num_shards

    def __len__(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Photos:
    """The photos of a data set by split, the folder or Hub name they come from, and the files left out."""

    splits: Mapping[str, datasets.Dataset | StreamedSplit]
    data_dir: str | os.PathLike
    skipped: Sequence[Path] = ()
    # Whether the validation split was split off a train split with copies, which were kept together.
    cut_by_content: bool = False
    # What the tables of labels say, hashed; None without any.
    labels_digest: str | None = None
    # Where decoded photos are kept, if they are.
    cache: DecodedCache | None = None

    @property
    def label_names(self) -> list[str]:
        """The class names, in the order of their indices."""
        return self.splits["train"].features["label"].names

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of photos by split and class name."""

        def count(rows: datasets.Dataset | StreamedSplit) -> list[int]:
            if isinstance(rows, StreamedSplit):
                return rows.counts
            return np.bincount(rows["label"][:], minlength=len(self.label_names)).tolist()

        return {
            split: dict(zip(self.label_names, count(rows), strict=True))
            for split, rows in self.splits.items()
        }

    def names(self, split: str) -> list[str]:
        """Return each photo's path within the folder, or the name in the data set, or its number."""
        rows = self.splits[split]
        paths = (row["image"]["path"] for row in rows)
        if _are_files(rows, self.data_dir):
            return [os.path.relpath(path, self.data_dir) for path in paths]
        return [str(number) if path is None else path for number, path in enumerate(paths)]

    def manifest(self, *splits: str) -> dict[str, list]:
        """Return each file's size and time by its path in the folder, to detect changes.

        Of the given splits, or of all. Photos that are not files have one entry per split, with its
        `datasets` fingerprint.
        """
        entries = {}
        for split in splits or self.splits:
            rows = self.splits[split]
            if not _are_files(rows, self.data_dir):
                entries[f"{self.data_dir}/{split}"] = [rows._fingerprint, len(rows)]
                continue
            for row, name in zip(rows, self.names(split), strict=True):
                status = Path(row["image"]["path"]).stat()
                entries[name] = [status.st_size, status.st_mtime_ns]
        return entries

    def digest(self) -> str:
        """Hash the names and labels of all photos, in order."""
        facts = {
            split: [self.names(split), rows["label"][:]]
            if _are_files(rows, self.data_dir)
            else [rows._fingerprint, len(rows)]
            for split, rows in self.splits.items()
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_photos(
    data_dir: str | os.PathLike,
    val_fraction: float = 0.0,
    seed: int = 0,
    skip: Collection[Path] = (),
    labels: Sequence[str] = (),
) -> datasets.DatasetDict:
    """Load a data folder, or `hf://datasets/user/name`, as a DatasetDict of `image` (undecoded) and `label`.

    The files in `skip` are left out; the tables `labels` override the folders, see `data.labels`. If there
    is no `validation` split, `val_fraction` of train becomes one, see `cut_validation`. Raises `UserError`
    for data of another structure.
    """
    splits = load_splits(data_dir, skip, labels)
    if val_fraction and "validation" not in splits:
        splits = cut_validation(splits, val_fraction, seed, photos_to_hold_back(splits, val_fraction, seed))
    return splits


def load_splits(
    data_dir: str | os.PathLike, skip: Collection[Path] = (), labels: Sequence[str] = ()
) -> datasets.DatasetDict:
    """Load the splits that are there, as `load_photos` does."""
    name = str(data_dir)
    is_hub_data = name.startswith(HUB_DATA_PREFIX)
    if is_hub_data:
        return _in_order(_read_hub(name.removeprefix(HUB_DATA_PREFIX)))
    return _in_order(_read_folder(name, skip, labels))


def photos_to_hold_back(
    splits: datasets.DatasetDict, fraction: float, seed: int, progress: bool = False
) -> np.ndarray | None:
    """Return the rows of train to validate on, if train has copies or near duplicates to keep together."""
    train = splits["train"]
    groups = content_groups(train, progress=progress)
    try:
        return hold_back(np.asarray(train["label"][:]), groups, fraction, seed)
    except ValueError as error:
        raise UserError(f"--val-fraction {fraction}: {error}; make a validation/ folder yourself") from error


def cut_validation(
    splits: datasets.DatasetDict, fraction: float, seed: int, held_back: np.ndarray | None
) -> datasets.DatasetDict:
    """Move the rows `held_back` of train to a validation split; None leaves the choice to scikit-learn."""
    train = splits["train"]
    if held_back is not None:
        kept = np.setdiff1d(np.arange(len(train)), held_back)
        return _in_order({**splits, "train": train.select(kept), "validation": train.select(held_back)})
    try:
        cut = train.train_test_split(fraction, stratify_by_column="label", seed=seed)
    except ValueError as error:  # scikit-learn's rule: at least one photo of every class on each side
        raise UserError(f"--val-fraction {fraction} of {len(train)} photos: {error}") from error
    return _in_order({**splits, "train": cut["train"], "validation": cut["test"]})


def _in_order(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: splits[name] for name in SPLIT_FOLDERS if name in splits})


def _read_folder(data_dir: str, skip: Collection[Path], labels: Sequence[str]) -> dict[str, datasets.Dataset]:
    """Load a data folder like `load_dataset("imagefolder")`, but from an explicit list of files.

    The patterns of `datasets` let the word "test" in a file name choose its split, and drop files that do not
    match. The labels of every split are the sorted class names. Groups that a table gives are a third column.
    """
    files = label_tables.find_photos(data_dir, labels)
    table = label_tables.read_tables(labels, data_dir) if labels else {}
    group_of = {path: row.group for path, row in table.items() if row.group is not None}
    label_names = sorted(files["train"])
    label = datasets.ClassLabel(names=label_names)
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    if group_of:
        features["group"] = datasets.Value("string")
    splits = {}
    for split, classes in files.items():
        used = {name: [path for path in paths if path not in skip] for name, paths in classes.items()}
        if empty := [name for name in label_names if not used[name]]:
            raise UserError(f"no readable image is left in {data_dir}/{split}/{empty[0]}")
        rows = [(path, label) for label, name in enumerate(label_names) for path in used[name]]
        columns = {"image": [str(path) for path, _ in rows], "label": [label for _, label in rows]}
        if group_of:
            columns["group"] = [group_of.get(path) for path, _ in rows]
        try:
            splits[split] = datasets.Dataset.from_dict(columns, features=features)
        except UnicodeEncodeError as error:
            raise UserError(f"{error.object}: the name of this file is not UTF-8; rename it") from error
    return splits


def _read_hub(repo: str) -> dict[str, datasets.Dataset]:
    """Load an image-classification data set of the Hub: one image and one label column, train and test."""
    with hub_errors(repo):
        loaded = datasets.load_dataset(repo)
    split_of = {alias: split for split, aliases in SPLIT_FOLDERS.items() for alias in aliases}
    splits = {
        split_of[name]: select_image_and_label(repo, rows)
        for name, rows in loaded.items()
        if name in split_of
    }
    if unlabelled := sum(label < 0 for rows in splits.values() for label in rows["label"]):
        raise UserError(f"{repo}: {unlabelled} photos have no label")
    if missing := {"train", "test"} - set(splits):
        raise UserError(
            f"{repo} has the splits {', '.join(loaded)}; missing: {' and '.join(sorted(missing))}"
        )
    require_every_class(Photos(splits, repo))
    return splits


def require_every_class(photos: Photos) -> None:
    """Raise `UserError` if a split has no photo of some class."""
    for split, by_class in photos.counts().items():
        if empty := [label for label, count in by_class.items() if not count]:
            raise UserError(
                f"no image of {empty[0]!r} in {photos.data_dir}/{split}; every class needs some"
                " in every split"
            )


def select_image_and_label(
    repo: str, rows: datasets.Dataset | datasets.IterableDataset
) -> datasets.Dataset | datasets.IterableDataset:
    """Return only the image and label columns, under these names, images undecoded."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in rows.features.items())
        raise UserError(f"{repo} must have one Image and one ClassLabel column, but has {columns}")
    # First, as a stream would decode every photo to rename a column, and encode it again.
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    names = {images[0]: "image", labels[0]: "label"}
    # A stream's columns cannot be renamed to their own names.
    renamed = {old: new for old, new in names.items() if old != new}
    return rows.select_columns(list(names)).rename_columns(renamed)


def push_photos(photos: datasets.DatasetDict, repo: str, *, private: bool = False) -> str:
    """Upload photos as a data set of the Hub, files unchanged, and return its URL."""
    with hub_errors(repo):
        photos.cast_column("image", datasets.Image()).push_to_hub(repo, private=private)
    return f"{huggingface_hub.constants.ENDPOINT}/datasets/{repo}"


def _are_files(rows: datasets.Dataset | StreamedSplit, data_dir: str | os.PathLike) -> bool:
    """Return whether photos are files of a data folder: not from the Hub, and not from shards."""
    if str(data_dir).startswith(HUB_DATA_PREFIX) or isinstance(rows, StreamedSplit):
        return False
    return rows[0]["image"]["bytes"] is None


def resolve_positive(label_names: list[str], positive_label: str | None) -> str | None:
    """Return the positive class: the one asked for, else "hotdog" if it exists, else None."""
    if positive_label is None:
        return "hotdog" if "hotdog" in label_names else None
    if positive_label not in label_names:
        raise UserError(
            f"--positive-label {positive_label!r} is none of the classes: {', '.join(label_names)}"
        )
    return positive_label


def sample_photos(
    rows: datasets.Dataset, positive_label: str | None, count: int = 8
) -> tuple[list[Image.Image], list[Image.Image], tuple[str, str]]:
    """Return sample photos as in the chapter: the first of one class, the last of the others, and titles.

    The one class is the positive one, or the first if there is none.
    """
    names, labels = rows.features["label"].names, np.asarray(rows["label"][:])
    one = names.index(positive_label or names[0])
    first, last = np.flatnonzero(labels == one)[:count], np.flatnonzero(labels != one)[: -count - 1 : -1]
    others = names[1 - one] if len(names) == 2 else f"not {names[one]}"
    return (
        [thumbnail(rows[int(i)], SAMPLE_SIDE) for i in first],
        [thumbnail(rows[int(i)], SAMPLE_SIDE) for i in last],
        (names[one], others),
    )
