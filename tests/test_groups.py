"""No cut separates copies: content groups, and the validation split that is cut by them."""

import collections
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT, draw_photos, run
from PIL import Image
from test_engine import TWO_PROCESSES

from hotdog_hf.data import groups, splits
from hotdog_hf.errors import UserError


@pytest.fixture
def half_twice(tmp_path):
    """20 + 40 train photos; half of them once more, as they are or saved anew as a smaller JPEG."""
    draw_photos(tmp_path / "train", {"a": 20, "b": 40})
    draw_photos(tmp_path / "test", {"a": 1, "b": 1})
    for name, count in (("a", 20), ("b", 40)):
        for index in range(0, count, 2):
            photo, copy = tmp_path / f"train/{name}/{index:03}.png", tmp_path / f"train/{name}/copy{index:03}"
            if index % 4:
                shutil.copy(photo, copy.with_suffix(".png"))
            else:
                smooth(photo)
                with Image.open(photo) as image:
                    image.resize((100, 90)).save(copy.with_suffix(".jpg"))
    return tmp_path


def smooth(photo):
    """Draw a picture that keeps its look when it is resized, unlike noise; another one for each path."""
    seed = [ord(letter) for letter in f"{photo.parent.name}{photo.name}"]
    waves = np.random.default_rng(seed).uniform(0, 255, (5, 4, 3)).astype(np.uint8)
    Image.fromarray(waves).resize((72, 56), Image.Resampling.BICUBIC).save(photo)


def originals(rows):
    return {
        row["image"]["path"].rpartition("/")[2].removeprefix("copy")[:3] + str(row["label"]) for row in rows
    }


@pytest.mark.parametrize("seed", range(3))
def test_with_half_of_train_duplicated_no_photo_is_on_both_sides(half_twice, seed):
    cut = splits.load_photos(half_twice, 0.2, seed)
    assert len(cut["train"]) + len(cut["validation"]) == 90
    assert not originals(cut["train"]) & originals(cut["validation"])
    assert collections.Counter(cut["validation"]["label"]) == {0: 6, 1: 12}  # a fifth of each class
    again = splits.load_photos(half_twice, 0.2, seed)
    assert again["validation"]["image"][:] == cut["validation"]["image"][:]
    other = splits.load_photos(half_twice, 0.2, seed + 1)
    assert other["validation"]["image"][:] != cut["validation"]["image"][:]


def test_without_copies_the_cut_is_scikit_learns(photos_dir):
    train = splits.load_splits(photos_dir)["train"]
    expected = train.train_test_split(0.3, stratify_by_column="label", seed=4)
    cut = splits.load_photos(photos_dir, 0.3, 4)
    for ours, theirs in ((cut["train"], expected["train"]), (cut["validation"], expected["test"])):
        assert ours["image"][:] == theirs["image"][:]


def test_photos_of_the_hub_have_the_groups_of_their_files(half_twice):
    rows = splits.load_splits(half_twice)["train"]
    held = [{"path": None, "bytes": Path(row["image"]["path"]).read_bytes()} for row in rows]
    held[3]["bytes"] = b"no image"
    features = datasets.Features(image=datasets.Image(decode=False))
    there = groups.content_groups(datasets.Dataset.from_dict({"image": held}, features=features))
    here = groups.content_groups(rows)
    assert len(set(here.tolist())) == 60
    assert (there == there[3]).sum() == 1
    others = np.arange(len(rows)) != 3
    pairs = set(zip(here[others].tolist(), there[others].tolist(), strict=True))
    assert len(pairs) == len(set(here[others].tolist())) == len(set(there[others].tolist()))


def test_a_group_of_two_classes_stays_whole():
    labels, pairs = np.arange(40) % 2, np.arange(40) // 2  # each photo once as a and once as b
    held_back = groups.hold_back(labels, pairs, 0.25, 0)
    assert np.bincount(labels[held_back]).tolist() == [5, 5]
    assert set(pairs[held_back]).isdisjoint(np.delete(pairs, held_back))


def test_groups_larger_than_their_share_leave_a_class_its_smallest():
    labels, triples = np.repeat([0, 1], 9), np.arange(18) // 3
    held_back = groups.hold_back(labels, triples, 0.1, 0)
    assert np.bincount(labels[held_back]).tolist() == [3, 3]
    with pytest.raises(ValueError, match="9 photos of class 0 are copies"):
        groups.hold_back(labels, np.where(labels == 0, 0, triples), 0.1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_no_class_is_held_back_whole(seed):
    """The second photo of class 0 is like one of class 1, whose other photos are too many for its share."""
    labels, together = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 2, 2])
    held_back = groups.hold_back(labels, together, 0.2, seed)
    assert set(np.delete(labels, held_back)) == set(labels[held_back]) == {0, 1}
    with pytest.raises(ValueError, match="class 0 has too few photos for two sides: 1"):
        groups.hold_back(labels[1:], np.array([0, 1, 2, 2]), 0.2, seed)


def test_a_class_of_copies_alone_is_one_clear_error(tmp_path):
    draw_photos(tmp_path / "train", {"a": 1, "b": 4})
    draw_photos(tmp_path / "test", {"a": 1, "b": 1})
    for number in range(3):
        shutil.copy(tmp_path / "train/a/000.png", tmp_path / f"train/a/copy{number}.png")
    with pytest.raises(UserError, match=r"--val-fraction 0\.25: the 4 photos of class 0 are copies"):
        splits.load_photos(tmp_path, 0.25)


def test_one_process_checks_for_all_of_its_machine(half_twice, tmp_path):
    (half_twice / "train/a/broken.png").write_bytes(b"no image")
    # Nothing can be read back from a cache that cannot be written.
    (tmp_path / "file").touch()
    script = (ROOT / "tests/check_together.py", half_twice, tmp_path / "out")
    done = run(*TWO_PROCESSES, *script, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out-{rank}").read_text()) for rank in (0, 1))
    assert first[0] > 90 and second[0] == 0
    assert first[1:] == second[1:] and len(first[1]) == 18
    assert first[2] == [str(half_twice / "train/a/broken.png")]
    assert first[3] >= 3600  # others wait for as long as the check takes
