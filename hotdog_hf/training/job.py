"""The parts of one training run, built from its config: photos, network, loaders, optimizer."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hotdog_hf.config import FITTED_HEADS, SOURCE_HEADS, TrainConfig
from hotdog_hf.data import loaders, stream, transforms
from hotdog_hf.data.images import describe_preprocessing
from hotdog_hf.data.on_device import DevicePhotoDataset
from hotdog_hf.data.prepare import choose_cache, open_photos
from hotdog_hf.data.splits import Photos, resolve_positive
from hotdog_hf.errors import UserError
from hotdog_hf.model import calibration, heads, network
from hotdog_hf.model.licenses import choose_license, describe_license
from hotdog_hf.model.source import check_size, load_source, source_data_config
from hotdog_hf.training import engine, launch, optim, sharding
from hotdog_hf.training.features import FeatureExtractor
from hotdog_hf.training.state import Progress, TrainState

if TYPE_CHECKING:
    from hotdog_hf.classification import ClassificationReport

# Photos per forward pass of an evaluation, at most: small enough for all loader processes to have a share.
EVAL_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, ready to start."""

    config: TrainConfig
    accelerator: Accelerator
    hardware: str
    # The photos, and the class that precision and recall are computed for.
    photos: Photos
    positive_label: str | None
    # The split that ranks the epochs: test chooses nothing if there is a validation split.
    eval_split: str
    # The bare network, a copy of it on the meta device (all that saving needs besides the weights), and its
    # preprocessing.
    net: torch.nn.Module
    meta_model: torch.nn.Module
    data_config: dict
    # The licence that the trained model is saved under.
    license: str
    # Modules that stay in evaluation mode while training.
    eval_modules: Sequence[torch.nn.Module]
    # A batch of `train_loader` is one optimizer step; a batch of `eval_loaders` is one forward pass.
    train_loader: DataLoader
    eval_loaders: dict[str, loaders.KeptLoader]
    # Predictions of a fitted head that is not trained further, see `BuiltModel`.
    held_out: calibration.HeldOut | None
    # What training changes. A fitted head starts at epoch 0, with its loss and accuracy on train.
    state: TrainState
    # What the recipe "best" tried and chose, for choice.json and the card.
    choice: dict | None = None

    @functools.cached_property
    def metric(self) -> "ClassificationReport":
        """The metrics. Nothing before the first evaluation waits for the import of `evaluate`."""
        from hotdog_hf.classification import ClassificationReport

        return ClassificationReport(self.photos.label_names, self.positive_label)

    @property
    def micro_batch_size(self) -> int:
        """Photos per forward pass of one process."""
        return micro_batch_size(self.config, self.accelerator)


class BuiltModel(NamedTuple):
    """The network with its new head, before the accelerator prepares it."""

    net: torch.nn.Module
    data_config: dict
    license: str
    # The photos, with the cache of decoded ones.
    photos: Photos
    # Cached features by split; training on them changes only the head.
    split_features: dict[str, loaders.FeatureDataset]
    trainable: torch.nn.Module
    # Predictions of a fitted head for photos that it did not learn, on the first process; None without any.
    held_out: calibration.HeldOut | None


def build(
    config: TrainConfig,
    accelerator: Accelerator,
    photos: Photos | None = None,
    stop: launch.StopSignal | None = None,
) -> Job:
    """Build all parts and print a summary; reads the photos unless they are given.

    Raises `UserError` for parts that do not fit together, and `StoppedError` if told to stop while features
    are computed.
    """
    seed, workers = config.run.seed, config.data.num_workers
    if accelerator.is_fsdp2:
        check_sharded(config)
    set_seed(seed)
    workers = launch.default_workers(accelerator) if workers is None else workers
    hardware = launch.describe_hardware(accelerator)
    accelerator.print(f"{hardware}, {workers} loader processes, seed {seed}")
    if hint := launch.bf16_hint(accelerator):
        accelerator.print(hint)
    photos = photos or open_photos(config.data, seed, accelerator)
    positive_label = resolve_positive(photos.label_names, config.data.positive_label)
    eval_split = "validation" if "validation" in photos.splits else "test"
    if config.run.keep == "best" and eval_split == "test":
        raise UserError("--keep best needs a validation split: add --val-fraction 0.1")
    about = f"for the class {positive_label}" if positive_label else "as means over the classes"
    accelerator.print(f"precision, recall, F1 and ROC-AUC are computed {about} (--positive-label)")

    model = build_model(config, accelerator, photos, workers, stop)
    photos = model.photos
    train_loader = build_train_loader(config, accelerator, photos, model, workers)
    eval_loaders = build_eval_loaders(config, accelerator, photos, model, workers)
    # FSDP leaves shards in the network; saving needs only this copy and the full weights.
    meta_model = network.to_meta(model.net)
    eval_modules = network.modules_in_eval_mode(
        model.trainable, body=config.model.freeze_body, batch_norm=config.model.batch_norm == "source"
    )
    if rank := accelerator.process_index:
        # Its own masks of dropout and stochastic depth; the first process has those of a run by itself.
        torch.manual_seed(transforms.derive_seed(seed, rank))
    return Job(
        config=config,
        accelerator=accelerator,
        hardware=hardware,
        photos=photos,
        positive_label=positive_label,
        eval_split=eval_split,
        net=model.net,
        meta_model=meta_model,
        data_config=model.data_config,
        license=model.license,
        eval_modules=eval_modules,
        train_loader=train_loader,
        eval_loaders=eval_loaders,
        held_out=model.held_out if config.optim.epochs == 0 else None,
        state=build_state(config, accelerator, photos, model, len(train_loader) * config.optim.epochs),
    )


def check_sharded(config: TrainConfig) -> None:
    """Raise `UserError` for knobs that FSDP cannot combine."""
    frozen = config.model.frozen_share or (config.model.freeze_body and not config.model.cache_features)
    if frozen and config.optim.gradient_accumulation_steps > 1:
        # Measured with torch 2.14: the sum over several backward passes differs from that of one process.
        flag = (
            "--freeze-body" if config.model.freeze_body else f"--frozen-share {config.model.frozen_share:g}"
        )
        raise UserError(
            f"{flag}: FSDP does not accumulate gradients rightly above frozen layers;"
            " use --gradient-accumulation-steps 1, or train all layers"
        )


def build_model(
    config: TrainConfig,
    accelerator: Accelerator,
    photos: Photos,
    workers: int,
    stop: launch.StopSignal | None = None,
) -> BuiltModel:
    """Return the source's body with a new head, and the preprocessing to be saved with them.

    A head of `FITTED_HEADS` is fitted to the features of the training photos.
    """
    head_init, image_size = config.model.head_init, config.data.image_size
    source = load_source(config.model.model, config.model.weights, image_size)
    source_license = source.pretrained_cfg.get("license")
    accelerator.print(describe_license(config.hub.license, source_license))
    accelerator.print(f"source head: {network.describe_head(source)}")
    data_config = source_data_config(source, config.data.preprocessing, image_size)
    side, crops = data_config["input_size"][-1], config.data.train_image_size
    if crops not in (None, side):
        check_size(source, crops, "--train-image-size")
    source_head, source_classes = source.get_classifier(), None
    if head_init in SOURCE_HEADS:
        given = config.model.source_class
        source_classes = heads.match_classes(source, photos.label_names, given, head_init)
        accelerator.print(heads.describe_sources(source, photos.label_names, source_classes))
    net = network.replace_head(source, photos.label_names, data_config, head_init)
    net = net.to(accelerator.device, memory_format=transforms.MEMORY_FORMAT)
    accelerator.print(f"target head: {network.describe_head(net)}")
    accelerator.print(f"photos in evaluation: {describe_preprocessing(data_config)}")
    photos = keep_decoded(config, accelerator, photos, data_config)
    if config.model.freeze_body:
        network.freeze_body(net)
    if config.model.frozen_share:
        network.freeze_lowest(net, config.model.frozen_share)

    seed, fitted = config.run.seed, head_init in FITTED_HEADS
    extractor = FeatureExtractor(accelerator, net, photos, data_config, workers, stop)
    feature_splits = photos.splits if config.model.cache_features else ["train"] if fitted else []
    split_features = {split: extractor.split(split, seed) for split in feature_splits}
    held_out = None
    if fitted:
        views = extractor.crops(
            "train", config.model.probe_views, config.data.min_crop_area, seed, config.data.flip
        )
        if warning := heads.single_photo_warning(head_init, photos.counts()["train"]):
            accelerator.print(warning)
        balanced = config.optim.class_weights == "balanced"
        # One process computes, as its copies of the features in float64 are several times as large.
        fit = functools.partial(heads.fit_head, net, head_init, split_features["train"], views)
        fit = functools.partial(fit, source_head, source_classes, balanced)
        logits = launch.run_on_main(accelerator, fit, share=False)
        if logits is not None:
            held_out = calibration.from_folds(logits, split_features["train"].labels)
        sharding.broadcast_state(net.get_classifier())
    trainable = net.get_classifier() if config.model.cache_features else net
    license = choose_license(config.hub.license, source_license)
    return BuiltModel(net, data_config, license, photos, split_features, trainable, held_out)


def keep_decoded(
    config: TrainConfig, accelerator: Accelerator, photos: Photos, data_config: dict, reads: int | None = None
) -> Photos:
    """Return the photos with a cache for what is decoded of them, if --cache-images asks for it or it pays.

    `reads` is how often a photo of train is read; None: as often as this run does.
    """
    if photos.cache:
        return photos
    as_evaluated = transforms.eval_transform(data_config)
    uses = {split: [as_evaluated] for split in photos.splits}
    if config.data.augmentation != "none":
        uses["train"] = [
            build_crop(config, data_config),
            *(uses["train"] if config.model.probe_views else []),
        ]
    if reads is None:
        fitted = config.model.head_init in FITTED_HEADS or config.model.cache_features
        reads = fitted + config.model.probe_views
        reads += 0 if config.model.cache_features else config.optim.epochs
    choose = functools.partial(choose_cache, config.data, photos, uses, reads)
    cache, line = launch.run_on_main(accelerator, choose)
    if line:
        accelerator.print(line)
    return dataclasses.replace(photos, cache=cache)


def build_crop(config: TrainConfig, data_config: dict) -> transforms.CropAndFlip:
    """Return the random crops that the network trains on."""
    knobs = config.data
    return transforms.train_transform(
        data_config, knobs.train_image_size, knobs.min_crop_area, knobs.flip, knobs.augmentation
    )


def micro_batch_size(config: TrainConfig, accelerator: Accelerator) -> int:
    """Return the number of photos per forward pass of one process."""
    passes = accelerator.num_processes * config.optim.gradient_accumulation_steps
    return math.ceil(config.optim.batch_size / passes)


def build_train_loader(
    config: TrainConfig, accelerator: Accelerator, photos: Photos, model: BuiltModel, workers: int
) -> DataLoader:
    """Return batches of one optimizer step each: of a stream, of photos, or of their features."""
    rows, batch_size, seed = photos.splits["train"], config.optim.batch_size, config.run.seed
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    transform = transforms.eval_transform(model.data_config)
    if config.data.augmentation != "none":
        transform = build_crop(config, model.data_config)
    if config.data.streaming:
        sum_processes = functools.partial(launch.sum_processes, accelerator)
        sampler = stream.StreamSampler(
            rows, batch_size, seed, config.data.shuffle_buffer, sum_processes, **share
        )
        return stream.train_loader(sampler, transform, num_workers=workers)
    if config.model.cache_features:
        train_set = model.split_features["train"]
    elif config.data.crop_on_device:
        where = accelerator.device, engine.no_bar(accelerator)
        train_set = DevicePhotoDataset(rows, transform, seed, photos.cache, *where)
    else:
        train_set = loaders.PhotoDataset(rows, transform, seed, photos.cache)
    last_epoch = config.optim.epochs
    return loaders.train_loader(train_set, batch_size, num_workers=workers, last_epoch=last_epoch, **share)


def build_eval_loaders(
    config: TrainConfig, accelerator: Accelerator, photos: Photos, model: BuiltModel, workers: int
) -> dict[str, loaders.KeptLoader]:
    """Return the loaders of test, and of validation if there is such a split.

    "saved" is that of test for the saved model, which is evaluated in float32: features in less would not do.
    """
    batch_size = micro_batch_size(config, accelerator)

    def prepared_loader(eval_set: loaders.PhotoDataset) -> loaders.KeptLoader:
        most = batch_size if isinstance(eval_set, loaders.FeatureDataset) else EVAL_BATCH
        loader = loaders.eval_loader(eval_set, min(batch_size, most), num_workers=workers)
        return loaders.KeptLoader(accelerator.prepare(loader))

    transform, prepared = transforms.eval_transform(model.data_config), {}
    for split in [name for name in ("validation", "test") if name in photos.splits]:
        eval_set = model.split_features.get(split) if config.model.cache_features else None
        eval_set = eval_set or loaders.PhotoDataset(
            photos.splits[split], transform, config.run.seed, photos.cache
        )
        prepared[split] = prepared_loader(eval_set)
    prepared["saved"] = prepared["test"]
    if config.model.cache_features and launch.precision_of(accelerator) != "no":
        test_photos = loaders.PhotoDataset(photos.splits["test"], transform, config.run.seed, photos.cache)
        prepared["saved"] = prepared_loader(test_photos)
    return prepared


def build_state(
    config: TrainConfig, accelerator: Accelerator, photos: Photos, model: BuiltModel, total_steps: int
) -> TrainState:
    """Return network, optimizer and schedule, prepared for the launch; prints the parameter groups."""
    net, trainable, knobs = model.net, model.trainable, config.optim
    groups = optim.parameter_groups(
        net,
        learning_rate=knobs.learning_rate,
        head_lr_mult=knobs.head_lr_mult,
        layer_decay=knobs.layer_decay,
        weight_decay=knobs.weight_decay,
        decay_norm_and_bias=knobs.decay_norm_and_bias,
    )
    if knobs.epochs:
        accelerator.print(optim.describe_groups(groups, net))
    fused = optim.use_fused(accelerator)
    optimizer = optim.build_optimizer(groups, knobs.optimizer, knobs.momentum, fused=fused)
    schedule = optim.build_schedule(optimizer, knobs.schedule, total_steps, knobs.warmup_fraction)
    progress, totals, weights = Progress(), torch.zeros(3, device=accelerator.device), None
    if knobs.class_weights == "balanced":
        weights = heads.class_weights(np.array(list(photos.counts()["train"].values())))
        weights = torch.tensor(weights, dtype=torch.float32, device=accelerator.device)
    if config.model.head_init in FITTED_HEADS:
        progress.epoch = 0
        train_features, smoothing = model.split_features["train"], knobs.label_smoothing
        totals = engine.totals_of(accelerator, net.get_classifier(), train_features, smoothing, weights)
    if accelerator.is_fsdp2:
        net.cpu()  # sharded from there, so that no GPU holds the full network and its average
    average = optim.build_average(trainable, knobs.ema_decay)
    if config.run.compile:
        trainable.compile()  # in place, so that the weights keep their names
    trainable, optimizer = launch.prepare(accelerator, trainable, optimizer, average)
    return TrainState(trainable, optimizer, schedule, average, progress, totals, class_weights=weights)
