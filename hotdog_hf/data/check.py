"""Check of a folder of photos: files that do not decode, leaks between splits, misplaced files.

Imports no torch, so that `scripts/check_data.py` starts at once.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import PIL
from PIL import ExifTags, Image
from tqdm import tqdm

from hotdog_hf.data.folder import Photos, class_faults, describe_counts, plain_name, unused_files
from hotdog_hf.data.images import decode_image
from hotdog_hf.data.labels import find_photos, list_photos
from hotdog_hf.data.similar import near_pairs
from hotdog_hf.errors import UserError, printable
from hotdog_hf.files import replacing_file
from hotdog_hf.machine import allowed_cores, cache_dir

# Every kind of finding, worst first: an error would make training results wrong or stop the training.
KINDS = {
    "unreadable": ("error", "files that cannot be read as images"),
    "bomb": ("error", "images with absurdly many pixels, not decoded"),
    "classes": ("error", "class folders that do not agree"),
    "leak": ("error", "the same file in several splits"),
    "two-labels": ("error", "the same file in several classes"),
    "near-leak": ("warning", "photos that look like one of an earlier split"),
    "placeholder": ("warning", "many identical files, such as a 'photo not available' picture"),
    "repeat": ("warning", "the same file several times in a class"),
    "imbalance": ("warning", "classes of very different size"),
    "similar-classes": ("warning", "class names that differ only in spelling"),
    "tiny": ("warning", "images with hardly any pixels"),
    "animated": ("warning", "animations and multi-page images, of which the first is used"),
    "exif": ("warning", "damaged EXIF blocks; a rotation in them is lost"),
    "suffix": ("warning", "files of another format than their suffix; they are used all the same"),
    "unused": ("warning", "images outside the class folders, and links to folders; they are not used"),
    "hidden": ("warning", "hidden and system files; they are not used"),
    "heic": ("warning", 'HEIC files without pip install -e ".[heic]"; they are not used'),
    "other": ("warning", "files not named as images; they are not used"),
}
SHOWN = 10
PLACEHOLDER_COPIES = 5
MAX_IMBALANCE = 10
MIN_SIDE = 16
# Perceptual hashes reduce photos to 32 x 32 pixels: these suffice, and large JPEGs decode faster to so few.
HASH_SIDE = 256
ORIENTATION = ExifTags.Base.Orientation
MAX_CACHED = 200_000
# Files per task of a thread, and files queued at a time: a million at once would be a gigabyte of futures.
BATCH, QUEUED = 16, 4096
# A cache of another version of the check, or of Pillow, may hold other results.
CACHE_VERSION = f"3 Pillow {PIL.__version__}"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Facts about one file. If it cannot be used, `fault` is the kind of finding and `message` says why."""

    size: int = 0
    mtime_ns: int = 0
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    animated: bool = False
    broken_exif: bool = False
    sha256: str = ""
    phash: str = ""
    fault: str = ""
    message: str = ""


FIELDS = tuple(field.name for field in dataclasses.fields(Record))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding about the photos: its kind (of `KINDS`), a sentence, the files concerned."""

    kind: str
    message: str
    files: tuple[Path, ...] = ()

    @property
    def severity(self) -> str:
        """Return "error" or "warning", depending on the kind."""
        return KINDS[self.kind][0]


@dataclasses.dataclass(frozen=True)
class Report:
    """The checked photos, the record of each, and all findings."""

    photos: Photos
    records: dict[Path, Record]
    findings: list[Finding]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of photos by split and class."""
        return {
            split: {name: len(paths) for name, paths in classes.items()}
            for split, classes in self.photos.items()
        }

    def count(self, severity: str) -> int:
        """Return the number of findings that are an "error" or a "warning"."""
        return sum(finding.severity == severity for finding in self.findings)


def check_folder(
    data_dir: str | os.PathLike, labels: Sequence[str] = (), *, cache_file: Path | None, progress: bool
) -> Report:
    """Check a data folder, labelled by the tables `labels`: photos, classes, and the files that are not used.

    Raises `UserError` if there is nothing to check, as without train/ and test/, and for a wrong table.
    """
    photos = list_photos(data_dir, labels)
    report = check_photos(photos, cache_file=cache_file, progress=progress)
    faults = [Finding("classes", fault) for fault in class_faults(data_dir, photos)]
    return _with_findings(report, [*faults, *_unused(data_dir, report, labels)])


def check_photos(photos: Photos, *, cache_file: Path | None, progress: bool) -> Report:
    """Check the photos that `folder.find_photos` returns, each file and across files.

    A file with the size and time in `cache_file` is not read again.
    """
    paths = [path for classes in photos.values() for group in classes.values() for path in group]
    records = inspect_files(paths, cache_file=cache_file, progress=progress)
    findings = [
        *_file_findings(records),
        *_same_files(photos, records),
        *_near_leaks(photos, records),
        *_class_findings(photos),
    ]
    return Report(photos, records, _sorted(findings))


def unreadable(report: Report) -> list[Path]:
    """Return the files that training cannot use."""
    return [path for path, record in report.records.items() if record.fault]


def require_readable(report: Report) -> None:
    """Raise `UserError` with the number of files that training cannot use and the first names."""
    if faults := [record.message for record in report.records.values() if record.fault]:
        more = f"; and {len(faults) - SHOWN} more" if faults[SHOWN:] else ""
        raise UserError(
            f"{len(faults)} of {len(report.records)} photos cannot be used:"
            f" {'; '.join(faults[:SHOWN])}{more}. Fix or remove them, or skip them with"
            " --bad-images skip"
        )


def files_to_skip(
    data_dir: str | os.PathLike, policy: str, labels: Sequence[str] = (), *, progress: bool
) -> tuple[list[Path], str]:
    """Check a folder as training does; return the files to skip and what to print.

    With the policy "fail" a file that cannot be used is a `UserError`, with "skip" it is returned.
    """
    report = check_photos(find_photos(data_dir, labels), cache_file=default_cache_file(), progress=progress)
    report = _with_findings(report, _unused(data_dir, report, labels))
    if policy == "fail":
        require_readable(report)
    command = " ".join(
        ["python scripts/check_data.py", str(data_dir), *(["--labels", *labels] if labels else [])]
    )
    return unreadable(report), summary(report, command)


def summary(report: Report, command: str) -> str:
    """Return how many findings of each kind there are, one line per kind; `command` lists them all."""
    lines = [f"{len(report.records)} photos checked: {'' if report.findings else 'nothing found'}".rstrip()]
    for kind, count in collections.Counter(finding.kind for finding in report.findings).items():
        severity, title = KINDS[kind]
        lines.append(f"  {severity}: {title} ({count})")
    return "\n".join([*lines, *([f"  to list them: {command}"] if report.findings else [])])


def _unused(data_dir: str | os.PathLike, report: Report, labels: Sequence[str]) -> list[Finding]:
    tables = {Path(file).resolve() for file in labels}
    return [
        Finding(kind, str(path), (path,))
        for kind, path in unused_files(data_dir, set(report.records))
        if path.resolve() not in tables
    ]


def _with_findings(report: Report, more: list[Finding]) -> Report:
    return dataclasses.replace(report, findings=_sorted([*report.findings, *more]))


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    kinds = list(KINDS)
    return sorted(findings, key=lambda finding: (kinds.index(finding.kind), finding.files, finding.message))


def inspect_files(paths: Sequence[Path], *, cache_file: Path | None, progress: bool) -> dict[Path, Record]:
    """Return the record of each file; one with the size and time in `cache_file` is not read again."""
    cache = _read_cache(cache_file, paths)
    hidden = None if progress else True  # None: a bar on a terminal, none in a log file
    records, changed = {}, False
    # Threads, not processes: Pillow decodes and resizes without the interpreter's lock.
    with warnings.catch_warnings(), ThreadPoolExecutor(allowed_cores()) as pool:
        warnings.simplefilter("ignore")  # Pillow's, which the report covers
        bar = tqdm(total=len(paths), desc="checking photos", unit="img", leave=False, disable=hidden)
        for start in range(0, len(paths), QUEUED):
            queued = paths[start : start + QUEUED]
            cached = [cache.pop(_cache_key(path), None) for path in queued]
            parts = range(0, len(queued), BATCH)
            found = itertools.chain.from_iterable(
                pool.map(
                    _inspect_batch,
                    [queued[part : part + BATCH] for part in parts],
                    [cached[part : part + BATCH] for part in parts],
                )
            )
            for path, known, record in zip(queued, cached, found, strict=True):
                records[path] = record
                changed |= record != known and not record.fault
                bar.update()
        bar.close()
    if cache_file and changed:
        _write_cache(cache_file, records)
    return records


def _inspect_batch(paths: Sequence[Path], cached: Sequence[Record | None]) -> list[Record]:
    return list(map(_inspect, paths, cached))


def _inspect(path: Path, cached: Record | None) -> Record:
    try:
        str(path).encode()
        status = path.stat()
    except UnicodeEncodeError:  # pyarrow, which holds the paths in training, needs UTF-8
        advice = "rename it"
        if sys.getfilesystemencoding() != "utf-8":
            advice += f", or set PYTHONUTF8=1 if {sys.getfilesystemencoding()} is not its encoding"
        return Record(fault="unreadable", message=f"{path}: the name is not valid UTF-8; {advice}")
    except OSError as error:
        return Record(fault="unreadable", message=f"cannot read {path}: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        return Record(fault="unreadable", message=f"cannot read {path}: not a regular file")
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if cached and stamp == {"size": cached.size, "mtime_ns": cached.mtime_ns}:
        return cached
    try:
        decoded = decode_image(path, HASH_SIDE)
    except UserError as error:
        kind = "bomb" if isinstance(error.__cause__, Image.DecompressionBombError) else "unreadable"
        return Record(**stamp, fault=kind, message=str(error))
    with Image.open(path) as image:
        return Record(
            **stamp,
            width=image.width,
            height=image.height,
            format=image.format,
            mode=image.mode,
            # The other images in an MPO, which many phones write as .jpg, are previews and depth maps.
            animated=image.format != "MPO" and getattr(image, "is_animated", False),
            broken_exif=_is_exif_broken(image),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            phash=str(imagehash.phash(decoded)),
        )


def _is_exif_broken(image: Image.Image) -> bool:
    """Return whether an EXIF block is invalid, truncated, or has a rotation that Pillow cannot read."""
    block = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(block[:2])
    if order is None:
        return bool(block)
    start = int.from_bytes(block[4:8], order) + 2
    end = start + 12 * int.from_bytes(block[start - 2 : start], order)
    tags = {int.from_bytes(block[at : at + 2], order) for at in range(start, min(end, len(block)), 12)}
    if max(start, end) > len(block):
        return True
    try:
        return ORIENTATION in tags and ORIENTATION not in image.getexif()
    except Exception:  # a damaged header in PNG or WebP raises SyntaxError, struct.error, ...
        return True


def _file_findings(records: dict[Path, Record]) -> Iterator[Finding]:
    suffixes = Image.registered_extensions()
    for path, record in records.items():
        if record.fault:
            yield Finding(record.fault, record.message, (path,))
            continue
        if min(record.width, record.height) < MIN_SIDE:
            yield Finding("tiny", f"{path}: {record.width} x {record.height} pixels", (path,))
        if record.animated:
            yield Finding("animated", f"{path}", (path,))
        if record.broken_exif:
            yield Finding("exif", f"{path}", (path,))
        # MPO is JPEG with a second image after the first.
        if record.format.replace("MPO", "JPEG") != suffixes.get(path.suffix.lower()):
            yield Finding("suffix", f"{path} is {record.format}", (path,))


def _same_files(photos: Photos, records: dict[Path, Record]) -> Iterator[Finding]:
    # Their first 60 bits as numbers take a tenth of the memory of a million strings in a dictionary.
    starts = (int(record.sha256[:15], 16) for record in records.values() if record.sha256)
    starts, counts = np.unique(np.fromiter(starts, np.int64), return_counts=True)
    repeated = set(starts[counts > 1].tolist())
    copies = collections.defaultdict(list)
    for split, classes in photos.items():
        for name, paths in classes.items():
            for path in paths:
                digest = records[path].sha256
                if digest and int(digest[:15], 16) in repeated:
                    copies[digest].append((split, name, path))
    for group in copies.values():
        if len(group) == 1:
            continue
        files = tuple(path for _, _, path in group)
        splits, names = {split for split, _, _ in group}, {name for _, name, _ in group}
        message = " = ".join(map(str, files[:SHOWN])) + (f" = {len(files)} files" if files[SHOWN:] else "")
        if len(splits) > 1:
            yield Finding("leak", message, files)
        if len(names) > 1:
            yield Finding("two-labels", message, files)
        if len(files) >= PLACEHOLDER_COPIES:
            yield Finding("placeholder", f"{len(files)} files are identical to {files[0]}", files)
        elif len(files) > len({(split, name) for split, name, _ in group}):
            yield Finding("repeat", message, files)


def _near_leaks(photos: Photos, records: dict[Path, Record]) -> Iterator[Finding]:
    """Yield for each photo the nearest one in an earlier split, if it is near enough.

    The first, if several are equally near.
    """
    by_split = [
        [path for group in classes.values() for path in group if records[path].phash]
        for classes in photos.values()
    ]
    paths = list(itertools.chain.from_iterable(by_split))
    hashes, place = np.unique(perceptual_hashes(records[path] for path in paths), return_inverse=True)
    pairs = [np.stack([first, second, bits]) for first, second, bits in near_pairs(hashes)]
    equal = np.stack([np.arange(len(hashes))] * 2 + [np.zeros(len(hashes), int)])
    firsts, seconds, bits = np.concatenate([equal, *pairs, *(pair[[1, 0, 2]] for pair in pairs)], axis=1)
    start = len(by_split[0])
    for split_paths in by_split[1:]:
        # The first photo of the earlier splits with each hash, and for each hash the nearest of them.
        none = len(paths)
        earliest = np.full(len(hashes), none)
        earliest[place[:start][::-1]] = np.arange(start)[::-1]
        candidates = np.where(earliest[seconds] < none, bits * none + earliest[seconds], np.iinfo(int).max)
        nearest = np.full(len(hashes), np.iinfo(int).max)
        np.minimum.at(nearest, firsts, candidates)
        end = start + len(split_paths)
        for path, candidate in zip(split_paths, nearest[place[start:end]].tolist(), strict=True):
            if candidate < np.iinfo(int).max:
                twin = paths[candidate % none]
                if records[path].sha256 != records[twin].sha256:
                    yield Finding("near-leak", f"{path} looks like {twin}", (path, twin))
        start = end


def perceptual_hashes(records: Iterable[Record]) -> np.ndarray:
    """Return the perceptual hashes of records that have one, uint64 [N]."""
    return np.fromiter((int(record.phash, 16) for record in records), np.uint64)


def _class_findings(photos: Photos) -> Iterator[Finding]:
    sizes = {name: len(paths) for name, paths in photos["train"].items() if paths}
    if sizes and max(sizes.values()) > MAX_IMBALANCE * min(sizes.values()):
        few, many = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
        yield Finding("imbalance", f"train has {sizes[many]} photos of {many!r} but {sizes[few]} of {few!r}")
    alike = collections.defaultdict(list)
    for name in photos["train"]:
        alike[plain_name(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            yield Finding("similar-classes", f"train has {', '.join(map(ascii, names))}")


def describe(report: Report) -> str:
    """Return a table of photo counts, one line per class, and every kind of finding with its first files."""
    lines = describe_counts(report.counts()).split("\n")
    for kind, (severity, title) in KINDS.items():
        messages = [finding.message for finding in report.findings if finding.kind == kind]
        if messages:
            lines += ["", f"{severity}: {title} ({len(messages)})"]
            lines += [f"  {message}" for message in messages[:SHOWN]]
            lines += [f"  and {len(messages) - SHOWN} more"] if messages[SHOWN:] else []
    errors, warned = report.count("error"), report.count("warning")
    lines += ["", f"{len(report.records)} photos checked: {errors} errors, {warned} warnings"]
    # File names may hold line breaks and escape sequences, which a terminal would interpret.
    return "\n".join(map(printable, lines))


def write_report(report: Report, path: str | os.PathLike) -> None:
    """Write everything as JSON: counts, findings, and the record of every file."""
    content = {
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "counts": report.counts(),
        "findings": [{"severity": finding.severity, **vars(finding)} for finding in report.findings],
    }
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, allow_nan=False, default=str).removesuffix("\n}"))
            # One by one: the records of a million photos as one JSON object would take gigabytes.
            separator = ',\n  "files": {'
            for photo, record in report.records.items():
                about = json.dumps(_values(record), allow_nan=False)
                file.write(f"{separator}\n    {json.dumps(str(photo))}: {about}")
                separator = ","
            file.write("\n  }\n}\n")
    except OSError as error:
        raise UserError(f"--report {path} cannot be written: {error.strerror}") from error


def _values(record: Record) -> dict[str, object]:
    """Return what `dataclasses.asdict` does, without its copies, which take ten times as long."""
    return {name: getattr(record, name) for name in FIELDS}


def default_cache_file() -> Path:
    """Return the cache file of the check."""
    return cache_dir() / "check.jsonl"


def _cache_key(path: Path) -> str:
    return str(path.absolute())


def _read_cache(cache_file: Path | None, paths: Iterable[Path]) -> dict[str, Record]:
    """Read the records of these files from earlier checks, by absolute path; none if the file is damaged."""
    found, wanted = {}, {_cache_key(path) for path in paths} if cache_file else set()
    with contextlib.suppress(OSError, ValueError, TypeError):  # the cache only saves time
        for path, values in _cached_lines(cache_file) if cache_file else ():
            if path in wanted:
                record = Record(**values)
                # One copy of strings that a million records share.
                shared = {"format": sys.intern(record.format), "mode": sys.intern(record.mode)}
                found[path] = dataclasses.replace(record, **shared)
        return found
    return {}


def _cached_lines(cache_file: Path) -> Iterator[tuple[str, dict]]:
    """Yield path and record of each line of a cache, none if another version wrote it.

    Raises `ValueError` or `TypeError` for a damaged line.
    """
    with cache_file.open(encoding="utf-8") as file:
        if json.loads(next(file, "null")) != CACHE_VERSION:
            return
        for line in file:
            path, values = json.loads(line)
            yield path, values


def _write_cache(cache_file: Path, records: dict[Path, Record]) -> None:
    """Write the records without a fault, and those of other files unless there are too many.

    Atomically, so that of two checks at once one cache remains. Files with a fault are checked again every
    time: they may be fixed without a change of size or time (chmod).
    """
    ours, others = {_cache_key(path) for path in records}, []
    with contextlib.suppress(OSError, ValueError, TypeError):
        room = max(MAX_CACHED - len(ours), 0)
        others = list(
            itertools.islice((line for line in _cached_lines(cache_file) if line[0] not in ours), room + 1)
        )
        others = others if len(others) <= room else []
    good = ((path, record) for path, record in records.items() if not record.fault)
    lines = ((_cache_key(path), _values(record)) for path, record in good)
    # If the cache cannot be written, the next check takes longer.
    with (
        contextlib.suppress(OSError),
        replacing_file(cache_file) as part,
        part.open("w", encoding="utf-8") as file,
    ):
        for line in itertools.chain([CACHE_VERSION], others, lines):
            file.write(json.dumps(line, allow_nan=False) + "\n")
