"""Compare finished runs on the same test photos: curves, paired tests, knobs and photos that differ.

python scripts/compare.py runs/a runs/b                       # writes compare/compare.html
python scripts/compare.py runs/a runs/b runs/c --output-dir my/comparison
"""

from dataclasses import dataclass
from os.path import realpath
from typing import Annotated

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class CompareConfig:
    """Compare finished runs with the first of them, and write compare.html and compare.json."""

    # Folders of runs of scripts/train.py, two or more.
    runs: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="RUN")]
    # Where the comparison goes; an earlier one there is replaced.
    output_dir: str = "compare"

    def __post_init__(self) -> None:
        if not 2 <= len(self.runs) <= 8:
            raise ValueError(f"give from 2 to 8 runs to compare, got {len(self.runs)}")
        if len(set(map(realpath, self.runs))) < len(self.runs):
            raise ValueError(f"give runs that differ, got {' '.join(self.runs)}")


def main(config: CompareConfig) -> None:
    """Read the runs, write the page, print the table."""
    # Imported here so that --help and a mistyped flag answer before matplotlib is loaded.
    import shlex
    import sys

    from hotdog_hf.compare import page, runs

    folder = page.check_output_dir(config.output_dir)
    found = runs.read_runs(config.runs)
    summary = page.summarise(found)
    page.write_comparison(folder, found, summary, shlex.join(["python", *sys.argv]))
    print(page.describe(found, summary))
    print(f"comparison: {folder / page.FILES[1]}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(CompareConfig))
