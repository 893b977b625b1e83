"""What the trials and the final training of the recipe "best" take, and what --minutes has time for."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from hotdog_hf.config import RECIPES
from hotdog_hf.training.candidates import Candidate

# Epochs of fine-tuning on a part of train, enough to tell how it ends.
TRIAL_EPOCHS = {"full": 6, "light": 6}
# A full one passes so many photos at least: of few, in more epochs (but in at most so many). Fewer steps end
# far from where more would.
FEWEST_PASSED, MOST_EPOCHS_OF_FEW = 1350, 40
# With --minutes: the smallest share of the usual epochs that tells what a fine-tuning is good for, the
# smallest that is worth training on all of train, and the most epochs.
TRIAL_SHARE, FINAL_SHARE, MOST_EPOCHS = 2 / 3, 1 / 2, {"full": 20, "light": 6}
# Seconds of training on a photo by recipe, before any was trained, as shares of those for the whole network.
TRAIN_SHARES = {"full": 1.0, "light": 0.55}
# Seconds for what depends on no photo: fitting the head, saving, figures.
FIXED_SECONDS = 6
# Random crops of each photo that a head learns from, if it learns from crops.
VIEWS = 1


def enough_epochs(recipe: str, usual: int, photos: int) -> int:
    """Return the usual number of epochs, or for full fine-tuning on few photos what makes enough steps."""
    few = min(math.ceil(FEWEST_PASSED / photos), MOST_EPOCHS_OF_FEW)
    return max(usual, few) if recipe == "full" else usual


class Sizes(NamedTuple):
    """Sides in pixels of photos and crops."""

    # The model's own.
    own: int
    # A larger one to evaluate on; None: no other is tried.
    larger: int | None
    # Crops that take half the time, for light fine-tuning if there is little; None: none are tried.
    smaller_crops: int | None

    def evaluated(self, candidate: Candidate) -> int:
        """Return the side of the photos that a candidate is evaluated on."""
        return candidate.knobs.get("image_size", self.own)

    def share(self, way: Candidate) -> float:
        """Return the pixels of a fine-tuning's crops as a share of those of the model's own size."""
        return (way.knobs.get("train_image_size", self.own) / self.own) ** 2


@dataclasses.dataclass
class Costs:
    """Seconds of what a search may do: estimated from seconds per photo at the model's own size."""

    # The model's own input side, photos of train, and photos of the splits that are evaluated.
    size: int
    train_photos: int
    eval_photos: int
    # Seconds per photo of training, by recipe, and of evaluation, measured at the start on photos in memory,
    # then on what was done.
    train_seconds: dict[str, float]
    eval_seconds: float

    def correct(self, eval_seconds: float) -> None:
        """Take over what evaluation was measured to take: training takes as much longer by reading photos."""
        reading = max(eval_seconds - self.eval_seconds, 0)
        self.train_seconds = {recipe: each + reading for recipe, each in self.train_seconds.items()}
        self.eval_seconds = eval_seconds

    def features(self, size: int, views: float = 1) -> float:
        """Return the seconds of passing all of train through the network once per view."""
        return views * self.train_photos * self.eval_seconds * (size / self.size) ** 2

    def evaluation(self, size: int) -> float:
        """Return the seconds of evaluating test and validation once."""
        return self.eval_photos * self.eval_seconds * (size / self.size) ** 2

    def training(self, recipe: str, epochs: float) -> float:
        """Return the seconds of so many epochs on train, on crops of the model's own size."""
        return epochs * self.train_photos * self.train_seconds[recipe]


@dataclasses.dataclass
class Budget:
    """What there is time for."""

    costs: Costs
    sizes: Sizes
    # The photos that each trial of a fine-tuning learns, one trial per fold.
    trial_photos: list[int]
    # The share of train whose mirror images are tested.
    mirrored: float
    # Whether features of train are kept with the network.
    neighbors: bool
    # The limit of the whole run, None: there is none, and what is left of it in seconds, the same on every
    # process.
    minutes: float | None
    left: Callable[[], float]

    def describe(self) -> str:
        """Return a line that says how long the run will take."""
        if self.minutes is not None:
            return f"the whole run may take {self.minutes:g} minutes; trying what fits"
        costs, largest = self.costs, self.sizes.larger or self.sizes.own
        cheap = sum(map(costs.features, {self.sizes.own, largest})) + costs.features(self.sizes.own)
        cheap += costs.features(largest, self.mirrored + VIEWS) + FIXED_SECONDS + costs.evaluation(largest)
        trials = {
            recipe: costs.training(recipe, self.trial_size(self.trial_epochs(recipe)))
            for recipe in TRIAL_EPOCHS
        }
        final = {recipe: costs.training(recipe, self.epochs(recipe)) for recipe in TRIAL_EPOCHS}
        light = cheap + trials["full"] / 2 + trials["light"]
        ends = {
            "a fitted output layer": light,
            "light fine-tuning": light + final["light"],
            "full fine-tuning": cheap + trials["full"] + final["full"],
        }
        return "minutes this is expected to take: " + ", ".join(
            f"{each / 60:.1f} if {name} is best" for name, each in ends.items()
        )

    def epochs(self, recipe: str) -> int:
        """Return how many epochs a fine-tuning takes on all of train."""
        return enough_epochs(recipe, RECIPES[recipe].optim.epochs, self.costs.train_photos)

    def trial_epochs(self, recipe: str) -> int:
        """Return how many epochs a fine-tuning is tried for on a part of train."""
        return enough_epochs(recipe, TRIAL_EPOCHS[recipe], self.trial_photos[0])

    def trial_size(self, epochs: float) -> float:
        """Return how many epochs on all of train a trial of so many epochs is."""
        return epochs * sum(self.trial_photos) / self.costs.train_photos

    def training(self, way: Candidate, epochs: float) -> float:
        """Return the seconds of so many epochs of a fine-tuning on all of train."""
        return self.sizes.share(way) * self.costs.training(way.recipe, epochs)

    def finish(self, candidate: Candidate) -> float:
        """Return the seconds of a candidate's final run, without those of its epochs."""
        size = self.sizes.evaluated(candidate)
        # Features are kept with the network; those of the source may be in the cache.
        cached = candidate.recipe not in TRIAL_EPOCHS and candidate.knobs.get("cache_features", True)
        views = int(self.neighbors and not cached)
        return self.costs.features(size, views) + self.costs.evaluation(size) + FIXED_SECONDS

    def fewest_epochs(self, recipe: str) -> int:
        """Return the fewest epochs that a fine-tuning is worth on all of train."""
        return math.ceil(FINAL_SHARE * self.epochs(recipe))

    def fewest_trial_epochs(self, recipe: str) -> int:
        """Return the fewest epochs on a part of train that tell something of a fine-tuning."""
        return math.ceil(TRIAL_SHARE * self.trial_epochs(recipe))

    def has_time(self, seconds: float, head: Candidate, before: float = 0.0) -> bool:
        """Whether there is time to try a head, and then for a fine-tuning if there is now, or to train it.

        `before` are seconds of what is tried between the two.
        """
        left, final = self.left(), self.finish(head)
        epochs = self.trial_size(self.fewest_trial_epochs("light")) + self.fewest_epochs("light")
        light = Candidate("", "light", {"train_image_size": self.sizes.smaller_crops or self.sizes.own})
        shortest = final + self.training(light, epochs) + before
        return seconds <= left - (shortest if left > shortest else final)

    def epochs_in_time(self, way: Candidate) -> float:
        """Return how many epochs of a trial leave time for the shortest training on all of train."""
        final = self.training(way, self.fewest_epochs(way.recipe)) + self.finish(way)
        return (self.left() - final) / self.training(way, self.trial_size(1))

    def trial_epochs_in_time(self, way: Candidate) -> int:
        """Return for how many epochs there is time to try a fine-tuning; 0 if they would tell nothing."""
        epochs = int(min(self.epochs_in_time(way), self.trial_epochs(way.recipe)))
        return epochs if epochs >= self.fewest_trial_epochs(way.recipe) else 0

    def final_epochs(self, way: Candidate) -> int:
        """Return how many epochs of a fine-tuning on all of train fit into the time that is left."""
        epochs = int((self.left() - self.finish(way)) / self.training(way, 1))
        most = max(MOST_EPOCHS[way.recipe], self.epochs(way.recipe))
        return min(max(epochs, self.fewest_epochs(way.recipe)), most)
