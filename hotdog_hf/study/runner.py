"""The study from start to end: the queue of runs, their training, the written page."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from hotdog_hf import files
from hotdog_hf.config import DataConfig, override
from hotdog_hf.data import transforms
from hotdog_hf.data.folder import describe_counts
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import Photos, resolve_positive
from hotdog_hf.errors import UserError
from hotdog_hf.model import heads
from hotdog_hf.model.source import create_source, input_size, load_source, source_data_config
from hotdog_hf.study import plots
from hotdog_hf.study.page import write_study
from hotdog_hf.study.plan import COMMON, EXPERIMENTS, ReproduceConfig, Run, runs_of
from hotdog_hf.study.results import (
    Result,
    curves,
    rates_table,
    read_result,
    summaries,
    tuned,
    write_diverged,
    zero_shot,
)
from hotdog_hf.training import engine, launch
from hotdog_hf.training.features import FeatureExtractor
from hotdog_hf.training.loop import train
from hotdog_hf.training.run_dir import resume_command


class Clock:
    """Estimates how long runs take: from a measured pass at first, then from finished runs."""

    def __init__(
        self, counts: dict[str, dict[str, int]], size: int, train_seconds: float, eval_seconds: float
    ):
        """Takes the photos by split and class, the side of the input, and the seconds per photo."""
        self.photos = {split: sum(by_class.values()) for split, by_class in counts.items()}
        self.size, self.train_seconds, self.eval_seconds = size, train_seconds, eval_seconds
        self.guessed = self.taken = 0.0

    def guess(self, run: Run) -> float:
        """Estimate the seconds of a run from the measured pass only."""
        data, epochs = run.config.data, run.config.optim.epochs
        evaluation = self.photos.get("validation", self.photos["test"]) * self.eval_seconds
        if run.config.model.cache_features:
            return 2 * evaluation
        scale = ((data.train_image_size or self.size) / self.size) ** 2
        return epochs * (self.photos["train"] * self.train_seconds * scale + evaluation) + evaluation

    def learn(self, result: Result) -> None:
        """Take a finished run into account."""
        if not result.diverged:
            self.guessed += self.guess(result.run)
            self.taken += result.rows[-1]["seconds"]

    def describe(self, runs: list[Run]) -> str:
        """Return how many runs are left and about how long they take."""
        factor = self.taken / self.guessed if self.guessed else 1.0
        minutes = factor * sum(map(self.guess, runs)) / 60
        return f"{len(runs)} to go, about {minutes:.0f} minutes"


@dataclass
class Study:
    """The runs still to do, and the results of those that are done."""

    config: ReproduceConfig
    folder: Path
    photos: Photos
    experiments: Sequence[str]
    queue: list[Run]
    clock: Clock
    results: list[Result] = field(default_factory=list)


def run_study(config: ReproduceConfig, accelerator: Accelerator, stop: launch.StopSignal) -> UserError | None:
    """Train what has no result yet, and write the page; return the error of a run that failed."""
    study = plan_study(config, accelerator, config.data_dir[0])
    failure = train_missing(study, accelerator, stop)
    zero_shot = None
    if not failure and not stop.number:
        with contextlib.suppress(launch.StoppedError):
            zero_shot = ask_source(study, accelerator, stop)
    if accelerator.is_main_process and study.results:
        write(study, zero_shot, accelerator)
    return failure


def plan_study(config: ReproduceConfig, accelerator: Accelerator, data_dir: str) -> Study:
    """Open the photos and list all runs, except those that depend on the grid's result."""
    folder = Path(config.output_dir)
    with files.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data_config = DataConfig(data_dir=data_dir, bad_images=config.bad_images)
    photos = open_photos(data_config, 0, accelerator)
    common = {name: value for name in COMMON if (value := getattr(config, name)) is not None}
    common["data_dir"] = data_dir
    experiments = [name for name in EXPERIMENTS if name in config.only]
    if "class-vector" in experiments and len(experiments) > 1:
        try:
            match_source(config, photos)
        except UserError as error:
            accelerator.print(f"class-vector is left out: {error}")
            experiments.remove("class-vector")
    try:
        queue = [run for name in experiments for run in runs_of(name, config.seeds, common)]
    except ValueError as error:
        raise UserError(str(error)) from error
    size = config.image_size or input_size(config.model)
    net = create_source(config.model, "none", config.image_size)
    clock = Clock(photos.counts(), size, *engine.measure_speed(accelerator, net, size))
    return Study(config, folder, photos, experiments, queue, clock)


def train_missing(study: Study, accelerator: Accelerator, stop: launch.StopSignal) -> UserError | None:
    """Train the runs that have no result, until done, stopped, or a run fails; return its error."""
    manifest = study.photos.manifest()
    while study.queue and not stop.number:
        run = study.queue.pop(0)
        folder = run.folder(study.folder, manifest, accelerator.num_processes)
        accelerator.wait_for_everyone()
        result = read_result(run, folder)
        if result is None:
            left = study.clock.describe([run, *study.queue])
            accelerator.print(f"\n== {run.name}, seed {run.seed}; {left}")
            try:
                train(override(run.config, output_dir=str(folder), resume="auto"), accelerator, stop)
            except UserError as error:
                # A diverged loss is a result too.
                if not isinstance(error.__cause__, engine.NonFiniteLossError):
                    return error
                accelerator.print(str(error))
                if accelerator.is_main_process:
                    write_diverged(folder, str(error))
            launch.release(accelerator)
            accelerator.wait_for_everyone()
            if (result := read_result(run, folder)) is None:
                return None  # stopped
            study.clock.learn(result)
        study.results.append(result)
        # The grid's best is trained once the whole grid is done.
        if run.experiment == "grid" and not any(left.experiment == "grid" for left in study.queue):
            chosen = [tuned(study.results, arm) for arm in ("finetune", "scratch")]
            study.queue += [run for run in chosen if run]
    return None


def match_source(
    config: ReproduceConfig, photos: Photos
) -> tuple[torch.nn.Module, list[heads.SourceClasses] | None]:
    """Return the source classifier, and which of its classes correspond to ours."""
    source = load_source(config.model, config.weights, config.image_size)
    return source, heads.match_classes(source, photos.label_names, config.source_class)


def ask_source(study: Study, accelerator: Accelerator, stop: launch.StopSignal) -> dict | None:
    """Evaluate the source's own class before any training; None if no class corresponds to ours."""
    if "class-vector" not in study.experiments:
        return None
    config, label_names = study.config, study.photos.label_names
    source, classes = match_source(config, study.photos)
    positive = label_names.index(resolve_positive(label_names, config.positive_label) or label_names[0])
    if classes is None or classes[positive] is None:
        return None
    source = source.to(accelerator.device, memory_format=transforms.MEMORY_FORMAT)
    data_config = source_data_config(source, "chapter", config.image_size)
    extractor = FeatureExtractor(accelerator, source, study.photos, data_config, stop=stop)
    split_features = {split: extractor.split(split) for split in ("train", "test")}
    return zero_shot(split_features, source.get_classifier(), classes[positive], positive)


def write(study: Study, zero_shot: dict | None, accelerator: Accelerator) -> None:
    """Write the study's page, its table of results and its figures; print where they are."""
    folder, results, left = study.folder, study.results, len(study.queue)
    facts = {
        "command": resume_command(folder),
        "counts_table": describe_counts(study.photos.counts()),
        "hardware": launch.describe_hardware(accelerator),
        "versions": launch.describe_versions(),
        "missing": left,
    }
    with files.writing_to(folder):
        plots.plot_arms(summaries(results), folder / "intervals.png")
        plots.plot_arm_curves(curves(results), folder / "curves.png")
        plots.plot_rates(rates_table(results), folder / "rates.png")
        write_study(folder, results, zero_shot, facts)
    print(f"\n{folder}/README.md: {len(results)} runs{f', {left} still to come' if left else ''}")
