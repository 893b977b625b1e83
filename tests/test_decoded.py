"""The cache of decoded photos: the same pixels with and without it, bounded, and never a damaged one."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_photos
from PIL import Image
from test_resume import FLAGS, StopAfter, assert_same_run, train_here

from hotdog_hf.config import DataConfig
from hotdog_hf.data import decoded, prepare, transforms
from hotdog_hf.data.decoded import DecodedCache
from hotdog_hf.data.images import Photo, UnreadableImageError
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@pytest.fixture
def cache(tmp_path):
    return DecodedCache(tmp_path / "cache", 10**9)


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((603, 451)).save(tmp_path / "photo.jpg", quality=92)
    return tmp_path / "photo.jpg"


def cached_files(cache):
    return sorted(cache.folder.glob("*/*.rgb"))


def never():
    raise AssertionError("decoded again")


@pytest.mark.parametrize("transform", [transforms.eval_transform(CONFIG), transforms.train_transform(CONFIG)])
def test_pixels_are_the_same_bits_with_a_cache_and_without(cache, photo, transform, monkeypatch):
    transparent = photo.with_name("transparent.png")
    Image.open(photo).convert("RGBA").rotate(20).save(transparent)
    sources = [photo, photo.read_bytes(), transparent]
    for epoch in (1, 2):
        expected = [transform.pixels(Photo(source), 0, epoch) for source in sources]
        found = [transform.pixels(Photo(source, cache), 0, epoch) for source in sources]
        assert all(map(torch.equal, expected, found))
        monkeypatch.setattr("hotdog_hf.data.images._decode_jpeg", lambda *_: never())
        monkeypatch.setattr("hotdog_hf.data.images._upright", lambda *_: never())
        found = [transform.pixels(Photo(source, cache), 0, epoch) for source in sources]
        assert all(map(torch.equal, expected, found))
        monkeypatch.undo()
    assert len(cached_files(cache)) == 3


def test_all_crops_of_a_photo_come_from_one_decoding(cache, photo):
    crop = transforms.train_transform(CONFIG)
    for epoch in range(20):
        crop.pixels(Photo(photo, cache), 0, epoch)
    assert len(cached_files(cache)) == 1


def test_a_changed_photo_is_decoded_again_and_a_broken_one_is_not_kept(cache, photo):
    padded = photo.read_bytes().ljust(500_000, b"\0")  # decoders ignore what follows the image
    photo.write_bytes(padded)
    Photo(photo, cache).decode(4)
    status = photo.stat()
    with Image.open(photo) as image:
        turned = image.rotate(180)
    turned.save(photo, quality=92)
    photo.write_bytes(photo.read_bytes().ljust(len(padded), b"\0"))
    os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Photo(photo, cache).decode(4).tobytes() == Photo(photo).decode(4).tobytes()
    photo.write_bytes(photo.read_bytes().rstrip(b"\0")[:-2000])
    for _ in range(2):
        with pytest.raises(UnreadableImageError, match=r"photo\.jpg"):
            Photo(photo, cache).decode(4)
    assert len(cached_files(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "size", "empty", "another photo's"])
def test_a_damaged_file_is_decoded_again_and_replaced(cache, photo, damage):
    pixels = Photo(photo, cache).decode(4).tobytes()
    [file] = cached_files(cache)
    whole = file.read_bytes()
    if damage == "another photo's":
        Photo(photo, cache).decode(2)
        [other] = set(cached_files(cache)) - {file}
        file.write_bytes(other.read_bytes())
    else:
        width, height = whole[16:20], whole[20:24]
        broken = {
            "cut": whole[:-1],
            "bit": whole[:-1] + bytes([whole[-1] ^ 1]),
            "size": whole[:16] + height + width + whole[24:],  # as many pixels, in rows of another length
            "empty": b"",
        }
        file.write_bytes(broken[damage])
    assert Photo(photo, cache).decode(4).tobytes() == pixels
    assert file.read_bytes() == whole


def test_other_versions_of_the_decoders_have_other_files(cache, photo, monkeypatch):
    Photo(photo, cache).decode(4)
    assert cache.holds(photo, 4)
    assert not cache.holds(photo, 2)
    monkeypatch.setattr(decoded, "decoder_versions", lambda: ["another Pillow"])
    assert not cache.holds(photo, 4)


def test_a_full_cache_writes_nothing_and_the_least_recently_used_make_room(tmp_path, photo):
    size = {by: 24 + 3 * -(-603 // by) * -(-451 // by) for by in (1, 2, 4)}
    cache = DecodedCache(tmp_path / "cache", size[2] + size[4])
    for by in (2, 4, 1, 2):
        assert Photo(photo, cache).decode(by).tobytes() == Photo(photo).decode(by).tobytes()
    assert [cache.holds(photo, by) for by in (1, 2, 4)] == [False, True, True]
    os.utime(cache._file(photo, 2), (1, 1))
    cache.make_room(0)
    assert len(cached_files(cache)) == 2
    others = [cache.folder / "my/photo.rgb", cache.folder / "notes.txt"]
    others[0].parent.mkdir()
    for other in others:
        other.touch()
        os.utime(other, (0, 0))
    cache.make_room(1)
    assert all(other.exists() for other in others)
    assert [cache.holds(photo, by) for by in (2, 4)] == [False, True]
    os.utime(cache._file(photo, 4), (1, 1))
    Photo(photo, cache).decode(4)
    assert cache._file(photo, 4).stat().st_mtime > 1  # used a moment ago


def test_a_full_disk_and_a_folder_without_permission_cost_only_time(cache, photo, monkeypatch):
    monkeypatch.setattr(decoded, "MIN_FREE_BYTES", shutil.disk_usage(photo.parent).total)
    expected = Photo(photo).decode(4).tobytes()
    assert Photo(photo, cache).decode(4).tobytes() == expected
    assert not cached_files(cache)
    nowhere = DecodedCache(photo / "cache", 10**9)  # below a file
    assert Photo(photo, nowhere).decode(4).tobytes() == expected


def draw_jpegs(folder, size):
    for split, count in (("train", 5), ("test", 3)):
        draw_photos(folder / split, {"hotdog": count, "not-hotdog": count}, size)
    for path in list(folder.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    return folder


def photos_of(folder, size):
    return Photos(load_photos(draw_jpegs(folder, size)), folder)


def choose(photos, reads=2, **knobs):
    uses = {split: [transforms.eval_transform(CONFIG)] for split in photos.splits}
    return prepare.choose_cache(DataConfig(**knobs), photos, uses, reads)


def test_auto_caches_large_photos_that_are_read_again_and_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare, "LARGE_PHOTO", 200 * 200)
    large, small = photos_of(tmp_path / "large", (200, 200)), photos_of(tmp_path / "small", (72, 56))
    cache, line = choose(large)
    assert cache.folder == tmp_path / "home/hotdog_hf/decoded"
    assert line == f"caching 16 decoded photos in {cache.folder}: about 0.0 GB of 10 GB"
    assert choose(small) == choose(large, reads=1) == choose(large, cache_images="off") == (None, "")
    cache, line = choose(large, cache_size=1e-6)
    assert cache is None
    assert "more than --cache-size 1e-06" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    cache, line = choose(large)
    assert cache is None
    assert "0.0 GB free" in line
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert choose(large) == (None, "")


def test_a_given_folder_is_used_for_any_photos_and_must_be_writable(tmp_path):
    photos = photos_of(tmp_path / "small", (72, 56))
    cache, line = choose(photos, reads=1, cache_images=str(tmp_path / "given"))
    assert cache.folder == tmp_path / "given"
    assert str(cache.folder) in line
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        choose(photos, cache_images=str(tmp_path / "file"))


@pytest.mark.parametrize(
    "knobs",
    [{"cache_size": 0}, {"cache_size": float("inf")}, {"streaming": True, "cache_images": "somewhere"}],
)
def test_knobs_that_cannot_work_are_rejected(knobs):
    with pytest.raises(ValueError, match="--cache-"):
        DataConfig(**knobs)


def test_a_run_resumed_with_a_cache_ends_with_the_same_bits(tmp_path, tiny_weights):
    photos = draw_jpegs(tmp_path / "photos", (520, 400))
    flags = (*FLAGS, "--epochs", 2, "--train-image-size", 32)
    train_here(tiny_weights, photos, tmp_path / "without", *flags, "--cache-images", "off")
    cached = (*flags, "--cache-images", tmp_path / "cache", "--checkpoint-every", 1, "--resume", "auto")
    train_here(tiny_weights, photos, tmp_path / "with", *flags, "--checkpoint-every", 1, stop=StopAfter(3))
    train_here(tiny_weights, photos, tmp_path / "with", *cached)
    assert cached_files(DecodedCache(tmp_path / "cache", 1))
    assert_same_run(tmp_path / "with", tmp_path / "without")
