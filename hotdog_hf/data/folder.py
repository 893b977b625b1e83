"""The photos of a data folder by split and class, and problems with its structure. Imports no torch.

A data folder is `train/<class>/*` and `test/<class>/*`, optionally `validation/` (`val`, `valid`).
"""

import difflib
import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from hotdog_hf.data.images import IMAGE_SUFFIXES
from hotdog_hf.errors import UserError
from hotdog_hf.files import replacing_folder, writing_to

SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
# In the folder of a drawn sample: how it was drawn.
SAMPLE_MARKER = "sample.json"
# What operating systems and their zips leave between photos, besides names that start with a dot.
SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "Icon\r"})

Photos = dict[str, dict[str, list[Path]]]


def find_photos(data_dir: str | os.PathLike) -> Photos:
    """List the image files of every split and class, sorted by path; `UserError` for a malformed folder."""
    files = list_photos(data_dir)
    if faults := class_faults(data_dir, files):
        raise UserError(faults[0])
    return files


def list_photos(data_dir: str | os.PathLike) -> Photos:
    """List the image files of each split's classes, checked or not; `UserError` without train/ and test/."""
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"no such data folder: {root} (see --data-dir; `make demo` works without one)")
    files = {}
    for split, names in SPLIT_FOLDERS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise UserError(
                f"{root} has several {split} folders: {', '.join(p.name for p in present)}; keep one"
            )
        if present:
            files[split] = _classes(present[0])
        elif split != "validation":
            found = ", ".join(sorted(p.name for p in root.iterdir())[:10]) or "nothing"
            raise UserError(
                f"no {split}/ in {root} (found: {found}); a data folder has train/<class>/ and test/<class>/,"
                " which `python scripts/split.py` creates from <class>/ folders"
            )
    return files


def split_folder(
    source: str | os.PathLike, target: str | os.PathLike, shares: dict[str, float], seed: int
) -> tuple[Photos, list[Path]]:
    """Create the data folder `target` from the photos in `source/<class>/*`, with these shares besides train.

    Returns the photos of the new folder, and the files of the source that were left out.

    Files are hard-linked if possible, else copied. The split depends on a file's content, so a photo under
    two names is in one split. Raises `UserError` for a folder of another structure, a class of too few
    photos, or a target that exists.
    """
    root, made = Path(source), Path(target)
    if made.exists():
        raise UserError(f"{made} already exists; give another target folder")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    classes = {name: files for name, files in _classes(root).items() if files}
    if {"train", "test"} <= classes.keys():
        raise UserError(f"{root} already has train/ and test/; use it as it is")
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise UserError(f"{root} needs at least two folders of photos, one per class; found {found}")
    salt = str(seed).encode()
    with writing_to(made), replacing_folder(made) as part:
        for name, files in classes.items():
            bar = tqdm(files, desc=name, unit="img", leave=False, disable=None)
            digests = {path: hashlib.sha256(salt + path.read_bytes()).digest() for path in bar}
            order = sorted(set(digests.values()))
            counts = {split: max(round(share * len(order)), 1) for split, share in shares.items()}
            if sum(counts.values()) >= len(order):
                raise UserError(f"{root / name} has too few photos to split: {len(order)}")
            splits = [split for split, count in counts.items() for _ in range(count)]
            split_of = dict(zip(order, splits, strict=False))
            for path, digest in digests.items():
                place = part / split_of.get(digest, "train") / name / path.relative_to(root / name)
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path.resolve(), place)
                except OSError:  # another disk, or one without links
                    shutil.copy2(path, place)
    used = {path for files in classes.values() for path in files}
    return find_photos(made), sorted(path for _, path in unused_files(root, used))


def is_hidden(name: str) -> bool:
    """Return whether a name is a hidden or system one: `._photo.jpg` in a Mac's zip, `Thumbs.db`."""
    return name.startswith(".") or name in SYSTEM_NAMES


def _classes(folder: Path) -> dict[str, list[Path]]:
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
                faults.append(f"no image in {root}/{split}/{name}; every class needs photos in every split")
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
    """Yield what else is in a data folder: ("hidden" | "unused" | "other", path); a hidden folder once."""
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
            else:
                yield "other", path
