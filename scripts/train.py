"""Fine-tune a pretrained image classifier on a folder of photos.

accelerate launch scripts/train.py                                  # the chapter: hot dogs, ResNet-18
accelerate launch scripts/train.py --recipe scratch                 # its comparison, from random weights
accelerate launch scripts/train.py --data-dir my/photos --weights my.safetensors --epochs 10
python scripts/train.py --help                                      # every knob
"""

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, TrainConfig, parse_train_config
from hotdog_hf.errors import UserError, exit_on_user_error, message_of


def main(config: TrainConfig) -> None:
    """Load photos and model, train, evaluate, save."""
    # Imported here so that --help and a mistyped flag answer before torch is loaded.
    import dataclasses
    import json
    import time

    import torch
    from accelerate.utils import broadcast_object_list, set_seed

    from hotdog_hf import (
        card,
        check,
        checkpoint,
        data,
        engine,
        hub,
        images,
        metrics,
        model,
        optim,
        plots,
        run,
    )
    from hotdog_hf.download import download_photos
    from hotdog_hf.folder import find_photos
    from hotdog_hf.sample import draw_sample

    started = time.perf_counter()
    accelerator = engine.build_accelerator(config.run.precision, config.run.tracker, config.run.num_threads)
    set_seed(config.run.seed)
    say = accelerator.print
    say(f"{engine.describe_hardware(accelerator)}, seed {config.run.seed}")
    if config.hub.push_to_hub and accelerator.is_main_process:
        hub.check_can_push(config.hub.push_to_hub)

    # Photos. The test split chooses nothing: where there is a validation split, that alone judges the epochs.
    with accelerator.main_process_first():
        if config.data.data_dir == DEFAULT_DATA_DIR:
            download_photos(DEFAULT_DATA_DIR)
        elif config.data.data_dir == SAMPLE_DATA_DIR:
            draw_sample(SAMPLE_DATA_DIR)
    skipped = []
    if not config.data.data_dir.startswith(data.HUB_DATA_PREFIX):
        with accelerator.main_process_first():  # the others find its answers in the cache
            checked = check.check_photos(
                find_photos(config.data.data_dir),
                cache_file=check.default_cache_file(),
                progress=accelerator.is_main_process,
            )
        say(f"{check.summary(checked)}; `python scripts/check_data.py {config.data.data_dir}` says more")
        if config.data.bad_images == "fail":
            check.require_readable(checked)
        skipped = check.unreadable(checked)
    photos = data.load_photos(
        config.data.data_dir, config.data.val_fraction, config.run.seed, skip=frozenset(skipped)
    )
    label_names = photos["train"].features["label"].names
    positive_label = data.resolve_positive(label_names, config.data.positive_label)
    watched = "validation" if "validation" in photos else "test"
    if config.run.keep == "best" and watched == "test":
        raise UserError("--keep best needs a validation split to choose by: add --val-fraction 0.1")
    say(
        data.describe(data.counts(photos)),
        f"positive class: {positive_label or 'none, so macro averages'}",
        sep="\n",
    )

    # Model: the source's body, a new head, and the preprocessing that both will always carry.
    if hub.is_saved_model(config.model.weights):
        source = hub.load_model(config.model.weights)
    else:
        source = model.create_source(config.model.model, config.model.weights, config.data.image_size)
    data_config = model.source_data_config(source, config.data.preprocessing, config.data.image_size)
    say(f"source head: {model.describe_head(source)}")
    net = model.replace_head(source, label_names, data_config, config.model.head_init)
    net = net.to(memory_format=engine.MEMORY_FORMAT)
    say(f"target head: {model.describe_head(net)}", f"preprocessing: {data_config}", sep="\n")

    # Batches.
    workers = (
        engine.default_workers(accelerator) if config.data.num_workers is None else config.data.num_workers
    )
    train_set = data.PhotoDataset(photos["train"], data.train_transform(data_config), config.run.seed)
    eval_sets = {
        split: data.PhotoDataset(photos[split], data.eval_transform(data_config))
        for split in (watched, "test")
    }
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    train_loader = data.train_loader(train_set, config.optim.batch_size, num_workers=workers, **ranks)
    pass_size = -(
        -config.optim.batch_size // (accelerator.num_processes * config.optim.gradient_accumulation_steps)
    )
    eval_loaders = {
        split: accelerator.prepare(data.eval_loader(eval_set, pass_size, num_workers=workers))
        for split, eval_set in eval_sets.items()
    }

    # Optimizer.
    groups = optim.parameter_groups(
        net,
        learning_rate=config.optim.learning_rate,
        head_lr_mult=config.optim.head_lr_mult,
        layer_decay=config.optim.layer_decay,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
    )
    say(optim.describe_groups(groups))
    optimizer = optim.build_optimizer(groups, config.optim.optimizer, config.optim.momentum)
    total_steps = len(train_loader) * config.optim.epochs
    schedule = optim.build_schedule(
        optimizer, config.optim.schedule, total_steps, config.optim.warmup_fraction
    )
    net, optimizer = accelerator.prepare(net, optimizer)

    # The run's folder, made last of all that can be refused, so that a refused start leaves nothing behind.
    identity = {
        "config": dataclasses.asdict(config),
        "num_processes": accelerator.num_processes,
        "photos": data.manifest(photos, config.data.data_dir),
    }
    found = checkpoint.find(config.run.resume, config.run.output_dir)
    run_dir = config.run.output_dir or run.default_run_dir(config.recipe)
    if found:
        run_dir = checkpoint.run_dir_of(found)
        saved = json.loads((run_dir / "identity.json").read_text(encoding="utf-8"))
        checkpoint.check_same_run(saved, identity, config.run.resume_anyway)
    if accelerator.is_main_process:
        run_dir, _lock = run.open_run_dir(run_dir, resume=config.run.resume is not None)
        with run.writing_to(run_dir):
            run.write_json(run_dir / "identity.json", identity)
            run.write_json(run_dir / "config.json", identity["config"])
            if skipped:
                run.write_json(run_dir / "skipped_images.json", [str(path) for path in skipped])
            plots.plot_samples(*data.showcase(photos["train"], positive_label), run_dir / "samples.png")
    [run_dir] = broadcast_object_list([run_dir])
    engine.start_tracker(accelerator, run_dir, run.flatten(config))

    # Where to start, and how to stop.
    progress, totals = checkpoint.Progress(), torch.zeros(3, device=accelerator.device)
    if found:
        progress, totals = checkpoint.load(found, accelerator, net, optimizer, schedule)
        say(f"resumed from {found}: epoch {progress.epoch}, step {progress.step}")
    stop = run.StopSignal()

    def save_checkpoint() -> None:
        parts = (accelerator, net, optimizer, schedule, progress, totals)
        checkpoint.save(run_dir, *parts, keep=config.run.keep_checkpoints)

    # Train.
    report = metrics.ClassificationReport(label_names, positive_label)
    every = config.run.checkpoint_every
    for epoch in range(progress.epoch, config.optim.epochs + 1):
        train_loader.batch_sampler.seek(epoch, progress.step)
        if progress.step == 0:
            progress.learning_rate = optimizer.param_groups[-1]["lr"]
        tick = time.perf_counter()
        steps = engine.train_steps(
            accelerator,
            net,
            train_loader,
            optimizer,
            schedule,
            totals,
            loss_reduction=config.optim.loss_reduction,
            accumulation_steps=config.optim.gradient_accumulation_steps,
            title=f"epoch {epoch}/{config.optim.epochs}",
        )
        try:
            for _ in steps:
                progress.step += 1
                progress.total_steps += 1
                progress.seconds += -tick + (tick := time.perf_counter())
                stopped = engine.agree(accelerator, bool(stop.number))
                if stopped or (every != "epoch" and progress.total_steps % every == 0):
                    save_checkpoint()
                if stopped:
                    say(f"stopped in epoch {epoch}; go on with: {run.resume_command(run_dir)}")
                    net, optimizer, *_ = engine.finish(accelerator, net, optimizer)
                    raise SystemExit(stop.exit_code)
        except UserError as error:
            # A photo that can't be read any more, a loss that isn't finite, a full disk.
            if accelerator.num_processes == 1 and isinstance(error, images.UnreadableImageError):
                save_checkpoint()
            where, last = f"epoch {epoch}, step {progress.step + 1}", checkpoint.latest(run_dir) or "none"
            raise UserError(f"{where}: {message_of(error)}. Last good checkpoint: {last}") from error

        row = {
            "epoch": epoch,
            "learning_rate": progress.learning_rate,
            **engine.epoch_row(accelerator, totals, progress.seconds),
        }
        probabilities, labels = engine.predict(accelerator, net, eval_loaders[watched], title=watched)
        scores = report.compute(predictions=probabilities, references=labels)
        row |= {f"{watched}_{name}": value for name, value in scores.items()}
        say(run.describe_epoch(row, watched))
        engine.log(accelerator, run.numbers(row), step=epoch)
        improved = scores["accuracy"] > progress.best_accuracy
        progress = checkpoint.Progress(
            epoch=epoch + 1,
            total_steps=progress.total_steps,
            rows=[*progress.rows, row],
            best_accuracy=max(scores["accuracy"], progress.best_accuracy),
        )
        totals.zero_()
        if accelerator.is_main_process:
            with run.writing_to(run_dir):
                run.write_metrics(run_dir, progress.rows)
                plots.plot_curves(progress.rows, watched, run_dir / "curves.png")
                if improved if config.run.keep == "best" else epoch == config.optim.epochs:
                    hub.save_model(accelerator.unwrap_model(net), run_dir / "model", config.hub.license)
        save_checkpoint()

    # The kept model, on the test split.
    if config.run.keep == "best":
        accelerator.unwrap_model(net).load_state_dict(hub.load_model(run_dir / "model").state_dict())
    if watched == "test":
        last_row = progress.rows[-1].items()
        scores = {name.removeprefix("test_"): value for name, value in last_row if name.startswith("test_")}
    else:
        probabilities, labels = engine.predict(accelerator, net, eval_loaders["test"], title="test")
        scores = report.compute(predictions=probabilities, references=labels)
    final = run.final_row(progress.rows, scores, seconds=time.perf_counter() - started)
    if accelerator.is_main_process:
        with run.writing_to(run_dir):
            run.write_metrics(run_dir, [*progress.rows, final])
            card.write_card(
                run_dir,
                name=(config.hub.push_to_hub or run_dir.name).rpartition("/")[2],
                config=identity["config"],
                counts=data.counts(photos),
                scores=final,
                positive_label=positive_label,
                hardware=engine.describe_hardware(accelerator),
                source=model.describe_source(config.model.model, config.model.weights),
                data_config=data_config,
            )
    say(run.describe_final(final, run_dir, engine.describe_hardware(accelerator)))
    if config.hub.push_to_hub and accelerator.is_main_process:
        say(
            "pushed to",
            hub.push_folder(run_dir / "model", config.hub.push_to_hub, private=config.hub.private),
        )
    net, optimizer, *_ = engine.finish(accelerator, net, optimizer)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_train_config())
