"""Atomic writes to disk, with a clear message if they fail."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors

from hotdog_hf.errors import UserError

# An unfinished file older than this was left by a killed process.
SECONDS_TO_WRITE = 3600
# Added to the name of a folder while another takes its place: people give their own copies other names.
REPLACED = ".replaced"


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: to a name beside it, then renamed."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Yield a new name beside `file` to write to, and rename it to `file` at the end; creates its folder.

    Several processes may do so at once: the last one wins. Files left by killed processes are deleted after
    an hour.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"*.{'[0-9a-f]' * 16}.part"):
        if time.time() - left.stat().st_mtime > SECONDS_TO_WRITE:
            left.unlink(missing_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and writes its names by itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, and rename it to `folder` at the end, replacing an earlier one.

    A kill at any moment leaves the earlier folder or the new one complete: at its place or, between the two
    renames, as `<folder>.replaced`. The next call deletes what is left beside it. Everyone who may read the
    folder may read the files, even if their writer restricts them to the user (as safetensors does).
    """
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}{REPLACED}")
    _restore(folder, old)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():
            file.chmod(part.stat().st_mode & 0o666)
            flush(file)
        flush(part)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        _restore(folder, old)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _restore(folder: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing folder into a `UserError` that names the folder."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
