import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import hypothesis
import imagehash
import numpy as np
import pytest
import zoo
from conftest import ROOT, run
from faults import Faults, Killed
from hypothesis import strategies as st

from hotdog_hf.data import check, folder, similar
from hotdog_hf.data.images import decode_image
from hotdog_hf.data.splits import load_photos
from hotdog_hf.errors import UserError


@pytest.fixture
def photos(tmp_path):
    return zoo.good_folder(tmp_path / "photos")


def check_folder(data_dir, cache_file=None):
    return check.check_folder(data_dir, cache_file=cache_file, progress=False)


def kinds(report):
    return sorted({finding.kind for finding in report.findings})


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("beast", zoo.BEASTS, ids=lambda beast: beast.name)
def test_a_hostile_image_comes_out_as_it_must(photos, beast):
    path = photos / "train/hotdog" / beast.name
    beast.make(path)
    report = check_folder(photos)
    about = [finding for finding in report.findings if path in finding.files]
    assert report.findings == about
    assert kinds(report) == sorted(beast.kinds)
    assert all(str(path) in finding.message for finding in about)
    if beast.size:
        decoded = decode_image(path)
        assert (decoded.mode, decoded.size) == ("RGB", beast.size)
        assert decode_image(decoded).size == beast.size  # an upright image is not turned again
        assert check.unreadable(report) == [] and report.count("error") == 0
    else:
        with pytest.raises(UserError, match=f"{re.escape(str(path))}.*({beast.says})"):
            decode_image(path)
        assert re.search(beast.says, about[0].message)
        assert check.unreadable(report) == [path] and report.count("error") == 1


@pytest.mark.parametrize("den", zoo.DENS.values(), ids=zoo.DENS)
def test_a_hostile_folder_comes_out_as_it_must(photos, den):
    den.harm(photos)
    if den.kinds is None:
        with pytest.raises(UserError, match=den.says):
            check_folder(photos)
        return
    report = check_folder(photos)
    assert kinds(report) == sorted(den.kinds)
    assert re.search(den.says, "\n".join(finding.message for finding in report.findings))
    assert len(report.records) == 10 + den.photos
    stops = any(finding.kind == "classes" for finding in report.findings)
    try:  # training refuses the folders whose classes are reported, and takes the same photos of the others
        trained_on = folder.find_photos(photos)
    except UserError as error:
        assert stops and str(error) in [finding.message for finding in report.findings]
    else:
        assert not stops and trained_on == report.photos


def test_the_zoo_is_large_enough():
    assert len(zoo.BEASTS) >= 25 and len(zoo.DENS) >= 15
    shown = {kind for beast in zoo.BEASTS for kind in beast.kinds}
    shown |= {kind for den in zoo.DENS.values() for kind in den.kinds or ()}
    assert shown == set(check.KINDS) - {"heic"}  # tests/test_heic.py has one


@pytest.fixture
def script(tmp_path):
    def run_script(*args, **env):
        place = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return run("python", ROOT / "scripts/check_data.py", *args, cwd=tmp_path, **place, **env)

    return run_script


def test_the_script_passes_a_good_folder(script, photos, tmp_path):
    (photos / "train/hotdog/notes.txt").write_text("a warning is no error")
    done = script(photos)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()[:3]] == [
        ["class", "train", "test"],
        ["hotdog", "3", "2"],
        ["salad", "3", "2"],
    ]
    assert "10 photos checked: 0 errors, 1 warnings" in done.stdout
    written = json.loads((tmp_path / "data_report.json").read_text())
    assert written["counts"] == {split: {"hotdog": n, "salad": n} for split, n in (("train", 3), ("test", 2))}
    [finding] = written["findings"]
    assert (finding["severity"], finding["kind"]) == ("warning", "other")
    record = written["files"][str(photos / "train/hotdog/000.png")]
    assert (record["width"], record["height"], record["format"], record["mode"]) == (56, 72, "PNG", "RGB")
    assert (tmp_path / "cache/hotdog_hf/check.jsonl").is_file()


def test_the_script_survives_the_whole_zoo_and_names_every_beast(script, photos, tmp_path):
    for beast in zoo.BEASTS:
        beast.make(photos / "train/hotdog" / beast.name)
    (photos / "train/hotdog/\x1b[31m red\n热狗.txt").write_text("a name that would colour the terminal")
    done = script(
        photos, "--report", tmp_path / "zoo.json", "--no-cache", fresh=True, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout and r"\x1b[31m red\n\u70ed\u72d7.txt" in done.stdout
    refused = [beast.name for beast in zoo.BEASTS if beast.size is None]
    assert f"files that cannot be read as images ({len(refused) - 2})" in done.stdout
    assert f"  and {len(refused) - 12} more" in done.stdout
    written = json.loads((tmp_path / "zoo.json").read_text())
    named = {Path(f).name for finding in written["findings"] for f in finding["files"]}
    assert named >= {beast.name for beast in zoo.BEASTS if beast.kinds}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nowhere",), "error: no such data folder: nowhere"),
        (
            ("photos", "--report", "no/such/place.json"),
            "error: --report no/such/place.json cannot be written",
        ),
    ],
)
def test_the_script_ends_on_a_mistake_in_one_line(script, photos, args, message):
    done = script(*args)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_check_does_without_torch():
    heavy = "('torch', 'datasets')"
    code = f"import hotdog_hf.data.check, sys; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert run("python", "-c", code).returncode == 0


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded rather than taken from the cache."""
    names = []
    monkeypatch.setattr(
        check, "decode_image", lambda path, side: names.append(path.name) or decode_image(path)
    )
    return names


def test_a_file_is_read_again_only_where_it_changed(photos, tmp_path, decoded, monkeypatch):
    first = check_folder(photos, tmp_path / "cache.json")
    assert len(decoded) == 10
    decoded.clear()
    assert check_folder(photos, tmp_path / "cache.json") == first and decoded == []
    changed = photos / "train/hotdog/001.png"
    stamp = changed.stat()
    shutil.copy(photos / "train/salad/002.png", changed)
    assert kinds(check_folder(photos, tmp_path / "cache.json")) == ["two-labels"] and decoded == ["001.png"]
    decoded.clear()
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check_folder(photos, tmp_path / "cache.json")
    assert decoded == ["001.png"]
    decoded.clear()
    changed.write_bytes(zoo.PNG)
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check_folder(photos, tmp_path / "cache.json")
    assert decoded == ["001.png"]
    decoded.clear()
    monkeypatch.setattr(check, "CACHE_VERSION", "the rule of tomorrow")
    check_folder(photos, tmp_path / "cache.json")
    assert len(decoded) == 10


def test_a_pipe_is_not_opened(photos, decoded):
    os.mkfifo(photos / "train/hotdog/pipe.jpg")
    assert kinds(check_folder(photos)) == ["unreadable"] and len(decoded) == 10


def test_a_fault_is_looked_at_again_and_stays_a_fault(photos, tmp_path, decoded):
    (photos / "train/hotdog/000.png").write_bytes(b"broken")
    for _ in range(2):
        report = check_folder(photos, tmp_path / "cache.json")
        assert check.unreadable(report) == [photos / "train/hotdog/000.png"]
    assert decoded.count("000.png") == 5 and len(decoded) == 11  # four files have that name


VERSION_LINE = json.dumps(check.CACHE_VERSION).encode() + b"\n"


def cached_files(cache_file):
    """How many files a cache remembers: a line each, after that of its version."""
    return len(cache_file.read_text().splitlines()) - 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"another version"\n["x", {}]',
        VERSION_LINE + b"3",
        VERSION_LINE + b'["x"]',
        VERSION_LINE + b'["x", 3]',
        VERSION_LINE + b'["x", {"colour": "red"}]',
        VERSION_LINE + b'["x", {"size": 3}',
    ],
)
def test_a_damaged_cache_is_ignored_and_written_anew(photos, tmp_path, decoded, content):
    (tmp_path / "cache.json").write_bytes(content)
    for _ in range(2):
        assert check_folder(photos, tmp_path / "cache.json").findings == []
    assert len(decoded) == 10
    assert [path.name for path in tmp_path.iterdir() if path.name != "photos"] == ["cache.json"]


@pytest.mark.parametrize("kind", ["kill", "fill_disk"])
def test_a_fault_while_the_cache_is_written_costs_a_check_at_most(
    photos, tmp_path, decoded, monkeypatch, kind
):
    faults, cache_file = Faults(monkeypatch), tmp_path / "cache/cache.json"
    with faults.before(None) as changes:
        expected = check_folder(photos, cache_file)
    total = len(changes)
    assert total >= 3, changes
    for number in range(1, total + 1):
        shutil.rmtree(cache_file.parent)
        with faults.before(number, getattr(faults, kind)), contextlib.suppress(Killed):
            assert check_folder(photos, cache_file) == expected
        assert check_folder(photos, cache_file) == expected
        decoded.clear()
        assert check_folder(photos, cache_file) == expected and decoded == []
    print(f"{total} faults, as many equal reports")


def test_the_cache_keeps_other_folders_until_it_is_full(photos, tmp_path, monkeypatch):
    other = zoo.good_folder(tmp_path / "other")
    for data_dir in (photos, other):
        check_folder(data_dir, tmp_path / "cache.json")
    assert cached_files(tmp_path / "cache.json") == 20
    zoo.put(photos / "train/hotdog/new.png")
    monkeypatch.setattr(check, "MAX_CACHED", 20)
    check_folder(photos, tmp_path / "cache.json")
    assert cached_files(tmp_path / "cache.json") == 11


def test_a_cache_that_cannot_be_written_does_no_harm(photos, tmp_path):
    (tmp_path / "file").touch()
    assert check_folder(photos, tmp_path / "file/cache.json").findings == []


def test_near_leaks_are_those_of_imagehash(tmp_path):
    rng = np.random.default_rng(0)
    train = rng.integers(0, 2, (300, 8, 8)).astype(bool)
    test = np.concatenate([train[:150], rng.integers(0, 2, (150, 8, 8)).astype(bool)])
    for number, bits in enumerate(test[:150]):  # 0 to 9 bits away from the train photo of the same number
        bits.flat[rng.choice(64, number % 10, replace=False)] ^= True
    hashes = {"train": train, "validation": rng.integers(0, 2, (9, 8, 8)).astype(bool), "test": test}
    photos = {split: {"a": [Path(f"{split}/{i}") for i in range(len(hashes[split]))]} for split in hashes}
    records = {
        path: check.Record(phash=str(imagehash.ImageHash(bits)), sha256=str(path))
        for split, group in hashes.items()
        for path, bits in zip(photos[split]["a"], group, strict=True)
    }
    found = {finding.files for finding in check._near_leaks(photos, records)}
    assert found == {
        (Path(f"test/{i}"), Path(f"train/{j}"))
        for i in range(300)
        for j in range(300)
        if imagehash.ImageHash(test[i]) - imagehash.ImageHash(train[j]) <= similar.NEAR_BITS
    }
    assert len(found) == 75


def test_names_of_signs_alone_are_not_alike():
    assert folder.plain_name("-") != folder.plain_name("_")
    assert folder.plain_name("Hot dog") == folder.plain_name("hot_dog ")


def test_unreadable_files_are_no_duplicates_of_each_other(photos):
    for name in ("train/hotdog/a.jpg", "test/hotdog/a.jpg"):
        (photos / name).write_bytes(b"")
    assert kinds(check_folder(photos)) == ["unreadable"]


def as_a_file_system_may_see_it(name):
    return unicodedata.normalize("NFC", name).casefold()


# Names as a file system allows them: up to 255 bytes, no slash, no NUL, and UTF-8 can write them.
name_parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=40)
starts = st.sampled_from(["", "-", "--help ", "train", "test.", "validation ", "hf:", " ", "x" * 60, "\n"])
names = st.builds("{}{}".format, starts, name_parts).filter(
    lambda name: name not in ("", ".", "..") and len(name.encode()) < 240
)
unique_names = st.lists(names, min_size=2, max_size=5, unique_by=as_a_file_system_may_see_it)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(unique_names)
def test_any_class_name_is_a_class_or_hidden(class_names):
    with tempfile.TemporaryDirectory() as root:
        for split in ("train", "test"):
            for number, name in enumerate(class_names):
                zoo.put(Path(root, split, name, f"{split} {number}.png"))
        expected = sorted(name for name in class_names if not folder.is_hidden(name))
        files = folder.list_photos(root)
        assert all(sorted(classes) == expected for classes in files.values())
        if len(expected) < 2:
            with pytest.raises(UserError, match="at least two class folders"):
                folder.find_photos(root)
            return
        loaded = load_photos(root)
        assert loaded["train"].features["label"].names == expected
        for split, rows in loaded.items():
            for row in rows:
                assert Path(row["image"]["path"]).parent == Path(root, split, expected[row["label"]])
        report = check_folder(root)
        alike = len({folder.plain_name(name) for name in expected}) < len(expected)
        assert ("similar-classes" in kinds(report)) == alike
        assert all(line.isprintable() for line in check.describe(report).split("\n"))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(unique_names, st.sampled_from([".png", ".JPG", ".tiff", ".txt", ""]))
def test_any_file_name_stays_in_its_split_and_class(file_names, suffix):
    with tempfile.TemporaryDirectory() as root:
        zoo.good_folder(Path(root))
        new = [Path(root, "train/salad/new", name + suffix) for name in file_names]
        for path in new:
            zoo.put(path)
        taken = [path for path in new if not folder.is_hidden(path.name)]
        taken = [path for path in taken if path.suffix.lower() in folder.IMAGE_SUFFIXES]
        files = folder.find_photos(root)
        assert set(files["train"]["salad"]) >= set(taken)
        assert sum(len(paths) for classes in files.values() for paths in classes.values()) == 10 + len(taken)
        report = check_folder(root)
        assert set(taken) | {f for finding in report.findings for f in finding.files} >= set(new)
        assert check.unreadable(report) == []


def test_the_progress_bar_is_for_terminals(photos, capsys, monkeypatch):
    for progress, shown in ((True, True), (False, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        check.check_folder(photos, cache_file=None, progress=progress)
        assert ("checking photos" in capsys.readouterr().err) == shown


def test_what_training_prints_of_the_check_is_in_words():
    findings = [check.Finding(kind, "a") for kind in ("near-leak", "near-leak", "hidden")]
    command = "python scripts/check_data.py my/photos"
    told = check.summary(check.Report({}, {Path("a"): check.Record()}, findings), command)
    assert told.splitlines() == [
        "1 photos checked:",
        "  warning: photos that look like one of an earlier split (2)",
        "  warning: hidden and system files; they are not used (1)",
        f"  to list them: {command}",
    ]
    assert check.summary(check.Report({}, {}, []), command) == "0 photos checked: nothing found"
