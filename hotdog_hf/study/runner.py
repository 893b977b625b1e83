"""The queue of the study's runs."""

from hotdog_hf.study.plan import Run
from hotdog_hf.study.results import Result


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
