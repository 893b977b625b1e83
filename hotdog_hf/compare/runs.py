"""Finished runs, read from their folders, and what differs between them. No torch here."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from hotdog_hf.config import flatten
from hotdog_hf.errors import UserError

RESAMPLES = 1000


@dataclass(frozen=True)
class Run:
    """One finished run: its knobs, the rows of its epochs, and its predictions on test."""

    name: str
    config: dict
    epochs: list[dict]
    final: dict
    # The test photos, their labels [N] as indices into the names, and probabilities [N, classes].
    files: list[str]
    labels: np.ndarray
    label_names: list[str]
    probabilities: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Return which photos are predicted right, [N]."""
        return self.probabilities.argmax(axis=1) == self.labels

    @property
    def losses(self) -> np.ndarray:
        """Return the log-loss of each photo, [N]."""
        tiny = np.finfo(np.float64).eps  # as scikit-learn's log-loss
        return -np.log(self.probabilities[np.arange(len(self.labels)), self.labels].clip(tiny, 1))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read runs to compare. Raises `UserError` for folders of no finished run, or with other test photos."""
    runs = [_read(Path(folder), folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if run.label_names != first.label_names:
            raise UserError(f"{run.name} has other classes than {first.name}: {', '.join(run.label_names)}")
        if run.files != first.files or not np.array_equal(run.labels, first.labels):
            raise UserError(
                f"{run.name} was evaluated on other test photos or labels than {first.name}; only runs on the"
                " same photos can be compared"
            )
    return runs


def _read(folder: Path, name: str) -> Run:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        # File names in another encoding come as the bytes they left as.
        with (folder / "predictions.csv").open(
            encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            (_, _, _, *label_names), *photos = csv.reader(file)
        photos = sorted(photos)  # runs read their photos in the same order, other tools may not
        probabilities = np.array([photo[3:] for photo in photos], np.float64)
        return Run(
            name=name,
            config=dict(config),
            epochs=[row for row in rows if not row.get("final")],
            final=next(row for row in rows if row.get("final")),
            files=[photo[0] for photo in photos],
            labels=np.array([label_names.index(photo[1]) for photo in photos]),
            label_names=label_names,
            probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        )
    except (OSError, ValueError, LookupError, StopIteration, AttributeError, TypeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        hint = f"; {folder.parent} is one" if (folder.parent / "predictions.csv").is_file() else ""
        raise UserError(
            f"{folder} is not the folder of a finished run with config.json, metrics.jsonl and"
            f" predictions.csv ({reason}){hint}"
        ) from error


def metrics(run: Run) -> dict[str, dict[str, float]]:
    """Return accuracy and log-loss on test with 95 % bootstrap intervals over photos."""
    return {"accuracy": _interval(run.right), "loss": _interval(run.losses)}


def paired(run: Run, other: Run) -> dict:
    """Compare two runs photo by photo: `other` minus `run`, and McNemar's exact test.

    `lost` and `won` count the photos that only `run`, and only `other`, predicts right. `p_value` is the
    probability of so uneven a division if the two were equally good; 1.0 if no photo differs.
    """
    lost, won = int((run.right & ~other.right).sum()), int((other.right & ~run.right).sum())
    return {
        "accuracy": _interval(other.right.astype(float) - run.right),
        "loss": _interval(other.losses - run.losses),
        "lost": lost,
        "won": won,
        "p_value": float(binomtest(won, lost + won).pvalue) if lost + won else 1.0,
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    rng, size = np.random.default_rng(0), len(values)  # the same resamples for every run
    means = [values[rng.integers(0, size, size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def differing_knobs(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Return the knobs that are not the same in all runs, with each run's value; None if it has none."""
    knobs = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for values in knobs for name in values)
    table = {name: [values.get(name) for values in knobs] for name in names if name != "output_dir"}
    return {name: row for name, row in table.items() if any(value != row[0] for value in row)}


def differing_photos(runs: Sequence[Run]) -> list[int]:
    """Return the photos that some runs predict right and others wrong, those they differ most on first."""
    right = np.stack([run.right for run in runs])
    found = np.flatnonzero(right.any(axis=0) & ~right.all(axis=0))
    given = np.stack([run.probabilities[np.arange(len(run.labels)), run.labels] for run in runs])
    spread = given.max(axis=0) - given.min(axis=0)
    return found[np.argsort(-spread[found], kind="stable")].tolist()
