"""From a photo to a network's input: resize, crop and flip per photo, normalise per batch."""

import functools
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from hotdog_hf.data.images import Photo, reduction_of, resized_and_cropped


class ResizeAndCrop:
    """timm's evaluation transform in two parts: `pixels` per photo, `normalize` per batch on its device."""

    def __init__(self, data_config: dict):
        self.data_config = data_config
        self.normalize = Normalize(data_config["mean"], data_config["std"])

    def pixels(self, photo: Photo | Image.Image, *_numbers: int) -> torch.Tensor:
        """Return the photo's bytes, uint8 [3, H, W]: those that prediction computes."""
        return v2.functional.pil_to_tensor(resized_and_cropped(photo, self.data_config))

    def reduction(self, photo: Photo) -> int:
        """Return the reduction at which `pixels` decodes a photo."""
        return reduction_of(photo, self.data_config)

    def __call__(self, photo: Photo | Image.Image) -> torch.Tensor:
        """Return the network's input for one photo, float [3, H, W]."""
        return self.normalize(self.pixels(photo)[None])[0]


class Mirrored(ResizeAndCrop):
    """The evaluation transform of a photo's mirror image."""

    def pixels(self, photo: Photo | Image.Image, *_numbers: int) -> torch.Tensor:
        """Return the bytes of the mirror image, uint8 [3, H, W]."""
        return super().pixels(photo).flip(-1)


class CropAndFlip:
    """The chapter's training transform: a random resized crop and a random flip, then normalisation.

    torchvision's, with drawing (from torch's generator) separated from the work, which threads share. Crops
    are drawn from the photo's full size, then cut from a `Photo` decoded at the size that all crops need.
    """

    # All threads share torch's generator.
    _drawing = threading.Lock()

    def __init__(self, size: int | Sequence[int], min_crop_area: float, data_config: dict, flip: bool = True):
        self.crop = v2.RandomResizedCrop(size, scale=(min_crop_area, 1.0))
        self.interpolation = Image.Resampling[data_config["interpolation"].upper()]
        self.normalize = Normalize(data_config["mean"], data_config["std"])
        self.flip = flip

    def pixels(self, photo: Photo | Image.Image, *numbers: int) -> torch.Tensor:
        """Return the bytes of a crop, uint8 [3, H, W]; crop and flip depend only on size and numbers."""
        place, flip = self.draw(photo.size, *numbers)
        cropped = self._cropped(photo, place)
        return v2.functional.pil_to_tensor(v2.functional.horizontal_flip(cropped) if flip else cropped)

    def draw(self, size: tuple[int, int], *numbers: int) -> tuple[tuple[int, int, int, int], bool]:
        """Return a crop's left, top, right and bottom edge in a photo of this size, and if it is flipped."""
        with self._drawing, torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: torch.manual_seed would reset the GPU's too, for every photo.
            torch.default_generator.manual_seed(derive_seed(*numbers))
            place = self.crop.make_params([torch.empty(size[::-1], device="meta")])
            flip = self.flip and bool(torch.rand(1) < 0.5)
        left, top = place["left"], place["top"]
        return (left, top, left + place["width"], top + place["height"]), flip

    def reduction(self, photo: Photo) -> int:
        """Return the reduction at which `pixels` decodes a photo, the same for all of its crops."""
        return photo.reduction_for(self.crop.size, self.crop.scale[0])

    def _cropped(self, photo: Photo | Image.Image, place: tuple[int, int, int, int]) -> Image.Image:
        size, reduction = tuple(self.crop.size[::-1]), 1
        if isinstance(photo, Photo):
            reduction = self.reduction(photo)
            photo = photo.decode(reduction)
        edges = [edge / reduction for edge in place]
        # As torchvision: cut first, so that the resized pixels hold nothing from outside of the crop.
        outer = [*map(math.floor, edges[:2]), *map(math.ceil, edges[2:])]
        box = [edge - outer[number % 2] for number, edge in enumerate(edges)]
        return photo.crop(outer).resize(size, self.interpolation, box)


class RandAugmented(CropAndFlip):
    """`CropAndFlip`, then two random operations, such as a rotation, a shear or another contrast.

    RandAugment (arXiv 1909.13719) with torchvision's defaults.
    """

    operations = v2.RandAugment()

    def pixels(self, photo: Photo | Image.Image, *numbers: int) -> torch.Tensor:
        """Return the bytes of an augmented crop, uint8 [3, H, W], which depend only on photo and numbers."""
        crop = super().pixels(photo, *numbers)
        with self._drawing, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(*numbers, 1))
            return self.operations(crop)


Transform = ResizeAndCrop | CropAndFlip


def eval_transform(data_config: dict) -> ResizeAndCrop:
    """Return timm's evaluation transform: PIL image -> normalised float tensor [3, H, W]."""
    return ResizeAndCrop(data_config)


def train_transform(
    data_config: dict,
    image_size: int | None = None,
    min_crop_area: float = 0.08,
    flip: bool = True,
    augmentation: str = "crop",
) -> CropAndFlip:
    """Return the chapter's training transform, or without `flip` one that mirrors no photo.

    The `augmentation` is "crop", or "randaugment" for more.

    A crop covers at least `min_crop_area` of the photo and is resized to `image_size` pixels square (None:
    the evaluation size; smaller is faster, and objects look larger in random crops anyway: arXiv 1906.06423).
    """
    kind = RandAugmented if augmentation == "randaugment" else CropAndFlip
    return kind(image_size or data_config["input_size"][1:], min_crop_area, data_config, flip)


def derive_seed(*numbers: int) -> int:
    """Hash a few numbers into one seed; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


# Convolutions are faster in it, on CPUs and on GPUs with tensor cores; results are the same.
MEMORY_FORMAT = torch.channels_last


class Normalize:
    """Scales bytes to 0..1, subtracts the mean and divides by the deviation, per channel.

    Bit for bit what torchvision computes per photo. Bytes copy to a GPU in a quarter of the time of floats.
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
    """Return values [C, 1, 1], copied to the device once: a copy per batch would stall the GPU."""
    return torch.tensor(values, device=device)[:, None, None]
