"""Decoded photos kept on disk, so that a large one is decoded once and not in every epoch."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import PIL
import PIL.features
import xxhash
from PIL import Image

from hotdog_hf.files import replacing_file

# To be raised when images.py decodes the same file to other pixels, or transforms.py reduces it otherwise.
DECODING_RULE = 2
# What a file begins with: the checksum of all that follows and of its key, then width and height.
HEAD = struct.Struct("<16sII")
# After writing this share of the cache's size, a process counts what the others have written.
RECOUNT_SHARE = 0.01
# So much of the disk is left free.
MIN_FREE_BYTES = 2**30


class DecodedCache:
    """A folder with the pixels that `images.Photo` has decoded, as bytes: the same bits as without it.

    A photo is known by its path, size and time (one in memory by its content), its reduction, and the
    versions of what decodes. Processes may share the folder: a file appears whole or not at all, and a
    damaged one is decoded again. Nothing is written beyond `max_bytes`; `make_room` deletes what was not used
    for the longest time.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._used: int | None = None
        self._written = 0

    def get(
        self, source: str | os.PathLike | bytes, reduction: int, decode: Callable[[], Image.Image]
    ) -> Image.Image:
        """Return the RGB image that `decode` returns, from the cache if it is there."""
        file = self._file(source, reduction)
        image = _read(file)
        if image is None:
            image = decode()
            self._write(file, image)
        return image

    def holds(self, source: str | os.PathLike | bytes, reduction: int) -> bool:
        """Return whether there is a file for a photo, which is not read."""
        return self._file(source, reduction).is_file()

    def make_room(self, needed: int) -> None:
        """Delete the least recently used files until `needed` bytes more fit."""
        kept = sorted(self._files(), key=lambda pair: pair[1].st_mtime)
        used = sum(status.st_size for _, status in kept)
        for file, status in kept:
            if used + needed <= self.max_bytes:
                break
            with contextlib.suppress(OSError):  # another process has deleted it
                file.unlink()
            used -= status.st_size

    def _file(self, source: str | os.PathLike | bytes, reduction: int) -> Path:
        if isinstance(source, bytes):
            photo = [hashlib.sha256(source).hexdigest()]
        else:
            status = Path(source).stat()
            photo = [str(Path(source).absolute()), status.st_size, status.st_mtime_ns]
        key = hashlib.sha256(json.dumps([*photo, reduction, decoder_versions()]).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.rgb"

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for file in self.folder.glob("??/*.rgb"):
            # Only the cache's own: a user's folder may hold other files.
            with contextlib.suppress(OSError):
                if len(file.stem) == 64 and file.stem.startswith(file.parent.name):
                    found.append((file, file.stat()))
        return found

    def _write(self, file: Path, image: Image.Image) -> None:
        pixels = image.tobytes()
        with contextlib.suppress(OSError):  # the cache only saves time
            if not self._has_room(HEAD.size + len(pixels)):
                return
            with replacing_file(file) as part, part.open("wb") as opened:
                opened.write(HEAD.pack(_checksum(file, image.size, pixels), *image.size))
                opened.write(pixels)
            self._written += HEAD.size + len(pixels)

    def _has_room(self, size: int) -> bool:
        if self._used is None or self._written > RECOUNT_SHARE * self.max_bytes:
            self._used = sum(status.st_size for _, status in self._files())
            self._written = 0
        if self._used + self._written + size > self.max_bytes:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free - size > MIN_FREE_BYTES


@functools.cache
def decoder_versions() -> list:
    """Return what decides which pixels a file has: our rule, and the libraries that decode."""
    heif = metadata.version("pi-heif") if importlib.util.find_spec("pi_heif") else None
    return [DECODING_RULE, PIL.__version__, PIL.features.version("libjpeg_turbo"), heif]


def _checksum(file: Path, size: tuple[int, int], pixels: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_128(f"{file.name} {size[0]} {size[1]} ".encode())
    digest.update(pixels)
    return digest.digest()


def _read(file: Path) -> Image.Image | None:
    """Return the image in a file of the cache; None if there is none, or another than was written."""
    try:
        content = file.read_bytes()
        os.utime(file)  # the least recently used are deleted first
    except OSError:
        return None
    if len(content) < HEAD.size:
        return None
    checksum, *size = HEAD.unpack_from(content)
    pixels = memoryview(content)[HEAD.size :]
    if checksum != _checksum(file, size, pixels):
        return None
    return Image.frombytes("RGB", tuple(size), pixels)
