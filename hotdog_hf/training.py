"""One training run from photos to a saved, judged model. The loop lies open in `train`."""

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hotdog_hf import (
    card,
    checkpoint,
    data,
    engine,
    features,
    files,
    heads,
    hub,
    images,
    metrics,
    model,
    optim,
    photos,
    plots,
    run,
    sharding,
    stream,
)
from hotdog_hf.config import SOLVED_HEADS, TrainConfig, flatten, plain
from hotdog_hf.errors import UserError, message_of


def train(config: TrainConfig, accelerator: Accelerator, stop: run.StopSignal) -> Path | None:
    """Load photos and model, train, evaluate, save; return the run's folder, or None where it was stopped."""
    started, say, is_main = time.perf_counter(), accelerator.print, accelerator.is_main_process
    hardware = engine.describe_hardware(accelerator)
    set_seed(config.run.seed)
    workers = config.data.num_workers
    workers = engine.default_workers(accelerator) if workers is None else workers
    say(f"{hardware}, {workers} loader processes, seed {config.run.seed}")

    # Photos. The test split chooses nothing: where there is a validation split, that alone judges the epochs.
    splits, skipped = photos.open_photos(config.data, config.run.seed, accelerator)
    label_names = splits["train"].features["label"].names
    positive_label = data.resolve_positive(label_names, config.data.positive_label)
    watched = "validation" if "validation" in splits else "test"
    if config.run.keep == "best" and watched == "test":
        raise UserError("--keep best needs a validation split to choose by: add --val-fraction 0.1")
    say(f"positive class: {positive_label or 'none, so macro averages'}")

    # Model: the source's body, a new head, and the preprocessing that both will always carry.
    source = model.load_source(config.model.model, config.model.weights, config.data.image_size)
    say(f"source head: {model.describe_head(source)}")
    data_config = model.source_data_config(source, config.data.preprocessing, config.data.image_size)
    source_head, source_classes = source.get_classifier(), None
    if config.model.head_init == "class-vector":
        source_classes = heads.match_classes(source, label_names, config.model.source_class)
    net = model.replace_head(source, label_names, data_config, config.model.head_init)
    net = net.to(accelerator.device, memory_format=engine.MEMORY_FORMAT)
    say(f"target head: {model.describe_head(net)}")
    say(f"preprocessing: {data_config}")
    if config.model.freeze_body:
        model.freeze_body(net)

    # Photos as tensors or, where a frozen body allows, as its features, on which a head can be solved.
    accumulation = config.optim.gradient_accumulation_steps
    eval_batch = engine.pass_size(accelerator, config.optim.batch_size, accumulation)
    as_in_test = data.eval_transform(data_config)
    sets = {
        split: data.PhotoDataset(rows, as_in_test, config.run.seed)
        for split, rows in splits.items()
        if not isinstance(rows, data.StreamedSplit)
    }
    solved, seen = config.model.head_init in SOLVED_HEADS, {}
    for split in splits if config.model.cache_features else ["train"] if solved else []:
        place = (splits, split, config.data.data_dir, data_config)
        seen[split] = features.of_split(accelerator, net, *place, seed=config.run.seed, num_workers=workers)
    if solved:
        views = features.of_crops(
            accelerator,
            net,
            *(splits, "train", config.data.data_dir, data_config),
            count=config.model.probe_views,
            min_crop_area=config.data.min_crop_area,
            seed=config.run.seed,
            num_workers=workers,
        )
        heads.solve(net, config.model.head_init, seen["train"], views, source_head, source_classes)
    sets, trained = (seen, net.get_classifier()) if config.model.cache_features else (sets, net)
    transform, augmented = as_in_test, config.data.augmentation == "crop"
    if augmented:
        transform = data.train_transform(data_config, config.data.train_image_size, config.data.min_crop_area)
    batch_size, seed = config.optim.batch_size, config.run.seed
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if config.data.streaming:
        total = functools.partial(engine.total, accelerator)
        buffer_size = config.data.shuffle_buffer
        sampler = stream.StreamSampler(splits["train"], batch_size, seed, buffer_size, total, **share)
        train_loader = stream.train_loader(sampler, transform, num_workers=workers)
    else:
        train_set = data.PhotoDataset(splits["train"], transform, seed) if augmented else sets["train"]
        train_loader = data.train_loader(train_set, batch_size, num_workers=workers, **share)
    eval_loaders = {
        split: accelerator.prepare(data.eval_loader(sets[split], eval_batch, num_workers=workers))
        for split in {watched, "test"}
    }

    # Optimizer: named groups, each with its rate, and a schedule that keeps their ratios.
    groups = optim.parameter_groups(
        net,
        learning_rate=config.optim.learning_rate,
        head_lr_mult=config.optim.head_lr_mult,
        layer_decay=config.optim.layer_decay,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
    )
    say(optim.describe_groups(groups, net))
    optimizer = optim.build_optimizer(groups, config.optim.optimizer, config.optim.momentum)
    total_steps = len(train_loader) * config.optim.epochs
    schedule = optim.build_schedule(
        optimizer, config.optim.schedule, total_steps, config.optim.warmup_fraction
    )
    if solved:
        head, smoothing = net.get_classifier(), config.optim.label_smoothing
        start_totals = engine.totals_of(accelerator, head, seen["train"], smoothing)
    shell = model.without_weights(net)  # to be saved with weights that a launch may cut into pieces
    if accelerator.is_fsdp2:
        net.cpu()  # its pieces go from there to the GPUs, which need not hold it and its average whole
    average = optim.build_average(trained, config.optim.ema_decay)
    resting = model.resting_modules(
        trained, body=config.model.freeze_body, batch_norm=config.model.batch_norm == "source"
    )
    if config.run.compile:
        trained.compile()  # in place, so that the weights keep their names
    trained, optimizer = engine.prepare(accelerator, trained, optimizer, average)

    # The run's folder, made last of all that can be refused, so that a refused start leaves nothing behind.
    identity = {
        "config": plain(config),
        "num_processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "photos": data.manifest(splits, config.data.data_dir),
    }
    found = engine.on_main(accelerator, lambda: _checkpoint_to_go_on_from(config, identity))
    run_dir = checkpoint.run_dir_of(found) if found else config.run.output_dir
    run_dir = run_dir or run.default_run_dir(config.recipe)
    locks = []  # held until this function ends

    def enter() -> Path:
        folder, lock = run.open_run_dir(run_dir, resume=config.run.resume is not None)
        locks.append(lock)
        with files.writing_to(folder):
            run.write_identity(folder, identity, skipped)
            shown = splits["test" if config.data.streaming else "train"]
            plots.plot_samples(*data.showcase(shown, positive_label), folder / "samples.png")
        return folder

    run_dir = engine.on_main(accelerator, enter)
    engine.start_tracker(accelerator, run_dir, flatten(identity["config"]))

    # Where to start, and how to judge. A solved head is judged before training, as epoch 0.
    progress = checkpoint.Progress(epoch=0 if solved else 1)
    totals = torch.zeros(3, device=accelerator.device)
    if found:
        content = engine.on_main(accelerator, lambda: checkpoint.read(found))
        progress, totals = checkpoint.load(content, accelerator, trained, optimizer, schedule, average)
        say(f"resumed from {found}: epoch {progress.epoch}, step {progress.step}")
    report = metrics.ClassificationReport(label_names, positive_label)

    def save_checkpoint() -> None:
        state = (accelerator, trained, optimizer, schedule, average, progress, totals)
        checkpoint.save(run_dir, *state, keep=config.run.keep_checkpoints)

    @contextlib.contextmanager
    def telling_where() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            # A photo that can't be read any more, a loss that isn't finite, a full disk.
            if isinstance(error, images.UnreadableImageError) and accelerator.num_processes == 1:
                save_checkpoint()
            epoch = min(progress.epoch, config.optim.epochs)
            where = f"epoch {epoch}, after {progress.total_steps} steps"
            last = checkpoint.latest(run_dir) or "none"
            raise UserError(f"{where}: {message_of(error)}. Last good checkpoint: {last}") from error

    def evaluate(network: torch.nn.Module, split: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
        engine.share_state(network)
        with telling_where():
            probabilities, labels = engine.predict(accelerator, network, eval_loaders[split], title=split)
        return report.compute(predictions=probabilities, references=labels), probabilities, labels

    def train_epoch(epoch: int) -> bool:
        train_loader.batch_sampler.seek(epoch, progress.step)
        if progress.step == 0:
            progress.learning_rate = optimizer.param_groups[-1]["lr"]
        tick, every = time.perf_counter(), config.run.checkpoint_every
        with telling_where():
            for waited in engine.train_steps(
                accelerator,
                trained,
                train_loader,
                optimizer,
                schedule,
                totals,
                loss_reduction=config.optim.loss_reduction,
                label_smoothing=config.optim.label_smoothing,
                accumulation_steps=accumulation,
                average=average,
                resting=resting,
                title=f"epoch {epoch}/{config.optim.epochs}",
            ):
                progress.step += 1
                progress.total_steps += 1
                before, tick = tick, time.perf_counter()
                progress.seconds += tick - before
                progress.waited += waited
                stopped = engine.agree(accelerator, bool(stop.number))
                if stopped or (every != "epoch" and progress.total_steps % every == 0):
                    save_checkpoint()
                if stopped:
                    say(f"stopped in epoch {epoch}; go on with: {run.resume_command(run_dir)}")
                    return False
        return True

    # Train. Each epoch is judged; of a solved head also the start, as epoch 0.
    scores = predicted = None
    for epoch in range(progress.epoch, config.optim.epochs + 1):
        if epoch == 0:
            totals.copy_(start_totals)
            progress.seconds = time.perf_counter() - started
        elif not train_epoch(epoch):
            return None
        row = {"epoch": epoch, "learning_rate": progress.learning_rate}
        row |= engine.epoch_row(accelerator, totals, progress.seconds)
        judged = average.module if average and epoch > 0 else trained
        tick = time.perf_counter()
        scores, *predicted = evaluate(judged, watched)
        row |= {"loading_seconds": progress.waited, "evaluating_seconds": time.perf_counter() - tick}
        row |= {f"{watched}_{name}": value for name, value in scores.items()}
        say(run.describe_epoch(row, watched))
        engine.log(accelerator, run.numbers(row), step=epoch)
        start = run.scores_of(progress.rows[0], watched) if solved and epoch > 0 else None
        quality = metrics.quality(scores, start)
        improved = quality > progress.best
        progress = checkpoint.Progress(
            epoch=epoch + 1,
            total_steps=progress.total_steps,
            rows=[*progress.rows, row],
            best=max(quality, progress.best),
        )
        totals.zero_()
        keeps = improved if config.run.keep == "best" else epoch == config.optim.epochs
        kept = net if config.model.cache_features else accelerator.unwrap_model(judged)
        weights = sharding.whole(kept.state_dict(), keep=is_main) if keeps else None
        with telling_where():
            if is_main:
                with files.writing_to(run_dir):
                    run.write_metrics(run_dir, progress.rows)
                    plots.plot_curves(progress.rows, watched, run_dir / "curves.png")
                    if keeps:
                        hub.save_model(shell, run_dir / "model", config.hub.license, weights)
            save_checkpoint()

    # The kept model on the test split, its card, and its way to the Hub.
    if watched != "test" or predicted is None:

        def kept_state() -> dict[str, torch.Tensor]:
            kept = hub.load_model(run_dir / "model")
            return (kept.get_classifier() if config.model.cache_features else kept).state_dict()

        sharding.load_state(accelerator.unwrap_model(trained), engine.on_main(accelerator, kept_state))
        scores, *predicted = evaluate(trained, "test")
    final = run.final_row(progress.rows, scores, seconds=time.perf_counter() - started)
    if not config.model.cache_features:
        size = config.data.train_image_size or data_config["input_size"][-1]
        limit, _ = engine.measure_speed(accelerator, net, size, min(eval_batch, 32))
        final["share_of_limit"] = final["examples_per_second"] * limit
    if is_main:
        with files.writing_to(run_dir):
            run.write_metrics(run_dir, [*progress.rows, final])
            names = data.names_of(splits["test"], config.data.data_dir)
            run.write_predictions(run_dir / "predictions.csv", names, *predicted, label_names)
            card.write_card(
                run_dir,
                name=(config.hub.push_to_hub or run_dir.name).rpartition("/")[2],
                config=identity["config"],
                counts=data.counts(splits),
                scores=final,
                positive_label=positive_label,
                hardware=hardware,
                source=model.describe_source(config.model.model, config.model.weights),
                data_config=data_config,
            )
    say(run.describe_final(final, run_dir, hardware))
    return run_dir


def _checkpoint_to_go_on_from(config: TrainConfig, identity: dict) -> Path | None:
    found = checkpoint.find(config.run.resume, config.run.output_dir)
    if found:
        before = run.read_identity(checkpoint.run_dir_of(found))
        checkpoint.check_same_run(before, identity, config.run.resume_anyway)
    return found
