"""The chapter as one study: which runs it takes, what they say together, and how sure that is."""

import csv
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from sklearn import metrics as sk

from hotdog_hf import templates
from hotdog_hf.checkpoint import HARMLESS
from hotdog_hf.config import RECIPES, TrainConfig, command_of, flatten, to_dict
from hotdog_hf.data import FeatureDataset
from hotdog_hf.files import write_json, write_text
from hotdog_hf.metrics import quality
from hotdog_hf.run import scores_of

# The arms by name: the recipe, and what the table calls it.
ARMS = {
    "finetune": ("chapter", "fine-tuned (the chapter)"),
    "scratch": ("scratch", "from scratch"),
    "frozen": ("frozen", "body frozen (exercise 3)"),
    "class-vector": ("class-vector", "from the source's class vector (exercise 4)"),
    "probe": ("probe", "solved head, no training"),
    "best": ("best", "our recipe"),
}
# Exercise 1: the chapter's rate times these. Exercise 2: every pair of these factors and weight decays.
RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
GRID_FACTORS, GRID_DECAYS = (0.3, 1.0, 3.0), (0.0001, 0.001, 0.01)
# What else was tried for the recipe "best", each judged on a validation split alone.
VARIANTS: dict[str, dict] = {
    "best": {},
    "probe without crops": {"probe_views": 0},
    "head not solved": {"head_init": "xavier", "probe_views": 0, "head_lr_mult": 10.0},
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
# Knobs of the study that every run takes over.
COMMON = (
    "data_dir",
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
PICTURES = ("curves.png", "intervals.png", "rates.png")
# Marks a run whose loss became infinite, which is its result.
DIVERGED_FILE = "broke.json"
# Share of train that judges the grid and the variants.
CHOICE_FRACTION = 0.2
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """One training of the study: its place in it, and its config."""

    experiment: str
    name: str
    seed: int
    config: TrainConfig

    def folder(self, study_dir: Path, photos: dict, num_processes: int) -> Path:
        """Return the run's folder: another one for another config, other photos, or other processes."""
        usual = flatten(to_dict(TrainConfig()))
        # What is as usual is left out, so that a knob that is new in a later version changes no folder.
        knobs = {
            name: value
            for name, value in flatten(to_dict(self.config)).items()
            if name not in HARMLESS and value != usual[name]
        }
        facts = json.dumps([knobs, photos, num_processes], sort_keys=True)
        return study_dir / f"{self.name}-seed{self.seed}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Result:
    """What one finished run left: the rows of its metrics, or none where its loss diverged."""

    run: Run
    folder: Path
    rows: list[dict]

    @property
    def diverged(self) -> bool:
        """Tell whether the loss became infinite."""
        return not self.rows

    @property
    def test(self) -> dict:
        """Return the test scores of the kept model."""
        return scores_of(self.rows[-1], "test")

    @property
    def validation(self) -> dict:
        """Return the validation scores of the kept epoch: the best, or the last."""
        epochs = [scores_of(row, "validation") for row in self.rows[:-1]]
        if self.run.config.run.keep == "last":
            return epochs[-1]
        start = epochs[0] if self.rows[0]["epoch"] == 0 else None
        return max(epochs, key=lambda scores: quality(scores, start))


def override(config: TrainConfig, **knobs: object) -> TrainConfig:
    """Return the config with some knobs set, whatever group they belong to."""
    groups = {}
    for group in ("data", "model", "optim", "run", "hub"):
        part = getattr(config, group)
        own = {field.name for field in dataclasses.fields(part)} & knobs.keys()
        groups[group] = dataclasses.replace(part, **{name: knobs.pop(name) for name in own})
    return dataclasses.replace(config, **groups, **knobs)


def runs_of(experiment: str, seeds: int, common: dict) -> list[Run]:
    """Return the runs of one experiment, with the `common` knobs (data, model, size) on top of its recipe.

    Raises `ValueError` for knobs that do not go together.
    """

    def run(name: str, recipe: str, seed: int = 0, **knobs: object) -> Run:
        # Knobs that are part of a recipe, or of no use to it.
        kept_out = {
            "weights": recipe == "scratch",
            "source_class": recipe != "class-vector",
            "epochs": recipe == "probe",
        }
        shared = {key: value for key, value in common.items() if not kept_out.get(key)}
        return Run(experiment, name, seed, override(RECIPES[recipe], **shared | knobs, seed=seed))

    if experiment in ARMS:
        return [run(experiment, ARMS[experiment][0], seed) for seed in range(seeds)]
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
        run(f"variant-{name}", "best", seed, **{"val_fraction": CHOICE_FRACTION, **knobs})
        for name, knobs in VARIANTS.items()
        for seed in range(min(seeds, 2))
    ]


def tuned(grid: list[Result], arm: str) -> Run:
    """Return the run on all of train with the rate and decay of the grid's best validation score."""
    candidates = [result for result in grid if f"grid-{arm}-" in result.run.name and not result.diverged]
    best = max(candidates, key=lambda result: quality(result.validation)).run
    config = override(best.config, val_fraction=0.0)
    return Run("tuned", f"tuned-{arm}", best.seed, config)


def read_result(run: Run, folder: Path) -> Result | None:
    """Return a finished run's result, or None where it has to be run, or to go on."""
    if (folder / DIVERGED_FILE).is_file():
        return Result(run, folder, [])
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = rows and rows[-1].get("final") and (folder / "predictions.csv").is_file()
    return Result(run, folder, rows) if done else None


def write_diverged(folder: Path, message: str) -> None:
    """Mark a run whose loss became infinite."""
    write_json(folder / DIVERGED_FILE, {"error": message})


class Clock:
    """How long runs will take: by a measured pass at first, then by what finished runs took."""

    def __init__(
        self, counts: dict[str, dict[str, int]], size: int, train_seconds: float, eval_seconds: float
    ):
        """Take photos by split and class, the side of the input, and seconds a photo."""
        self.photos = {split: sum(by_class.values()) for split, by_class in counts.items()}
        self.size, self.train_seconds, self.eval_seconds = size, train_seconds, eval_seconds
        self.guessed = self.taken = 0.0

    def guess(self, run: Run) -> float:
        """Return the seconds of a run by the measured pass alone."""
        data, epochs = run.config.data, run.config.optim.epochs
        judged = self.photos.get("validation", self.photos["test"]) * self.eval_seconds
        if run.config.model.cache_features:
            return 2 * judged
        scale = ((data.train_image_size or self.size) / self.size) ** 2
        return epochs * (self.photos["train"] * self.train_seconds * scale + judged) + judged

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


def interval(values: list[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean, or None for a single value."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), scipy.stats.sem(values)
    reach = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(mean - reach), float(mean + reach)


def summarise(results: list[Result], arm: str) -> dict | None:
    """Return mean, deviation and interval of an arm's test accuracy, and its difference to fine-tuning."""
    by_seed = {result.run.seed: result for result in results if result.run.experiment == arm}
    reference = {result.run.seed: result for result in results if result.run.experiment == "finetune"}
    if not by_seed or any(result.diverged for result in by_seed.values()):
        return None
    accuracies = [result.test["accuracy"] for result in by_seed.values()]
    paired = [
        result.test["accuracy"] - reference[seed].test["accuracy"]
        for seed, result in by_seed.items()
        if arm != "finetune" and seed in reference and not reference[seed].diverged
    ]
    first = next(iter(by_seed.values()))
    start = first.rows[0]
    return {
        "arm": arm,
        "title": ARMS[arm][1],
        "seeds": len(accuracies),
        "mean": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "interval": interval(accuracies),
        "difference": float(np.mean(paired)) if paired else None,
        "difference_interval": interval(paired),
        "mcnemar": mcnemar(first, reference[first.run.seed]) if paired else None,
        "before": start.get("test_accuracy") if start["epoch"] == 0 else None,
        "seconds": float(np.median([result.rows[-1]["seconds"] for result in by_seed.values()])),
        "command": command_of(first.run.config),
    }


def mcnemar(one: Result, other: Result) -> dict:
    """Return the exact McNemar test of two runs on the same test photos: who alone was right, and p."""
    ours, theirs = (_right(result.folder) for result in (one, other))
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = scipy.stats.binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    return {"only_this": only_ours, "only_finetune": only_theirs, "p": float(p)}


def _right(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return np.array([row["true_label"] == row["predicted_label"] for row in csv.DictReader(file)])


def zero_shot(
    split_features: dict[str, FeatureDataset], source_head: torch.nn.Module, source_class: int, positive: int
) -> dict:
    """Judge "is the source's own class likely" before any training: accuracy and ROC-AUC on test.

    `seen` has the features of train and test; the probability from which on the answer is yes is the one that
    is right most often on train.
    """
    with torch.no_grad():
        head = source_head.cpu()
        scores = {
            split: head(s.features).softmax(dim=1)[:, source_class].numpy()
            for split, s in split_features.items()
        }
    truth = {split: s.labels == positive for split, s in split_features.items()}
    candidates = np.unique(scores["train"])
    right = [((scores["train"] >= candidate) == truth["train"]).mean() for candidate in candidates]
    threshold = float(candidates[int(np.argmax(right))])
    return {
        "threshold": threshold,
        "accuracy": float(((scores["test"] >= threshold) == truth["test"]).mean()),
        "roc_auc": float(sk.roc_auc_score(truth["test"], scores["test"])),
    }


def answers(rows: dict[str, dict], results: list[Result], zero: dict | None) -> list[tuple[str, str]]:
    """Return the chapter's questions, each with an answer in two sentences, as far as the runs tell."""
    said = []
    if {"finetune", "scratch"} <= rows.keys():
        tuned_row, scratch = rows["finetune"], rows["scratch"]
        said.append(
            (
                "Does fine-tuning beat training from scratch for the same epochs?",
                f"Fine-tuned, the network is right on {_percent(tuned_row)} of the test photos; from scratch,"
                f" on {_percent(scratch)}. {_verdict(scratch, 'training from scratch')}",
            )
        )
    rates = [result for result in results if result.run.experiment == "rates"]
    if rates:
        said.append(("Exercise 1: what if the learning rate keeps rising?", _rates_answer(rates)))
    chosen = {result.run.name: result for result in results if result.run.name.startswith("tuned-")}
    if len(chosen) == 2:
        pretrained, scratch = chosen["tuned-finetune"], chosen["tuned-scratch"]
        said.append(
            (
                "Exercise 2: does the comparison hold when both are tuned?",
                f"With the rate and the weight decay that validation chose for each ({_knobs(pretrained)};"
                f" {_knobs(scratch)}), fine-tuning is right on {pretrained.test['accuracy']:.1%} of the test"
                f" photos and training from scratch on {scratch.test['accuracy']:.1%}."
                f" {_paired_sentence(mcnemar(pretrained, scratch), 'fine-tuned', 'from scratch')}",
            )
        )
    if "frozen" in rows:
        said.append(
            (
                "Exercise 3: what if the body is not trained?",
                f"With the body frozen and the output layer alone trained, without augmentation, the accuracy"
                f" is {_percent(rows['frozen'])}. {_verdict(rows['frozen'], 'that')}",
            )
        )
    if "class-vector" in rows:
        vector = rows["class-vector"]
        before = "" if vector["before"] is None else f"{vector['before']:.1%} before any training and "
        shot = (
            ""
            if zero is None
            else f" Asking the source alone whether its class is likely is right on {zero['accuracy']:.1%}"
            f" (ROC-AUC {zero['roc_auc']:.3f}), with a threshold from train."
        )
        said.append(
            (
                "Exercise 4: what is ImageNet's own weight vector worth?",
                f"An output layer made of the source classifier's rows is right on {before}"
                f"{_percent(vector)} after it.{shot} {_verdict(vector, 'starting from the class vector')}",
            )
        )
    return said


def _percent(row: dict) -> str:
    return f"{row['mean']:.1%}" + (f" (mean of {row['seeds']} seeds)" if row["seeds"] > 1 else " (one seed)")


def _verdict(row: dict, what: str) -> str:
    """Say what the paired difference to fine-tuning shows."""
    difference, bounds = row["difference"], row["difference_interval"]
    if difference is None:
        return "There is no fine-tuned run of the same seed to compare with."
    points = f"{abs(difference) * 100:.1f} points {'better' if difference > 0 else 'worse'} than fine-tuning"
    if bounds is None:
        return f"Here {what} was {points}, with one seed ({_mcnemar_text(row['mcnemar'])})."
    low, high = (value * 100 for value in bounds)
    shown = "more than seeds vary" if low > 0 or high < 0 else "which may be the seeds' chance"
    return f"Here {what} is {points} (95 % interval {low:+.1f} to {high:+.1f}), {shown}."


def _mcnemar_text(test: dict) -> str:
    return (
        f"right alone on {test['only_this']} and {test['only_finetune']} photos, McNemar p = {test['p']:.2g}"
    )


def _paired_sentence(test: dict, ours: str, theirs: str) -> str:
    return (
        f"Only {ours} was right on {test['only_this']} photos and only {theirs} on {test['only_finetune']}"
        f" (McNemar p = {test['p']:.2g})."
    )


def _knobs(result: Result) -> str:
    return f"rate {result.run.config.optim.learning_rate:g}, decay {result.run.config.optim.weight_decay:g}"


def _factor(result: Result) -> float:
    return result.run.config.optim.learning_rate / RECIPES["chapter"].optim.learning_rate


def _rates_answer(rates: list[Result]) -> str:
    whole = sorted((result for result in rates if not result.diverged), key=_factor)
    broken = sorted(_factor(result) for result in rates if result.diverged)
    breaks = [f"from {broken[0]:g} times the book's rate on the loss is no number any more"] if broken else []
    if not whole:
        return f"{breaks[0].capitalize()}."

    def say(result: Result) -> str:
        factor = _factor(result)
        rate = "the book's own rate" if math.isclose(factor, 1) else f"{factor:g} times the book's"
        return f"{rate} gives {result.test['accuracy']:.1%}"

    best = max(range(len(whole)), key=lambda index: whole[index].test["accuracy"])
    # Of the rates above the best, the next and the highest.
    told = [say(result) for result in (whole[best + 1 : best + 2] + whole[best + 2 :][-1:])] + breaks
    end = f"Beyond it, {', '.join(told)}" if told else "No higher rate was tried"
    return f"The best test accuracy of the sweep: {say(whole[best])}. {end}."


def rates_table(results: list[Result]) -> list[tuple[float, float | None]]:
    """Return the factors on the chapter's rate, rising, with the test accuracy, or None where it diverged."""
    pairs = [
        (_factor(result), None if result.diverged else result.test["accuracy"])
        for result in results
        if result.run.experiment == "rates"
    ]
    return sorted(pairs, key=lambda pair: pair[0])


def choices_table(results: list[Result], experiment: str) -> list[dict]:
    """Return the validation figures of everything that was tried and chosen from, by name, means of seeds."""
    names = dict.fromkeys(result.run.name for result in results if result.run.experiment == experiment)
    table = []
    for name in names:
        same = [result for result in results if result.run.name == name]
        scores = [] if any(result.diverged for result in same) else [result.validation for result in same]
        table.append(
            {
                "name": name.removeprefix(f"{experiment}-").removeprefix("variant-"),
                "seeds": len(same),
                "accuracy": float(np.mean([score["accuracy"] for score in scores])) if scores else None,
                "loss": float(np.mean([score["loss"] for score in scores])) if scores else None,
                "command": command_of(same[0].run.config),
            }
        )
    return table


def write_results(path: Path, results: list[Result]) -> None:
    """Write a CSV line a run: where it is, its knobs that tell it apart, and all its numbers."""
    columns = dict.fromkeys(
        key for result in results if result.rows for key in result.rows[-1] if key not in ("final", "epoch")
    )
    columns.pop("test_confusion_matrix", None)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experiment", "run", "seed", "folder", "broke", *columns, "command"])
        for result in results:
            last = result.rows[-1] if result.rows else {}
            run = result.run
            numbers = [last.get(name, "") for name in columns]
            place = [run.experiment, run.name, run.seed, result.folder.name, result.diverged]
            writer.writerow([*place, *numbers, command_of(run.config)])


def summaries(results: list[Result]) -> dict[str, dict]:
    """Return `summarise` of every arm that was run."""
    return {arm: row for arm in ARMS if (row := summarise(results, arm))}


def curves(results: list[Result]) -> dict[str, tuple[list[int], list[float]]]:
    """Return each arm's epochs and its accuracies on the split that judges them, means over the seeds."""
    drawn = {}
    for arm in ARMS:
        rows = [r.rows[:-1] for r in results if r.run.experiment == arm and not r.diverged]
        if rows:
            split = "validation" if "validation_accuracy" in rows[0][0] else "test"
            values = np.mean([[row[f"{split}_accuracy"] for row in own] for own in rows], axis=0)
            drawn[f"{ARMS[arm][1]}, {split}"] = [row["epoch"] for row in rows[0]], values.tolist()
    return drawn


def write_study(study_dir: Path, results: list[Result], zero: dict | None, facts: dict) -> None:
    """Write `README.md` and `results.csv` of the study; `facts` has what the template says of the machine."""
    rows = summaries(results)
    template = templates.load(
        "study.md.j2",
        percent=lambda value: "" if value is None else f"{value:.1%}",
        points=lambda pair: "" if pair is None else f"{pair[0] * 100:.1f} to {pair[1] * 100:.1f}",
    )
    text = template.render(
        rows=rows.values(),
        answers=answers(rows, results, zero),
        zero=zero,
        rates=rates_table(results),
        grid=choices_table(results, "grid"),
        tuned=[result for result in results if result.run.name.startswith("tuned-")],
        variants=choices_table(results, "variants"),
        choice_fraction=CHOICE_FRACTION,
        minutes=round(sum(result.rows[-1]["seconds"] for result in results if result.rows) / 60),
        pictures=[name for name in PICTURES if (study_dir / name).is_file()],
        **facts,
    )
    write_text(study_dir / "README.md", text)
    write_results(study_dir / "results.csv", results)
