"""Data sets, samplers and loaders: batches in an order that depends only on the seed."""

import atexit
import copy
import math
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch

from hotdog_hf.data.decoded import DecodedCache
from hotdog_hf.data.groups import merge_groups
from hotdog_hf.data.images import open_photo
from hotdog_hf.data.transforms import Transform, derive_seed
from hotdog_hf.machine import cpu_requested, stop_signals

# The label of a padding photo; `torch.nn.functional.cross_entropy` leaves it out of the loss.
IGNORED_LABEL = -100
# Bytes of photos for evaluation that stay in memory: 3,500 of 224 pixels.
MOST_KEPT = 2**29


def map_threaded(work: Callable[[object], dict], keys: Sequence, threads: int | None = None) -> list[dict]:
    """Apply `work` to every key, in as many threads as torch uses: one in a loader process.

    Decoding and resizing release Python's lock. The network is idle meanwhile, so the cores are free.
    """
    threads = threads or torch.get_num_threads()
    if threads == 1:
        return [work(key) for key in keys]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, keys))


class PhotoDataset(torch.utils.data.Dataset):
    """Photos as `{"pixel_values": uint8 [3, H, W], "labels": int}`; `network_input` normalises a batch.

    Keys are indices for evaluation, `(epoch, index)` for training: the augmentation of a photo depends only
    on (seed, epoch, index), not on the number of workers or processes or on earlier draws. Index `PADDING`
    returns a photo with `IGNORED_LABEL`.
    """

    PADDING = -1
    # Threads per batch; None: as many as torch uses.
    threads: int | None = None

    def __init__(
        self,
        rows: datasets.Dataset,
        transform: Transform,
        seed: int = 0,
        cache: DecodedCache | None = None,
    ):
        self.rows, self.transform, self.seed, self.cache = rows, transform, seed, cache
        self.labels = np.asarray(rows["label"][:], dtype=np.int64)
        # The groups of a table of labels, which no fold may separate; None without any.
        self.groups = None
        if "group" in rows.column_names:
            self.groups = merge_groups(np.arange(len(rows)), rows["group"][:])

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
        """Return the items of a batch; called by torch's loader."""
        return map_threaded(self.__getitem__, keys, self.threads)

    def pixel_values(self, epoch: int, index: int) -> torch.Tensor:
        """Return the bytes of the transformed photo, uint8 [3, H, W]."""
        photo = open_photo(self.rows[index], self.cache)
        return self.transform.pixels(photo, self.seed, epoch, index)

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the network's input for a batch, float [N, 3, H, W], on the batch's device."""
        return self.transform.normalize(pixel_values)

    def name_of(self, index: int) -> str:
        """Return the file of a photo, for messages."""
        return self.rows[index]["image"]["path"] or f"photo {index}"


class FeatureDataset(PhotoDataset):
    """A data set of photos without augmentation whose `pixel_values` are cached features [D]."""

    threads = 1

    def __init__(self, photo_set: PhotoDataset, features: torch.Tensor):
        super().__init__(photo_set.rows, photo_set.transform, photo_set.seed)
        self.features = features

    def pixel_values(self, epoch: int, index: int) -> torch.Tensor:
        """Return the features; they are the same in every epoch."""
        return self.features[index]

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features, float [N, D], unchanged."""
        return pixel_values


class StepSampler(torch.utils.data.Sampler):
    """For every optimizer step of an epoch, this process's share of the batch as a list of `(epoch, index)`.

    The batches do not depend on the number of processes: batch b of epoch e is the b-th slice of `batch_size`
    photos of a permutation drawn from (seed, e); process r of w takes every w-th photo of it, from r on. If a
    short last batch leaves a process without a photo, it gets one padding photo, which the loss ignores.

    Those of the following epochs, up to `last_epoch`, come next, so that loader processes can begin them.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        last_epoch: int = 0,
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.last_epoch = rank, world_size, last_epoch
        self.epoch = self.first_step = 0

    def seek(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch of the next iteration, and the number of its steps to skip."""
        self.epoch, self.first_step = epoch, first_step

    def photos_skipped(self) -> int:
        """Return the number of photos in the skipped steps."""
        return min(self.first_step * self.batch_size, self.size)

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def step_sizes(self) -> list[int]:
        """Return the number of photos of each remaining batch of the epoch, over all processes."""
        return [min(self.batch_size, self.size - start) for start in self._starts(self.photos_skipped())]

    def _starts(self, skipped: int) -> range:
        return range(skipped, self.size, self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, skipped = self.epoch, self.photos_skipped()  # `seek` is called while this runs ahead
        for epoch in range(first, max(self.last_epoch, first) + 1):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
            for start in self._starts(skipped if epoch == first else 0):
                share = order[start : start + self.batch_size][self.rank :: self.world_size]
                yield [(epoch, index) for index in share or [PhotoDataset.PADDING]]


class StepLoader(torch.utils.data.DataLoader):
    """Batches of one optimizer step each, those of the epoch and step that its `StepSampler` was sent to.

    Loader processes do not wait for the next epoch to begin: they decode its first photos while the network
    learns the last ones of this epoch, and is evaluated and saved.
    """

    # What is being read, and the (epoch, step) that comes next in it.
    running: Iterator[dict] | None = None
    place: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[dict]:
        sampler = self.batch_sampler
        epoch, first_step = sampler.epoch, sampler.first_step
        if self.place != (epoch, first_step) or epoch > sampler.last_epoch:
            self.running = super().__iter__()
        for step in range(first_step, len(sampler)):
            self.place = None  # in case of an error
            batch = next(self.running)
            self.place = (epoch, step + 1)
            yield batch
        self.place = (epoch + 1, 0)


def train_loader(
    dataset: PhotoDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    last_epoch: int = 0,
) -> StepLoader:
    """Return batches of one optimizer step each: this process's share of `batch_size` photos, shuffled."""
    sampler = StepSampler(len(dataset), batch_size, dataset.seed, rank, world_size, last_epoch)
    return step_loader(dataset, sampler, num_workers, StepLoader)


def step_loader(
    dataset: torch.utils.data.Dataset,
    sampler: torch.utils.data.Sampler,
    num_workers: int,
    kind: type[torch.utils.data.DataLoader] = torch.utils.data.DataLoader,
) -> torch.utils.data.DataLoader:
    """Return the loader of a sampler that yields the keys of one optimizer step at a time."""
    return _loader(dataset, num_workers, kind, batch_sampler=sampler, persistent_workers=num_workers > 0)


def eval_loader(
    dataset: PhotoDataset, batch_size: int, *, num_workers: int = 0
) -> torch.utils.data.DataLoader:
    """Return batches in the order of the data set, for `accelerator.prepare`."""
    workers = min(num_workers, math.ceil(len(dataset) / batch_size))
    return _loader(dataset, workers, batch_size=batch_size)


class KeptLoader:
    """The batches of a prepared `eval_loader`, kept in main memory: in evaluation they are always the same.

    From the second pass on no photo is read, if the pixels of all have at most `MOST_KEPT` bytes.
    """

    def __init__(self, loader: torch.utils.data.DataLoader):
        self.loader, self.dataset = loader, loader.dataset
        self.kept: list[dict] = []
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        if self.kept:
            for batch in self.kept:
                yield {name: part.to(self.device, non_blocking=True) for name, part in batch.items()}
            return
        kept = []
        for number, batch in enumerate(self.loader):
            pixels = batch["pixel_values"]
            if number == 0:  # a full one
                self.device, fits = pixels.device, len(self) * pixels.nbytes <= MOST_KEPT
            if fits:  # copied, as a loader process's memory holds a file open
                kept.append({name: _kept(part) for name, part in batch.items()})
            yield batch
        self.kept = kept


def _kept(part: torch.Tensor) -> torch.Tensor:
    """Return a copy in main memory, from where a GPU can fetch it while it works."""
    copied = part.to("cpu", copy=True)
    return copied.pin_memory() if part.is_cuda else copied


def _ignore_signals(_worker: int) -> None:
    """Leave stop signals to the main process, which needs its workers to finish the step."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


# The loader processes that this process has started, while they exist.
_workers: weakref.WeakSet[multiprocessing.Process] = weakref.WeakSet()


def _worker_context() -> multiprocessing.context.BaseContext:
    """Return the default multiprocessing context (fork, spawn), which adds each process to `_workers`."""
    usual = multiprocessing.get_context()
    context = copy.copy(usual)

    def start_known(*args: object, **kwargs: object) -> multiprocessing.Process:
        process = usual.Process(*args, **kwargs)
        _workers.add(process)
        return process

    context.Process = start_known
    return context


@atexit.register
def _end_workers() -> None:
    """Kill loader processes left by an error: they ignore the signal that Python would send.

    Other child processes are not touched: a program that imports this module may have its own.
    """
    left = [worker for worker in multiprocessing.active_children() if worker in _workers]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their exit as an error
    for worker in left:
        worker.kill()


def _loader(
    dataset: torch.utils.data.Dataset,
    num_workers: int,
    kind: type[torch.utils.data.DataLoader] = torch.utils.data.DataLoader,
    **batching: object,
) -> torch.utils.data.DataLoader:
    return kind(
        dataset,
        worker_init_fn=_ignore_signals,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=torch.cuda.is_available() and not cpu_requested(),
        # Its own generator: seeding the workers must not advance the global one.
        generator=torch.Generator(),
        **batching,
    )
