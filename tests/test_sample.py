"""Tests of the drawn sample set."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hotdog_hf.data import check, sample
from hotdog_hf.data.sample import LABELS, LOOKALIKES, MARKER, draw_image, draw_sample, kind_at
from hotdog_hf.errors import UserError

SMALL = {"train": 4, "test": 2, "progress": False}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample that the tests read but never change."""
    return draw_sample(tmp_path_factory.mktemp("sample") / "small", **SMALL)


@pytest.fixture
def copy(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the small sample that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_counts(drawn: Path) -> None:
    expected = {f"train/{label}/{index:04d}.jpg" for label in LABELS for index in range(2)}
    expected |= {f"test/{label}/0000.jpg" for label in LABELS}
    assert set(contents(drawn)) == expected | {MARKER}


def test_the_check_finds_nothing_in_a_sample(drawn: Path) -> None:
    assert check.check_folder(drawn, cache_file=None, progress=False).findings == []


def test_the_progress_bar_is_for_terminals(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, terminal in enumerate((True, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        draw_sample(tmp_path / str(number), train=2, test=0)
        assert ("Drawing sample images" in capsys.readouterr().err) == terminal


def test_only_the_sample_is_left_in_the_parent_folder(drawn: Path) -> None:
    assert list(drawn.parent.iterdir()) == [drawn]


def test_same_bytes_when_drawn_again(drawn: Path, tmp_path: Path) -> None:
    assert contents(draw_sample(tmp_path / "again", **SMALL)) == contents(drawn)


def test_an_image_does_not_depend_on_what_was_drawn_before() -> None:
    first = draw_image("hotdog", seed=3, split="test", index=5)
    draw_image("not-hotdog", seed=3, split="test", index=0)
    assert draw_image("hotdog", seed=3, split="test", index=5).tobytes() == first.tobytes()


def test_seed_split_label_and_index_each_change_the_image() -> None:
    base = {"label": "hotdog", "seed": 0, "split": "train", "index": 0}
    changes = ({}, {"seed": 1}, {"split": "test"}, {"label": "not-hotdog"}, {"index": 1})
    assert len({draw_image(**base | change).tobytes() for change in changes}) == len(changes)


def test_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="not-hotdog"):
        draw_image("cat", seed=0, split="train", index=0)


def test_images_are_rgb_and_vary_in_size_and_aspect(drawn: Path) -> None:
    aspects = set()
    for path in drawn.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 200 <= max(image.size) <= 400
            aspects.add(round(image.width / image.height, 2))
    assert len(aspects) >= 3


def test_complete_sample_is_reused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "draw_image", lambda *_, **__: pytest.fail("drawn again"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert draw_sample(copy, **SMALL) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_incomplete_sample_is_redrawn(copy: Path, drawn: Path) -> None:
    (copy / "train" / "hotdog" / "0001.jpg").unlink()
    assert contents(draw_sample(copy, **SMALL)) == contents(drawn)


def test_sample_of_another_seed_or_version_is_redrawn(copy: Path, drawn: Path) -> None:
    assert contents(draw_sample(copy, **SMALL, seed=1)) != contents(drawn)
    marker = copy / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"generator_version": 0, "seed": 0}))
    assert contents(draw_sample(copy, **SMALL)) == contents(drawn)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    folder = draw_sample(tmp_path, train=2, test=0, progress=False)
    assert len(contents(folder)) == 3


@pytest.mark.parametrize("name", ["holiday.png", "train/hotdog/0000.jpg", MARKER])
def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "photos"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=r"photos.*another folder"):
        draw_sample(folder, **SMALL)
    assert contents(tmp_path) == {f"photos/{name}": b"{}"}


def test_file_added_to_a_sample_is_never_deleted(copy: Path) -> None:
    (copy / "train" / "hotdog" / "mine.jpg").write_text("kept")
    with pytest.raises(UserError, match=r"mine\.jpg"):
        draw_sample(copy, **SMALL, seed=1)
    assert (copy / "train" / "hotdog" / "mine.jpg").read_text() == "kept"


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sample"
    path.write_text("kept")
    with pytest.raises(UserError):
        draw_sample(path, **SMALL)
    assert path.read_text() == "kept"


def test_interrupted_drawing_keeps_the_old_sample(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copy.parent)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draw_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(copy, **SMALL, seed=1)
    assert contents(copy.parent) == before


@pytest.mark.parametrize(("split", "count"), [("train", 100), ("test", 50)])
def test_every_lookalike_occurs_about_equally_often(split: str, count: int) -> None:
    kinds = [kind_at(0, split, index) for index in range(count)]
    tally = [kinds.count(kind) for kind in LOOKALIKES]
    assert len(tally) >= 12
    assert min(tally) >= count // len(LOOKALIKES)
    assert max(tally) <= count // len(LOOKALIKES) + 1


def test_every_lookalike_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in LOOKALIKES:
        monkeypatch.setattr(sample, "kind_at", lambda *_, kind=kind: kind)
        draw_image("not-hotdog", seed=0, split="test", index=0)


def test_colour_alone_does_not_separate_the_labels() -> None:
    def colours(split: str, count: int) -> np.ndarray:
        """Give a (label, image, feature) array of pictures shrunk to 4x4 pixels."""
        pictures = [
            [draw_image(label, seed=0, split=split, index=i) for i in range(count)] for label in LABELS
        ]
        small = [
            [np.asarray(picture.resize((4, 4), Image.Resampling.BOX)) for picture in row] for row in pictures
        ]
        return np.reshape(small, (len(LABELS), count, -1)).astype(float)

    centres = colours("train", 16).mean(axis=1)
    test = colours("test", 12)
    distances = np.linalg.norm(test[:, :, None] - centres, axis=-1)
    accuracy = (distances.argmin(axis=-1) == np.arange(len(LABELS))[:, None]).mean()
    assert accuracy < 0.75
