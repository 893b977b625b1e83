"""Photos ready to be used: fetched or drawn where they are the project's own, checked, loaded."""

from accelerate import Accelerator
from accelerate.utils import gather_object

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, DataConfig
from hotdog_hf.data import check, stream
from hotdog_hf.data.download import download_photos
from hotdog_hf.data.sample import draw_sample
from hotdog_hf.data.splits import HUB_DATA_PREFIX, Photos, describe, load_photos
from hotdog_hf.errors import UserError


def open_photos(config: DataConfig, seed: int, accelerator: Accelerator) -> Photos:
    """Return the photos, checked by one process of each machine, without the unreadable files.

    Prints what the check found and a table of the counts. Raises `UserError` for what would be no data set,
    and where machines have different photos.
    """
    photos = fault = None
    # The machine's other processes find its answers in the cache.
    with accelerator.local_main_process_first():
        try:
            photos, summary = _read(config, seed, progress=accelerator.is_main_process)
        except UserError as error:
            fault = str(error)
    if accelerator.num_processes > 1:
        # All processes end on a fault of one, so that none waits for it.
        found = gather_object([(fault, photos.digest() if photos else None)])
        fault = next((fault for fault, _ in found if fault), None)
        other = next((rank for rank, (_, other) in enumerate(found) if other != found[0][1]), None)
        if other and not fault:
            fault = f"process {other} finds other photos in {config.data_dir} than process 0: copy them anew"
    if fault:
        raise UserError(fault)
    accelerator.print(summary)
    accelerator.print(describe(photos.counts()))
    return photos


def _read(config: DataConfig, seed: int, progress: bool) -> tuple[Photos, str]:
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
        return Photos(splits, config.data_dir), summary
    skipped, summary = [], "photos of the Hub are not checked"
    if config.data_dir == DEFAULT_DATA_DIR:
        download_photos(config.data_dir)
    elif config.data_dir == SAMPLE_DATA_DIR:
        draw_sample(config.data_dir)
    if not config.data_dir.startswith(HUB_DATA_PREFIX):
        skipped, summary = check.files_to_skip(config.data_dir, config.bad_images, progress=progress)
    splits = load_photos(config.data_dir, config.val_fraction, seed, skip=frozenset(skipped))
    return Photos(splits, config.data_dir, skipped), summary
