"""Make a data folder with train/ and test/ of a folder with one folder a class.

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
    """Divide photos into train, test and, where wanted, validation; the source stays as it is."""

    # Folder with <class>/*, two classes or more.
    source: Annotated[str, Positional, tyro.conf.arg(metavar="SOURCE")]
    # Folder to make.
    target: Annotated[str, Positional, tyro.conf.arg(metavar="TARGET")]
    # Share of each class to test by.
    test_fraction: float = 0.2
    # Share of each class to judge epochs by (0: no validation split).
    val_fraction: float = 0.0
    # Another seed, another division.
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.test_fraction < 1 and 0 <= self.val_fraction < 1 - self.test_fraction):
            raise ValueError("--test-fraction is above 0, --val-fraction 0 or more, both together below 1")


def main(config: SplitConfig) -> None:
    """Divide, and say what came out."""
    from hotdog_hf.data.folder import split_folder

    shares = {"test": config.test_fraction}
    if config.val_fraction:
        shares["validation"] = config.val_fraction
    made, left_out = split_folder(config.source, config.target, shares, config.seed)
    for split, classes in made.items():
        counts = ", ".join(f"{len(files)} {name}" for name, files in classes.items())
        print(f"{config.target}/{split}: {counts}")
    if left_out:
        print(
            f"left out: {len(left_out)} files not named as images or outside <class>/*, first {left_out[0]}"
        )
    print(f"look for copies that differ in their bytes: python scripts/check_data.py {config.target}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(SplitConfig))
