"""Labels from a table: which class, split and group the photos of a folder belong to. Imports no torch.

A table is CSV with a header, or JSON lines. `path` is a photo's path within the data folder, `label` its
class; `split` and `group` are optional, and other columns are ignored. The `metadata.csv` and
`metadata.jsonl` of `datasets`' imagefolder have `file_name` instead, a path from the folder of the table.
"""

import csv
import difflib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hotdog_hf.data import folder
from hotdog_hf.data.folder import SPLIT_FOLDERS, Photos
from hotdog_hf.data.images import IMAGE_SUFFIXES
from hotdog_hf.errors import UserError

# Wrong rows that an error names.
SHOWN = 5
SPLITS = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}


class Row(NamedTuple):
    """One photo's row: where it stands, its label, and its split and group if the table gives them."""

    # File and line, as an error names them.
    place: str
    label: str
    split: str | None = None
    group: str | None = None


Table = dict[Path, Row]


def find_photos(data_dir: str | os.PathLike, labels: Sequence[str] = ()) -> Photos:
    """List the photos of every split and class as the tables `labels` say; see `list_photos`.

    Raises `UserError` for a malformed folder or table.
    """
    photos = list_photos(data_dir, labels)
    if faults := folder.class_faults(data_dir, photos):
        raise UserError(faults[0])
    return photos


def list_photos(data_dir: str | os.PathLike, labels: Sequence[str] = ()) -> Photos:
    """List the photos of every split and class, sorted by path; the classes are not checked.

    A row overrides what the folders say of its photo; photos without a row keep their folder's split and
    class. Labels are then among the folders' classes. If every photo of the split folders has a row, only
    the table counts. Raises `UserError` naming file and line for a row that cannot be followed, and for a
    group that is in two splits.
    """
    if not labels:
        return folder.list_photos(data_dir)
    root, table = Path(data_dir), read_tables(labels, data_dir)
    listed = folder.list_photos(data_dir, incomplete=True)
    here = {
        path: (split, name)
        for split, classes in listed.items()
        for name, paths in classes.items()
        for path in paths
    }
    known = sorted({name for _, name in here.values()}) if here.keys() - table.keys() else None

    def place_of(path: Path, row: Row) -> tuple[str, str]:
        split = row.split or here.get(path, (None,))[0] or SPLITS.get(path.relative_to(root).parts[0])
        if split is None:
            raise ValueError(f"{path} is in no split: add a column split (train, validation or test)")
        require_label(row.label, known)
        return split, row.label

    here |= _each_row(table, place_of)
    _require_whole_groups({path: split for path, (split, _) in here.items()}, table)
    names = sorted({name for _, name in here.values()} | set(known or ()))
    photos: Photos = {}
    for split in SPLIT_FOLDERS:
        if split in listed or any(split == other for other, _ in here.values()):
            photos[split] = {name: [] for name in names}
    for path in sorted(here):
        split, name = here[path]
        photos[split][name].append(path)
    if missing := [split for split in ("train", "test") if split not in photos]:
        raise UserError(
            f"{', '.join(labels)}: no photo is in {missing[0]}; add a column split, or let"
            " `python scripts/split.py` choose the splits"
        )
    return photos


def relabel(
    classes: Mapping[str, list[Path]], labels: Sequence[str], data_dir: str | os.PathLike
) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Return the photos by class as the tables say, sorted by path, and the group of those that have one.

    As in `list_photos`, but of `classes` that are not split yet. Raises `UserError` for a row with a split.
    """
    if not labels:
        return dict(classes), {}
    table = read_tables(labels, data_dir)
    here = {path: name for name, paths in classes.items() for path in paths}
    known = sorted(classes) if here.keys() - table.keys() else None

    def label_of(path: Path, row: Row) -> str:
        if row.split:
            raise ValueError(f"split {row.split!r} is given: train.py --labels takes such a table as it is")
        require_label(row.label, known)
        return row.label

    here |= _each_row(table, label_of)
    by_label = {name: [] for name in sorted(set(here.values()))}
    for path in sorted(here):
        by_label[here[path]].append(path)
    return by_label, {path: row.group for path, row in table.items() if row.group is not None}


def require_label(label: str, known: Sequence[str] | None) -> None:
    """Raise `ValueError` if a label is not among the known ones; None allows any."""
    if known is not None and label not in known:
        close = difflib.get_close_matches(label, known, n=1)
        hint = f" (is it {close[0]!r}?)" if close else ""
        raise ValueError(
            f"label {label!r} is none of the folder's classes {', '.join(known)}{hint}; a table with other"
            " classes needs a row for every photo"
        )


def read_tables(files: Sequence[str], data_dir: str | os.PathLike) -> Table:
    """Read tables of labels: a row by each photo's path. Raises `UserError` naming the wrong rows."""
    table: Table = {}
    for file in files:
        faults = []
        for place, values in _read(file):
            try:
                path = _photo_of(values, Path(file), Path(data_dir))
                if path in table:
                    raise ValueError(f"{path} already has a row: {table[path].place}")
                table[path] = _row_of(place, values)
            except ValueError as error:
                faults.append(f"{place}: {error}")
        _raise_faults(faults)
    if not table:
        raise UserError(f"{', '.join(files)}: the table has no row")
    return table


def check_tables(files: Sequence[str]) -> None:
    """Raise `UserError` for a table that cannot be read or lacks a column; its rows are not checked."""
    for file in files:
        next(_read(file), None)


def _raise_faults(faults: Sequence[str]) -> None:
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if faults[SHOWN:] else ""
        raise UserError("; ".join(faults[:SHOWN]) + more)


def _each_row(table: Table, function: Callable[[Path, Row], object]) -> dict:
    """Call a function for every row; its `ValueError`s become one `UserError` that names the lines."""
    found, faults = {}, []
    for path, row in table.items():
        try:
            found[path] = function(path, row)
        except ValueError as error:
            faults.append(f"{row.place}: {error}")
    _raise_faults(faults)
    return found


def _read(file: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield file and line, and the values by column, of each row that is not empty."""
    try:
        # Excel writes a mark first; the names of files may be in another encoding.
        text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    if Path(file).suffix in (".jsonl", ".json"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}, line {number}: not JSON: {error}") from error
                if not isinstance(values, dict):
                    raise UserError(f"{file}, line {number}: a row is an object with path and label")
                yield f"{file}, line {number}", values
        return
    header = text.partition("\n")[0]
    # Spreadsheets of some countries separate by semicolons.
    delimiter = ";" if header.count(";") > header.count(",") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [str(name) for name in reader.fieldnames or ()]
    if "label" not in columns or not {"path", "file_name"} & set(columns):
        raise UserError(
            f"{file}, line 1: needs the columns path and label, has {', '.join(columns) or 'none'}"
        )
    for values in reader:
        if None in values:
            raise UserError(f"{file}, line {reader.line_num}: more cells than the header has columns")
        yield f"{file}, line {reader.line_num}", values


def _photo_of(values: Mapping[str, object], file: Path, data_dir: Path) -> Path:
    """Return the photo that a row is about. Raises `ValueError` if there is none in the data folder."""
    named = values.get("path") or values.get("file_name")
    if not isinstance(named, str) or not named:
        raise ValueError("the row names no photo: path is empty")
    if values.get("path"):
        path = data_dir / os.path.normpath(named)
    else:
        path = data_dir / os.path.relpath(file.parent.absolute() / named, data_dir.absolute())
    if Path(named).is_absolute() or ".." in path.relative_to(data_dir).parts:
        raise ValueError(f"{named} is not a path within {data_dir}")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{named} is not named as an image")
    if not os.path.lexists(path):
        raise ValueError(f"no such photo: {path}")
    return path


def _row_of(place: str, values: Mapping[str, object]) -> Row:
    """Return a row. Raises `ValueError` if its label is empty or its split is not one."""
    cells = {name: values.get(name) for name in ("label", "split", "group")}
    cells = {name: None if cell is None else str(cell).strip() or None for name, cell in cells.items()}
    if not cells["label"]:
        raise ValueError("label is empty")
    if cells["split"] and cells["split"] not in SPLITS:
        raise ValueError(f"split {cells['split']!r} is none of {', '.join(SPLITS)}")
    return Row(place, cells["label"], SPLITS.get(cells["split"]), cells["group"])


def _require_whole_groups(split_of: Mapping[Path, str], table: Table) -> None:
    """Raise `UserError` if photos of one group are in two splits."""
    first: dict[str, tuple[str, Row]] = {}
    faults = []
    for path, row in table.items():
        if row.group is not None:
            split, before = first.setdefault(row.group, (split_of[path], row))
            if split != split_of[path]:
                faults.append(
                    f"{row.place}: group {row.group!r} is in {split_of[path]}, and in {split} by"
                    f" {before.place}; a group belongs to one split"
                )
    _raise_faults(faults)


def digest(labels: Sequence[str], data_dir: str | os.PathLike) -> str | None:
    """Hash what the tables say, whatever the order of the rows; None without a table."""
    if not labels:
        return None
    rows = {os.path.relpath(path, data_dir): row[1:] for path, row in read_tables(labels, data_dir).items()}
    return hashlib.sha256(json.dumps(sorted(rows.items())).encode()).hexdigest()


def describe(labels: Sequence[str], data_dir: str | os.PathLike) -> str:
    """Return a line: how many photos the tables name, and how many are in another class's folder."""
    table = read_tables(labels, data_dir)
    listed = folder.list_photos(data_dir, incomplete=True)
    name_of = {path: name for classes in listed.values() for name, paths in classes.items() for path in paths}
    changed = sum(name_of[path] != row.label for path, row in table.items() if path in name_of)
    groups = {row.group for row in table.values()} - {None}
    in_groups = f", in {len(groups)} groups" if groups else ""
    return (
        f"labels of {len(table)} photos from {', '.join(labels)}{in_groups}; {changed} of them are in the"
        " folder of another class"
    )
