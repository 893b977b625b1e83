"""Pack a data folder into Parquet shards for scripts/train.py --streaming.

python scripts/shard.py my/photos my/shards
python scripts/train.py --data-dir my/shards --streaming
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.data.folder import check_data_dir
from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class ShardConfig:
    """Pack the files of photos, shuffled, into Parquet shards; the source is left unchanged."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*.
    source: Annotated[str, Positional, tyro.conf.arg(metavar="SOURCE")]
    # Folder to create.
    target: Annotated[str, Positional, tyro.conf.arg(metavar="TARGET")]
    # At most so many photos per shard. Reading is fastest if the processes divide the number of shards.
    photos_a_shard: int = 2000
    # Photos that cannot be read: stop and name them, or skip them.
    bad_images: Literal["fail", "skip"] = "fail"
    # Seed of the order.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.photos_a_shard < 1:
            raise ValueError(f"--photos-a-shard must be at least 1, got {self.photos_a_shard}")


def main(config: ShardConfig) -> None:
    """Check the photos, pack them, and print what was written."""
    # Imported below so that --help, a mistyped flag and a missing folder respond at once.
    check_data_dir(config.source)

    from pathlib import Path

    from hotdog_hf import files
    from hotdog_hf.config import DataConfig
    from hotdog_hf.data import stream
    from hotdog_hf.data.prepare import open_photos
    from hotdog_hf.training import launch

    data_config = DataConfig(data_dir=config.source, bad_images=config.bad_images)
    splits = open_photos(data_config, 0, launch.build_accelerator()).splits
    with files.writing_to(Path(config.target)):
        made = stream.write_shards(splits, Path(config.target), config.photos_a_shard, config.seed)
    print(f"{config.target}: {', '.join(f'{count} shards of {split}' for split, count in made.items())}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ShardConfig))
