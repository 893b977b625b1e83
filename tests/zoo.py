"""Hostile images and hostile folders, each with what must come of it."""

import gzip
import io
import os
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import draw_photos
from PIL import Image, ImageCms, features

WIDTH, HEIGHT = 48, 40


@dataclass(frozen=True)
class Beast:
    """A file named `name` made by `make(path)`: the kinds of finding about it, and how it decodes.

    `size` is that of the decoded image; None where it must be refused with a message that matches `says`.
    """

    name: str
    make: Callable[[Path], object]
    kinds: tuple[str, ...] = ()
    size: tuple[int, int] | None = (WIDTH, HEIGHT)
    says: str = ""


def picture(mode: str = "RGB") -> Image.Image:
    """Draw a smooth picture like none of `draw_photos`, which keeps its look through any format."""
    waves = np.random.default_rng(7).uniform(0, 255, (5, 4, 3)).astype(np.uint8)
    return Image.fromarray(waves).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


JPEG, PNG = encoded(picture(), "JPEG"), encoded(picture(), "PNG")


def refused(name: str, content: bytes, says: str = "cannot identify image file") -> Beast:
    return Beast(name, lambda path: path.write_bytes(content), ("unreadable",), None, says)


def read(name: str, content: bytes, *kinds: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Beast:
    return Beast(name, lambda path: path.write_bytes(content), kinds, size)


def animation(image_format: str) -> bytes:
    return encoded(picture(), image_format, save_all=True, append_images=[picture().rotate(180)])


def exif(orientation: int = 6) -> bytes:
    """Return an EXIF block, big-endian, with a description before the rotation and a resolution behind it."""
    tags = Image.Exif()
    tags[0x010E], tags[0x0112], tags[0x011A] = "a description", orientation, 72.0
    return tags.tobytes()


def jpeg_with_exif(block: bytes) -> bytes:
    return encoded(picture(), "JPEG", exif=block)


def entry_at(block: bytes, tag: bytes) -> int:
    return block.index(tag, 14)


def misplaced_description() -> bytes:
    """Let the description point behind the end of the block: Pillow stops there, before the rotation."""
    block = exif()
    at = entry_at(block, b"\x01\x0e") + 8
    return block[:at] + b"\x0f\xff\xff\xff" + block[at + 4 :]


def mistyped_resolution() -> bytes:
    """Call the resolution a text: it can be read but not written again, which Pillow does as it rotates."""
    block = exif()
    at = entry_at(block, b"\x01\x1a") + 2
    return block[:at] + b"\x00\x02" + block[at + 2 :]


def broken_header() -> bytes:
    """Take away the 42 by which a TIFF header is known; the rotation behind it is in its place."""
    block = exif()
    return block[:8] + bytes(2) + block[10:]


def bad_crc() -> bytes:
    at = PNG.index(b"IDAT") + 10
    return PNG[:at] + bytes([PNG[at] ^ 255]) + PNG[at + 1 :]


def giant_header() -> bytes:
    """A PNG of 1 kB that says it has 60,000 x 60,000 pixels: 11 GB when decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    at = PNG.index(b"IHDR") - 4
    return PNG[: at + 4] + header + struct.pack(">I", zlib.crc32(header)) + PNG[at + 25 :]


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that its colours are YCCK."""
    content = encoded(picture("CMYK"), "JPEG")
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\x02" + content[at + 1 :]


def transparent_palette() -> bytes:
    return encoded(picture().quantize(16), "PNG", transparency=3)


def dds_without_format() -> bytes:
    """A DDS whose pixel format says nothing: Pillow raises NotImplementedError."""
    content = bytearray(encoded(picture("RGBA"), "DDS"))
    content[80:84] = bytes(4)
    return bytes(content)


def broken_avif() -> bytes:
    """An AVIF without its picture: Pillow raises RuntimeError."""
    content = encoded(picture(), "AVIF")
    at = content.index(b"mdat") + 4
    return content[:at] + bytes(len(content) - at)


def numbers(dtype: type, top: float) -> Image.Image:
    return Image.fromarray((np.asarray(picture("L"), np.float64) / 255 * top).astype(dtype))


def nan_pixels() -> Image.Image:
    return Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32))


def lock(path: Path) -> None:
    path.write_bytes(JPEG)
    path.chmod(0)


GRAY_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()

BEASTS = [
    # No image at all.
    refused("zero-bytes.jpg", b""),
    refused("page.jpg", b"<!DOCTYPE html><html><body>404 not found</body></html>"),
    refused("notes.png", "kein Bild".encode("utf-16")),
    refused("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'),
    refused("document.jpg", encoded(picture(), "PDF")),
    refused("archive.jpg", gzip.compress(JPEG)),
    refused("iphone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)),
    refused("wrong-magic.jpg", b"\0" + JPEG[1:]),
    # Images that break off or are damaged.
    refused("half.jpg", JPEG[:-100], "truncated"),
    refused("half.png", PNG[: len(PNG) // 2], "truncated"),
    refused("half.webp", (webp := encoded(picture(), "WEBP"))[: len(webp) // 2], "could not create decoder"),
    refused("half.gif", (gif := encoded(picture(), "GIF"))[: len(gif) // 2], "truncated"),
    refused("half.bmp", (bmp := encoded(picture(), "BMP"))[: len(bmp) // 2], "truncated"),
    refused("half.tif", (tif := encoded(picture(), "TIFF"))[: len(tif) // 2], "truncated"),
    refused("bad-crc.png", bad_crc(), "broken data stream"),
    refused("no-format.png", dds_without_format(), "Unknown pixel format"),
    refused("no-numbers.tif", encoded(nan_pixels(), "TIFF"), "mode F with values from nan to nan"),
    # The tail of a picture that was cut and closed again is grey; no decoder minds, nor does the check.
    read("half-but-closed.jpg", JPEG[: len(JPEG) - 60] + b"\xff\xd9"),
    read("no-end.png", PNG[:-12]),
    read("more-behind.jpg", JPEG + b"<?php ?>" * 99),
    # Not what the name says.
    read("png.jpg", PNG, "suffix"),
    read("jpeg.PNG", JPEG, "suffix"),
    read("UPPER.JPEG", JPEG),
    read("phone.jpg", animation("MPO")),
    # EXIF.
    read("rotated.jpg", jpeg_with_exif(exif()), size=(HEIGHT, WIDTH)),
    read("rotated.png", encoded(picture(), "PNG", exif=exif(8)), size=(HEIGHT, WIDTH)),
    read("exif-empty.jpg", jpeg_with_exif(Image.Exif().tobytes())),
    read("exif-garbage.jpg", jpeg_with_exif(b"Exif\0\0garbage"), "exif"),
    read("exif-cut.jpg", jpeg_with_exif(exif()[:24]), "exif"),
    read("exif-bad-offset.jpg", jpeg_with_exif(misplaced_description()), "exif"),
    read("exif-bad-type.jpg", jpeg_with_exif(mistyped_resolution()), size=(HEIGHT, WIDTH)),
    read("exif-orientation-99.jpg", jpeg_with_exif(exif(99))),
    *(
        read(f"exif-header.{kind.lower()}", encoded(picture(), kind, exif=broken_header()), "exif")
        for kind in ("JPEG", "PNG", "WEBP")
    ),
    # Modes.
    read("cmyk.jpg", encoded(picture("CMYK"), "JPEG")),
    read("ycck.jpg", ycck()),
    read("gray16.png", encoded(numbers(np.uint16, 65535), "PNG")),
    read("gray16.tif", encoded(numbers(np.uint16, 65535), "TIFF")),
    read("int32.tif", encoded(numbers(np.int32, 65535), "TIFF")),
    read("float.tif", encoded(numbers(np.float32, 1), "TIFF")),
    read("lab.tif", encoded(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF")),
    read("one-bit.png", encoded(picture("1"), "PNG")),
    read("palette.png", transparent_palette()),
    read("la.png", encoded(picture("LA"), "PNG")),
    read("rgba.png", encoded(picture("RGBA"), "PNG")),
    read("progressive.jpg", encoded(picture(), "JPEG", progressive=True)),
    read("gray-profile.jpg", encoded(picture("L"), "JPEG", icc_profile=GRAY_PROFILE)),
    # Several pictures in one.
    read("moving.gif", animation("GIF"), "animated"),
    read("moving.webp", animation("WEBP"), "animated"),
    read("moving.png", animation("PNG"), "animated"),
    read("pages.tif", animation("TIFF"), "animated"),
    # Sizes.
    read("dot.png", encoded(picture().resize((1, 1)), "PNG"), "tiny", size=(1, 1)),
    read("line.png", encoded(picture().resize((3000, 1)), "PNG"), "tiny", size=(3000, 1)),
    Beast("bomb.png", lambda path: path.write_bytes(giant_header()), ("bomb",), None, "3600000000 pixels"),
    Beast("huge.png", lambda path: Image.new("1", (10_000, 9_000)).save(path), ("bomb",), None, "too many"),
    # No files, or files that cannot be opened.
    Beast("gone.jpg", lambda path: path.symlink_to("nowhere.jpg"), ("unreadable",), None, "No such file"),
    Beast("loop.jpg", lambda path: path.symlink_to(path.name), ("unreadable",), None, "symbolic links"),
    Beast("pipe.jpg", lambda path: os.mkfifo(path), ("unreadable",), None, "a pipe|not a regular file"),
]
if features.check("avif"):
    BEASTS.append(refused("broken.avif", broken_avif(), "decode"))
if os.geteuid():  # root reads everything
    BEASTS.append(Beast("locked.jpg", lock, ("unreadable",), None, "Permission denied"))


@dataclass(frozen=True)
class Den:
    """What `harm(folder)` does to a good data folder: the kinds of finding, and a pattern of their messages.

    `photos` is the change in the number of photos. Where nothing can be checked, `kinds` is None.
    """

    harm: Callable[[Path], object]
    kinds: tuple[str, ...] | None = ()
    says: str = ""
    photos: int = 0


def good_folder(folder: Path) -> Path:
    """Make 2 classes of 3 photos to train and 2 to test, in which nothing is wrong."""
    draw_photos(folder / "train", {"hotdog": 3, "salad": 3})
    draw_photos(folder / "test", {"hotdog": 2, "salad": 2})
    return folder


def put(path: Path, content: bytes | Path = PNG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def rename_class(folder: Path, split: str, new: str, old: str = "hotdog") -> None:
    (folder / split / old).rename(folder / split / new)


def mac_zip(folder: Path) -> None:
    for name in ("__MACOSX/train/hotdog/000.png", "train/hotdog/._000.png", "train/.DS_Store", "__MACOSX/x"):
        put(folder / name)


def two_forms_of_one_name(folder: Path) -> None:
    rename_class(folder, "train", unicodedata.normalize("NFC", "brötchen"))
    rename_class(folder, "test", unicodedata.normalize("NFD", "brötchen"))


def placeholders(folder: Path, *places: str) -> None:
    for number in range(6):
        put(folder / places[number % len(places)] / f"placeholder-{number}.png")


def outweigh(folder: Path) -> None:
    draw_photos(folder / "more", {"a": 1, "b": 31}, size=(20, 20))
    for path in (folder / "more/b").iterdir():
        path.rename(folder / "train/salad" / f"more-{path.name}")
    shutil.rmtree(folder / "more")


def resaved(folder: Path) -> None:
    with Image.open(folder / "train/hotdog/000.png") as image:
        image.resize((80, 100)).save(folder / "test/hotdog/small.jpg")


def linked_class(folder: Path) -> None:
    store = folder.parent / f"{folder.name}-store"
    (folder / "train/hotdog").rename(store)
    (folder / "train/hotdog").symlink_to(store)


def linked_subfolder(folder: Path) -> None:
    draw_photos(folder.parent / f"{folder.name}-more", {"a": 2})
    (folder / "train/hotdog/more").symlink_to(folder.parent / f"{folder.name}-more")


def one_class(folder: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "salad")


def similar_classes(folder: Path) -> None:
    for number, split in enumerate(("train", "test")):
        put(folder / split / "Hot dog/new.png", encoded(picture().rotate(180 * number), "PNG"))


def undecodable_name(folder: Path) -> None:
    put(folder / "train/hotdog" / os.fsdecode(b"\xff.png"))


DENS = {
    "nothing wrong": Den(lambda f: None),
    # Files that are no photos of a class.
    "a folder named as an image": Den(lambda f: (f / "train/hotdog/x.jpg").mkdir()),
    "photos in a folder named as an image": Den(lambda f: put(f / "train/hotdog/x.jpg/y.png"), photos=1),
    "photos in subfolders": Den(lambda f: put(f / "train/hotdog/a/b/c.png"), photos=1),
    "a Mac's zip": Den(mac_zip, ("hidden",), "__MACOSX"),
    "a Windows folder": Den(lambda f: put(f / "train/hotdog/Thumbs.db"), ("hidden",), "Thumbs"),
    "a notebook's copies": Den(
        lambda f: put(f / "test/hotdog/.ipynb_checkpoints/a.png", f / "train/hotdog/000.png"), ("hidden",)
    ),
    "a disk station's thumbnails": Den(lambda f: put(f / "train/hotdog/@eaDir/000.png/m.jpg"), ("hidden",)),
    "a hidden class": Den(lambda f: put(f / "train/.old/a.png"), ("hidden",), r"\.old"),
    "photos beside the classes": Den(lambda f: put(f / "train/a.png"), ("unused",), "train/a.png"),
    "a further split": Den(lambda f: put(f / "extra/hotdog/a.png"), ("unused",), "extra/hotdog/a.png"),
    "a link to more photos": Den(linked_subfolder, ("unused",), "hotdog/more"),
    "a class that is a link": Den(linked_class),
    "texts": Den(lambda f: put(f / "train/hotdog/notes.txt"), ("other",), "notes.txt"),
    "a name in another encoding": Den(undecodable_name, ("unreadable",), "not valid UTF-8", photos=1),
    # Classes.
    "a class in another case": Den(
        lambda f: rename_class(f, "test", "Hotdog"), ("classes",), "'hotdog' and 'Hotdog' differ only in case"
    ),
    "a class with another space": Den(
        lambda f: rename_class(f, "test", "hot_dog "), ("classes",), "'hotdog' and 'hot_dog ' differ only"
    ),
    "a class in another Unicode form": Den(
        two_forms_of_one_name, ("classes",), r"'br\\xf6tchen' and 'bro\\u0308"
    ),
    "a misspelt class": Den(
        lambda f: rename_class(f, "test", "hotdgo"),
        ("classes",),
        "class 'hotdog' is in .*'hotdgo' there the same",
    ),
    "a class without a test": Den(
        lambda f: shutil.rmtree(f / "test/salad"), ("classes",), "'salad' is in .*/train but not", -2
    ),
    "a class only to test": Den(
        lambda f: put(f / "test/taco/a.png"), ("classes",), "'taco' is in .*/test but not in train/;", 1
    ),
    "an empty class": Den(
        lambda f: [(f / s / "taco").mkdir() for s in ("train", "test")],
        ("classes",),
        "no image in .*train/taco",
    ),
    "one class": Den(one_class, ("classes",), "at least two class folders, found only 'hotdog'", -5),
    "classes that read alike": Den(similar_classes, ("similar-classes",), "'Hot dog', 'hotdog'", 2),
    "an outweighed class": Den(outweigh, ("imbalance",), "34 photos of 'salad' but 3 of 'hotdog'", 31),
    # The same photo twice.
    "a train photo in test": Den(
        lambda f: put(f / "test/hotdog/a.png", f / "train/hotdog/000.png"), ("leak",), "train.* = .*test", 1
    ),
    "a train photo linked in test": Den(
        lambda f: (f / "test/hotdog/a.png").symlink_to(f / "train/hotdog/000.png"), ("leak",), photos=1
    ),
    "a train photo in another class to test": Den(
        lambda f: put(f / "test/salad/a.png", f / "train/hotdog/000.png"), ("leak", "two-labels"), photos=1
    ),
    "a validation photo in test": Den(
        lambda f: shutil.copytree(f / "test", f / "val"), ("leak",), "val.* = .*test", 4
    ),
    "a photo resaved in test": Den(resaved, ("near-leak",), "small.jpg looks like .*train/hotdog/000.png", 1),
    "a photo in two classes": Den(
        lambda f: put(f / "train/salad/a.png", f / "train/hotdog/000.png"), ("two-labels",), photos=1
    ),
    "a photo twice in a class": Den(
        lambda f: put(f / "train/hotdog/a.png", f / "train/hotdog/000.png"), ("repeat",), photos=1
    ),
    "placeholders": Den(lambda f: placeholders(f, "train/hotdog"), ("placeholder",), "6 files are", 6),
    "placeholders everywhere": Den(
        lambda f: placeholders(f, "train/hotdog", "test/salad"),
        ("leak", "two-labels", "placeholder"),
        photos=6,
    ),
    # Nothing that could be checked.
    "no folder": Den(shutil.rmtree, None, "no such data folder"),
    "a file for a folder": Den(lambda f: (shutil.rmtree(f), f.write_bytes(PNG)), None, "no such data folder"),
    "no test": Den(lambda f: shutil.rmtree(f / "test"), None, "no test/ in .*found: train"),
    "splits in another case": Den(lambda f: (f / "train").rename(f / "Train"), None, "found: Train, test"),
    "two validation splits": Den(
        lambda f: [(f / name).mkdir() for name in ("val", "valid")], None, "several validation folders"
    ),
}
