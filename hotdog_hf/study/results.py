"""The results of a study's runs, with their statistics."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from sklearn import metrics as sk

from hotdog_hf.config import RECIPES, command_of, override
from hotdog_hf.data.loaders import FeatureDataset
from hotdog_hf.files import write_json
from hotdog_hf.metrics import quality
from hotdog_hf.study.plan import ARMS, Run
from hotdog_hf.training.records import scores_of

# Marks a run whose loss diverged, which is a result too.
DIVERGED_FILE = "broke.json"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Result:
    """The metrics rows of one finished run; none if its loss diverged."""

    run: Run
    folder: Path
    rows: list[dict]

    @property
    def diverged(self) -> bool:
        """Return whether the loss diverged."""
        return not self.rows

    @property
    def test(self) -> dict:
        """Return the test scores of the saved model."""
        return scores_of(self.rows[-1], "test")

    @property
    def validation(self) -> dict:
        """Return the validation scores of the last epoch, which is saved."""
        return scores_of(self.rows[-2], "validation")


def tuned(grid: list[Result], arm: str) -> Run | None:
    """Return the run on all of train with the rate and decay of the grid's best validation score.

    None if all runs of the grid diverged.
    """
    candidates = [result for result in grid if f"grid-{arm}-" in result.run.name and not result.diverged]
    if not candidates:
        return None
    best = max(candidates, key=lambda result: quality(result.validation)).run
    config = override(best.config, val_fraction=0.0)
    return Run("tuned", f"tuned-{arm}", best.seed, config)


def read_result(run: Run, folder: Path) -> Result | None:
    """Return a finished run's result, or None if it has to be started or resumed."""
    if (folder / DIVERGED_FILE).is_file():
        return Result(run, folder, [])
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = rows and rows[-1].get("final") and (folder / "predictions.csv").is_file()
    return Result(run, folder, rows) if done else None


def write_diverged(folder: Path, message: str) -> None:
    """Mark a run whose loss diverged."""
    write_json(folder / DIVERGED_FILE, {"error": message})


def interval(values: list[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean, or None for a single value."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), scipy.stats.sem(values)
    reach = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(mean - reach), float(mean + reach)


def summarise(results: list[Result], arm: str) -> dict | None:
    """Return mean, deviation and interval of an arm's test accuracy, and its difference from fine-tuning."""
    by_seed = {result.run.seed: result for result in results if result.run.experiment == arm}
    reference = {result.run.seed: result for result in results if result.run.experiment == "finetune"}
    if not by_seed or any(result.diverged for result in by_seed.values()):
        return None
    accuracies = [result.test["accuracy"] for result in by_seed.values()]
    pairs = [
        (result, reference[seed])
        for seed, result in by_seed.items()
        if arm != "finetune" and seed in reference and not reference[seed].diverged
    ]
    paired = [result.test["accuracy"] - other.test["accuracy"] for result, other in pairs]
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
        "mcnemar": mcnemar(*pairs[0]) if pairs else None,
        "before": start.get("test_accuracy") if start["epoch"] == 0 else None,
        "seconds": float(np.median([result.rows[-1]["seconds"] for result in by_seed.values()])),
        "command": command_of(first.run.config),
    }


def mcnemar(one: Result, other: Result) -> dict:
    """Return the exact McNemar test of two runs on the same test photos: those only one gets right, and p."""
    ours, theirs = (_right(result.folder) for result in (one, other))
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = scipy.stats.binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    return {"only_this": only_ours, "only_finetune": only_theirs, "p": float(p)}


def _right(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return np.array([row["true_label"] == row["predicted_label"] for row in csv.DictReader(file)])


def zero_shot(
    split_features: dict[str, FeatureDataset],
    source_head: torch.nn.Module,
    source_classes: tuple[int, ...],
    positive: int,
) -> dict:
    """Evaluate the source's own classes before any training: accuracy and ROC-AUC on test.

    `split_features` has the features of train and test; the threshold on the probability is the one with the
    highest accuracy on train.
    """
    with torch.no_grad():
        head = source_head.cpu()
        scores = {
            split: head(s.features).softmax(dim=1)[:, list(source_classes)].sum(dim=1).numpy()
            for split, s in split_features.items()
        }
    truth = {split: s.labels == positive for split, s in split_features.items()}
    candidates = np.unique(scores["train"])
    yes, no = (np.sort(scores["train"][answer]) for answer in (truth["train"], ~truth["train"]))
    # For each candidate: the photos of the class at or above it, and the others below it.
    right = len(yes) - np.searchsorted(yes, candidates) + np.searchsorted(no, candidates)
    threshold = float(candidates[int(np.argmax(right))])
    return {
        "threshold": threshold,
        "accuracy": float(((scores["test"] >= threshold) == truth["test"]).mean()),
        "roc_auc": float(sk.roc_auc_score(truth["test"], scores["test"])),
    }


def rate_factor(result: Result) -> float:
    """Return a run's learning rate as a multiple of the chapter's."""
    return result.run.config.optim.learning_rate / RECIPES["chapter"].optim.learning_rate


def rates_table(results: list[Result]) -> list[tuple[float, float | None]]:
    """Return the factors on the chapter's rate, rising, with the test accuracy, or None if it diverged."""
    pairs = [
        (rate_factor(result), None if result.diverged else result.test["accuracy"])
        for result in results
        if result.run.experiment == "rates"
    ]
    return sorted(pairs, key=lambda pair: pair[0])


def choices_table(results: list[Result], experiment: str) -> list[dict]:
    """Return the validation scores of every run of an experiment by name, means over seeds."""
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
    """Write one CSV line per run: its name, seed and folder, all its metrics, and its command."""
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
    """Return each arm's epochs and its accuracies on the split that ranks them, means over the seeds."""
    drawn = {}
    for arm in ARMS:
        rows = [r.rows[:-1] for r in results if r.run.experiment == arm and not r.diverged]
        if rows:
            split = "validation" if "validation_accuracy" in rows[0][0] else "test"
            values = np.mean([[row[f"{split}_accuracy"] for row in own] for own in rows], axis=0)
            drawn[f"{ARMS[arm][1]}, {split}"] = [row["epoch"] for row in rows[0]], values.tolist()
    return drawn
