"""Measure on this machine: speed, time to accuracy, memory, start-up, against a plain loop and other tools.

python scripts/benchmark.py                                         # the drawn sample, offline: about an hour
python scripts/benchmark.py --data-dir my/photos --model resnet18 --weights my.safetensors
python scripts/benchmark.py --only startup prediction --repeats 5   # only these; the others are kept
python scripts/benchmark.py --data-dir my/photos --photos 30 --enlarge 4000 --only profile cache prediction
python scripts/benchmark.py --photos 20 --repeats 1 --epochs 1      # a few minutes, to see that it works
"""

from dataclasses import dataclass
from typing import Literal, get_args

import tyro

from hotdog_hf.config import RECIPES, SAMPLE_DATA_DIR
from hotdog_hf.errors import UserError, exit_on_user_error

Section = Literal[
    "startup",
    "prediction",
    "profile",
    "memory",
    "frozen",
    "exact",
    "cache",
    "simulated",
    "training",
    "processes",
    "accuracy",
]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure everything on this machine, and write README.md, results.json and pictures.

    The candidates take turns, each in its own process. Keep the machine free of other work.
    """

    # Folder with train/<class>/* and test/<class>/*. The default is drawn if missing.
    data_dir: str = SAMPLE_DATA_DIR
    # Any timm model name, and its weights, as for scripts/train.py.
    model: str = "tf_efficientnet_lite0"
    # "auto", "bundled", "none", or a .safetensors/.pth file.
    weights: str = "bundled"
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # At most so many photos per class and split. Unset: all.
    photos: int | None = None
    # Enlarge the photos to so many pixels on the longer side, 4000 for those of a phone. Unset: as they are.
    enlarge: int | None = None
    # Photos per optimizer step. Unset: each recipe's own (128 for the chapter's).
    batch_size: int | None = None
    # Epochs of each training run whose speed is measured.
    epochs: int = 2
    # Repeats of each measurement, taking turns; the seeds are 0, 1, ...
    repeats: int = 3
    # Sections to measure. Results of the others are kept if from the same machine with the same flags.
    only: tuple[Section, ...] = get_args(Section)
    # Recipes of the section "accuracy"; "chapter" sets the accuracy to reach.
    recipes: tuple[str, ...] = ("chapter", "frozen", "probe", "light")
    # CPU threads, for hotdog_hf and the other tools alike. Unset: all cores.
    num_threads: int | None = None
    # Folder of the report.
    output_dir: str = "runs/bench"

    def __post_init__(self) -> None:
        for flag, value in (("epochs", self.epochs), ("repeats", self.repeats)):
            if value < 1:
                raise ValueError(f"--{flag} must be at least 1, got {value}")
        for flag, least in (("photos", 2), ("batch_size", 1), ("num_threads", 1), ("enlarge", 16)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
        if wrong := sorted(set(self.recipes) - set(RECIPES)):
            raise ValueError(f"--recipes {wrong[0]!r} must be one of {', '.join(RECIPES)}")
        if "accuracy" in self.only and "chapter" not in self.recipes:
            raise ValueError("--recipes must include chapter, which sets the accuracy to reach")


def main(config: BenchmarkConfig) -> None:
    """Prepare, measure in turns, and write the results after every section."""
    # Imported here so that --help and a mistyped flag respond at once.
    import dataclasses
    import os
    import tempfile
    from pathlib import Path

    from hotdog_hf import files
    from hotdog_hf.bench import page, runner
    from hotdog_hf.bench.setup import prepare
    from hotdog_hf.data.folder import check_data_dir
    from hotdog_hf.model.places import check_weights

    check_data_dir(config.data_dir)
    check_weights(config.weights)
    folder, root = Path(config.output_dir), Path(os.path.relpath(Path(__file__).parent.parent))
    knobs = dataclasses.asdict(config)
    sections, repeats, _ = (knobs.pop(name) for name in ("only", "repeats", "output_dir"))
    load = runner.measure_load()
    with files.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="work-", dir=folder, ignore_cleanup_errors=True)
    with scratch as work:
        print("preparing photos, weights and a saved model", flush=True)
        exported = not set(page.EXPORTING).isdisjoint(sections)
        setup, machine = prepare(Path(work), root, exported=exported, **knobs)
        results = runner.Results(folder / "results.json", runner.facts_of(setup, machine, knobs), sections)
        failed, stopped = runner.measure_all(setup, results, sections, repeats, load)
    print(page.write_report(folder, results.content))
    print(f"report: {folder / 'README.md'}")
    if failed:
        raise UserError(f"{len(failed)} measurements failed, first {failed[0]}")
    if stopped:
        raise SystemExit(130)


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(BenchmarkConfig))
