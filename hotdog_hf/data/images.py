"""Decoding and resizing of images, the same for every use. Imports no torch: ONNX predicts without it."""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
from PIL import ExifTags, Image

from hotdog_hf.errors import UserError

if TYPE_CHECKING:
    from hotdog_hf.data.decoded import DecodedCache

# The photos of iPhones, which are read if pi-heif is installed.
HEIF_SUFFIXES = frozenset(".heic .heif .hif".split())
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .jp2".split()
)
with contextlib.suppress(ModuleNotFoundError):
    import pi_heif

    pi_heif.register_heif_opener()
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
# Transpositions that undo EXIF's Orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}
# A JPEG is decoded at 1/8, 1/4 or 1/2 of its size if that leaves this many times the width and height that
# are needed: resizing then averages over 2 x 2 pixels or more, as it does at full size.
SPARE_SIZE = 2
REDUCTIONS = (8, 4, 2)
REDUCIBLE = ("JPEG", "MPO")

Source = str | os.PathLike | bytes | Image.Image


class UnreadableImageError(UserError):
    """A file that cannot be read as an image."""


class Photo:
    """An image whose header is read, and whose pixels are decoded when it is known how many are needed.

    A phone's photo has 12 million pixels, of which a network sees 50,000. A JPEG can be decoded at a fraction
    of its size in a third of the time, and is then resized faster. `size` is the upright photo's width and
    height. Pixels in the `cache` are not decoded again. Raises `UnreadableImageError` naming the file.
    """

    def __init__(self, source: Source, cache: Optional["DecodedCache"] = None, name: str | None = None):
        """`name` is what errors call bytes and images; a file has its path."""
        # Takes the reduction and a function that decodes.
        self._cached: Callable[[int, Callable[[], Image.Image]], Image.Image] = lambda _, decode: decode()
        if cache and not isinstance(source, Image.Image):
            self._cached = functools.partial(cache.get, source)
        self.name = source if isinstance(source, (str, os.PathLike)) else name or "image"
        # A JPEG waits for `decode`. The others decode only whole, and some end with their EXIF block.
        self._jpeg = self._decoded = None
        with _naming_errors(self.name):
            if isinstance(source, Image.Image):
                self._decoded = _to_rgb(_upright(source))
                self.size = self._decoded.size
            elif self.name is source and Path(source).is_fifo():  # opening it would block forever
                raise OSError("a pipe, not a file")
            else:
                self._open(io.BytesIO(source) if isinstance(source, bytes) else source)

    def _open(self, file: str | os.PathLike | io.BytesIO) -> None:
        image = Image.open(file)
        if image.format in REDUCIBLE:
            self._jpeg = image
            self.size = image.size[::-1] if _turn_of(image) in SIDEWAYS else image.size
        else:
            with image:
                self._decoded = self._cached(1, lambda: _to_rgb(_upright(image)))
                self.size = self._decoded.size

    def decode(self, reduction: int = 1) -> Image.Image:
        """Return the image as 8-bit RGB, every side of a JPEG divided by `reduction` and rounded up.

        `reduction` is one that `reduction_for` returned.
        """
        if self._jpeg is not None:
            with _naming_errors(self.name), self._jpeg as image:
                self._decoded = self._cached(reduction, lambda: _decode_jpeg(image, reduction))
            self._jpeg = None
        return self._decoded

    def reduction_for(self, needed: tuple[float, float], min_area: float | None = None) -> int:
        """Return the largest reduction that leaves enough pixels to resize to the `needed` width and height.

        Enough is `SPARE_SIZE` times the `needed` sides. If crops are resized that cover at least the share
        `min_area` of the photo, a square one of that area keeps at least `needed`: most are larger. All crops
        of a photo are then cut from the same pixels, which are decoded once if they are cached.
        """
        if self._jpeg is None:
            return 1
        if min_area is None:
            spare = min(side / goal for side, goal in zip(self.size, needed, strict=True)) / SPARE_SIZE
        else:
            spare = math.sqrt(min_area * math.prod(self.size)) / max(needed)
        return next((reduction for reduction in REDUCTIONS if reduction <= spare), 1)


def source_of(row: dict) -> Source:
    """Return the path (of a folder) or the bytes (of the Hub) in the `image` of a dataset row."""
    image = row["image"]
    return image["path"] if image["bytes"] is None else image["bytes"]


def open_photo(row: dict, cache: Optional["DecodedCache"] = None) -> Photo:
    """Open the `image` of a dataset row."""
    return Photo(source_of(row), cache, row["image"]["path"])


def thumbnail(row: dict, size: int) -> Image.Image:
    """Return the `image` of a dataset row for display, at most `size` pixels a side."""
    image = decode_image(source_of(row), min_side=size)
    image.thumbnail((size, size))
    return image


def decode_image(source: Source, min_side: int | None = None) -> Image.Image:
    """Open an image as 8-bit RGB, in the same way for every use.

    With `min_side`, a JPEG of many pixels is reduced as long as both sides keep at least so many.

    Applies EXIF rotation, puts transparency on white, reduces 16 bits to 8, converts CMYK and other modes,
    and takes the first frame of an animation. Raises `UnreadableImageError` naming the file.
    """
    photo = Photo(source)
    needed = min_side and (min_side / SPARE_SIZE,) * 2
    return photo.decode(photo.reduction_for(needed) if needed else 1)


@contextlib.contextmanager
def _naming_errors(name: object) -> Iterator[None]:
    """Raise any error inside the context as an `UnreadableImageError`."""
    try:
        yield
    # Pillow's decoders raise various errors on broken files: SyntaxError for PNG, RuntimeError for AVIF, ...
    except Exception as error:
        reason = str(error)
        if Path(str(name)).suffix.lower() in HEIF_SUFFIXES - IMAGE_SUFFIXES:
            reason = 'HEIC needs pip install -e ".[heic]"'
        raise UnreadableImageError(f"cannot read {name} as an image: {reason}") from error


def _decode_jpeg(image: Image.Image, reduction: int) -> Image.Image:
    _check_size(image)
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    return _to_rgb(_upright(image))


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow rejects only twice as many
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    # Not ImageOps.exif_transpose, which fails on a readable rotation if it cannot rewrite some other tag.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the rotation is unknown, but the pixels are good (datasets#7668)
        return None


def _upright(image: Image.Image) -> Image.Image:
    _check_size(image)
    image.load()  # before reading EXIF, to tell a broken file from a broken EXIF block
    turn = _turn_of(image)
    if turn is None:
        return image
    image = image.transpose(turn)
    for block in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(block, None)  # it would rotate the image again
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32-bit: no range is declared, so infer it from the values
        values = np.asarray(image, dtype=np.float64)
        full_scale = next((top for top in (1, 255, 65535) if values.max() <= top and values.min() >= 0), None)
        if full_scale is None or not np.isfinite(values).all():
            raise ValueError(f"mode {image.mode} with values from {values.min()} to {values.max()}")
        image = Image.fromarray((values * (255 / full_scale)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def preprocess(image: Photo | Image.Image, data_config: dict) -> np.ndarray:
    """Return timm's evaluation transform of an image, without torch: normalised float32 [3, H, W].

    Raises `UserError` for a `crop_mode` or an `interpolation` of `data_config` that is not supported.
    """
    return normalize(resize_and_crop(image, data_config)[None], data_config)[0]


def normalize(images: np.ndarray, data_config: dict) -> np.ndarray:
    """Return images, uint8 [N, H, W, 3], as normalised float32 [N, 3, H, W]."""
    mean, std = (np.array(data_config[name], np.float32)[:, None, None] for name in ("mean", "std"))
    floats = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
    floats /= np.float32(255)
    floats -= mean
    floats /= std
    return floats


def resize_and_crop(image: Photo | Image.Image, data_config: dict) -> np.ndarray:
    """Return the first half of `preprocess`: bytes, uint8 [H, W, 3]."""
    return np.asarray(resized_and_cropped(image, data_config))


def resized_and_cropped(image: Photo | Image.Image, data_config: dict) -> Image.Image:
    """Return the image as a network sees it; a large JPEG is decoded at a reduced size."""
    height, width = data_config["input_size"][-2:]
    mode = data_config.get("crop_mode") or "center"
    interpolation = str(data_config["interpolation"]).upper()
    if mode not in ("squash", "center", "border"):
        raise UserError(f"preprocessing: crop_mode {mode!r} is none of squash, center, border")
    if interpolation not in Image.Resampling.__members__:
        raise UserError(f"preprocessing: interpolation {data_config['interpolation']!r} is none of Pillow's")
    image = reduced(image, data_config)
    image = image.resize(_resized(image.size, data_config), Image.Resampling[interpolation])
    # The centre of the image, padded with the mean colour or black if it is smaller.
    fill = tuple(round(255 * value) for value in data_config["mean"]) if mode == "border" else 0
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, (_start(width, image.width), _start(height, image.height)))
    return canvas


def describe_preprocessing(data_config: dict) -> str:
    """Return in words what `preprocess` does."""
    mode, (height, width) = data_config.get("crop_mode") or "center", data_config["input_size"][-2:]
    scaled = " x ".join(map(str, _scaled(data_config)))
    resized = {
        "squash": f"resized to {scaled} pixels whatever their aspect ratio",
        "center": f"resized to cover {scaled} pixels with their aspect ratio kept",
        "border": f"resized to fit into {scaled} pixels with their aspect ratio kept",
    }.get(mode, mode)
    mean, std = (", ".join(f"{value:.4g}" for value in data_config[name]) for name in ("mean", "std"))
    return (
        f"{resized} ({data_config['interpolation']}), the central {width} x {height} cropped,"
        f" normalised by mean ({mean}) and standard deviation ({std})"
    )


def reduced(image: Photo | Image.Image, data_config: dict) -> Image.Image:
    """Decode a photo at the smallest size that is enough for `resize_and_crop`; return an RGB image as is."""
    return image.decode(reduction_of(image, data_config)) if isinstance(image, Photo) else image


def reduction_of(photo: Photo, data_config: dict) -> int:
    """Return the reduction at which `resize_and_crop` decodes a photo."""
    return photo.reduction_for(_resized(photo.size, data_config))


def _scaled(data_config: dict) -> list[int]:
    """Return the width and height that the crop is taken from."""
    height, width = data_config["input_size"][-2:]
    return [math.floor(side / (data_config.get("crop_pct") or 0.875)) for side in (width, height)]


def _resized(size: tuple[int, int], data_config: dict) -> tuple[int, int]:
    """Return the width and height to resize to before the crop, rounded as timm and torchvision do."""
    mode, scaled = data_config.get("crop_mode") or "center", _scaled(data_config)
    if mode == "squash":
        return tuple(scaled)
    if mode == "center" and scaled[0] == scaled[1]:
        return tuple(int(scaled[0] * side / min(size)) for side in size)
    ratios = [side / goal for side, goal in zip(size, scaled, strict=True)]
    ratio = max(ratios) if mode == "border" else min(ratios)
    # At least one pixel of an extremely narrow image; timm fails there.
    return tuple(max(round(side / ratio), 1) for side in size)


def _start(room: int, side: int) -> int:
    """Return the offset that centres a side in its room; what lies outside is cut off."""
    return (room - side) // 2 if side < room else -round((side - room) / 2)
