"""Decoding and resizing of images, the same for every use. Imports no torch: ONNX predicts without it."""

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from hotdog_hf.errors import UserError


def read_photo(row: dict) -> Image.Image:
    """Decode the `image` of a dataset row, which holds a path (a folder) or bytes (the Hub)."""
    image = row["image"]
    return decode_image(image["path"] if image["bytes"] is None else image["bytes"])


IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .jp2".split()
)
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


class UnreadableImageError(UserError):
    """A file that cannot be read as an image."""


def decode_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """Open an image as 8-bit RGB, in the same way for training, evaluation and prediction.

    Applies EXIF rotation, puts transparency on white, reduces 16 bits to 8, converts CMYK and other modes,
    and takes the first frame of an animation. Raises `UnreadableImageError` naming the file.
    """
    name = source if isinstance(source, (str, os.PathLike)) else "image"
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(_upright(source))
        if name is source and Path(source).is_fifo():  # opening it would block forever
            raise OSError("a pipe, not a file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(_upright(image))
    # Pillow's decoders raise various errors on broken files: SyntaxError for PNG, RuntimeError for AVIF, ...
    except Exception as error:
        raise UnreadableImageError(f"cannot read {name} as an image: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow rejects only twice as many
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    image.load()  # before reading EXIF, to tell a broken file from a broken EXIF block
    # Not ImageOps.exif_transpose, which fails on a readable rotation if it cannot rewrite some other tag.
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the rotation is unknown, but the pixels are good (datasets#7668)
        turn = None
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


def preprocess(image: Image.Image, data_config: dict) -> np.ndarray:
    """Return timm's evaluation transform of an RGB image, without torch: normalised float32 [3, H, W].

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


def resize_and_crop(image: Image.Image, data_config: dict) -> np.ndarray:
    """Return the first half of `preprocess`: bytes, uint8 [H, W, 3]."""
    height, width = data_config["input_size"][-2:]
    mode = data_config.get("crop_mode") or "center"
    interpolation = str(data_config["interpolation"]).upper()
    if mode not in ("squash", "center", "border"):
        raise UserError(f"preprocessing: crop_mode {mode!r} is none of squash, center, border")
    if interpolation not in Image.Resampling.__members__:
        raise UserError(f"preprocessing: interpolation {data_config['interpolation']!r} is none of Pillow's")
    size = _resized(image.size, (width, height), data_config.get("crop_pct") or 0.875, mode)
    image = image.resize(size, Image.Resampling[interpolation])
    # The centre of the image, padded with the mean colour or black if it is smaller.
    fill = tuple(round(255 * value) for value in data_config["mean"]) if mode == "border" else 0
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, (_start(width, image.width), _start(height, image.height)))
    return np.asarray(canvas)


def _resized(size: tuple[int, int], target: tuple[int, int], crop_pct: float, mode: str) -> tuple[int, int]:
    """Return the width and height to resize to before the crop, rounded as timm and torchvision do."""
    scaled = [math.floor(side / crop_pct) for side in target]
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
