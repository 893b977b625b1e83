"""Download the hot-dog photos of Dive into Deep Learning, section 14.2.

python scripts/download.py
python scripts/download.py --data-dir somewhere/hotdog
"""

from dataclasses import dataclass

import tyro

from hotdog_hf.config import DEFAULT_DATA_DIR
from hotdog_hf.data.download import HOTDOG_SHA1, HOTDOG_URL, download_photos
from hotdog_hf.errors import exit_on_user_error


@dataclass(frozen=True)
class DownloadConfig:
    """Download the chapter's hot-dog photos, check them, and unpack them."""

    # Folder to create. The zip is kept beside it; one already there is used instead of the network.
    data_dir: str = DEFAULT_DATA_DIR
    # URL of the zip.
    url: str = HOTDOG_URL
    # Expected SHA-1 of the zip.
    sha1: str = HOTDOG_SHA1


def main(config: DownloadConfig) -> None:
    """Fetch, check, unpack."""
    folder = download_photos(config.data_dir, config.url, config.sha1)
    print(f"photos are in {folder}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(DownloadConfig))
