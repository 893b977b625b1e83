"""Pack a data folder into Parquet shards, which scripts/train.py --streaming reads as it needs them.

python scripts/shard.py my/photos my/shards
python scripts/train.py --data-dir my/shards --streaming
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class ShardConfig:
    """Pack photos, shuffled and as their files are, into shards; the source stays as it is."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*.
    source: Annotated[str, Positional, tyro.conf.arg(metavar="SOURCE")]
    # Folder to make.
    target: Annotated[str, Positional, tyro.conf.arg(metavar="TARGET")]
    # Photos in a shard at most. A number of shards that the processes divide is read fastest.
    photos_a_shard: int = 2000
    # Photos that cannot be read: end with their names, or go on without them.
    bad_images: Literal["fail", "skip"] = "fail"
    # Another seed, another order.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.photos_a_shard < 1:
            raise ValueError(f"--photos-a-shard must be at least 1, got {self.photos_a_shard}")


def main(config: ShardConfig) -> None:
    """Check the photos, pack them, and say what came out."""
    # Imported here so that --help and a mistyped flag answer at once.
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
