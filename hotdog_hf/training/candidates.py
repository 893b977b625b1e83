"""What the recipe "best" chooses from: candidates, and what each reached on held-back photos."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import scipy.special

from hotdog_hf.model.calibration import calibrate, from_folds

# Stands above the lines that describe candidates. The numbers come first, as names are of any length.
HEADER = f"{'log-loss':<16}{'accuracy':<16}{'photos':>6}  tried on parts of train"


class Candidate(NamedTuple):
    """A recipe that may be chosen: its name in the table, and the knobs that differ from a named one."""

    name: str
    recipe: str
    knobs: dict


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate with the log-loss [n] of its held-back photos, and whether each was right [n]."""

    candidate: Candidate
    # The rows of train that were held back: of a head all of them, of a fine-tuning at least one fold.
    rows: np.ndarray
    losses: np.ndarray
    correct: np.ndarray
    # What calibrates a fine-tuning; None of a fitted head, whose penalty was chosen by such photos.
    calibration: dict | None = None
    given_up: bool = False

    @property
    def trained(self) -> bool:
        """Whether it is a fine-tuning."""
        return self.calibration is not None


class Board:
    """The candidates that were tried; `weights` are those of the classes in the log-loss, None: all 1.

    Fine-tuned networks that are too certain are calibrated before they are compared if that is allowed
    (`rescale`), as the chosen one will be. The others are left as they are: the longer training to come makes
    a network more certain than it is now.
    """

    def __init__(self, labels: np.ndarray, weights: np.ndarray | None, rescale: bool = True):
        self.labels, self.weights, self.rescale = labels, weights, rescale
        self.tried: list[Tried] = []

    def add(
        self,
        candidate: Candidate,
        log_probabilities: np.ndarray,
        rows: np.ndarray | None = None,
        given_up: bool = False,
    ) -> Tried:
        """Record a candidate by its log-probabilities [n, classes] of held-back photos.

        Those of a fine-tuning are in these rows [n]; a fitted head (None) was cross-validated on all photos.
        """
        calibration = None
        if rows is None:
            rows = np.arange(len(self.labels))
        else:
            held_out = from_folds(log_probabilities, self.labels[rows])
            calibration = calibrate(held_out, self.rescale, self.weights)
            if calibration["temperature"] < 1:
                calibration = calibrate(held_out, False, self.weights)
            scaled = log_probabilities / calibration["temperature"]
            log_probabilities = scipy.special.log_softmax(scaled, axis=1)
        losses = self.losses(log_probabilities, rows)
        correct = log_probabilities.argmax(axis=1) == self.labels[rows]
        self.tried.append(Tried(candidate, rows, losses, correct, calibration, given_up))
        return self.tried[-1]

    def losses(self, log_probabilities: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the weighted log-loss [n] of the photos in these rows [n]."""
        labels = self.labels[rows]
        losses = -log_probabilities[np.arange(len(rows)), labels]
        return losses if self.weights is None else losses * self.weights[labels]

    def reference(self) -> Tried:
        """Return the best of the fitted heads, which were tested on all photos."""
        return min((each for each in self.tried if not each.trained), key=lambda each: each.losses.mean())

    def differences(self, tried: Tried) -> np.ndarray:
        """Return by how much the log-losses [n] are above those that the best head has on the same photos."""
        return tried.losses - self.reference().losses[tried.rows]

    def score(self, tried: Tried) -> float:
        """Return the estimated log-loss on all photos: the best head's, times the ratio on those tested."""
        best = self.reference().losses
        return float(best.mean() * tried.losses.mean() / max(best[tried.rows].mean(), 1e-12))

    def error(self, tried: Tried) -> float:
        """Return the standard error of the log-loss; of a fine-tuning, of the difference to the best head."""
        losses = self.differences(tried) if tried.trained else tried.losses
        return float(losses.std(ddof=min(1, len(losses) - 1)) / math.sqrt(len(losses)))

    def best(self) -> tuple[Tried, str]:
        """Return the candidate to choose, and why.

        A fine-tuning must be better than the best head by more than the standard error of the difference.
        """
        trained = [each for each in self.tried if each.trained and not each.given_up]
        better = [each for each in trained if -self.differences(each).mean() > self.error(each)]
        if better:
            best = min(better, key=self.score)
            why = "is lower than that of the best fitted head by more than a standard error"
        else:
            best = self.reference()
            why = "is the lowest of the fitted heads"
            why += ", and no fine-tuning's is lower by more than a standard error" if trained else ""
        return best, f"its log-loss, {self.row(best)['log_loss']:.3f}, {why}"

    def rows(self) -> list[dict]:
        """Return what choice.json says of each candidate, the lowest log-loss first."""
        return [self.row(each) for each in sorted(self.tried, key=self.score)]

    def row(self, tried: Tried) -> dict:
        """Return what choice.json says of one candidate; `_se` are standard errors."""
        count, accuracy = len(tried.rows), float(tried.correct.mean())
        how = "part held back" if tried.trained else "cross-validation"
        return {
            "name": tried.candidate.name,
            "recipe": tried.candidate.recipe,
            "knobs": tried.candidate.knobs,
            "log_loss": round(self.score(tried), 4),
            "log_loss_se": round(self.error(tried), 4),
            "accuracy": round(accuracy, 4),
            "accuracy_se": round(math.sqrt(accuracy * (1 - accuracy) / count), 4),
            "photos": count,
            "how": how + (", given up" if tried.given_up else ""),
        }

    def describe(self, tried: Tried) -> str:
        """Return a line of the table below `HEADER`."""
        row = self.row(tried)
        numbers = [f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in ("log_loss", "accuracy")]
        given_up = " (given up)" if tried.given_up else ""
        return f"{numbers[0]:<16}{numbers[1]:<16}{row['photos']:>6}  {row['name']}{given_up}"
