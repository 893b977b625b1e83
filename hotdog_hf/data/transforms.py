"""From a photo to what a network takes: resized, cropped and flipped per photo, normalised per batch."""

import functools
import threading
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2


class ResizeAndCrop:
    """timm's evaluation transform in two halves: what is done to a photo, and to a batch on its device."""

    def __init__(self, data_config: dict):
        self.resize_and_crop = create_transform(**data_config, normalize=False)
        self.normalize = Normalize(data_config["mean"], data_config["std"])

    def pixels(self, photo: Image.Image, *_numbers: int) -> torch.Tensor:
        """Return the photo's bytes, uint8 [3, H, W]."""
        return self.resize_and_crop(photo)

    def __call__(self, photo: Image.Image) -> torch.Tensor:
        """Return what a network takes of one photo, float [3, H, W]."""
        return self.normalize(self.pixels(photo)[None])[0]


class CropAndFlip:
    """The chapter's training transform: a random resized crop and a random flip of a photo, then as above.

    torchvision's, with what is drawn (from torch's generator alone) apart from the work, which threads share.
    """

    # Torch's generator is one for all threads.
    _drawing = threading.Lock()

    def __init__(self, size: int | Sequence[int], min_crop_area: float, data_config: dict):
        self.crop = v2.RandomResizedCrop(
            size,
            scale=(min_crop_area, 1.0),
            interpolation=v2.InterpolationMode(data_config["interpolation"]),
        )
        self.normalize = Normalize(data_config["mean"], data_config["std"])

    def pixels(self, photo: Image.Image, *numbers: int) -> torch.Tensor:
        """Return the bytes of a crop, uint8 [3, H, W]; what is drawn follows from the numbers alone."""
        with self._drawing, torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would reset the GPU's as well, photo by photo.
            torch.default_generator.manual_seed(derive_seed(*numbers))
            place, flip = self.crop.make_params([photo]), torch.rand(1) < 0.5
        cropped = self.crop.transform(photo, place)
        return v2.functional.pil_to_tensor(v2.functional.horizontal_flip(cropped) if flip else cropped)


Transform = ResizeAndCrop | CropAndFlip


def eval_transform(data_config: dict) -> ResizeAndCrop:
    """Return timm's evaluation transform: PIL image -> normalised float tensor [3, H, W]."""
    return ResizeAndCrop(data_config)


def train_transform(
    data_config: dict, image_size: int | None = None, min_crop_area: float = 0.08
) -> CropAndFlip:
    """Return the chapter's training transform.

    A crop takes at least `min_crop_area` of the photo and becomes `image_size` pixels square (None: the size
    of evaluation; smaller is faster, and things look larger in a random crop anyway: arXiv 1906.06423).
    """
    return CropAndFlip(image_size or data_config["input_size"][1:], min_crop_area, data_config)


def derive_seed(*numbers: int) -> int:
    """Hash a few numbers into one well-spread seed, so that neighbours share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


# Convolutions run faster on it, on CPUs and on GPUs with tensor cores; the numbers are the same.
MEMORY_FORMAT = torch.channels_last


class Normalize:
    """Scales bytes to 0..1, subtracts the mean and divides by the deviation, a channel at a time.

    To the bit what torchvision does photo by photo. A byte crosses to a GPU in a quarter of a float's time.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 [N, 3, H, W] as normalised float32 in the network's memory format."""
        floats = images.to(torch.float32, memory_format=MEMORY_FORMAT).div_(255)
        mean, std = (_on_device(values, images.device) for values in (self.mean, self.std))
        return floats.sub_(mean).div_(std)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return values [C, 1, 1], sent to the device once: each time would make the GPU's queue wait."""
    return torch.tensor(values, device=device)[:, None, None]
