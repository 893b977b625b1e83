"""Photos of iPhones: read with pi-heif, named by the check without it."""

import base64
import shutil

import numpy as np
import pytest
from conftest import draw_photos

from hotdog_hf.data import check, divide, folder, images
from hotdog_hf.data.splits import load_photos
from hotdog_hf.errors import UserError

# 64 x 64 pixels: blue above row 20, red below.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAVZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABegABAAAAAAAAADUAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA1mlwcnAAAAC3aXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqSSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAiQAAAABNjb2xy"
    "bmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAABBwaXhpAAAAAAMICAgAAAAXaXBtYQAAAAAAAAABAAEEgQIDBAAAAD1t"
    "ZGF0AAAAMSgBrxmA26PE2et/+VDfcTA+M0wS79viMpr1RFjWMarpio75q1Takg6KG5Tm+EBlU0g="
)


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "test"):
        draw_photos(tmp_path / split, {"cat": 2, "dog": 2})
    (tmp_path / "train/cat/IMG_1.HEIC").write_bytes(HEIC)
    return tmp_path


def test_a_heic_photo_is_one_of_the_photos(photos):
    pytest.importorskip("pi_heif")
    assert len(load_photos(photos)["train"]) == 5
    report = check.check_folder(photos, cache_file=None, progress=False)
    assert report.findings == []
    record = report.records[photos / "train/cat/IMG_1.HEIC"]
    assert (record.format, record.width, record.height) == ("HEIF", 64, 64)
    pixels = np.asarray(images.decode_image(photos / "train/cat/IMG_1.HEIC")).astype(int)
    assert pixels.shape == (64, 64, 3) and pixels[5, 5, 2] > 150 > pixels[5, 5, 0]
    assert pixels[50, 5, 0] > 150 > pixels[50, 5, 2]


def test_without_its_library_the_check_names_a_heic_photo(photos, monkeypatch):
    for module in (images, folder):
        monkeypatch.setattr(module, "IMAGE_SUFFIXES", images.IMAGE_SUFFIXES - images.HEIF_SUFFIXES)
    monkeypatch.setattr(images.Image, "open", lambda *_: 1 / 0)
    assert len(load_photos(photos)["train"]) == 4
    with pytest.raises(UserError, match="HEIC needs pip install"):
        images.decode_image(photos / "train/cat/IMG_1.HEIC")
    monkeypatch.undo()
    monkeypatch.setattr(folder, "IMAGE_SUFFIXES", images.IMAGE_SUFFIXES - images.HEIF_SUFFIXES)
    [finding] = check.check_folder(photos, cache_file=None, progress=False).findings
    assert finding.kind == "heic" and "[heic]" in check.KINDS["heic"][1]


def test_a_folder_of_heic_photos_alone_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "IMAGE_SUFFIXES", images.IMAGE_SUFFIXES - images.HEIF_SUFFIXES)
    for place in ("cat", "dog"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        (tmp_path / "pictures" / place / "IMG_1.HEIC").write_bytes(HEIC)
    with pytest.raises(UserError, match=r"found none; HEIC files need pip install -e \"\.\[heic\]\""):
        divide.split_folder(tmp_path / "pictures", tmp_path / "photos", {"test": 0.2}, 0)
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "pictures", tmp_path / "photos" / split)
    with pytest.raises(UserError, match=r"no image in .*train/cat; .*; HEIC files need"):
        folder.find_photos(tmp_path / "photos")
    assert folder.heic_hint(tmp_path / "nothing") == ""
