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
    from hotdog_hf.sample import draw_sample

    # Hardware and seed; what the Hub would refuse is refused now.
    started = time.perf_counter()
    accelerator = engine.build_accelerator(
        config.run.precision, config.run.tracker, config.run.num_threads, config.run.deterministic
    )
    say, is_main = accelerator.print, accelerator.is_main_process
    set_seed(config.run.seed)
    say(f"{engine.describe_hardware(accelerator)}, seed {config.run.seed}")
    if config.hub.push_to_hub and is_main:
        hub.check_can_push(config.hub.push_to_hub)

    # Photos. The test split chooses nothing: where there is a validation split, that alone judges the epochs.
    data_dir, skipped = config.data.data_dir, []
    with accelerator.main_process_first():
        if data_dir == DEFAULT_DATA_DIR:
            download_photos(data_dir)
        elif data_dir == SAMPLE_DATA_DIR:
            draw_sample(data_dir)
        if not data_dir.startswith(data.HUB_DATA_PREFIX):
            # The other processes find the answers in its cache.
            skipped, summary = check.files_to_skip(data_dir, config.data.bad_images, progress=is_main)
            say(summary)
    photos = data.load_photos(data_dir, config.data.val_fraction, config.run.seed, skip=frozenset(skipped))
    label_names = photos["train"].features["label"].names
    positive_label = data.resolve_positive(label_names, config.data.positive_label)
    watched = "validation" if "validation" in photos else "test"
    if config.run.keep == "best" and watched == "test":
        raise UserError("--keep best needs a validation split to choose by: add --val-fraction 0.1")
    say(data.describe(data.counts(photos)))
    say(f"positive class: {positive_label or 'none, so macro averages'}")

    # Model: the source's body, a new head, and the preprocessing that both will always carry.
    if hub.is_saved_model(config.model.weights):
        source = hub.load_model(config.model.weights)
    else:
        source = model.create_source(config.model.model, config.model.weights, config.data.image_size)
    say(f"source head: {model.describe_head(source)}")
    data_config = model.source_data_config(source, config.data.preprocessing, config.data.image_size)
    net = model.replace_head(source, label_names, data_config, config.model.head_init)
    net = net.to(memory_format=engine.MEMORY_FORMAT)
    say(f"target head: {model.describe_head(net)}")
    say(f"preprocessing: {data_config}")

    # Batches.
    workers = config.data.num_workers
    workers = engine.default_workers(accelerator) if workers is None else workers
    train_loader = data.train_loader(
        data.PhotoDataset(photos["train"], data.train_transform(data_config), config.run.seed),
        config.optim.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=workers,
    )
    accumulation = config.optim.gradient_accumulation_steps
    eval_batch = engine.pass_size(accelerator, config.optim.batch_size, accumulation)
    eval_loaders = {}
    for split in {watched, "test"}:
        eval_set = data.PhotoDataset(photos[split], data.eval_transform(data_config))
        eval_loaders[split] = accelerator.prepare(data.eval_loader(eval_set, eval_batch, num_workers=workers))

    # Optimizer: named groups, each with its rate, and a schedule that keeps their ratios.
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
        "photos": data.manifest(photos, data_dir),
    }
    run_dir = config.run.output_dir or run.default_run_dir(config.recipe)
    if found := checkpoint.find(config.run.resume, config.run.output_dir):
        run_dir = checkpoint.run_dir_of(found)
        checkpoint.check_same_run(run.read_identity(run_dir), identity, config.run.resume_anyway)
    if is_main:
        run_dir, _lock = run.open_run_dir(run_dir, resume=config.run.resume is not None)
        with run.writing_to(run_dir):
            run.write_identity(run_dir, identity, skipped)
            plots.plot_samples(*data.showcase(photos["train"], positive_label), run_dir / "samples.png")
    [run_dir] = broadcast_object_list([run_dir])
    engine.start_tracker(accelerator, run_dir, run.flatten(config))

    # Where to start, how to stop, and how to judge.
    progress, totals = checkpoint.Progress(), torch.zeros(3, device=accelerator.device)
    if found:
        progress, totals = checkpoint.load(found, accelerator, net, optimizer, schedule)
        say(f"resumed from {found}: epoch {progress.epoch}, step {progress.step}")
    stop, report = run.StopSignal(), metrics.ClassificationReport(label_names, positive_label)

    def save_checkpoint() -> None:
        state = (accelerator, net, optimizer, schedule, progress, totals)
        checkpoint.save(run_dir, *state, keep=config.run.keep_checkpoints)

    def evaluate(split: str) -> dict:
        probabilities, labels = engine.predict(accelerator, net, eval_loaders[split], title=split)
        return report.compute(predictions=probabilities, references=labels)

    # Train.
    every = config.run.checkpoint_every
    for epoch in range(progress.epoch, config.optim.epochs + 1):
        train_loader.batch_sampler.seek(epoch, progress.step)
        if progress.step == 0:
            progress.learning_rate = optimizer.param_groups[-1]["lr"]
        tick = time.perf_counter()
        try:
            for _ in engine.train_steps(
                accelerator,
                net,
                train_loader,
                optimizer,
                schedule,
                totals,
                loss_reduction=config.optim.loss_reduction,
                accumulation_steps=accumulation,
                title=f"epoch {epoch}/{config.optim.epochs}",
            ):
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
            if isinstance(error, images.UnreadableImageError) and accelerator.num_processes == 1:
                save_checkpoint()
            where, last = f"epoch {epoch}, step {progress.step + 1}", checkpoint.latest(run_dir) or "none"
            raise UserError(f"{where}: {message_of(error)}. Last good checkpoint: {last}") from error

        row = {"epoch": epoch, "learning_rate": progress.learning_rate}
        row |= engine.epoch_row(accelerator, totals, progress.seconds)
        scores = evaluate(watched)
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
        if is_main:
            with run.writing_to(run_dir):
                run.write_metrics(run_dir, progress.rows)
                plots.plot_curves(progress.rows, watched, run_dir / "curves.png")
                if improved if config.run.keep == "best" else epoch == config.optim.epochs:
                    hub.save_model(accelerator.unwrap_model(net), run_dir / "model", config.hub.license)
        save_checkpoint()

    # The kept model on the test split, its card, and its way to the Hub.
    if config.run.keep == "best":
        accelerator.unwrap_model(net).load_state_dict(hub.load_model(run_dir / "model").state_dict())
    scores = run.scores_of(progress.rows[-1], "test") if watched == "test" else evaluate("test")
    final = run.final_row(progress.rows, scores, seconds=time.perf_counter() - started)
    hardware = engine.describe_hardware(accelerator)
    if is_main:
        with run.writing_to(run_dir):
            run.write_metrics(run_dir, [*progress.rows, final])
            card.write_card(
                run_dir,
                name=(config.hub.push_to_hub or run_dir.name).rpartition("/")[2],
                config=identity["config"],
                counts=data.counts(photos),
                scores=final,
                positive_label=positive_label,
                hardware=hardware,
                source=model.describe_source(config.model.model, config.model.weights),
                data_config=data_config,
            )
    say(run.describe_final(final, run_dir, hardware))
    if config.hub.push_to_hub and is_main:
        url = hub.push_folder(run_dir / "model", config.hub.push_to_hub, private=config.hub.private)
        say(f"pushed to {url}")
    net, optimizer, *_ = engine.finish(accelerator, net, optimizer)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_train_config())
