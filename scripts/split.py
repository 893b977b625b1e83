"""Split a folder with one subfolder per class into a data folder with train/ and test/.

python scripts/split.py pictures my/photos                                # a fifth to test
python scripts/split.py pictures my/photos --test-fraction 0.1 --val-fraction 0.1 --seed 1
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class SplitConfig:
    """Split photos into train, test and, if wanted, validation; the source is left unchanged."""

    # Folder with <class>/*, two classes or more.
    source: Annotated[str, Positional, tyro.conf.arg(metavar="SOURCE")]
    # Folder to create.
    target: Annotated[str, Positional, tyro.conf.arg(metavar="TARGET")]
    # Tables of labels (CSV or JSON lines) that override the folders: path,label[,group], paths within SOURCE.
    labels: tuple[str, ...] = ()
    # Share of each class for test.
    test_fraction: float = 0.2
    # Share of each class for validation (0: no validation split).
    val_fraction: float = 0.0
    # Seed of the split.
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.test_fraction < 1 and 0 <= self.val_fraction < 1 - self.test_fraction):
            raise ValueError("--test-fraction must be above 0, --val-fraction 0 or more, their sum below 1")


def main(config: SplitConfig) -> None:
    """Split, and print the counts."""
    from hotdog_hf.data.divide import split_folder
    from hotdog_hf.data.folder import describe_counts, heic_hint

    shares = {"test": config.test_fraction}
    if config.val_fraction:
        shares["validation"] = config.val_fraction
    made, left_out = split_folder(config.source, config.target, shares, config.seed, config.labels)
    counts = {split: {name: len(files) for name, files in own.items()} for split, own in made.items()}
    print(describe_counts(counts))
    if left_out:
        print(
            f"left out: {len(left_out)} files not named as images or outside <class>/*, first {left_out[0]}"
            + heic_hint(config.source)
        )
    print(f"to look for broken and misplaced files: python scripts/check_data.py {config.target}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(SplitConfig))
