"""Photos ready to use: downloaded or drawn if they are the project's own, checked, loaded."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, DataConfig
from hotdog_hf.data import check, labels, stream
from hotdog_hf.data.download import download_photos
from hotdog_hf.data.sample import draw_sample
from hotdog_hf.data.splits import (
    HUB_DATA_PREFIX,
    Photos,
    cut_validation,
    describe,
    load_splits,
    photos_to_hold_back,
)
from hotdog_hf.errors import UserError


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
    accelerator.print(describe(photos.counts()))
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
