"""Photos ready to use: downloaded or drawn if they are the project's own, checked, loaded, cached."""

import contextlib
import dataclasses
import io
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, DataConfig
from hotdog_hf.data import check, labels, stream
from hotdog_hf.data.decoded import HEAD, DecodedCache
from hotdog_hf.data.download import download_photos
from hotdog_hf.data.folder import describe_counts
from hotdog_hf.data.images import REDUCIBLE, Photo, source_of
from hotdog_hf.data.sample import draw_sample
from hotdog_hf.data.splits import (
    HUB_DATA_PREFIX,
    Photos,
    cut_validation,
    load_splits,
    photos_to_hold_back,
)
from hotdog_hf.data.transforms import Transform
from hotdog_hf.errors import UserError
from hotdog_hf.files import writing_to
from hotdog_hf.machine import cache_dir

# By default photos are kept if half of them have at least so many pixels: decoding 2 million takes longer
# than everything else that a photo needs before the network.
LARGE_PHOTO = 2_000_000
# Photos whose headers tell how large the others are.
SAMPLE_SIZE = 64


@dataclass(frozen=True)
class Found:
    """What one process of a machine has found in the photos, for the other processes."""

    summary: str
    skipped: Sequence[Path] = ()
    # The rows of train for validation; None if scikit-learn chooses them, or if there are none.
    held_back: np.ndarray | None = None


def open_photos(config: DataConfig, seed: int, accelerator: Accelerator) -> Photos:
    """Return the photos, checked by one process per machine, without the unreadable files.

    Prints a summary of the check and a table of the counts. Raises `UserError` for an invalid data set, or if
    machines have different photos.
    """
    photos = found = fault = None
    if accelerator.is_local_main_process:
        photos, found, fault = _try_read(config, seed, accelerator.is_main_process, None)
    if accelerator.num_processes > 1:
        # The machine's other processes wait for these results, and use them.
        answers = gather_object([(found, fault)])
        if not accelerator.is_local_main_process:
            found, failed = answers[accelerator.process_index - accelerator.local_process_index]
            if not failed:
                photos, found, fault = _try_read(config, seed, False, found)
        # All processes exit on an error of one, so that none waits for it.
        digests = gather_object([(fault, photos.digest() if photos else None)])
        fault = next((fault for fault, _ in digests if fault), None)
        other = next((rank for rank, (_, other) in enumerate(digests) if other != digests[0][1]), None)
        if other and not fault:
            fault = f"process {other} finds other photos in {config.data_dir} than process 0: copy them again"
    if fault:
        raise UserError(fault)
    accelerator.print(found.summary)
    accelerator.print(describe_counts(photos.counts()))
    return photos


def _try_read(
    config: DataConfig, seed: int, progress: bool, found: Found | None
) -> tuple[Photos | None, Found | None, str | None]:
    """Return the photos and what was found in them, or the error message."""
    try:
        return *_read(config, seed, progress, found), None
    except UserError as error:
        return None, None, str(error)


def _read(config: DataConfig, seed: int, progress: bool, found: Found | None) -> tuple[Photos, Found]:
    if config.streaming:
        splits = stream.open_stream(config.data_dir, progress)
        train = splits["train"]
        summary = f"train is streamed in {train.num_shards} shards; photos are not checked"
        if train.sorted_by_class and len(train) > config.shuffle_buffer:
            summary += (
                "\nwarning: the shards are sorted by class, and only"
                f" {config.shuffle_buffer} photos are mixed at a time: write them in a shuffled order"
                " (scripts/shard.py), or raise --shuffle-buffer"
            )
        return Photos(splits, config.data_dir), Found(summary)
    is_first = found is None
    if is_first:
        found = _check(config, progress)
    splits = load_splits(config.data_dir, frozenset(found.skipped), config.labels)
    cut = config.val_fraction and "validation" not in splits
    if cut and is_first:
        held_back = photos_to_hold_back(splits, config.val_fraction, seed, progress)
        found = dataclasses.replace(found, held_back=held_back)
    if cut:
        splits = cut_validation(splits, config.val_fraction, seed, found.held_back)
    digest = labels.digest(config.labels, config.data_dir)
    return Photos(splits, config.data_dir, found.skipped, found.held_back is not None, digest), found


def _check(config: DataConfig, progress: bool) -> Found:
    if config.data_dir == DEFAULT_DATA_DIR:
        download_photos(config.data_dir)
    elif config.data_dir == SAMPLE_DATA_DIR:
        draw_sample(config.data_dir)
    if config.data_dir.startswith(HUB_DATA_PREFIX):
        return Found("photos of the Hub are not checked")
    skipped, summary = check.files_to_skip(
        config.data_dir, config.bad_images, config.labels, progress=progress
    )
    if config.labels:
        summary += "\n" + labels.describe(config.labels, config.data_dir)
    return Found(summary, skipped)


def choose_cache(
    config: DataConfig, photos: Photos, uses: Mapping[str, Sequence[Transform]], reads: int
) -> tuple[DecodedCache | None, str]:
    """Return the cache for a run's photos, or None if there is none, and a line to print about it.

    `uses` are the transforms that each split is read with, `reads` is how often a photo is read. Raises
    `UserError` if the folder of --cache-images cannot be written.
    """
    auto, limit = config.cache_images == "auto", round(config.cache_size * 1e9)
    if config.cache_images == "off" or config.streaming or (auto and reads < 2):
        return None, ""
    cache = DecodedCache(cache_dir() / "decoded" if auto else Path(config.cache_images), limit)
    pixels, sizes, missing = _sample(cache, photos, uses)
    if auto and (not pixels or statistics.median(pixels) < LARGE_PHOTO):
        return None, ""
    count = sum(len(photos.splits[split]) for split in uses)
    total, missing = (round(sum(each) / max(len(each), 1) * count) for each in (sizes, missing))
    needs = f"{count} decoded photos need about {total / 1e9:.1f} GB"
    try:
        with writing_to(cache.folder):
            cache.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(cache.folder).free
    except UserError:
        if auto:  # a user without a home
            return None, ""
        raise
    if auto and total > limit:
        return None, f"not cached: {needs}, more than --cache-size {config.cache_size:g}"
    if auto and missing > free / 2:
        return None, f"not cached: {needs}, and {cache.folder} has {free / 1e9:.1f} GB free"
    cache.make_room(max(min(missing, limit - (total - missing)), 0))
    size = f"about {total / 1e9:.1f} GB of {config.cache_size:g} GB"
    return cache, f"caching {count} decoded photos in {cache.folder}: {size}"


def _sample(
    cache: DecodedCache, photos: Photos, uses: Mapping[str, Sequence[Transform]]
) -> tuple[list[int], list[int], list[int]]:
    """Return for some photos: their pixels, the bytes of what is decoded of them, and those not there yet."""
    pixels, sizes, missing = [], [], []
    places = [(split, index) for split in uses for index in range(len(photos.splits[split]))]
    for split, index in places[:: max(len(places) // SAMPLE_SIZE, 1)]:
        source = source_of(photos.splits[split][index])
        # A broken file is named when it is used.
        with contextlib.suppress(OSError, UserError, Image.DecompressionBombError):
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                (width, height), reducible = image.size, image.format in REDUCIBLE
            reductions = {each.reduction(Photo(source)) for each in uses[split]} if reducible else {1}
            each = {by: HEAD.size + 3 * math.ceil(width / by) * math.ceil(height / by) for by in reductions}
            pixels.append(width * height)
            sizes.append(sum(each.values()))
            missing.append(sum(size for by, size in each.items() if not cache.holds(source, by)))
    return pixels, sizes, missing
