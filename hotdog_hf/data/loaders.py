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
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
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
        """Return the number of photos of each remaining batch, over all processes."""
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
    """Return batches in the order of the data set, for `accelerator.prepare`."""
    return _loader(dataset, num_workers, batch_size=batch_size)


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
    dataset: torch.utils.data.Dataset, num_workers: int, **batching: object
) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        worker_init_fn=_ignore_signals,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=torch.cuda.is_available() and not cpu_requested(),
        # Its own generator: seeding the workers must not advance the global one.
        generator=torch.Generator(),
        **batching,
    )
