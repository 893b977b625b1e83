"""Check a folder of photos before training: broken files, leaks between splits, misplaced files.

python scripts/check_data.py data/hotdog
python scripts/check_data.py my/photos --report my/data_report.json
python scripts/check_data.py my/photos --no-cache                   # read every file again
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class CheckConfig:
    """Check a folder of photos. Exit code 1: an error that would make the results wrong."""

    # Folder with train/<class>/* and test/<class>/*, optionally validation/<class>/*.
    data_dir: Annotated[str, Positional, tyro.conf.arg(metavar="DIR")]
    # Tables of labels (CSV or JSON lines) that override the folders: path,label[,split][,group].
    labels: tuple[str, ...] = ()
    # JSON file with all findings and what each file is; the default is in the current folder.
    report: str = "data_report.json"
    # Skip files whose size and time have not changed since they last passed.
    cache: bool = True


def main(config: CheckConfig) -> int:
    """Check, print, write; return the exit code."""
    # Imported here so that --help and a mistyped flag respond before Pillow and SciPy are loaded.
    import sys

    from hotdog_hf.data import check

    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot encode
    cache_file = check.default_cache_file() if config.cache else None
    report = check.check_folder(config.data_dir, config.labels, cache_file=cache_file, progress=True)
    print(check.describe(report))
    check.write_report(report, config.report)
    print(f"all findings: {config.report}")
    return 1 if report.count("error") else 0


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main(tyro.cli(CheckConfig)))
