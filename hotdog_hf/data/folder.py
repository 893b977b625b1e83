"""The photos of a data folder by split and class, and problems with its structure. Imports no torch.

A data folder is `train/<class>/*` and `test/<class>/*`, optionally `validation/` (`val`, `valid`).
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR
from hotdog_hf.data.images import HEIF_SUFFIXES, IMAGE_SUFFIXES
from hotdog_hf.errors import UserError, printable

SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
# In the folder of a drawn sample: how it was drawn.
SAMPLE_MARKER = "sample.json"
# What operating systems and their zips leave between photos, besides names that start with a dot.
SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "Icon\r"})
# Classes that the table of counts names before it only says how many more there are.
SHOWN_CLASSES = 50

Photos = dict[str, dict[str, list[Path]]]


def find_photos(data_dir: str | os.PathLike) -> Photos:
    """List the image files of every split and class, sorted by path; `UserError` for a malformed folder."""
    files = list_photos(data_dir)
    if faults := class_faults(data_dir, files):
        raise UserError(faults[0])
    return files


def check_is_folder(data_dir: str | os.PathLike) -> None:
    """Raise `UserError` for a data folder that does not exist."""
    if not Path(data_dir).is_dir():
        raise UserError(
            f"no such data folder: {data_dir}; give one with train/<class>/ and test/<class>/, which"
            " `python scripts/split.py` makes from <class>/ folders, or try `make demo`, which needs none"
        )


def check_data_dir(data_dir: str) -> None:
    """Raise `UserError` at once for a data folder that training would miss seconds later.

    The project's own folders are made when they are missing, and addresses such as hf:// are no folders.
    """
    if data_dir not in (DEFAULT_DATA_DIR, SAMPLE_DATA_DIR) and "://" not in data_dir:
        check_is_folder(data_dir)


def list_photos(data_dir: str | os.PathLike, incomplete: bool = False) -> Photos:
    """List the image files of each split's classes, checked or not.

    Raises `UserError` without train/ and test/, unless the folder may be `incomplete`.
    """
    check_is_folder(data_dir)
    root, files = Path(data_dir), {}
    for split, names in SPLIT_FOLDERS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise UserError(
                f"{root} has several {split} folders: {', '.join(p.name for p in present)}; keep one"
            )
        if present:
            files[split] = list_classes(present[0])
        elif split != "validation" and not incomplete:
            found = ", ".join(sorted(p.name for p in root.iterdir())[:10]) or "nothing"
            raise UserError(
                f"no {split}/ in {root} (found: {found}); a data folder has train/<class>/ and test/<class>/,"
                " which `python scripts/split.py` creates from <class>/ folders"
            )
    return files


def describe_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return a table of photo counts by split and class: one line per class, and one for all of them."""
    names = list(dict.fromkeys(name for by_class in counts.values() for name in by_class))
    rows = [(printable(name), *(own.get(name, 0) for own in counts.values())) for name in names]
    if more := rows[SHOWN_CLASSES:]:
        sums = [sum(column) for column in list(zip(*more, strict=True))[1:]]
        rows[SHOWN_CLASSES:] = [(f"{len(more)} more classes", *sums)]
    rows = [("class", *counts), *rows, ("all", *(sum(own.values()) for own in counts.values()))]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}" + "".join(f" {each:>10}" for each in row) for name, *row in rows)


def is_hidden(name: str) -> bool:
    """Return whether a name is a hidden or system one: `._photo.jpg` in a Mac's zip, `Thumbs.db`."""
    return name.startswith(".") or name in SYSTEM_NAMES


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """List the image files of every class folder in `folder`."""
    return {
        path.name: _image_files(path)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not is_hidden(path.name)
    }


def _image_files(folder: Path) -> list[Path]:
    """List all files below `folder` named as images, without hidden files and folders.

    Broken links are included: a missing photo must be reported, not silently left out.
    """
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        path
        for path in paths
        if not path.is_dir() and not any(map(is_hidden, path.relative_to(folder).parts))
    )


def heic_hint(folder: str | os.PathLike) -> str:
    """Return what to install if a folder has HEIC files (phones write them) that cannot be read; else ""."""
    unread = HEIF_SUFFIXES - IMAGE_SUFFIXES
    found = any(path.suffix.lower() in unread for path in Path(folder).rglob("*"))
    return '; HEIC files need pip install -e ".[heic]"' if found else ""


def class_faults(data_dir: str | os.PathLike, files: Photos) -> list[str]:
    """Return what is wrong with the classes: too few, not the same in each split, or without photos."""
    root = Path(data_dir)
    faults = []
    expected = sorted(files["train"])
    if len(expected) < 2:
        found = f"only {expected[0]!r}" if expected else "none"
        faults.append(f"{root}/train needs at least two class folders, found {found}")
    for split, classes in files.items():
        for name in sorted(set(expected) ^ set(classes)):
            here, there = (split, "train") if name in classes else ("train", split)
            faults.append(
                f"class {name!r} is in {root}/{here} but not in {there}/; class folders must agree"
                + _hint(name, set(files[there]) - set(files[here]))
            )
        for name, paths in classes.items():
            if not paths:
                faults.append(
                    f"no image in {root}/{split}/{name}; every class needs photos in every split"
                    + heic_hint(root / split / name)
                )
    return faults


def _hint(name: str, candidates: set[str]) -> str:
    """Suggest the class that `name` may stand for: the same in another spelling, or a similar one."""
    for other in sorted(candidates):
        if plain_name(other) == plain_name(name):
            # ascii() shows differences that look the same on screen, such as the two encodings of "ü".
            return f" ({name!a} and {other!a} differ only in case, spacing or Unicode form)"
    close = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.75)
    return f" (is {close[0]!r} there the same class?)" if close else ""


def plain_name(name: str) -> str:
    """Return a class name without differences in case, spacing and Unicode form."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()) or name


def unused_files(data_dir: str | os.PathLike, used: set[Path]) -> Iterator[tuple[str, Path]]:
    """Yield what else is in a data folder, as (kind of finding, path); a hidden folder once."""
    used_folders = {folder for path in used for folder in path.parents}
    for parent, folders, names in os.walk(data_dir):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        hidden = [name for name in folders if is_hidden(name)]
        folders[:] = [name for name in folders if name not in hidden]
        for path in (Path(parent, name) for name in {*links, *hidden, *names}):
            if path in used or path in used_folders or path == Path(data_dir, SAMPLE_MARKER):
                continue
            if is_hidden(path.name):
                yield "hidden", path
            elif path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
                yield "unused", path
            elif path.suffix.lower() in HEIF_SUFFIXES:
                yield "heic", path
            else:
                yield "other", path
