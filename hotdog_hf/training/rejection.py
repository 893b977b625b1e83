"""What a finished run keeps with its model so that it can tell photos unlike those it was trained on."""

from pathlib import Path

import numpy as np
import torch

from hotdog_hf import files
from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.groups import content_groups
from hotdog_hf.model import neighbors, network
from hotdog_hf.training import engine, launch
from hotdog_hf.training.job import Job


def keep_neighbors(job: Job, net: torch.nn.Module, folder: Path, stop: launch.StopSignal) -> None:
    """Keep unit features of training photos in the saved model's `folder`, and the distances of others.

    `net` has the saved weights. The others are the validation photos; without any, the training photos
    themselves, each compared with those that are no near duplicates of it. If the network has no single
    vector of features, nothing is kept, with a message.
    """
    accelerator, splits, seed = job.accelerator, job.photos.splits, job.config.run.seed
    labels, dimensions = np.array(splits["train"]["label"][:]), net.get_classifier().in_features
    chosen = neighbors.photos_to_keep(labels, dimensions, seed)
    try:
        features = neighbors.unit_roots(_features(job, net, "train", chosen, stop))
        kept = features.astype(np.float16)
        held_out = None
        if "validation" in splits and (count := len(splits["validation"])) >= neighbors.MIN_VALIDATION:
            others = np.random.default_rng(seed).permutation(count)[: neighbors.MAX_HELD_OUT]
            held_out = neighbors.unit_roots(_features(job, net, "validation", np.sort(others), stop))
    except network.NoFeaturesError as error:
        accelerator.print(f"no neighbours are kept, so that predict.py --reject is not possible: {error}")
        return

    def save() -> None:
        if held_out is not None:
            found, source = neighbors.distances(held_out, kept), "validation"
        else:
            groups = content_groups(splits["train"].select(chosen))
            found, source = neighbors.distances(features, kept, groups), "train"
            found = found[neighbors.with_usual_shares(labels, chosen, seed)]
            found = np.random.default_rng(seed).permutation(found)[: neighbors.MAX_HELD_OUT]
        known = np.sort(found[np.isfinite(found)])
        with files.writing_to(folder):
            neighbors.save(neighbors.Neighbors(kept, known, source), folder / neighbors.FILE)

    launch.run_on_main(accelerator, save)


def _features(
    job: Job, net: torch.nn.Module, split: str, indices: np.ndarray, stop: launch.StopSignal
) -> np.ndarray:
    """Return the features [N, D] of some photos of a split: cached, or in one pass in float32."""
    cached = job.train_loader.dataset if split == "train" else job.eval_loaders[split].dataset
    if isinstance(cached, loaders.FeatureDataset) and launch.precision_of(job.accelerator) == "no":
        return cached.features[indices].numpy()
    rows = job.photos.splits[split].select(indices)
    transform, cache = transforms.eval_transform(job.data_config), job.photos.cache
    photo_set = loaders.PhotoDataset(rows, transform, job.config.run.seed, cache)
    loader = loaders.eval_loader(photo_set, job.micro_batch_size, num_workers=job.train_loader.num_workers)
    loader = job.accelerator.prepare(loader)
    return engine.pooled_features(
        job.accelerator, net, loader, f"features of {split}", float32=True, stop=stop
    )[0].numpy()
