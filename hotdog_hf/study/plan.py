"""The runs of the study."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hotdog_hf.config import DEFAULT_DATA_DIR, HARMLESS, RECIPES, TrainConfig, flatten, override, to_dict

# The arms by name: the recipe, and its name in the table.
ARMS = {
    "finetune": ("chapter", "fine-tuned (the chapter)"),
    "scratch": ("scratch", "from scratch"),
    "frozen": ("frozen", "body frozen (exercise 3)"),
    "class-vector": ("class-vector", "from the source's class vector (exercise 4)"),
    "probe": ("probe", "fitted head, no training"),
    "light": ("light", "light fine-tuning"),
}
# The recipes that `compare` trains on every folder.
COMPARED = ("chapter", "probe", "source-probe", "light", "full", "best")
# Exercise 1: the chapter's rate times these. Exercise 2: every pair of these factors and weight decays.
RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
GRID_FACTORS, GRID_DECAYS = (0.3, 1.0, 3.0), (0.0001, 0.001, 0.01)
# What else was tried for the recipe "light", each evaluated only on a validation split.
VARIANTS: dict[str, dict] = {
    "light": {},
    "all of the body": {"frozen_share": 0.0},
    "new head": {"head_init": "xavier", "probe_views": 0, "head_lr_mult": 10.0},
    "BatchNorm by the batch": {"batch_norm": "batch"},
    "SGD": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 3e-4, "weight_decay": 1e-4},
    "a third of the rate": {"learning_rate": 1e-5},
    "three times the rate": {"learning_rate": 1e-4},
    "crops of 160 pixels": {"train_image_size": 160},
    "crops from 8 %": {"min_crop_area": 0.08},
    "without the average": {"ema_decay": 0.0},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "lower layers slower": {"layer_decay": 0.7},
}
# Knobs of the study that every run shares.
COMMON = (
    "model",
    "weights",
    "source_class",
    "epochs",
    "image_size",
    "positive_label",
    "bad_images",
    "num_workers",
    "num_threads",
)
# Share of train that the grid and the variants are evaluated on.
CHOICE_FRACTION = 0.2


Experiment = Literal[
    "finetune", "scratch", "frozen", "class-vector", "probe", "light", "rates", "grid", "variants", "compare"
]
EXPERIMENTS = get_args(Experiment)


@dataclass(frozen=True)
class ReproduceConfig:
    """Run the chapter's study and write runs/reproduce/README.md, results.csv and the figures."""

    # Folder with train/<class>/* and test/<class>/*, or hf://datasets/user/name; several for "compare".
    data_dir: tuple[str, ...] = (DEFAULT_DATA_DIR,)
    # Any timm model name, and its weights, as for scripts/train.py.
    model: str = "resnet18"
    # "auto", "bundled", or a .safetensors/.pth file.
    weights: str = "auto"
    # Source classes, as in hotdog=934, if the class names are not the source's.
    source_class: tuple[str, ...] = ()
    # Number of seeds (0, 1, ...) of each arm. Rates and grid have one, variants at most two.
    seeds: int = 5
    # What to run: the arms by name, exercise 1 (rates), exercise 2 (grid), what was tried for "light"
    # (variants), or, alone, the recipes side by side on each folder (compare). Unset: all but the last two.
    only: tuple[Experiment, ...] = EXPERIMENTS[:-2]
    # Epochs of every run but the probe's. Unset: each recipe's own.
    epochs: int | None = None
    # Side of the square input in pixels. Unset: the model's own.
    image_size: int | None = None
    # Class that precision, recall and the zero-shot score are computed for. Unset: "hotdog" if it exists.
    positive_label: str | None = None
    # Photos that cannot be read: stop and name them, or skip them.
    bad_images: Literal["fail", "skip"] = "fail"
    # Loader processes. Unset: as in scripts/train.py.
    num_workers: int | None = None
    # CPU threads per process. Unset: the cores divided among the processes.
    num_threads: int | None = None
    # Folder of the study.
    output_dir: str = "runs/reproduce"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if "compare" in self.only and self.only != ("compare",):
            raise ValueError("--only compare stands alone: it has a page of its own")
        if len(set(self.data_dir)) != len(self.data_dir) or not self.data_dir:
            raise ValueError(f"--data-dir needs folders that differ, got {' '.join(self.data_dir) or 'none'}")
        if len(self.data_dir) > 1 and self.only != ("compare",):
            raise ValueError(f"{len(self.data_dir)} --data-dir need --only compare")


@dataclass(frozen=True)
class Run:
    """One training run of the study: its place in it, and its config."""

    experiment: str
    name: str
    seed: int
    config: TrainConfig

    def folder(self, study_dir: Path, photos: dict, num_processes: int) -> Path:
        """Return the run's folder, which depends on config, photos and number of processes."""
        usual = flatten(to_dict(TrainConfig()))
        # Default values are left out, so that a knob added in a later version changes no folder.
        knobs = {
            name: value
            for name, value in flatten(to_dict(self.config)).items()
            if name not in HARMLESS and value != usual[name]
        }
        facts = json.dumps([knobs, photos, num_processes], sort_keys=True)
        return study_dir / f"{self.name}-seed{self.seed}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def runs_of(experiment: str, seeds: int, common: dict) -> list[Run]:
    """Return the runs of one experiment, with the `common` knobs (data, model, size) on top of its recipe.

    Raises `ValueError` for knobs that contradict each other.
    """

    def run(name: str, recipe: str, seed: int = 0, **knobs: object) -> Run:
        # Knobs that a recipe sets itself, or does not use.
        kept_out = {
            "weights": recipe == "scratch",
            "source_class": recipe not in ("class-vector", "source-probe", "light", "full", "best"),
            "epochs": recipe in ("probe", "source-probe", "best"),
        }
        shared = {key: value for key, value in common.items() if not kept_out.get(key)}
        return Run(experiment, name, seed, override(RECIPES[recipe], **shared | knobs, seed=seed))

    if experiment in ARMS:
        return [run(experiment, ARMS[experiment][0], seed) for seed in range(seeds)]
    if experiment == "compare":
        return [run(recipe, recipe, seed, evaluate="end") for recipe in COMPARED for seed in range(seeds)]
    if experiment == "rates":
        rate = RECIPES["chapter"].optim.learning_rate
        # The chapter's own rate is the first run of the fine-tuned arm.
        return [
            run("finetune" if factor == 1 else f"rate-x{factor:g}", "chapter", learning_rate=rate * factor)
            for factor in RATE_FACTORS
        ]
    if experiment == "grid":
        return [
            run(
                f"grid-{arm}-x{factor:g}-decay{decay:g}",
                ARMS[arm][0],
                learning_rate=RECIPES[ARMS[arm][0]].optim.learning_rate * factor,
                weight_decay=decay,
                val_fraction=CHOICE_FRACTION,
            )
            for arm in ("finetune", "scratch")
            for factor in GRID_FACTORS
            for decay in GRID_DECAYS
        ]
    return [
        run(f"variant-{name}", "light", seed, **{"val_fraction": CHOICE_FRACTION, **knobs})
        for name, knobs in VARIANTS.items()
        for seed in range(min(seeds, 2))
    ]
