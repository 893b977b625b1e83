import pytest
from conftest import ROOT, draw_photos, run
from PIL import Image

from hotdog_hf.data import check, divide, folder
from hotdog_hf.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    """Ten photos of each of two classes; one of them twice, under another name."""
    draw_photos(tmp_path / "pictures", {"cat": 10, "dog": 10})
    first = min((tmp_path / "pictures/cat").iterdir())
    (first.parent / "copy.png").write_bytes(first.read_bytes())
    return tmp_path / "pictures"


def names(made):
    return {
        split: {name: {path.name for path in paths} for name, paths in classes.items()}
        for split, classes in made.items()
    }


def test_every_photo_goes_to_one_side_and_a_copy_goes_with_its_original(pictures, tmp_path):
    (pictures / "cat/phone.mov").touch()
    done = run("python", ROOT / "scripts/split.py", pictures, tmp_path / "photos", "--val-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    assert (
        f"left out: 1 files not named as images or outside <class>/*, first {pictures}/cat/phone.mov"
        in done.stdout
    )
    (pictures / "cat/phone.mov").unlink()
    made = names(folder.find_photos(tmp_path / "photos"))
    for name in ("cat", "dog"):
        sides = [made[split][name] for split in ("train", "validation", "test")]
        assert sorted(photo for side in sides for photo in side) == sorted(
            path.name for path in (pictures / name).iterdir()
        )
    assert {split: len(classes["dog"]) for split, classes in made.items()} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }
    report = check.check_folder(tmp_path / "photos", cache_file=None, progress=False)
    assert not [finding for finding in report.findings if finding.kind == "leak"]


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_go_to_one_side_whatever_their_names(pictures, tmp_path, seed):
    for path in sorted((pictures / "cat").glob("*.png"))[:8]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=90)
    made, _ = divide.split_folder(pictures, tmp_path / "photos", {"test": 0.3}, seed)
    report = check.check_folder(tmp_path / "photos", cache_file=None, progress=False)
    assert not [finding for finding in report.findings if finding.kind in ("leak", "near-leak")]
    assert 4 <= len(made["test"]["cat"]) <= 7 and len(made["test"]["dog"]) == 3
    for path in sorted((pictures / "cat").iterdir()):
        path.rename(path.with_name(f"{path.read_bytes()[-20:].hex()}{path.name}"))
    again, _ = divide.split_folder(pictures, tmp_path / "again", {"test": 0.3}, seed)
    assert {p.read_bytes() for p in again["test"]["cat"]} == {p.read_bytes() for p in made["test"]["cat"]}


def test_the_division_goes_by_content_and_seed(pictures, tmp_path):
    def test_photos(target, seed=0):
        made, _ = divide.split_folder(pictures, tmp_path / target, {"test": 0.3}, seed)
        return {path.read_bytes() for path in made["test"]["dog"]}

    before, other_seed = test_photos("one"), test_photos("two", seed=1)
    for path in (pictures / "dog").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    assert test_photos("three") == before != other_seed


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda source, target: target.mkdir(), "already exists"),
        (lambda source, target: source.rename(source.with_name("gone")), "no such folder"),
        (lambda source, target: (source / "cat").rename(source / ".cat"), "at least two folders of photos"),
        (
            lambda source, target: [path.unlink() for path in sorted((source / "dog").iterdir())[1:]],
            "dog has too few photos",
        ),
        (
            lambda source, target: [
                (source / a).rename(source / b) for a, b in (("cat", "train"), ("dog", "test"))
            ],
            "already",
        ),
    ],
)
def test_what_cannot_be_split_leaves_nothing(pictures, tmp_path, harm, message):
    target = tmp_path / "photos"
    harm(pictures, target)
    with pytest.raises(UserError, match=message):
        divide.split_folder(pictures, target, {"test": 0.2}, 0)
    assert not target.exists() or not list(target.iterdir())
    assert not list(tmp_path.glob("photos.*"))
