"""The chapter's hot-dog photos: fetched, checked, unpacked."""

import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import pooch

from hotdog_hf.errors import UserError

HOTDOG_URL = "https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
HOTDOG_SHA1 = "fba480ffa8aa7e0febbb511d181409f899b9baa5"
CONNECT_SECONDS = 10
# The chapter's zip unpacks to 0.3 GB; far more is not that file.
MAX_UNPACKED_BYTES = 4 * 2**30


def download_photos(data_dir: str | os.PathLike, url: str = HOTDOG_URL, sha1: str = HOTDOG_SHA1) -> Path:
    """Fetch a zip of photos, check its SHA-1, and unpack its one top folder as `data_dir`; return that.

    The zip is kept beside the folder, and one that lies there already is used. Nothing half-fetched or
    half-unpacked is ever found under `data_dir`. Raises `UserError` without a network or with another file.
    """
    data_dir = Path(data_dir)
    if data_dir.exists():
        return data_dir
    name = PurePosixPath(url).name
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=CONNECT_SECONDS)
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        archive = pooch.retrieve(url, f"sha1:{sha1}", fname=name, path=data_dir.parent, downloader=fetch)
        _unpack(Path(archive), data_dir)
    except (
        OSError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:  # requests' errors are OSErrors; a wrong hash, ValueError
        raise UserError(
            f"could not get {url}: {error}. Put {name} into {data_dir.parent}/ by hand, give your own photos"
            " with --data-dir, or run `make demo`, which works offline"
        ) from error
    return data_dir


def _unpack(archive: Path, data_dir: Path) -> None:
    """Unpack into a temporary folder beside `data_dir` and move the archive's top folder into place."""
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=".unpacking-") as scratch:
        with zipfile.ZipFile(archive) as file:
            _check_members(file)
            file.extractall(scratch)
        tops = [path for path in Path(scratch).iterdir() if path.name != "__MACOSX"]
        if len(tops) != 1 or not tops[0].is_dir():
            raise ValueError(f"{archive} holds {len(tops)} entries at its top, not one folder")
        try:
            tops[0].rename(data_dir)
        except OSError:
            # Another process was faster; its folder came out of the same checked file.
            if not data_dir.is_dir():
                raise
            shutil.rmtree(tops[0])


def _check_members(file: zipfile.ZipFile) -> None:
    """Refuse paths that leave the folder, links, and archives that unpack to absurd sizes."""
    if sum(member.file_size for member in file.infolist()) > MAX_UNPACKED_BYTES:
        raise ValueError(f"{file.filename} unpacks to more than {MAX_UNPACKED_BYTES // 2**30} GB")
    for member in file.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{file.filename} holds an unsafe entry: {member.filename!r}")
