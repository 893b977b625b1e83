"""What a frozen body sees: pooled features of photos, kept on disk."""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path

import datasets
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator

from hotdog_hf.data.loaders import FeatureDataset, PhotoDataset, eval_loader
from hotdog_hf.data.splits import manifest
from hotdog_hf.data.transforms import derive_seed, eval_transform, train_transform
from hotdog_hf.machine import cache_dir
from hotdog_hf.training import engine, launch

# The oldest features are dropped beyond this.
MAX_CACHE_BYTES = 2 * 2**30
# Photos that go through the body together.
BATCH_SIZE = 32


def of_split(
    accelerator: Accelerator,
    net: torch.nn.Module,
    splits: datasets.DatasetDict,
    split: str,
    data_dir: str,
    data_config: dict,
    *,
    seed: int = 0,
    num_workers: int = 0,
) -> FeatureDataset:
    """Return the features of a split's photos, preprocessed as for evaluation, on every process."""
    photo_set = PhotoDataset(splits[split], eval_transform(data_config), seed)
    facts = _facts(splits, split, data_dir, data_config)
    return pooled_features(
        accelerator, net, photo_set, facts, batch_size=BATCH_SIZE, num_workers=num_workers, title=split
    )


def of_crops(
    accelerator: Accelerator,
    net: torch.nn.Module,
    splits: datasets.DatasetDict,
    split: str,
    data_dir: str,
    data_config: dict,
    *,
    count: int,
    min_crop_area: float,
    seed: int,
    num_workers: int = 0,
) -> list[FeatureDataset]:
    """Return the features of `count` random crops of each photo, of the size of evaluation."""
    crop, views = train_transform(data_config, None, min_crop_area), []
    facts = _facts(splits, split, data_dir, data_config) if count else []
    for view in range(1, count + 1):
        photo_set = PhotoDataset(splits[split], crop, derive_seed(seed, view))
        knobs = {"batch_size": BATCH_SIZE, "num_workers": num_workers, "title": f"crops {view}/{count}"}
        views.append(
            pooled_features(accelerator, net, photo_set, [*facts, min_crop_area, seed, view], **knobs)
        )
    return views


def _facts(splits: datasets.DatasetDict, split: str, data_dir: str, data_config: dict) -> list:
    """Say which photos these are and how they are prepared; it looks at every file's size and time."""
    return [manifest({split: splits[split]}, data_dir), str(Path(data_dir).absolute()), data_config]


def pooled_features(
    accelerator: Accelerator,
    net: torch.nn.Module,
    photo_set: PhotoDataset,
    facts: object,
    *,
    batch_size: int,
    num_workers: int,
    title: str,
) -> FeatureDataset:
    """Return the features [N, D] that the output layer of `net` gets of all N photos, on every process.

    They are taken from the cache where body, photos and preprocessing are the very same: `facts` (JSON) says
    what the photos and the preprocessing are. `net` is not prepared by the accelerator.
    """
    precision = launch.precision_of(accelerator)
    machine = [accelerator.device.type, precision, torch.get_num_threads(), batch_size]
    file = cache_dir() / "features" / f"{_key(net, [facts, len(photo_set), machine])}.safetensors"
    features = _read(file)
    if launch.any_process(accelerator, features is None):
        loader = eval_loader(photo_set, batch_size, num_workers=num_workers)
        features, _ = engine.pooled_features(accelerator, net, accelerator.prepare(loader), title)
        if accelerator.is_local_main_process:
            _write(file, features)
    return FeatureDataset(photo_set, features)


def _key(net: torch.nn.Module, facts: object) -> str:
    """Hash the body's weights and all that else decides what the features are."""
    head = {id(parameter) for parameter in net.get_classifier().parameters()}
    digest = hashlib.sha256(json.dumps([facts, torch.__version__], default=list).encode())
    for name, value in net.state_dict(keep_vars=True).items():
        if id(value) not in head:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(file: Path) -> torch.Tensor | None:
    try:
        features = safetensors.torch.load_file(file)["features"]
        os.utime(file)  # the ones not used for long go first
    except (OSError, KeyError, safetensors.SafetensorError):
        return None  # the cache saves time, nothing else
    return features


def _write(file: Path, features: torch.Tensor) -> None:
    if features.nbytes > MAX_CACHE_BYTES:
        return
    part = file.with_name(f"{file.stem}.{secrets.token_hex(8)}.part")
    with contextlib.suppress(OSError, safetensors.SafetensorError):  # a full disk: it is computed again
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"features": features.contiguous()}, part)
        part.replace(file)
        kept = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        while sum(path.stat().st_size for path in kept) > MAX_CACHE_BYTES:
            kept.pop(0).unlink()
    with contextlib.suppress(OSError):
        part.unlink()
