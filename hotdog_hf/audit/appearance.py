"""What a photo looks like, whatever it shows: its size, how bright and how sharp it is."""

from typing import NamedTuple

import numpy as np

from hotdog_hf.data.images import Photo

# Below these, a photo is said to be tiny, dark or blurred.
MIN_SIDE = 64
MIN_BRIGHTNESS = 0.25
MIN_SHARPNESS = 30.0
# Sharpness is measured on photos reduced to this longer side, or it would depend on the camera's pixels.
SHARPNESS_SIDE = 256


class Appearance(NamedTuple):
    """The measures of one photo."""

    # The shorter side in pixels.
    side: int
    # The luminance that 95 % of the pixels do not exceed, from 0 to 1.
    brightness: float
    # The variance of the luminance's Laplacian (Pech-Pacheco et al., ICPR 2000), of luminances from 0 to 255.
    sharpness: float

    def faults(self) -> list[str]:
        """Return which of "tiny", "dark" and "blurred" the photo is."""
        measures = {
            "tiny": self.side < MIN_SIDE,
            "dark": self.brightness < MIN_BRIGHTNESS,
            "blurred": self.sharpness < MIN_SHARPNESS,
        }
        return [name for name, holds in measures.items() if holds]


def measure(photo: Photo) -> Appearance:
    """Measure a photo."""
    thumbnail = [SHARPNESS_SIDE * side / max(photo.size) for side in photo.size]
    grey = photo.decode(photo.reduction_for(thumbnail)).convert("L")
    grey.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE))
    pixels = np.asarray(grey, dtype=np.float64)
    padded = np.pad(pixels, 1, mode="edge")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * pixels
    return Appearance(
        side=min(photo.size),
        brightness=float(np.quantile(pixels, 0.95) / 255),
        sharpness=float(laplacian.var()),
    )
