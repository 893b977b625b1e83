"""The recipe "best": what to train is decided on parts of train, and recorded in the run's choice.json."""

import json
import time
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from hotdog_hf.config import TrainConfig, check_new_run, command_of, differences, to_dict
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import Photos
from hotdog_hf.errors import UserError
from hotdog_hf.training import checkpoint, launch
from hotdog_hf.training.search import Search, check_flags, settle

# What the choice decides, so that no flag may.
CHOSEN = (
    "preprocessing augmentation min_crop_area flip train_image_size head_init probe_views freeze_body"
    " frozen_share cache_features batch_norm epochs optimizer momentum learning_rate schedule keep"
).split()


class Decision(NamedTuple):
    """The config to train, the photos if they are read already, the record of the choice, and its seconds."""

    config: TrainConfig
    photos: Photos | None = None
    record: dict | None = None
    seconds: float = 0.0


def decide(
    config: TrainConfig, accelerator: Accelerator, stop: launch.StopSignal, started: float
) -> Decision | None:
    """Return what to train: for recipe "best" the best candidate on parts of train, else `config` itself.

    A resumed run takes the choice in its folder's choice.json. Without --minutes the choice depends only on
    the photos and the seed. Returns None if it was stopped meanwhile.
    """
    if config.recipe != "best":
        return Decision(config)
    if set_too := sorted(differences(config).keys() & set(CHOSEN)):
        flag = set_too[0].replace("_", "-")
        raise UserError(
            f"--{flag}: --recipe best chooses it; set it with another recipe, such as light or full"
        )
    check_flags(config)
    if accelerator.is_fsdp2:
        raise UserError("--recipe best does not work with FSDP: use --recipe light or full")
    record = launch.run_on_main(accelerator, lambda: _recorded(config))
    if record is not None:
        accelerator.print(f"the choice of {record['time']}: {record['chosen']}")
        return Decision(settle(config, record["recipe"], record["knobs"]), None, record)
    accelerator.print("--recipe best: trying recipes on parts of train")
    photos = open_photos(config.data, config.run.seed, accelerator)
    search = Search(config, accelerator, photos, stop, started)
    try:
        chosen, why, calibration = search.run()
    except launch.StoppedError:
        accelerator.print("stopped before anything was chosen; the same command starts again")
        return None
    settled = settle(config, chosen.recipe, chosen.knobs)
    accelerator.print(f"chosen: {chosen.name}, as {why}")
    record = {
        "chosen": chosen.name,
        "why": why,
        "recipe": chosen.recipe,
        "knobs": chosen.knobs,
        "command": command_of(settled),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.perf_counter() - started, 1),
        "minutes": config.run.minutes,
        "mirrored": search.mirrored,
        "calibration": calibration,
        "tried": search.board.rows(),
        "config": to_dict(settled),
    }
    record = launch.run_on_main(accelerator, lambda: record)
    return Decision(settled, search.photos, record, time.perf_counter() - started)


def _recorded(config: TrainConfig) -> dict | None:
    """Return the choice of the run to be resumed; None for a new run."""
    folder = config.run.output_dir
    if config.run.resume is None:
        if folder:
            check_new_run(folder)
        return None
    if found := checkpoint.find(config.run.resume, folder):
        folder = checkpoint.run_dir_of(found)
    file = Path(folder) / "choice.json"
    if not found and not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot resume {folder}: it was not trained by --recipe best, or {file} is damaged: {error}"
        ) from error
