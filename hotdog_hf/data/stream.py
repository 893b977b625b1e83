"""Streaming photos from Parquet shards on the Hub or on disk, for data larger than the disk."""

import collections
import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets.distributed import split_dataset_by_node
from datasets.table import embed_table_storage
from PIL import Image
from tqdm import tqdm

from hotdog_hf.data.folder import SPLIT_FOLDERS
from hotdog_hf.data.images import open_photo
from hotdog_hf.data.loaders import IGNORED_LABEL, StepSampler, map_threaded, step_loader
from hotdog_hf.data.splits import (
    HUB_DATA_PREFIX,
    Photos,
    StreamedSplit,
    require_every_class,
    select_image_and_label,
)
from hotdog_hf.data.transforms import Transform
from hotdog_hf.errors import UserError
from hotdog_hf.files import replacing_folder
from hotdog_hf.hub import hub_errors


def open_stream(data_dir: str, progress: bool = True) -> dict[str, datasets.Dataset | StreamedSplit]:
    """Open `hf://datasets/user/name`, or a folder of Parquet shards, with train as a stream.

    The other splits are kept in memory, undecoded. Of train, only the labels are read at once. Raises
    `UserError` for data of another structure.
    """
    name = data_dir.removeprefix(HUB_DATA_PREFIX)
    if name == data_dir and not Path(data_dir).is_dir():
        raise UserError(f"no such data folder: {data_dir}")
    with _reading(data_dir):
        try:
            builder = datasets.load_dataset_builder(name)
            files = builder.config.data_files or {}
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--streaming cannot read {data_dir}: {error}") from error
        names = {split: name for split, aliases in SPLIT_FOLDERS.items() for name in aliases if name in files}
        if missing := {"train", "test"} - set(names):
            raise UserError(f"{data_dir}: no shards of {' and '.join(sorted(missing))}")
        for name in names.values():
            if other := next((path for path in files[name] if not path.endswith(".parquet")), None):
                raise UserError(
                    f"--streaming reads Parquet shards, and {other} is not one: scripts/shard.py writes them"
                    " from a folder of photos, scripts/push.py --dataset to the Hub"
                )
        streams = builder.as_streaming_dataset()
        streams = {split: select_image_and_label(data_dir, streams[name]) for split, name in names.items()}
        opened, label_names = {}, streams["train"].features["label"].names
        for split, stream in streams.items():
            paths = files[names[split]]
            counted, sorted_by_class = _count(paths, label_names, progress)
            if split == "train":
                facts = json.dumps([list(paths), paths.origin_metadata], default=str)
                fingerprint = hashlib.sha256(facts.encode()).hexdigest()
                opened[split] = StreamedSplit(data_dir, stream, counted, fingerprint, sorted_by_class)
            else:
                rows = tqdm(stream, desc=split, unit="img", leave=False, disable=None if progress else True)
                opened[split] = datasets.Dataset.from_list(list(rows), features=stream.features)
    require_every_class(Photos(opened, data_dir))
    return opened


@contextlib.contextmanager
def _reading(data_dir: str) -> Iterator[None]:
    """Turn errors of reading shards into a `UserError`."""
    on_hub = data_dir.startswith(HUB_DATA_PREFIX)
    try:
        with hub_errors(data_dir.removeprefix(HUB_DATA_PREFIX)) if on_hub else contextlib.nullcontext():
            yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{data_dir}: a shard cannot be read: {error}") from error


def _count(paths: list[str], label_names: list[str], progress: bool) -> tuple[list[int], bool]:
    """Return the photos per class, from the shards' label columns only, and whether these are sorted.

    They count as sorted if neighbours differ less than half as often as in a shuffled order. Shards with
    other class names than the first are rejected; `datasets` would use the first's for all.
    """
    counted, changes = np.zeros(len(label_names), dtype=np.int64), 0
    for path in tqdm(paths, desc="labels", unit="shard", leave=False, disable=None if progress else True):
        with fsspec.open(path, "rb") as file:
            shard = pyarrow.parquet.ParquetFile(file)
            features = datasets.Features.from_arrow_schema(shard.schema_arrow)
            column, names = next(
                (name, feature.names)
                for name, feature in features.items()
                if isinstance(feature, datasets.ClassLabel)
            )
            if names != label_names:
                raise UserError(f"{path} has the classes {names}, the first shard has {label_names}")
            column_read = shard.read(columns=[column])[column]
        labels = column_read.to_numpy()
        if unlabelled := column_read.null_count or int((labels < 0).sum()):
            raise UserError(f"{path}: {unlabelled} photos have no label")
        counted += np.bincount(labels, minlength=len(label_names))
        changes += int(np.count_nonzero(np.diff(labels)))
    shares = counted / max(counted.sum(), 1)
    return counted.tolist(), changes < counted.sum() * (1 - (shares**2).sum()) / 2


class StreamDataset(torch.utils.data.Dataset):
    """Decodes and augments the rows of `StreamSampler`: keys are `(epoch, index, row)`, row None for padding.

    Items are those of `loaders.PhotoDataset`; the augmentation depends on (seed, epoch, index).
    """

    def __init__(self, transform: Transform, seed: int):
        self.transform, self.seed = transform, seed

    def __getitem__(self, key: tuple[int, int, dict | None]) -> dict:
        epoch, index, row = key
        photo = Image.new("RGB", (64, 64)) if row is None else open_photo(row)
        return {
            "pixel_values": self.transform.pixels(photo, self.seed, epoch, index),
            "labels": IGNORED_LABEL if row is None else row["label"],
            "index": index,
        }

    def __getitems__(self, keys: Sequence) -> list[dict]:
        """Return the items of a batch; called by torch's loader."""
        return map_threaded(self.__getitem__, keys)

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the network's input for a batch, like `PhotoDataset`."""
        return self.transform.normalize(pixel_values)

    def name_of(self, index: int) -> str:
        """Return a photo's name for messages: its place in the epoch's stream."""
        return f"photo {index} of the stream"


class StreamSampler(StepSampler):
    """For every optimizer step of an epoch, the photos that this process reads for it, undecoded.

    Process r of w reads its own shards if w divides their number, else every w-th photo of all
    (`split_dataset_by_node`); the order of the shards is shuffled, and their photos within `buffer_size`,
    both by (seed, epoch). Every photo comes exactly once: the processes continue until the last one's photos
    are used up; one without photos gets a padding photo. `sum_processes` adds up how many each has.
    """

    def __init__(
        self,
        split: StreamedSplit,
        batch_size: int,
        seed: int,
        buffer_size: int,
        sum_processes: Callable[[int], int],
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < world_size:
            raise UserError(f"--streaming needs --batch-size {world_size} or more for {world_size} processes")
        super().__init__(len(split), batch_size, seed, rank, world_size)
        shuffled = split.stream.shuffle(seed=seed, buffer_size=buffer_size)
        self.stream, self.name = split_dataset_by_node(shuffled, rank, world_size), split.name
        self.share, self.sum_processes = len(range(rank, batch_size, world_size)), sum_processes
        self.agreed: collections.deque[int] = collections.deque()

    def step_sizes(self) -> Iterator[int]:
        """Yield each batch's number of photos over all processes, once the batch has been read."""
        while self.agreed:
            yield self.agreed.popleft()

    def __iter__(self) -> Iterator[list[tuple[int, int, dict | None]]]:
        self.agreed.clear()
        rows = self._rows()
        # Photos before a resume are read again, but not decoded, so that the shuffle buffer fills as before.
        position = sum(1 for _ in itertools.islice(rows, self.first_step * self.share))
        yielded = self.sum_processes(position)
        while size := self.sum_processes(len(batch := list(itertools.islice(rows, self.share)))):
            self.agreed.append(size)
            yielded += size
            places = range(position, position + max(len(batch), 1))
            yield [
                (self.epoch, place * self.world_size + self.rank, row)
                for place, row in zip(places, batch or [None], strict=True)
            ]
            position += len(batch)
        if yielded != self.size:
            raise UserError(f"{self.name} yielded {yielded} photos of train, but its shards had {self.size}")

    def _rows(self) -> Iterator[dict]:
        # At the end `datasets` waits 5 seconds for its prefetching threads.
        self.stream.set_epoch(self.epoch)
        with _reading(self.name):
            yield from self.stream


def train_loader(
    sampler: StreamSampler, transform: Transform, *, num_workers: int = 0
) -> torch.utils.data.DataLoader:
    """Return batches of one optimizer step each, as `loaders.train_loader` does for photos on disk.

    The order depends on the number of processes, not on the number of workers, which only decode what this
    process reads.
    """
    return step_loader(StreamDataset(transform, sampler.seed), sampler, num_workers)


def write_shards(
    photos: datasets.DatasetDict, target: Path, photos_a_shard: int, seed: int
) -> dict[str, int]:
    """Write `target/data/<split>-00000-of-00002.parquet`, ... atomically; return the shards per split.

    Photos are shuffled by the seed, as a stream shuffles only a part of them at a time.
    """
    numbers = {split: math.ceil(len(rows) / photos_a_shard) for split, rows in photos.items()}
    if target.exists():
        raise UserError(f"{target} already exists; give another folder")
    with replacing_folder(target) as part:
        (part / "data").mkdir()
        bar = tqdm(total=sum(numbers.values()), unit="shard", leave=False, disable=None)
        for split, rows in photos.items():
            shuffled = rows.shuffle(seed=seed).cast_column("image", datasets.Image())
            for number in range(numbers[split]):
                shard = shuffled.shard(numbers[split], number).with_format("arrow")
                table = embed_table_storage(shard[:])  # the files' bytes instead of their paths
                name = f"{split}-{number:05}-of-{numbers[split]:05}.parquet"
                pyarrow.parquet.write_table(table, part / "data" / name)
                bar.update()
        bar.close()
    return numbers
