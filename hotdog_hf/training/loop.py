"""One training run from photos to a saved and evaluated model: `train` has the loop over the epochs."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from hotdog_hf import files, metrics
from hotdog_hf.config import TrainConfig, default_run_dir, flatten, to_dict
from hotdog_hf.data import images
from hotdog_hf.data.loaders import FeatureDataset
from hotdog_hf.data.splits import sample_photos
from hotdog_hf.errors import UserError, message_of
from hotdog_hf.model import calibration as calibrations
from hotdog_hf.model import heads, neighbors, saved
from hotdog_hf.model.source import describe_source
from hotdog_hf.training import (
    card,
    checkpoint,
    choice,
    engine,
    launch,
    plots,
    records,
    rejection,
    sharding,
)
from hotdog_hf.training.job import Job, build
from hotdog_hf.training.run_dir import (
    check_same_run,
    open_run_dir,
    read_identity,
    resume_command,
    write_identity,
)
from hotdog_hf.training.state import Progress


def train(config: TrainConfig, accelerator: Accelerator, stop: launch.StopSignal) -> Path | None:
    """Load photos and model, train, evaluate, save; return the run's folder, or None if it was stopped."""
    started = time.perf_counter()
    if (decision := choice.decide(config, accelerator, stop, started)) is None:
        return None
    config = decision.config
    try:
        job = build(config, accelerator, decision.photos, stop)
    except launch.StoppedError:
        accelerator.print("stopped before the first epoch; the same command starts again")
        return None
    job = dataclasses.replace(job, choice=decision.record)
    job.state.started, built = started, decision.seconds + started
    with contextlib.ExitStack() as stack:
        run_dir = open_run(job, stack)
        if job.state.progress.epoch == 0:
            job.state.progress.seconds = time.perf_counter() - built
        evaluation = None
        try:
            # With a fitted head the start counts as epoch 0.
            for epoch in range(job.state.progress.epoch, config.optim.epochs + 1):
                if epoch > 0:
                    train_epoch(job, run_dir, epoch, stop)
                evaluation = end_epoch(job, run_dir, epoch, stop)
            calibration = calibrate_saved(job, run_dir, stop)
            keep_neighbors(job, run_dir, stop)
            rescaled = calibration and calibration["temperature"] != 1
            if (
                rescaled
                or evaluation is None
                or job.eval_split != "test"
                or launch.precision_of(accelerator) != "no"
            ):
                evaluation = evaluate_saved(job, run_dir, stop)
        except launch.StoppedError:
            epoch, how = min(job.state.progress.epoch, config.optim.epochs), resume_command(run_dir)
            accelerator.print(f"stopped in epoch {epoch}; resume with: {how}")
            return None
        finish(job, run_dir, evaluation, calibration)
    return run_dir


class Evaluation(NamedTuple):
    """A network evaluated on a split: the scores, the probabilities [N, classes], and the labels [N]."""

    scores: dict
    probabilities: torch.Tensor
    labels: torch.Tensor


def open_run(job: Job, stack: contextlib.ExitStack) -> Path:
    """Open the run's folder, locked until `stack` is closed, and resume from a checkpoint if asked to.

    Called after every check that can fail, so a rejected start leaves nothing on disk.
    """
    config, accelerator = job.config, job.accelerator
    identity = {
        "config": to_dict(config),
        "num_processes": accelerator.num_processes,
        "precision": launch.precision_of(accelerator),
        "photos": job.photos.manifest(),
        "cut_by_content": job.photos.cut_by_content,
        "labels": job.photos.labels_digest,
    }
    found = launch.run_on_main(accelerator, lambda: _checkpoint_to_resume(config, identity))
    run_dir = checkpoint.run_dir_of(found) if found else config.run.output_dir
    run_dir = run_dir or default_run_dir(config.recipe)

    def open_folder() -> Path:
        folder, lock = open_run_dir(run_dir, resume=config.run.resume is not None)
        stack.callback(lock.release)
        with files.writing_to(folder):
            write_identity(folder, identity, job.photos.skipped)
            if job.choice:
                files.write_json(folder / "choice.json", job.choice)
        return folder

    run_dir = launch.run_on_main(accelerator, open_folder)
    launch.start_tracker(accelerator, run_dir, flatten(identity["config"]))
    if found:
        content = launch.run_on_main(accelerator, lambda: checkpoint.read(found), share=False)
        checkpoint.load(content, accelerator, job.state)
        progress = job.state.progress
        accelerator.print(f"resumed from {found}: epoch {progress.epoch}, step {progress.step}")
    return run_dir


def _checkpoint_to_resume(config: TrainConfig, identity: dict) -> Path | None:
    found = checkpoint.find(config.run.resume, config.run.output_dir)
    if found:
        before = read_identity(checkpoint.run_dir_of(found))
        check_same_run(before, identity, config.run.resume_anyway)
        begun, epochs = checkpoint.epoch_of(found), config.optim.epochs
        if epochs < begun and epochs != before["config"]["optim"]["epochs"]:
            raise UserError(
                f"--epochs {epochs}: {checkpoint.run_dir_of(found)} has finished {begun - 1} epochs;"
                f" give --epochs {begun} or more, or start a new run"
            )
    return found


def train_epoch(job: Job, run_dir: Path, epoch: int, stop: launch.StopSignal) -> None:
    """Train over the rest of an epoch. Raises `StoppedError` if told to stop, once the state is saved."""
    config, accelerator, state = job.config, job.accelerator, job.state
    progress = state.progress
    job.train_loader.batch_sampler.seek(epoch, progress.step)
    if progress.step == 0:
        progress.learning_rate = state.optimizer.param_groups[-1]["lr"]
    tick, every = time.perf_counter(), config.run.checkpoint_every
    with add_progress_to_errors(job, run_dir):
        steps = engine.train_steps(
            accelerator,
            state,
            job.train_loader,
            config.optim,
            job.eval_modules,
            title=f"epoch {epoch}/{config.optim.epochs}",
        )
        for data_seconds in steps:
            progress.step += 1
            progress.total_steps += 1
            before, tick = tick, time.perf_counter()
            progress.seconds += tick - before
            progress.waited += data_seconds
            stopped = launch.stop_requested(accelerator, stop, progress.total_steps)
            if stopped or (every != "epoch" and progress.total_steps % every == 0):
                save_checkpoint(job, run_dir)
            if stopped:
                raise launch.StoppedError


def end_epoch(job: Job, run_dir: Path, epoch: int, stop: launch.StopSignal) -> Evaluation | None:
    """Evaluate the weights after an epoch; save the metrics, the model if it is kept, and a checkpoint.

    With --evaluate end, only the last epoch is evaluated. Raises `StoppedError` if the run was told to stop
    meanwhile; the state after the epoch's last step is saved, and a resumed run begins with this evaluation.
    """
    config, accelerator, state = job.config, job.accelerator, job.state
    eval_split, progress = job.eval_split, state.progress
    last, best, evaluation = epoch == config.optim.epochs, progress.best, None
    row = {"epoch": epoch, "learning_rate": progress.learning_rate}
    row |= records.epoch_row(accelerator, state.totals, progress.seconds)
    row |= {"loading_seconds": progress.waited, "evaluating_seconds": 0.0}
    network = state.average.module if state.average and epoch > 0 else state.model
    keeps = last
    if last or config.run.evaluate == "epoch":
        tick = time.perf_counter()
        try:
            evaluation = evaluate(job, run_dir, network, job.eval_loaders[eval_split], stop)
        except launch.StoppedError:
            save_checkpoint(job, run_dir)
            raise
        row["evaluating_seconds"] = time.perf_counter() - tick
        row |= records.epoch_scores(evaluation.scores, eval_split)
    if config.run.keep == "best":
        fitted = progress.rows and progress.rows[0]["epoch"] == 0
        start = records.scores_of(progress.rows[0], eval_split) if fitted else None
        quality = metrics.quality(evaluation.scores, start, config.optim.class_weights == "balanced")
        keeps, best = quality > best, max(quality, best)
    accelerator.print(records.describe_epoch(row, eval_split))
    launch.log(accelerator, records.numbers(row), step=epoch)

    state.progress = Progress(
        epoch=epoch + 1, total_steps=progress.total_steps, rows=[*progress.rows, row], best=best
    )
    state.totals.zero_()
    kept = job.net if config.model.cache_features else accelerator.unwrap_model(network)
    weights = sharding.full_tensors(kept.state_dict(), keep=accelerator.is_main_process) if keeps else None
    with add_progress_to_errors(job, run_dir):
        if accelerator.is_main_process:
            with files.writing_to(run_dir):
                records.write_metrics(run_dir, state.progress.rows)
                draw_figures(job, run_dir)
                if keeps:
                    saved.save_model(job.meta_model, run_dir / "model", job.license, weights)
        save_checkpoint(job, run_dir)
    return evaluation


def draw_figures(job: Job, run_dir: Path) -> None:
    """Draw the curves, and once the samples: after an epoch, as importing matplotlib takes seconds."""
    plots.plot_curves(job.state.progress.rows, job.eval_split, run_dir / "curves.png")
    samples = run_dir / "samples.png"
    if not samples.exists():
        shown = job.photos.splits["test" if job.config.data.streaming else "train"]
        plots.plot_samples(*sample_photos(shown, job.positive_label), samples)


def calibrate_saved(job: Job, run_dir: Path, stop: launch.StopSignal) -> dict | None:
    """Calibrate the saved model on photos that it has not learned, if there are any; return the calibration.

    Those are validation photos, the folds of a fitted head, or the parts of train on which the recipe "best"
    tested a shorter training. A model that is calibrated already, as in a run that was stopped after that,
    stays as it is.
    """
    config, accelerator, folder = job.config, job.accelerator, run_dir / "model"
    before = launch.run_on_main(accelerator, lambda: saved.calibration_of(folder))
    if before:
        return before
    held_out, chosen_with = job.held_out, (job.choice or {}).get("calibration")
    if not launch.any_process(accelerator, held_out is not None):
        if job.eval_split == "validation":
            found = evaluate_saved(job, run_dir, stop, "validation")
            logits = found.probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
            held_out = calibrations.HeldOut(logits.numpy(), found.labels.numpy(), "validation")
        elif chosen_with is None:
            return None

    def calibrate() -> dict:
        weights = None
        if config.optim.class_weights == "balanced":
            weights = heads.class_weights(np.array(list(job.photos.counts()["train"].values())))
        calibration = chosen_with
        if held_out is not None:
            calibration = calibrations.calibrate(held_out, config.run.calibrate, weights)
        with files.writing_to(run_dir):
            saved.calibrate_saved(job.meta_model, folder, job.license, calibration)
        return calibration

    return launch.run_on_main(accelerator, calibrate)


def evaluate_saved(
    job: Job, run_dir: Path, stop: launch.StopSignal, loader_name: str = "saved"
) -> Evaluation:
    """Evaluate the saved model in float32, as every loader does: on test for the card, or on validation."""
    loader = job.eval_loaders[loader_name]
    restore_saved(job, run_dir)
    network = job.net.get_classifier() if isinstance(loader.dataset, FeatureDataset) else job.net
    return evaluate(job, run_dir, without_autocast(job, network), loader, stop, float32=True)


def restore_saved(job: Job, run_dir: Path) -> None:
    """Copy the weights of the saved model into the network, on every process."""
    kept = launch.run_on_main(
        job.accelerator, lambda: saved.load_model(run_dir / "model").state_dict(), share=False
    )
    own = job.net.state_dict()
    for name, value in sharding.broadcast_each(job.accelerator, kept or {}):
        sharding.copy_into(own[name], value)


def without_autocast(job: Job, network: torch.nn.Module) -> torch.nn.Module:
    """Return a network that computes in float32; prepared by the accelerator, it brings autocast along."""
    return job.accelerator.unwrap_model(network, keep_fp32_wrapper=False)


def keep_neighbors(job: Job, run_dir: Path, stop: launch.StopSignal) -> None:
    """Keep features of training photos with the saved model, unless they are kept already or not wanted."""
    folder = run_dir / "model"
    exists = launch.run_on_main(job.accelerator, (folder / neighbors.FILE).exists)
    if job.config.run.neighbors and not job.config.data.streaming and not exists:
        restore_saved(job, run_dir)
        with add_progress_to_errors(job, run_dir):
            rejection.keep_neighbors(job, without_autocast(job, job.net), folder, stop)


def finish(job: Job, run_dir: Path, evaluation: Evaluation, calibration: dict | None) -> None:
    """Write the final metrics, the predictions and the model card, and print where they are."""
    config, accelerator = job.config, job.accelerator
    seconds = time.perf_counter() - job.state.started
    final = records.final_row(job.state.progress.rows, evaluation.scores, seconds)
    if calibration:
        outputs = evaluation.probabilities.numpy(), evaluation.labels.numpy()
        final |= records.calibration_row(*outputs, calibration["temperature"])
    if accelerator.is_main_process:
        with files.writing_to(run_dir):
            records.write_metrics(run_dir, [*job.state.progress.rows, final])
            outputs = evaluation.probabilities, evaluation.labels, job.photos.label_names
            records.write_predictions(run_dir / "predictions.csv", job.photos.names("test"), *outputs)
            facts = card.CardFacts(
                name=(config.hub.push_to_hub or run_dir.name).rpartition("/")[2],
                config=to_dict(config),
                counts=job.photos.counts(),
                scores=final,
                positive_label=job.positive_label,
                source=describe_source(config.model.model, config.model.weights),
                license=job.license,
                data_config=job.data_config,
                hardware=job.hardware,
                versions=launch.describe_versions(),
                choice=job.choice,
                neighbors=neighbors.load(run_dir / "model" / neighbors.FILE),
            )
            card.write_card(run_dir, facts)
    # Last, once everything else is written: the GPU may have no room for a copy of the network.
    trains = config.optim.epochs and not config.model.cache_features
    if trains and (limit := _seconds_at_the_limit(job)):
        final["share_of_limit"] = final["examples_per_second"] * limit
        if accelerator.is_main_process:
            with files.writing_to(run_dir):
                records.write_metrics(run_dir, [*job.state.progress.rows, final])
    accelerator.print(records.describe_final(final, run_dir, job.hardware))
    if hint := records.waiting_hint(final, config, accelerator.device.type):
        accelerator.print(hint)


def _seconds_at_the_limit(job: Job) -> float | None:
    """Return the seconds per photo of training on photos in memory, or None if memory does not suffice."""
    size = job.config.data.train_image_size or job.data_config["input_size"][-1]
    try:
        # On a CPU the size of a batch hardly matters, and a large one takes seconds.
        most = 32 if job.accelerator.device.type == "cpu" else 256
        photos = min(max(job.micro_batch_size, 2), most)  # see network.single_photo
        return engine.measure_speed(job.accelerator, job.net, size, photos)[0]
    except torch.OutOfMemoryError:
        job.accelerator.print("the speed on photos in memory was not measured: not enough memory")
        return None


def evaluate(
    job: Job,
    run_dir: Path,
    network: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    stop: launch.StopSignal,
    float32: bool = False,
) -> Evaluation:
    """Evaluate a network on a loader's photos, on every process with the first one's BatchNorm statistics."""
    sharding.broadcast_state(network)
    with add_progress_to_errors(job, run_dir):
        probabilities, labels = engine.predict(job.accelerator, network, loader, "evaluation", float32, stop)
    return Evaluation(job.metric.compute(predictions=probabilities, references=labels), probabilities, labels)


def save_checkpoint(job: Job, run_dir: Path) -> None:
    """Save everything that a resumed run needs."""
    checkpoint.save(run_dir, job.accelerator, job.state, keep=job.config.run.keep_checkpoints)


@contextlib.contextmanager
def add_progress_to_errors(job: Job, run_dir: Path) -> Iterator[None]:
    """Add to a `UserError` the epoch, the step, and the checkpoint that the run can resume from.

    The error may be an unreadable photo, a loss that is not finite, or a full disk.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, images.UnreadableImageError) and job.accelerator.num_processes == 1:
            with contextlib.suppress(UserError):  # the photo is the error to tell
                save_checkpoint(job, run_dir)
        progress, before = job.state.progress, math.inf
        if isinstance(error, engine.NonFiniteLossError):
            before = progress.total_steps - error.steps_since
        epoch = min(progress.epoch, job.config.optim.epochs)
        where = f"epoch {epoch}, after {progress.total_steps} steps"
        last = checkpoint.latest(run_dir, before) or "none"
        raise UserError(f"{where}: {message_of(error)}. Last good checkpoint: {last}") from error
