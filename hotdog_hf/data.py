"""Photos on disk -> a `datasets` DatasetDict -> batches, in an order that depends on the seed alone.

A data folder is `train/<class>/*` and `test/<class>/*`, optionally `validation/` (`val`, `valid`).
"""

import atexit
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from hotdog_hf.errors import UserError
from hotdog_hf.folder import SPLIT_FOLDERS, find_photos
from hotdog_hf.hub import hub_errors
from hotdog_hf.images import decode_image
from hotdog_hf.pixels import Normalize

# The label of a padding photo; `torch.nn.functional.cross_entropy` leaves it out of the loss.
IGNORED_LABEL = -100
HUB_DATA_PREFIX = "hf://datasets/"


def load_photos(
    data_dir: str | os.PathLike,
    val_fraction: float = 0.0,
    seed: int = 0,
    skip: Collection[Path] = (),
) -> datasets.DatasetDict:
    """Load a data folder, or `hf://datasets/user/name`, as a DatasetDict of `image` (undecoded) and `label`.

    The files in `skip` are left out; `val_fraction` of train becomes a stratified `validation` split where
    there is none. Raises `UserError` for what is not in the expected form.
    """
    name = str(data_dir)
    is_hub_data = name.startswith(HUB_DATA_PREFIX)
    splits = _read_hub(name.removeprefix(HUB_DATA_PREFIX)) if is_hub_data else _read_folder(name, skip)
    if val_fraction and "validation" not in splits:
        splits |= _cut_validation(splits, val_fraction, seed)
    return datasets.DatasetDict({name: splits[name] for name in SPLIT_FOLDERS if name in splits})


def _read_folder(data_dir: str, skip: Collection[Path]) -> dict[str, datasets.Dataset]:
    """Make of a data folder what `load_dataset("imagefolder")` makes, out of an explicit list of files.

    `datasets`' own patterns let the word "test" inside a file name choose its split, and drop what they do
    not match. Every split has the label order of the sorted class names.
    """
    files = find_photos(data_dir)
    label_names = sorted(files["train"])
    label = datasets.ClassLabel(names=label_names)
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    splits = {}
    for split, classes in files.items():
        used = {name: [path for path in paths if path not in skip] for name, paths in classes.items()}
        if empty := [name for name in label_names if not used[name]]:
            raise UserError(f"no readable image is left in {data_dir}/{split}/{empty[0]}")
        rows = [(str(path), label) for label, name in enumerate(label_names) for path in used[name]]
        columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
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
            f"{repo} has the splits {', '.join(loaded)}; {' and '.join(sorted(missing))} is missing"
        )
    require_every_class(repo, counts(splits))
    return splits


def require_every_class(name: str, counts: dict[str, dict[str, int]]) -> None:
    """Raise `UserError` where a split of the data set `name` has no photo of some class."""
    for split, by_class in counts.items():
        if empty := [label for label, count in by_class.items() if not count]:
            raise UserError(
                f"no image of {empty[0]!r} in {name}/{split}; every class needs some in every split"
            )


def select_image_and_label(
    repo: str, rows: datasets.Dataset | datasets.IterableDataset
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the image and label columns under these names, images undecoded."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in rows.features.items())
        raise UserError(f"{repo} must have one Image and one ClassLabel column, but has {columns}")
    names = {images[0]: "image", labels[0]: "label"}
    rows = rows.select_columns(list(names))
    # A stream's columns cannot be renamed to what they are called.
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    return rows.cast_column("image", datasets.Image(decode=False))


def _cut_validation(
    splits: dict[str, datasets.Dataset], fraction: float, seed: int
) -> dict[str, datasets.Dataset]:
    try:
        cut = splits["train"].train_test_split(fraction, stratify_by_column="label", seed=seed)
    except ValueError as error:  # scikit-learn's own rule: at least one photo of every class on each side
        raise UserError(f"--val-fraction {fraction} of {len(splits['train'])} photos: {error}") from error
    return {"train": cut["train"], "validation": cut["test"]}


class StreamedSplit:
    """Stands for a split that is read as it is needed: its classes, its size, and its photos in turn."""

    def __init__(
        self,
        name: str,
        stream: datasets.IterableDataset,
        counts: list[int],
        fingerprint: str,
        sorted_by_class: bool = False,
    ):
        """Take rows of `image` (undecoded) and `label`, the photos of each class, and what tells a change."""
        self.name, self.stream, self.counts, self._fingerprint = name, stream, counts, fingerprint
        self.sorted_by_class = sorted_by_class
        self.features, self.num_shards = stream.features, stream.num_shards

    def __len__(self) -> int:
        return sum(self.counts)


def counts(photos: datasets.DatasetDict) -> dict[str, dict[str, int]]:
    """Return the number of photos by split and class name."""
    label_names = photos["train"].features["label"].names

    def count(rows: datasets.Dataset | StreamedSplit) -> list[int]:
        if isinstance(rows, StreamedSplit):
            return rows.counts
        return np.bincount(rows["label"][:], minlength=len(label_names)).tolist()

    return {split: dict(zip(label_names, count(rows), strict=True)) for split, rows in photos.items()}


def describe(counts: dict[str, dict[str, int]]) -> str:
    """Return a table of photo counts, a line a split and a column a class."""
    rows = [["split", *counts["train"], "all"]]
    rows += [[split, *by_class.values(), sum(by_class.values())] for split, by_class in counts.items()]
    return "\n".join(" ".join(f"{value:>14}" for value in row) for row in rows)


def push_photos(photos: datasets.DatasetDict, repo: str, *, private: bool = False) -> str:
    """Upload photos as a data set of the Hub, files as they are, and return its address."""
    with hub_errors(repo):
        photos.cast_column("image", datasets.Image()).push_to_hub(repo, private=private)
    return f"{huggingface_hub.constants.ENDPOINT}/datasets/{repo}"


def manifest(photos: datasets.DatasetDict, data_dir: str | os.PathLike) -> dict[str, list[int]]:
    """Return what tells whether photos have changed: each file's size and time by its path in the folder.

    Photos that are no files there stand as one entry a split, with the fingerprint that `datasets` gives it.
    """
    entries = {}
    for split, rows in photos.items():
        if not _are_files(rows, data_dir):
            entries[f"{data_dir}/{split}"] = [rows._fingerprint, len(rows)]
            continue
        for row, name in zip(rows, names_of(rows, data_dir), strict=True):
            status = Path(row["image"]["path"]).stat()
            entries[name] = [status.st_size, status.st_mtime_ns]
    return entries


def digest(photos: datasets.DatasetDict, data_dir: str | os.PathLike) -> str:
    """Hash which photos there are, in which order, by their names and labels."""
    facts = {
        split: [names_of(rows, data_dir), rows["label"][:]]
        if _are_files(rows, data_dir)
        else [rows._fingerprint, len(rows)]
        for split, rows in photos.items()
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def names_of(rows: datasets.Dataset, data_dir: str | os.PathLike) -> list[str]:
    """Return each photo's path within the folder, or the name that it came with, or its number."""
    paths = (row["image"]["path"] for row in rows)
    if _are_files(rows, data_dir):
        return [os.path.relpath(path, data_dir) for path in paths]
    return [str(number) if path is None else path for number, path in enumerate(paths)]


def _are_files(rows: datasets.Dataset | StreamedSplit, data_dir: str | os.PathLike) -> bool:
    """Tell whether photos are files of a data folder: not of the Hub, and not of shards."""
    if str(data_dir).startswith(HUB_DATA_PREFIX) or isinstance(rows, StreamedSplit):
        return False
    return rows[0]["image"]["bytes"] is None


def resolve_positive(label_names: list[str], positive_label: str | None) -> str | None:
    """Return the positive class: the one asked for, else "hotdog" where it exists, else None."""
    if positive_label is None:
        return "hotdog" if "hotdog" in label_names else None
    if positive_label not in label_names:
        raise UserError(
            f"--positive-label {positive_label!r} is none of the classes: {', '.join(label_names)}"
        )
    return positive_label


def read_photo(row: dict) -> Image.Image:
    """Decode the `image` of a dataset row, which holds a path (a folder) or bytes (the Hub)."""
    image = row["image"]
    return decode_image(image["path"] if image["bytes"] is None else image["bytes"])


def sample_photos(
    rows: datasets.Dataset, positive_label: str | None, count: int = 8
) -> tuple[list[Image.Image], list[Image.Image], tuple[str, str]]:
    """Return the chapter's look at the data: first photos of one class, last of the others, and titles.

    The one class is the positive one, or the first where there is none.
    """
    names, labels = rows.features["label"].names, np.asarray(rows["label"][:])
    one = names.index(positive_label or names[0])
    first, last = np.flatnonzero(labels == one)[:count], np.flatnonzero(labels != one)[: -count - 1 : -1]
    others = names[1 - one] if len(names) == 2 else f"not {names[one]}"
    return (
        [read_photo(rows[int(i)]) for i in first],
        [read_photo(rows[int(i)]) for i in last],
        (names[one], others),
    )


class ResizeAndCrop:
    """timm's evaluation transform in two halves: what is done to a photo, and to a batch on its device."""

    def __init__(self, data_config: dict):
        self.resize_and_crop = create_transform(**data_config, normalize=False)
        self.normalize = Normalize(data_config["mean"], data_config["std"])

    def pixels(self, photo: Image.Image, *_numbers: int) -> torch.Tensor:
        """Return the photo's bytes, uint8 [3, H, W]."""
        return self.resize_and_crop(photo)

    def __call__(self, photo: Image.Image) -> torch.Tensor:
        """Return what a network takes of one photo, float [3, H, W]."""
        return self.normalize(self.pixels(photo)[None])[0]


class CropAndFlip:
    """The chapter's training transform: a random resized crop and a random flip of a photo, then as above.

    torchvision's, with what is drawn (from torch's generator alone) apart from the work, which threads share.
    """

    # Torch's generator is one for all threads.
    _drawing = threading.Lock()

    def __init__(self, size: int | Sequence[int], min_crop_area: float, data_config: dict):
        self.crop = v2.RandomResizedCrop(
            size,
            scale=(min_crop_area, 1.0),
            interpolation=v2.InterpolationMode(data_config["interpolation"]),
        )
        self.normalize = Normalize(data_config["mean"], data_config["std"])

    def pixels(self, photo: Image.Image, *numbers: int) -> torch.Tensor:
        """Return the bytes of a crop, uint8 [3, H, W]; what is drawn follows from the numbers alone."""
        with self._drawing, torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would reset the GPU's as well, photo by photo.
            torch.default_generator.manual_seed(derive_seed(*numbers))
            place, flip = self.crop.make_params([photo]), torch.rand(1) < 0.5
        cropped = self.crop.transform(photo, place)
        return v2.functional.pil_to_tensor(v2.functional.horizontal_flip(cropped) if flip else cropped)


Transform = ResizeAndCrop | CropAndFlip


def eval_transform(data_config: dict) -> ResizeAndCrop:
    """Return timm's evaluation transform: PIL image -> normalised float tensor [3, H, W]."""
    return ResizeAndCrop(data_config)


def train_transform(
    data_config: dict, image_size: int | None = None, min_crop_area: float = 0.08
) -> CropAndFlip:
    """Return the chapter's training transform.

    A crop takes at least `min_crop_area` of the photo and becomes `image_size` pixels square (None: the size
    of evaluation; smaller is faster, and things look larger in a random crop anyway: arXiv 1906.06423).
    """
    return CropAndFlip(image_size or data_config["input_size"][1:], min_crop_area, data_config)


def map_threaded(work: Callable[[object], dict], keys: Sequence, threads: int | None = None) -> list[dict]:
    """Return the work on every key, done by as many threads as torch takes: one in a loader process.

    Decoding and resizing run without Python's lock. The network rests meanwhile, so the cores are free.
    """
    threads = threads or torch.get_num_threads()
    if threads == 1:
        return [work(key) for key in keys]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, keys))


class PhotoDataset(torch.utils.data.Dataset):
    """Photos as `{"pixel_values": uint8 [3, H, W], "labels": int}`; `network_input` is a batch's last step.

    Keys are indices for evaluation, `(epoch, index)` for training: the augmentation of a photo is drawn from
    (seed, epoch, index) alone, so it depends neither on the number of workers or processes nor on what was
    drawn before. Index `PADDING` gives a photo with `IGNORED_LABEL`.
    """

    PADDING = -1
    # Threads that share a batch; None: as many as torch takes.
    threads: int | None = None

    def __init__(self, rows: datasets.Dataset, transform: Transform, seed: int = 0):
        self.rows, self.transform, self.seed = rows, transform, seed
        self.labels = np.asarray(rows["label"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        is_padding, index = index == self.PADDING, max(index, 0)
        return {
            "pixel_values": self.pixel_values(epoch, index),
            "labels": IGNORED_LABEL if is_padding else self.labels[index],
            "index": index,
        }

    def __getitems__(self, keys: Sequence) -> list[dict]:
        """Return the items of a batch, as torch's loader asks for them."""
        return map_threaded(self.__getitem__, keys, self.threads)

    def pixel_values(self, epoch: int, index: int) -> torch.Tensor:
        """Return the bytes of the transformed photo, uint8 [3, H, W]."""
        return self.transform.pixels(read_photo(self.rows[index]), self.seed, epoch, index)

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what the network takes of a batch, float [N, 3, H, W]; computed where the batch lies."""
        return self.transform.normalize(pixel_values)

    def name_of(self, index: int) -> str:
        """Return the file of a photo, for messages."""
        return self.rows[index]["image"]["path"] or f"photo {index}"


class FeatureDataset(PhotoDataset):
    """Stands for a data set of photos without augmentation: `pixel_values` is a photo's features [D]."""

    threads = 1

    def __init__(self, photo_set: PhotoDataset, features: torch.Tensor):
        super().__init__(photo_set.rows, photo_set.transform, photo_set.seed)
        self.features = features

    def pixel_values(self, epoch: int, index: int) -> torch.Tensor:
        """Return the features; they are the same in every epoch."""
        return self.features[index]

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features, float [N, D], as they are."""
        return pixel_values


def derive_seed(*numbers: int) -> int:
    """Hash a few numbers into one well-spread seed, so that neighbours share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class StepSampler(torch.utils.data.Sampler):
    """For every optimizer step of an epoch, this process's share of the batch as a list of `(epoch, index)`.

    The batches are those of one process whatever their number: batch b of epoch e is the b-th run of
    `batch_size` photos of a permutation drawn from (seed, e); process r of w takes every w-th photo of it.
    A process left without a photo by a short last batch gets one padding photo, which the loss ignores.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_step = 0

    def seek(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and the steps of it to leave out."""
        self.epoch, self.first_step = epoch, first_step

    def photos_skipped(self) -> int:
        """Return the number of photos in the steps left out."""
        return min(self.first_step * self.batch_size, self.size)

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def step_sizes(self) -> list[int]:
        """Return the number of photos of each batch to come over all processes."""
        return [min(self.batch_size, self.size - start) for start in self._starts()]

    def _starts(self) -> range:
        return range(self.photos_skipped(), self.size, self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for start in self._starts():
            share = order[start : start + self.batch_size][self.rank :: self.world_size]
            yield [(self.epoch, index) for index in share or [PhotoDataset.PADDING]]


def train_loader(
    dataset: PhotoDataset, batch_size: int, *, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> torch.utils.data.DataLoader:
    """Return batches of one optimizer step each: this process's share of `batch_size` photos, shuffled."""
    sampler = StepSampler(len(dataset), batch_size, dataset.seed, rank, world_size)
    return step_loader(dataset, sampler, num_workers)


def step_loader(
    dataset: torch.utils.data.Dataset, sampler: torch.utils.data.Sampler, num_workers: int
) -> torch.utils.data.DataLoader:
    """Return the loader of a sampler that yields the keys of one optimizer step at a time."""
    return _loader(dataset, num_workers, batch_sampler=sampler, persistent_workers=num_workers > 0)


def eval_loader(
    dataset: PhotoDataset, batch_size: int, *, num_workers: int = 0
) -> torch.utils.data.DataLoader:
    """Return batches in the data set's own order, to be given to `accelerator.prepare`."""
    return _loader(dataset, num_workers, batch_size=batch_size)


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and its kind to the main process, which needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End the loader processes that an error has left: they ignore the signal by which Python would."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end a fault
    for child in multiprocessing.active_children():
        child.kill()


def _loader(
    dataset: torch.utils.data.Dataset, num_workers: int, **batching: object
) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        worker_init_fn=_ignore_signals,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader's seed for its workers must not advance the global one.
        generator=torch.Generator(),
        **batching,
    )
