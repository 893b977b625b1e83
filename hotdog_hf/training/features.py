"""Pooled features of photos from a frozen body, cached on disk."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import PIL
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hotdog_hf.data import images
from hotdog_hf.data.decoded import decoder_versions
from hotdog_hf.data.loaders import FeatureDataset, PhotoDataset, eval_loader
from hotdog_hf.data.splits import Photos
from hotdog_hf.data.transforms import Mirrored, derive_seed, eval_transform, train_transform
from hotdog_hf.files import replacing_file
from hotdog_hf.machine import cache_dir
from hotdog_hf.training import engine, launch

# Beyond this the least recently used features are deleted.
MAX_CACHE_BYTES = 2 * 2**30
# Photos per forward pass.
BATCH_SIZE = 32


@dataclass(frozen=True)
class FeatureExtractor:
    """Features of photos from a body that does not change; every process gets those of all photos."""

    accelerator: Accelerator
    net: torch.nn.Module
    photos: Photos
    data_config: dict
    num_workers: int = 0
    # Told to stop, it raises `StoppedError` after the batch, on all processes; nothing is cached then.
    stop: launch.StopSignal | None = None

    def split(self, name: str, seed: int = 0, *, mirrored: bool = False) -> FeatureDataset:
        """Return the features of a split, or of its mirror images, preprocessed as for evaluation."""
        transform = Mirrored(self.data_config) if mirrored else eval_transform(self.data_config)
        photo_set = PhotoDataset(self.photos.splits[name], transform, seed, self.photos.cache)
        kind = ["mirrored"] if mirrored else []
        return self._pooled(photo_set, [*self._facts(name), *kind], ", ".join([name, *kind]))

    def crops(
        self, name: str, count: int, min_crop_area: float, seed: int, flip: bool = True
    ) -> list[FeatureDataset]:
        """Return the features of `count` random crops of each photo of a split, at the evaluation size."""
        crop, views = train_transform(self.data_config, None, min_crop_area, flip), []
        facts = self._facts(name) if count else []
        for view in range(1, count + 1):
            rows, cache = self.photos.splits[name], self.photos.cache
            photo_set = PhotoDataset(rows, crop, derive_seed(seed, view), cache)
            view_facts = [*facts, min_crop_area, seed, view, *([] if flip else ["no flip"])]
            views.append(self._pooled(photo_set, view_facts, f"crops {view}/{count}"))
        return views

    def _facts(self, name: str) -> list:
        """Return what identifies the photos and their preprocessing; reads every file's size and time."""
        photos = self.photos
        return [photos.manifest(name), str(Path(photos.data_dir).absolute()), self.data_config]

    def _pooled(self, photo_set: PhotoDataset, facts: list, title: str) -> FeatureDataset:
        loader = eval_loader(photo_set, BATCH_SIZE, num_workers=self.num_workers)
        return pooled_features(self.accelerator, self.net, loader, facts, title, self.stop)


def pooled_features(
    accelerator: Accelerator,
    net: torch.nn.Module,
    loader: DataLoader,
    facts: object,
    title: str,
    stop: launch.StopSignal | None = None,
) -> FeatureDataset:
    """Return the features [N, D] of all N photos, the input of the output layer of `net`, on every process.

    They come from the cache if body, photos and preprocessing are the same: `facts` (JSON) identifies the
    photos and the preprocessing. `net` and `loader` must not be prepared by the accelerator. Raises
    `StoppedError` if a process was told to stop.
    """
    photo_set, precision = loader.dataset, launch.precision_of(accelerator)
    machine = [accelerator.device.type, precision, torch.get_num_threads(), loader.batch_size]
    file = cache_dir() / "features" / f"{_key(net, [facts, len(photo_set), machine])}.safetensors"
    features = _read(file)
    if launch.any_process(accelerator, features is None):
        features, _ = engine.pooled_features(accelerator, net, accelerator.prepare(loader), title, stop=stop)
        if accelerator.is_local_main_process:
            _write(file, features)
    return FeatureDataset(photo_set, features)


def _key(net: torch.nn.Module, facts: object) -> str:
    """Hash the body's weights and everything else that the features depend on."""
    head = {id(parameter) for parameter in net.get_classifier().parameters()}
    # What decodes, resizes and computes; another version may differ in the last digits, or by more.
    versions = [library.__version__ for library in (PIL, torchvision, timm, torch)]
    versions += [images.SPARE_SIZE, images.REDUCTIONS, *decoder_versions()]
    # Two networks of the same tensors may compute something else, as with other activations.
    facts = [net.pretrained_cfg.get("architecture"), facts]
    digest = hashlib.sha256(json.dumps([facts, versions], default=list).encode())
    for name, value in net.state_dict(keep_vars=True).items():
        if id(value) not in head:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(file: Path) -> torch.Tensor | None:
    try:
        features = safetensors.torch.load_file(file)["features"]
        os.utime(file)  # the least recently used are deleted first
    except (OSError, KeyError, safetensors.SafetensorError):
        return None  # the cache only saves time
    return features


def _write(file: Path, features: torch.Tensor) -> None:
    if features.nbytes > MAX_CACHE_BYTES:
        return
    with contextlib.suppress(OSError, safetensors.SafetensorError):  # a full disk: they are computed again
        with replacing_file(file) as part:
            safetensors.torch.save_file({"features": features.contiguous()}, part)
        kept = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        while sum(path.stat().st_size for path in kept) > MAX_CACHE_BYTES:
            kept.pop(0).unlink()
