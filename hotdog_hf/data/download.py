"""Download of the chapter's hot-dog photos: fetch, check, unpack."""

import hashlib
import os
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import filelock
import requests
from tqdm import tqdm

from hotdog_hf.errors import UserError

HOTDOG_URL = "https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
HOTDOG_SHA1 = "fba480ffa8aa7e0febbb511d181409f899b9baa5"
CONNECT_SECONDS = 10
# If the connection breaks, fewer bytes than this are lost.
CHUNK_BYTES = 2**13
# The chapter's zip unpacks to 0.3 GB; far more is not that file.
MAX_UNPACKED_BYTES = 4 * 2**30


def download_photos(data_dir: str | os.PathLike, url: str = HOTDOG_URL, sha1: str = HOTDOG_SHA1) -> Path:
    """Fetch a zip of photos, check its SHA-1, and unpack its one top folder as `data_dir`; return that.

    The zip is kept beside the folder; one that is already there is used. An interrupted download leaves
    `<zip name>.part` there, and the next call resumes it. `data_dir` is never left half-unpacked. Raises
    `UserError` without a network or if the file is a different one.
    """
    data_dir = Path(data_dir)
    if data_dir.exists():
        return data_dir
    archive = data_dir.parent / PurePosixPath(url).name
    part = archive.with_name(f"{archive.name}.part")
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here, and then finds what the first has fetched.
        with filelock.FileLock(data_dir.parent / ".download.lock"):
            if not data_dir.exists():
                _make_archive(archive, part, url, sha1.lower())
                _unpack(archive, data_dir)
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # requests' errors are OSErrors
        kept = ""
        if part.exists():
            kept = f"{part} keeps {part.stat().st_size:,} bytes; the same command resumes from there. "
        raise UserError(
            f"could not get {url}: {error}. {kept}Put {archive.name} into {data_dir.parent}/ by hand, give"
            " your own photos with --data-dir, or run `make demo`, which works offline"
        ) from error
    return data_dir


def _make_archive(archive: Path, part: Path, url: str, sha1: str) -> None:
    """Fetch `archive` by way of `part` unless it is there; a `part` whose SHA-1 is wrong is deleted."""
    if _sha1(archive) == sha1:
        return
    if _sha1(part) != sha1:
        _fetch(url, part)
    if (found := _sha1(part)) != sha1:
        part.unlink()
        raise ValueError(
            f"its SHA-1 hash is {found}, not {sha1}; {part} is deleted, the next try starts over"
        )
    part.replace(archive)


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`, or write it again if the server cannot resume."""
    start = part.stat().st_size if part.exists() else 0
    # A compressed body would not have the file's length and byte positions.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=CONNECT_SECONDS) as response:
        if start and response.status_code == requests.codes.range_not_satisfiable:
            part.unlink()  # it is at least as long as the file, but not the file
            _fetch(url, part)
            return
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True)
        with bar, part.open("ab" if start else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    # urllib3 1 raises nothing if the connection ends early.
    if total and (size := part.stat().st_size) < total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


def _sha1(path: Path) -> str:
    """Return the hex SHA-1 of a file, "" if there is none."""
    if not path.exists():
        return ""
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive: Path, data_dir: Path) -> None:
    """Unpack into a temporary folder beside `data_dir` and move the archive's top folder into place."""
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=".unpacking-") as scratch:
        with zipfile.ZipFile(archive) as file:
            _check_members(file)
            file.extractall(scratch)
        tops = [path for path in Path(scratch).iterdir() if path.name != "__MACOSX"]
        if len(tops) != 1 or not tops[0].is_dir():
            raise ValueError(f"{archive} holds {len(tops)} entries at its top, not one folder")
        tops[0].rename(data_dir)


def _check_members(file: zipfile.ZipFile) -> None:
    """Reject paths that leave the folder, links, and archives that unpack to absurd sizes."""
    if sum(member.file_size for member in file.infolist()) > MAX_UNPACKED_BYTES:
        raise ValueError(f"{file.filename} unpacks to more than {MAX_UNPACKED_BYTES // 2**30} GB")
    for member in file.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{file.filename} holds an unsafe entry: {member.filename!r}")
