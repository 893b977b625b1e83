"""Photos ready to be used: fetched or drawn where they are the project's own, checked, loaded."""

from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object

from hotdog_hf import check, data
from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, DataConfig
from hotdog_hf.download import download_photos
from hotdog_hf.errors import UserError
from hotdog_hf.sample import draw_sample


def open_photos(
    config: DataConfig, seed: int, accelerator: Accelerator
) -> tuple[datasets.DatasetDict, list[Path]]:
    """Return the photos by split, and the unreadable files that were left out, once a process has checked.

    Prints what the check found and a table of the counts. Raises `UserError` for what would be no data set,
    and where machines have different photos.
    """
    skipped: list[Path] = []
    with accelerator.local_main_process_first():
        if config.data_dir == DEFAULT_DATA_DIR:
            download_photos(config.data_dir)
        elif config.data_dir == SAMPLE_DATA_DIR:
            draw_sample(config.data_dir)
        if not config.data_dir.startswith(data.HUB_DATA_PREFIX):
            # The other processes find the answers in its cache.
            skipped, summary = check.files_to_skip(
                config.data_dir, config.bad_images, progress=accelerator.is_main_process
            )
            accelerator.print(summary)
    photos = data.load_photos(config.data_dir, config.val_fraction, seed, skip=frozenset(skipped))
    accelerator.print(data.describe(data.counts(photos)))
    digests = gather_object([data.digest(photos, config.data_dir)]) if accelerator.num_processes > 1 else []
    if len(set(digests)) > 1:
        differs = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise UserError(
            f"process {differs} finds other photos in {config.data_dir} than process 0: copy them anew"
        )
    return photos, skipped
