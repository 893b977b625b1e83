"""The chapter's claim and its exercises as one study, with numbers one can trust.

accelerate launch scripts/reproduce.py                                    # all of it, on the chapter's photos
accelerate launch scripts/reproduce.py --data-dir my/photos --seeds 3 --only finetune scratch best
python scripts/reproduce.py --only rates --image-size 128                 # one exercise, on smaller pictures

Runs that are finished are not run again: the same command goes on where it was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import tyro

from hotdog_hf.config import DEFAULT_DATA_DIR
from hotdog_hf.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from datasets import DatasetDict

Experiment = Literal[
    "finetune", "scratch", "frozen", "class-vector", "probe", "best", "rates", "grid", "variants"
]
EXPERIMENTS = get_args(Experiment)


@dataclass(frozen=True)
class ReproduceConfig:
    """Run the chapter's study and write runs/reproduce/README.md, results.csv and the figures."""

    # Folder with train/<class>/* and test/<class>/*, or hf://datasets/user/name.
    data_dir: str = DEFAULT_DATA_DIR
    # Any timm model name, and its weights, as for scripts/train.py.
    model: str = "resnet18"
    # "auto", "bundled", or a .safetensors/.pth file.
    weights: str = "auto"
    # Source classes of ours, as in hotdog=934, where the names are not the source's own.
    source_class: tuple[str, ...] = ()
    # Seeds 0, 1, ... of each arm (rates and grid have one seed, variants at most two).
    seeds: int = 5
    # What to run: rates is exercise 1, grid exercise 2, variants what was tried for "best"; the others are
    # the arms. Unset: all but the variants.
    only: tuple[Experiment, ...] = EXPERIMENTS[:-1]
    # Epochs of every run but the probe's. Unset: each recipe's own.
    epochs: int | None = None
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # Class that precision, recall and the zero-shot question speak of. Unset: "hotdog" where it exists.
    positive_label: str | None = None
    # Photos that cannot be read: end with their names, or go on without them.
    bad_images: Literal["fail", "skip"] = "fail"
    # Loader processes. Unset: as in scripts/train.py.
    num_workers: int | None = None
    # Threads of a process on a CPU. Unset: the cores, shared out among the processes.
    num_threads: int | None = None
    # Where the study goes.
    output_dir: str = "runs/reproduce"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")


def main(config: ReproduceConfig) -> None:
    """Plan the runs, train those that are missing, and write what they say."""
    # Imported here so that --help and a mistyped flag answer before torch is loaded.
    from pathlib import Path

    from hotdog_hf import files
    from hotdog_hf.config import DataConfig
    from hotdog_hf.data.prepare import open_photos
    from hotdog_hf.data.splits import counts, describe, manifest
    from hotdog_hf.model.source import create_source, input_size, load_source
    from hotdog_hf.study import plots
    from hotdog_hf.study.page import write_study
    from hotdog_hf.study.plan import COMMON, override, runs_of
    from hotdog_hf.study.results import (
        curves,
        rates_table,
        read_result,
        summaries,
        tuned,
        write_diverged,
    )
    from hotdog_hf.study.runner import Clock
    from hotdog_hf.training import engine, launch
    from hotdog_hf.training.launch import StopSignal
    from hotdog_hf.training.loop import train
    from hotdog_hf.training.run_dir import resume_command

    study_dir = Path(config.output_dir)
    accelerator = launch.build_accelerator("auto", num_threads=config.num_threads)
    is_main, stop = accelerator.is_main_process, StopSignal()
    with files.writing_to(study_dir):
        study_dir.mkdir(parents=True, exist_ok=True)

    # The photos, and all runs but those that a grid has still to choose.
    data_config = DataConfig(data_dir=config.data_dir, bad_images=config.bad_images)
    splits, _ = open_photos(data_config, 0, accelerator)
    manifest, counts = manifest(splits, config.data_dir), counts(splits)
    common = {name: value for name in COMMON if (value := getattr(config, name)) is not None}
    experiments = [name for name in EXPERIMENTS if name in config.only]
    if "class-vector" in experiments and len(experiments) > 1:
        try:
            load_source(config, splits)
        except UserError as error:
            accelerator.print(f"class-vector is left out: {error}")
            experiments.remove("class-vector")
    try:
        queue = [run for name in experiments for run in runs_of(name, config.seeds, common)]
    except ValueError as error:
        raise UserError(str(error)) from error
    size = config.image_size or input_size(config.model)
    net = create_source(config.model, "none", config.image_size)
    clock = Clock(counts, size, *engine.measure_speed(accelerator, net, size))

    # Train what is missing. What a grid chooses is trained when all of the grid is there.
    results, failure = [], None
    while queue and not stop.number:
        run = queue.pop(0)
        folder = run.folder(study_dir, manifest, accelerator.num_processes)
        accelerator.wait_for_everyone()
        result = read_result(run, folder)
        if result is None:
            accelerator.print(f"\n== {run.name}, seed {run.seed}; {clock.describe([run, *queue])}")
            try:
                train(override(run.config, output_dir=str(folder), resume="auto"), accelerator, stop)
            except UserError as error:
                # Too high a rate is an answer too.
                if not isinstance(error.__cause__, engine.NonFiniteLossError):
                    failure = error
                    break
                accelerator.print(str(error))
                if is_main:
                    write_diverged(folder, str(error))
            launch.release(accelerator)
            accelerator.wait_for_everyone()
            if (result := read_result(run, folder)) is None:
                break  # stopped
            clock.learn(result)
        results.append(result)
        if run.experiment == "grid" and not any(left.experiment == "grid" for left in queue):
            queue += [tuned(results, arm) for arm in ("finetune", "scratch")]

    # What they say.
    zero = None
    if "class-vector" in experiments and not stop.number and not failure:
        zero = ask_source(config, accelerator, splits)
    if is_main and results:
        with files.writing_to(study_dir):
            plots.plot_arms(summaries(results), study_dir / "intervals.png")
            plots.plot_arm_curves(curves(results), study_dir / "curves.png")
            plots.plot_rates(rates_table(results), study_dir / "rates.png")
            write_study(
                study_dir,
                results,
                zero,
                {
                    "command": resume_command(study_dir),
                    "counts_table": describe(counts),
                    "hardware": launch.describe_hardware(accelerator),
                    "versions": launch.describe_versions(),
                    "missing": len(queue),
                },
            )
        print(
            f"\n{study_dir}/README.md: {len(results)} runs{f', {len(queue)} still to come' if queue else ''}"
        )
    launch.finish(accelerator)
    if failure:
        raise failure
    if stop.number:
        raise SystemExit(stop.exit_code)


def load_source(config: ReproduceConfig, splits: DatasetDict) -> tuple[torch.nn.Module, list[int | None]]:
    """Return the source classifier and which of its classes ours are."""
    from hotdog_hf.model import heads
    from hotdog_hf.model.source import load_source

    source = load_source(config.model, config.weights, config.image_size)
    return source, heads.match_classes(source, splits["train"].features["label"].names, config.source_class)


def ask_source(config: ReproduceConfig, accelerator: Accelerator, splits: DatasetDict) -> dict | None:
    """Judge the source's own class before any training, or None where the positive class has none."""
    from hotdog_hf.data import transforms
    from hotdog_hf.data.splits import resolve_positive
    from hotdog_hf.model.source import load_source, source_data_config
    from hotdog_hf.study.results import (
        zero_shot,
    )
    from hotdog_hf.training import features

    label_names = splits["train"].features["label"].names
    source, classes = load_source(config, splits)
    source = source.to(accelerator.device, memory_format=transforms.MEMORY_FORMAT)
    data_config = source_data_config(source, "chapter", config.image_size)
    positive = label_names.index(resolve_positive(label_names, config.positive_label) or label_names[0])
    if classes[positive] is None:
        return None
    split_features = {
        split: features.of_split(accelerator, source, splits, split, config.data_dir, data_config)
        for split in ("train", "test")
    }
    return zero_shot(split_features, source.get_classifier(), classes[positive], positive)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(ReproduceConfig))
