"""Opening an image, the one way for every use. No torch here: the ONNX path predicts without it."""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from hotdog_hf.errors import UserError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .jp2".split()
)


def decode_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """Open an image as 8-bit RGB, the one way for training, evaluation and prediction.

    EXIF rotation is applied, transparency laid on white, 16-bit brought to 8, CMYK and the rest converted;
    of an animation the first frame. Raises `UserError` naming the file where it cannot be read.
    """
    name = source if isinstance(source, (str, os.PathLike)) else "image"
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(_upright(source))
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(_upright(image))
    # What Pillow's decoders raise on broken files: SyntaxError for PNG chunks, EOFError for others.
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {name} as an image: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before EXIF is looked at, so that a broken file is told from a broken EXIF block
    try:
        return ImageOps.exif_transpose(image)
    except (
        Exception
    ):  # an unreadable EXIF block says nothing of the rotation; the pixels are good (datasets#7668)
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32-bit: no range is declared, so it is read off the values
        values = np.asarray(image, dtype=np.float64)
        full_scale = next((top for top in (1, 255, 65535) if values.max() <= top and values.min() >= 0), None)
        if full_scale is None or not np.isfinite(values).all():
            raise ValueError(f"mode {image.mode} with values from {values.min()} to {values.max()}")
        image = Image.fromarray((values * (255 / full_scale)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
