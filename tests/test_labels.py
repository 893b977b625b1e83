"""Labels from a table: what its rows override, what is refused by line, and groups that nothing separates."""

import csv
import json
import os

import datasets
import numpy as np
import pytest
from conftest import ROOT, TINY_MODEL, draw_photos, run

from hotdog_hf.data import check, divide, groups, labels, splits
from hotdog_hf.data.loaders import FeatureDataset, PhotoDataset
from hotdog_hf.errors import UserError
from hotdog_hf.model import heads


@pytest.fixture
def photos(tmp_path):
    """8 + 8 photos to train, 3 + 3 to test."""
    draw_photos(tmp_path / "photos/train", {"cat": 8, "dog": 8})
    draw_photos(tmp_path / "photos/test", {"cat": 3, "dog": 3})
    return tmp_path / "photos"


def write(path, rows, header=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return [str(path)]


def labelled(loaded, folder):
    """The class of each photo by its path within the folder, split by split."""
    return {
        split: {
            os.path.relpath(row["image"]["path"], folder): rows.features["label"].int2str(row["label"])
            for row in rows
        }
        for split, rows in loaded.items()
    }


def test_rows_override_the_folders_and_the_others_keep_theirs(photos, tmp_path):
    before = labelled(splits.load_photos(photos), photos)
    rows = [["train/cat/001.png", "dog", "dog", "0.93"], ["train/dog/002.png", "dog", "cat", "0.61"]]
    table = write(tmp_path / "fixes.csv", rows, ("path", "label", "suggested", "confidence"))
    after = labelled(splits.load_photos(photos, labels=table), photos)
    assert after == {**before, "train": before["train"] | {"train/cat/001.png": "dog"}}
    assert "labels of 2 photos" in labels.describe(table, photos)
    assert "1 of them are in the folder of another class" in labels.describe(table, photos)
    # A spreadsheet saves semicolons, a mark in front, and Windows line ends.
    (tmp_path / "excel.csv").write_bytes(
        b"\xef\xbb\xbfpath;label;split\r\ntrain/cat/001.png;dog;val\r\ntrain/cat/002.png;cat;val\r\n"
    )
    moved = labelled(splits.load_splits(photos, labels=[str(tmp_path / "excel.csv")]), photos)
    assert moved["validation"]["train/cat/001.png"] == "dog" and len(moved["train"]) == 14


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["train/cat/001.png", "dgo"]], "line 2: label 'dgo' is none of .*is it 'dog'"),
        ([["train/cat/001.png", "dog"], ["train/cat/xyz.png", "dog"]], "line 3: no such photo"),
        ([["train/cat/001.png", ""]], "line 2: label is empty"),
        ([["", "dog"]], "line 2: the row names no photo"),
        ([["../x.png", "dog"]], "line 2: ../x.png is not a path within"),
        ([["test/cat/001.png", "dog"], ["test/./cat/001.png", "cat"]], "line 3: .* already has a row"),
        ([["train/cat/001.png", "dog", "holdout"]], "line 2: split 'holdout' is none of train"),
        ([["train/cat/001.png", "dog", "test", "g", "?"]], "line 2: more cells than the header"),
        ([["train/cat/001.png", "dog", "", "g"], ["test/cat/001.png", "cat", "", "g"]],
         "line 3: group 'g' is in test, and in train by .*line 2"),
        ([], "the table has no row"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_line(photos, tmp_path, rows, message):
    table = write(tmp_path / "labels.csv", rows, ("path", "label", "split", "group"))
    with pytest.raises(UserError, match=message) as error:
        splits.load_photos(photos, labels=table)
    assert "labels.csv" in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_imagefolder_gives_the_labels_that_datasets_reads(photos, tmp_path, kind):
    tables = []
    for split in ("train", "test"):
        flat = tmp_path / f"flat/{split}"
        flat.mkdir(parents=True)
        rows = []
        for path in sorted((photos / split).rglob("*.png")):
            path.rename(flat / f"{path.parent.name}{path.name}")
            rows.append({"file_name": f"{path.parent.name}{path.name}", "label": path.parent.name})
        tables.append(str(flat / f"metadata.{kind}"))
        if kind == "csv":
            write(flat / "metadata.csv", [row.values() for row in rows], ("file_name", "label"))
        else:
            (flat / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "flat"))
    ours = labelled(splits.load_photos(tmp_path / "flat", labels=tables), tmp_path / "flat")
    for split, rows in expected.items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        assert ours[split] == {
            os.path.relpath(row["image"]["path"], tmp_path / "flat"): row["label"] for row in rows
        }
    report = check.check_folder(tmp_path / "flat", tables, cache_file=None, progress=False)
    assert report.findings == []  # the tables themselves are no stray files


def test_a_folder_without_classes_takes_them_and_its_splits_from_the_table(tmp_path):
    draw_photos(tmp_path, {"all": 12})
    rows = [[f"all/{i:03}.png", "ab"[i % 2], "test" if i < 4 else "train"] for i in range(12)]
    table = write(tmp_path / "labels.csv", rows, ("path", "label", "split"))
    loaded = splits.load_photos(tmp_path, labels=table)
    assert {split: rows["label"][:].count(1) for split, rows in loaded.items()} == {"train": 4, "test": 2}
    with pytest.raises(UserError, match=r"line 2: .* is in no split"):
        splits.load_photos(tmp_path, labels=write(tmp_path / "short.csv", [row[:2] for row in rows]))


def test_groups_stay_on_one_side_of_a_cut_and_of_a_fold(photos, tmp_path):
    rows = [[f"train/{name}/{i:03}.png", name, f"{name}{i % 4}"] for name in ("cat", "dog") for i in range(8)]
    table = write(tmp_path / "labels.csv", rows, ("path", "label", "group"))
    for seed in range(4):
        cut = splits.load_photos(photos, 0.25, seed, labels=table)
        sides = [set(cut[split]["group"][:]) for split in ("train", "validation")]
        assert not sides[0] & sides[1] and len(cut["validation"]) == 4
    train = splits.load_splits(photos, labels=table)["train"]
    number = PhotoDataset(train, None).groups
    assert [number[i] == number[i + 4] for i in (0, 3, 8, 11)] == [True] * 4 and len(set(number)) == 8
    for learned, held_out in groups.stratified_folds(np.asarray(train["label"][:]), number, 5, seed=0):
        assert not {*number[learned]} & {*number[held_out]}
    one = write(tmp_path / "one.csv", [[*row[:2], row[1]] for row in rows], ("path", "label", "group"))
    train = splits.load_splits(photos, labels=one)["train"]
    with pytest.raises(UserError, match="two groups or more of every class"):
        heads.groups_of(FeatureDataset(PhotoDataset(train, None), None))


def test_a_cell_of_spaces_is_empty(photos, tmp_path):
    rows = [[f"train/cat/{number:03}.png", "cat", " ", " "] for number in range(2)]
    table = write(tmp_path / "labels.csv", rows, ("path", "label", "split", "group"))
    read = labels.read_tables(table, photos).values()
    assert [(row.split, row.group) for row in read] == [(None, None)] * 2


def test_what_shares_a_group_or_a_name_is_together():
    merged = groups.merge_groups(np.array([5, 5, 7, 8, 9, 9]), [None, "a", "a", "b", None, None])
    assert merged[0] == merged[1] == merged[2] and merged[4] == merged[5]
    assert len({merged[0], merged[3], merged[4]}) == 3
    assert len(set(groups.merge_groups(np.arange(3), [None] * 3))) == 3


def test_split_keeps_groups_and_hands_them_on(tmp_path):
    draw_photos(tmp_path / "pictures", {"cat": 20, "dog": 20})
    rows = [[f"{name}/{i:03}.png", name, f"{i // 2}"] for name in ("cat", "dog") for i in range(20)]
    table = write(tmp_path / "labels.csv", rows, ("path", "label", "group"))
    made = tmp_path / "made"
    divide.split_folder(tmp_path / "pictures", made, {"test": 0.2, "validation": 0.2}, 0, table)
    with (made / divide.GROUPS_FILE).open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == 40
    splits_of = {row["group"]: set() for row in written}
    for row in written:
        splits_of[row["group"]].add(row["split"])
        assert (made / row["path"]).is_file() and row["path"].startswith(f"{row['split']}/{row['label']}/")
    assert all(len(found) == 1 for found in splits_of.values())
    loaded = splits.load_photos(made, labels=[str(made / divide.GROUPS_FILE)])
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 24, "validation": 8, "test": 8}


def test_a_changed_table_is_another_run(photos, tmp_path):
    table = write(tmp_path / "labels.csv", [["train/cat/001.png", "dog"]])
    command = [
        "python",
        ROOT / "scripts/train.py",
        "--recipe",
        "probe",
        "--model",
        TINY_MODEL,
        "--weights",
        "none",
    ]
    command += ["--data-dir", photos, "--output-dir", tmp_path / "run", "--resume", "auto", "--labels"]
    out = run(*command, *table)
    assert out.returncode == 0 and "labels of 1 photos" in out.stdout, out.stderr
    same = write(
        tmp_path / "renamed.csv", [["train/cat/./001.png", "dog", "?"]], ("path", "label", "suggested")
    )
    assert labels.digest(same, photos) == labels.digest(table, photos)
    out = run(*command, *write(tmp_path / "labels.csv", [["train/cat/001.png", "cat"]]))
    assert out.returncode == 2 and "--labels gives photos other labels" in out.stderr
