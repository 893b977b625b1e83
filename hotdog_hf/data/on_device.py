"""Photos decoded into the memory of the device, where the random crops of a batch are cut together."""

import collections
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from hotdog_hf.data.decoded import DecodedCache
from hotdog_hf.data.images import open_photo
from hotdog_hf.data.loaders import PhotoDataset
from hotdog_hf.data.transforms import CropAndFlip
from hotdog_hf.errors import UserError

# The share of the device's free memory that photos may take: the network needs the rest.
MEMORY_SHARE = 0.5
# Pixels of photos that are cut at once; each takes 20 bytes meanwhile.
PIXELS_AT_ONCE = 2**25


class DevicePhotoDataset(PhotoDataset):
    """Training photos whose decoded pixels lie on the device; `network_input` cuts a batch of crops there.

    Crops are drawn as by `PhotoDataset`, and each is the antialiased resizing that Pillow does, as two matrix
    products: its bytes differ by rounding. `pixel_values` are float32 [6]: the index of the photo; the left,
    top, right and bottom edge in its decoded pixels; 1 to flip. Raises `UserError` if the photos need more
    memory than the device has to spare, or for an interpolation other than bilinear and bicubic.
    """

    # Nothing is decoded when a batch is drawn.
    threads = 1

    def __init__(
        self,
        rows: datasets.Dataset,
        transform: CropAndFlip,
        seed: int,
        cache: DecodedCache | None,
        device: torch.device,
        no_bar: bool | None = None,
    ):
        super().__init__(rows, transform, seed, cache)
        if transform.interpolation not in FILTERS:
            names = " or ".join(sorted(kind.name.lower() for kind in FILTERS))
            raise UserError(
                f"--crop-on-device resizes by {names}, not by {transform.interpolation.name.lower()} as the"
                " model's preprocessing says: use --no-crop-on-device"
            )
        self.sizes, self.reductions = [], []
        for index in range(len(rows)):
            photo = open_photo(rows[index], cache)  # its header: not kept, as its file is open
            self.sizes.append(photo.size)
            self.reductions.append(transform.reduction(photo))
        decoded = [
            [math.ceil(side / reduction) for side in size]
            for size, reduction in zip(self.sizes, self.reductions, strict=True)
        ]
        counts = [width * height for width, height in decoded]
        check_memory(3 * sum(counts), len(rows), device)
        starts = np.cumsum([0, *counts])
        # Of each photo: its first pixel, and its width.
        places = [[start, width] for start, (width, _) in zip(starts, decoded, strict=False)]
        self.places = torch.tensor(places, device=device)
        self.canvas = max(height for _, height in decoded), max(width for width, _ in decoded)
        self.pixels = torch.empty(3, starts[-1], dtype=torch.uint8, device=device)

        def decode(index: int) -> None:
            image = open_photo(rows[index], cache).decode(self.reductions[index])
            planes = np.asarray(image).reshape(-1, 3).T.copy()
            self.pixels[:, starts[index] : starts[index + 1]].copy_(torch.from_numpy(planes))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            done = pool.map(decode, range(len(rows)))
            collections.deque(tqdm(done, "decoding", len(rows), unit="img", leave=False, disable=no_bar), 0)

    def __getstate__(self) -> dict:
        """Leave the pixels out of what a loader process is sent: it only draws."""
        return self.__dict__ | {"pixels": None, "places": None}

    def pixel_values(self, epoch: int, index: int) -> torch.Tensor:
        """Return where to cut the crop of a photo, float32 [6]."""
        edges, flip = self.transform.draw(self.sizes[index], self.seed, epoch, index)
        return torch.tensor([index, *(edge / self.reductions[index] for edge in edges), flip])

    def network_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the crops of a batch as the network's input, float32 [N, 3, H, W]."""
        at_once = max(PIXELS_AT_ONCE // math.prod(self.canvas), 1)
        crops = [self._cut(part) for part in pixel_values.split(at_once)]
        return self.transform.normalize(torch.cat(crops))

    def _cut(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the bytes of crops [N, 6], uint8 [N, 3, H, W]."""
        index, left, top, right, bottom, flip = crops.unbind(1)
        starts, widths = self.places[index.long()][..., None, None].unbind(1)
        height, width = (torch.arange(side, device=crops.device) for side in self.canvas)
        # Each photo in the corner of a canvas; what is read beyond its edges gets no weight.
        places = (starts + height[:, None] * widths + width).clamp_(max=self.pixels.shape[1] - 1)
        # On a GPU bytes and sums of them fit into half precision, for which it has far faster units.
        dtype = torch.float16 if crops.is_cuda else torch.float32
        photos = self.pixels[:, places].to(dtype)
        kernel = FILTERS[self.transform.interpolation]
        down, across = (
            resizing_weights(start, end, side, len(pixels), kernel).to(dtype)
            for start, end, side, pixels in zip(
                (top, left), (bottom, right), self.transform.crop.size, (height, width), strict=True
            )
        )
        across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
        # Rounded to bytes after each of the two, as in Pillow.
        resized = (photos @ across.mT).round_().clamp_(0, 255)
        resized = (down @ resized).round_().clamp_(0, 255)
        return resized.to(torch.uint8).transpose(0, 1)


def check_memory(needed: int, count: int, device: torch.device) -> None:
    """Raise `UserError` if a GPU has no room for photos of so many bytes."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if needed > MEMORY_SHARE * free:
        raise UserError(
            f"--crop-on-device: {count} decoded photos need {needed / 1e9:.1f} GB, more than"
            f" {MEMORY_SHARE:.0%} of the {free / 1e9:.1f} GB that the GPU has free: use --no-crop-on-device"
        )


def resizing_weights(
    start: torch.Tensor, end: torch.Tensor, size: int, pixels: int, kernel: Callable
) -> torch.Tensor:
    """Return the weights [N, size, pixels] that resize the part [start, end) of a line of pixels to `size`.

    The filter is stretched by the reduction, so that it averages over all pixels (antialiasing), and cut off
    at the pixels of the part, as in Pillow.
    """
    start, end = start[:, None, None], end[:, None, None]
    step = (end - start) / size
    middles = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    positions = torch.arange(pixels, device=start.device)
    weights = kernel((positions + 0.5 - middles).abs() / step.clamp(min=1))
    weights = weights * ((positions >= start.floor()) & (positions < end.ceil()))
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution with a = -0.5 (IEEE Trans. ASSP 29, 1981), Pillow's BICUBIC."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


FILTERS = {Image.Resampling.BILINEAR: _triangle, Image.Resampling.BICUBIC: _cubic}
