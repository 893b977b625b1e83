"""All that one training consists of, built from its config: photos, network, loaders, optimizer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hotdog_hf.config import FITTED_HEADS, TrainConfig
from hotdog_hf.data import loaders, stream, transforms
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import StreamedSplit, resolve_positive
from hotdog_hf.errors import UserError
from hotdog_hf.metrics import ClassificationReport
from hotdog_hf.model import heads, network
from hotdog_hf.model.source import load_source, source_data_config
from hotdog_hf.training import engine, features, launch, optim
from hotdog_hf.training.state import Progress, TrainState


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, ready to begin."""

    config: TrainConfig
    accelerator: Accelerator
    hardware: str
    # The photos, the unreadable files left out, and the class that precision and recall speak of.
    splits: datasets.DatasetDict
    skipped: list[Path]
    label_names: list[str]
    positive_label: str | None
    # The split that judges the epochs: test chooses nothing where there is a validation split.
    eval_split: str
    # The bare network, all that is saved of it besides its weights, and its preprocessing.
    net: torch.nn.Module
    meta_model: torch.nn.Module
    data_config: dict
    # Modules that stay in evaluation mode while training.
    eval_modules: Sequence[torch.nn.Module]
    # Batches of one optimizer step each, and of one pass each of the splits that are judged.
    train_loader: DataLoader
    eval_loaders: dict[str, DataLoader]
    # Photos that one process takes through the network at once.
    micro_batch_size: int
    metric: ClassificationReport
    # What training changes. A solved head starts with epoch 0, and with what it is worth on train.
    state: TrainState


def build(config: TrainConfig, accelerator: Accelerator) -> Job:
    """Build all parts and print what they are. Raises `UserError` for what does not fit together."""
    seed = config.run.seed
    hardware = launch.describe_hardware(accelerator)
    set_seed(seed)
    workers = config.data.num_workers
    workers = launch.default_workers(accelerator) if workers is None else workers
    accelerator.print(f"{hardware}, {workers} loader processes, seed {seed}")
    if hint := launch.bf16_hint(accelerator):
        accelerator.print(hint)

    splits, skipped = open_photos(config.data, seed, accelerator)
    label_names = splits["train"].features["label"].names
    positive_label = resolve_positive(label_names, config.data.positive_label)
    eval_split = "validation" if "validation" in splits else "test"
    if config.run.keep == "best" and eval_split == "test":
        raise UserError("--keep best needs a validation split to choose by: add --val-fraction 0.1")
    accelerator.print(f"positive class: {positive_label or 'none, so macro averages'}")

    # The source's body, a new head, and the preprocessing that both will always carry.
    source = load_source(config.model.model, config.model.weights, config.data.image_size)
    accelerator.print(f"source head: {network.describe_head(source)}")
    data_config = source_data_config(source, config.data.preprocessing, config.data.image_size)
    source_head, source_classes = source.get_classifier(), None
    if config.model.head_init == "class-vector":
        source_classes = heads.match_classes(source, label_names, config.model.source_class)
    net = network.replace_head(source, label_names, data_config, config.model.head_init)
    net = net.to(accelerator.device, memory_format=transforms.MEMORY_FORMAT)
    accelerator.print(f"target head: {network.describe_head(net)}")
    accelerator.print(f"preprocessing: {data_config}")
    if config.model.freeze_body:
        network.freeze_body(net)

    # What a body that does not change sees, and the head that is solved on it.
    solved = config.model.head_init in FITTED_HEADS
    split_features = functools.partial(
        features.of_split, accelerator, net, splits, data_dir=config.data.data_dir, data_config=data_config
    )
    feature_splits = splits if config.model.cache_features else ["train"] if solved else []
    split_features = {
        split: split_features(split, seed=seed, num_workers=workers) for split in feature_splits
    }
    if solved:
        views = features.of_crops(
            accelerator,
            net,
            *(splits, "train", config.data.data_dir, data_config),
            count=config.model.probe_views,
            min_crop_area=config.data.min_crop_area,
            seed=seed,
            num_workers=workers,
        )
        heads.fit_head(
            net, config.model.head_init, split_features["train"], views, source_head, source_classes
        )

    # Photos in batches, or what stands for them.
    if config.model.cache_features:
        trainable, eval_sets = net.get_classifier(), split_features
    else:
        as_in_test = transforms.eval_transform(data_config)
        eval_sets = {
            split: loaders.PhotoDataset(splits[split], as_in_test, seed) for split in {eval_split, "test"}
        }
        trainable = net
    train_loader = _train_loader(config, accelerator, splits["train"], data_config, split_features, workers)
    accumulation = config.optim.gradient_accumulation_steps
    micro_batch_size = engine.micro_batch_size(accelerator, config.optim.batch_size, accumulation)
    eval_loaders = {
        split: accelerator.prepare(
            loaders.eval_loader(eval_sets[split], micro_batch_size, num_workers=workers)
        )
        for split in {eval_split, "test"}
    }

    # Named groups, each with its rate, and a schedule that keeps their ratios.
    groups = optim.parameter_groups(
        net,
        learning_rate=config.optim.learning_rate,
        head_lr_mult=config.optim.head_lr_mult,
        layer_decay=config.optim.layer_decay,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
    )
    accelerator.print(optim.describe_groups(groups, net))
    # Not where a gradient scaler (fp16) or pieces of weights (FSDP) come between.
    fused = accelerator.device.type == "cuda" and not accelerator.scaler and not accelerator.is_fsdp2
    optimizer = optim.build_optimizer(groups, config.optim.optimizer, config.optim.momentum, fused=fused)
    total_steps = len(train_loader) * config.optim.epochs
    schedule = optim.build_schedule(
        optimizer, config.optim.schedule, total_steps, config.optim.warmup_fraction
    )
    progress, totals = Progress(), torch.zeros(3, device=accelerator.device)
    if solved:
        progress.epoch = 0
        smoothing = config.optim.label_smoothing
        totals = engine.totals_of(accelerator, net.get_classifier(), split_features["train"], smoothing)

    # The network may be cut into pieces from here on.
    meta_model = network.to_meta(net)
    if accelerator.is_fsdp2:
        net.cpu()  # its pieces go from there to the GPUs, which need not hold it and its average whole
    average = optim.build_average(trainable, config.optim.ema_decay)
    eval_modules = network.modules_in_eval_mode(
        trainable, body=config.model.freeze_body, batch_norm=config.model.batch_norm == "source"
    )
    if config.run.compile:
        trainable.compile()  # in place, so that the weights keep their names
    trainable, optimizer = launch.prepare(accelerator, trainable, optimizer, average)
    return Job(
        config=config,
        accelerator=accelerator,
        hardware=hardware,
        splits=splits,
        skipped=skipped,
        label_names=label_names,
        positive_label=positive_label,
        eval_split=eval_split,
        net=net,
        meta_model=meta_model,
        data_config=data_config,
        eval_modules=eval_modules,
        train_loader=train_loader,
        eval_loaders=eval_loaders,
        micro_batch_size=micro_batch_size,
        metric=ClassificationReport(label_names, positive_label),
        state=TrainState(trainable, optimizer, schedule, average, progress, totals),
    )


def _train_loader(
    config: TrainConfig,
    accelerator: Accelerator,
    rows: datasets.Dataset | StreamedSplit,
    data_config: dict,
    split_features: dict[str, loaders.FeatureDataset],
    num_workers: int,
) -> DataLoader:
    """Return batches of one optimizer step each: of a stream, of photos, or of their features."""
    batch_size, seed = config.optim.batch_size, config.run.seed
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    transform = transforms.eval_transform(data_config)
    if config.data.augmentation == "crop":
        transform = transforms.train_transform(
            data_config, config.data.train_image_size, config.data.min_crop_area
        )
    if config.data.streaming:
        sum_processes = functools.partial(launch.sum_processes, accelerator)
        sampler = stream.StreamSampler(
            rows, batch_size, seed, config.data.shuffle_buffer, sum_processes, **share
        )
        return stream.train_loader(sampler, transform, num_workers=num_workers)
    train_set = (
        split_features["train"]
        if config.model.cache_features
        else loaders.PhotoDataset(rows, transform, seed)
    )
    return loaders.train_loader(train_set, batch_size, num_workers=num_workers, **share)
