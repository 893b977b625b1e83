"""Writing to disk: whole or not at all, and with a clear message where it cannot be."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors

from hotdog_hf.errors import UserError


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, and move it to `folder` in the end, in the place of an earlier one."""
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that has gone into a `UserError` that names the folder."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from error
