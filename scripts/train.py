"""Fine-tune a pretrained image classifier on a folder of photos.

accelerate launch scripts/train.py                                  # the chapter: hot dogs, ResNet-18
accelerate launch scripts/train.py --recipe scratch                 # its comparison, from random weights
accelerate launch scripts/train.py --data-dir my/photos --weights my.safetensors --epochs 10
python scripts/train.py --help                                      # every knob
"""

from hotdog_hf.config import DEFAULT_DATA_DIR, SAMPLE_DATA_DIR, TrainConfig, parse_train_config
from hotdog_hf.errors import UserError, exit_on_user_error


def main(config: TrainConfig) -> None:
    """Load photos and model, train, evaluate, save."""
    # Imported here so that --help and a mistyped flag answer before torch is loaded.
    import dataclasses
    import time

    from accelerate.utils import broadcast_object_list, set_seed

    from hotdog_hf import card, data, engine, hub, metrics, model, optim, plots, run
    from hotdog_hf.download import download_photos
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
    photos = data.load_photos(config.data.data_dir, config.data.val_fraction, config.run.seed)
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
    run_dir = config.run.output_dir or run.default_run_dir(config.recipe)
    if accelerator.is_main_process:
        run_dir = run.create_run_dir(run_dir, config)
        plots.plot_samples(*data.showcase(photos["train"], positive_label), run_dir / "samples.png")
    [run_dir] = broadcast_object_list([run_dir])
    engine.start_tracker(accelerator, run_dir, run.flatten(config))

    # Train.
    report = metrics.ClassificationReport(label_names, positive_label)
    rows, best_accuracy = [], -1.0
    for epoch in range(1, config.optim.epochs + 1):
        train_loader.batch_sampler.epoch = epoch
        row = {"epoch": epoch, "learning_rate": optimizer.param_groups[-1]["lr"]}
        row |= engine.train_one_epoch(
            accelerator,
            net,
            train_loader,
            optimizer,
            schedule,
            loss_reduction=config.optim.loss_reduction,
            accumulation_steps=config.optim.gradient_accumulation_steps,
            title=f"epoch {epoch}/{config.optim.epochs}",
        )
        probabilities, labels = engine.predict(accelerator, net, eval_loaders[watched], title=watched)
        scores = report.compute(predictions=probabilities, references=labels)
        row |= {f"{watched}_{name}": value for name, value in scores.items()}
        rows.append(row)
        say(run.describe_epoch(row, watched))
        accelerator.log(run.numbers(row), step=epoch)
        improved, best_accuracy = scores["accuracy"] > best_accuracy, max(scores["accuracy"], best_accuracy)
        if accelerator.is_main_process:
            run.append_metrics(run_dir, row)
            plots.plot_curves(rows, watched, run_dir / "curves.png")
            if improved if config.run.keep == "best" else epoch == config.optim.epochs:
                hub.save_model(accelerator.unwrap_model(net), run_dir / "model", config.hub.license)
    accelerator.wait_for_everyone()

    # The kept model, on the test split.
    if config.run.keep == "best":
        accelerator.unwrap_model(net).load_state_dict(hub.load_model(run_dir / "model").state_dict())
    if watched != "test":
        probabilities, labels = engine.predict(accelerator, net, eval_loaders["test"], title="test")
        scores = report.compute(predictions=probabilities, references=labels)
    final = run.final_row(rows, scores, seconds=time.perf_counter() - started)
    if accelerator.is_main_process:
        run.append_metrics(run_dir, final)
        card.write_card(
            run_dir,
            name=(config.hub.push_to_hub or run_dir.name).rpartition("/")[2],
            config=dataclasses.asdict(config),
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
