"""What the recipe "best" tries on parts of train: fitted heads by cross-validation, then fine-tuning."""

import contextlib
import dataclasses
import functools
import io
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special
from accelerate import Accelerator

from hotdog_hf.config import RECIPES, TrainConfig, differences, override
from hotdog_hf.data.groups import content_folds, content_groups
from hotdog_hf.data.splits import Photos
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.model import heads
from hotdog_hf.model.regression import Layer, cross_validate
from hotdog_hf.model.source import load_source, source_data_config
from hotdog_hf.training import engine, launch, sharding
from hotdog_hf.training.features import FeatureExtractor
from hotdog_hf.training.job import Job, build

FOLDS = 4
# Random crops of each photo that a probe learns from, if it learns from crops.
VIEWS = 2
# Two ways to crop: from a quarter of the photo, with flips, or gentler, for photos that must not be mirrored.
CROPS = {
    "crops from 25 %, flips": {"min_crop_area": 0.25, "flip": True},
    "crops from 50 %, no flips": {"min_crop_area": 0.5, "flip": False},
}
# Epochs of a full fine-tuning on a part of train; it is given up halfway if its log-loss is over so many
# times that of the best so far.
TRIAL_EPOCHS, HOPELESS = 4, 3.0
# With --minutes: the fewest epochs that are worth a full fine-tuning, and the most.
FEWEST_EPOCHS, MOST_EPOCHS = 4, 20
# Seconds for what depends on no photo: fitting heads, saving, figures.
FIXED_SECONDS = 12


class Candidate(NamedTuple):
    """A recipe that may be chosen: its name in the table, and the knobs that differ from a named one."""

    name: str
    recipe: str
    knobs: dict


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate with the log-loss [n] of its held-back photos, and whether each was right [n]."""

    candidate: Candidate
    # The rows of train that were held back: all in cross-validation, one fold for what is trained.
    rows: np.ndarray
    losses: np.ndarray
    correct: np.ndarray
    given_up: bool = False


def settle(config: TrainConfig, recipe: str, knobs: dict) -> TrainConfig:
    """Return the config of a candidate: its recipe and knobs, and the flags given with recipe "best"."""
    # On all of train: no photos are held back to choose an epoch, unless the user asks for it.
    given = {"val_fraction": config.data.val_fraction, "keep": "last", **differences(config)}
    given["minutes"] = None
    if recipe == "probe":
        given.pop("source_class", None)
    return override(RECIPES[recipe], **given | knobs)


class Search:
    """Tries candidates on the photos of train, the cheap ones first."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        photos: Photos,
        stop: launch.StopSignal,
        started: float,
    ):
        self.config, self.accelerator, self.photos, self.stop = config, accelerator, photos, stop
        minutes = config.run.minutes
        self.end = math.inf if minutes is None else started + 60 * minutes
        self.tried: list[Tried] = []
        # The heads at the model's own size, and their layers that have learned all folds but the first.
        self.starts: list[tuple[Tried, Layer]] = []
        # The heads that learned from crops, and how these were made.
        self.cropped: list[tuple[Tried, dict]] = []
        train, workers = photos.splits["train"], config.data.num_workers
        self.workers = launch.default_workers(accelerator) if workers is None else workers
        self.labels = np.asarray(train["label"][:])
        self.weights = None
        if config.optim.class_weights == "balanced":
            self.weights = heads.class_weights(np.bincount(self.labels))
        source = load_source(config.model.model, config.model.weights, config.data.image_size)
        self.fixed_size = bool(source.pretrained_cfg.get("fixed_input_size"))
        self.size = source_data_config(source, "model", config.data.image_size)["input_size"][-1]
        source.to(accelerator.device)
        # Reading and decoding come on top of what is measured on photos in memory.
        speeds = [1.2 * each for each in engine.measure_speed(accelerator, source, self.size)]
        self.train_seconds, self.eval_seconds = launch.run_on_main(accelerator, lambda: speeds)
        self.fold_of = launch.run_on_main(accelerator, self._folds)

    def _folds(self) -> np.ndarray | None:
        train = self.photos.splits["train"]
        groups = content_groups(train, progress=self.accelerator.is_main_process)
        return content_folds(self.labels, groups, FOLDS, self.config.run.seed)

    def left(self) -> float:
        """Return the seconds that are left of --minutes, the same on every process."""
        return launch.run_on_main(self.accelerator, lambda: self.end - time.perf_counter())

    def run(self) -> tuple[Candidate, str]:
        """Try the candidates; return the chosen one, and why."""
        if self.fold_of is None:
            why = "a class has one photo, or copies of one, so there is nothing to test on"
            return self.source_probe({}), why
        self.accelerator.print(self.describe_plan())
        self.try_heads()
        self.try_crops()
        self.try_training()
        best = min(self.tried, key=self.score)
        chosen = best.candidate
        why = f"its log-loss, {self.score(best):.3f}, is the lowest of {len(self.tried)} candidates"
        if chosen.recipe == "full" and self.config.run.minutes is not None:
            # An epoch trains on every photo once and is then evaluated, as is the fitted head.
            seconds = len(self.labels) * self.train_seconds + self.test_seconds()
            room = self.left() - FIXED_SECONDS - self.test_seconds()
            epochs = int(np.clip(room / seconds, 1, MOST_EPOCHS))
            chosen, why = (
                chosen._replace(knobs={**chosen.knobs, "epochs": epochs}),
                why + (f"; {epochs} epochs fit into the time"),
            )
        return chosen, why

    def describe_plan(self) -> str:
        """Return a line that says how long the run will take."""
        if self.config.run.minutes is not None:
            return f"the whole run shall take {self.config.run.minutes:g} minutes; trying what fits"
        count, sizes = len(self.labels), 1 + (self.larger() is not None)
        cheap = count * self.eval_seconds * (2 + 2 * VIEWS * sizes + 2 * (sizes - 1)) + FIXED_SECONDS
        cheap += 2 * self.test_seconds()
        trial = TRIAL_EPOCHS * count * (FOLDS - 1) / FOLDS * self.train_seconds
        epochs = RECIPES["full"].optim.epochs
        full = epochs * (count * self.train_seconds + self.test_seconds())
        return (
            f"expected to take {(cheap + trial / 2) / 60:.1f} minutes if a fitted head is best,"
            f" {(cheap + trial + full) / 60:.1f} if it is full fine-tuning"
        )

    def test_seconds(self) -> float:
        """Return the seconds of evaluating test once."""
        count = sum(len(rows) for name, rows in self.photos.splits.items() if name != "train")
        return count * self.eval_seconds

    def larger(self) -> int | None:
        """Return a size above the model's own that is tried too; None if the size is given or fixed."""
        return None if self.config.data.image_size or self.fixed_size else round(self.size * 9 / 7 / 32) * 32

    def source_probe(self, knobs: dict, name: str = "") -> Candidate:
        """Return a source-probe with these knobs."""
        return Candidate(f"source-probe{name}", "source-probe", knobs)

    def try_heads(self) -> None:
        """Try heads fitted to cached features, in up to three geometries, by cross-validation."""
        geometries = [{"preprocessing": "model"}, {"preprocessing": "chapter"}]
        if larger := self.larger():
            geometries.append({"preprocessing": "model", "image_size": larger})
        for knobs in geometries:
            # Features, and the test photos at the end if this is chosen.
            scale = (knobs.get("image_size", self.size) / self.size) ** 2
            cost = scale * (len(self.labels) * self.eval_seconds + self.test_seconds()) + FIXED_SECONDS
            if self.tried and cost > self.left():
                continue
            name = self.geometry_name(knobs)
            begun = time.perf_counter()
            extractor, prior_of = self.extractor(knobs)
            features = extractor.split("train", self.config.run.seed).features.numpy()
            seconds = (time.perf_counter() - begun) / len(self.labels) / scale
            seconds = launch.run_on_main(self.accelerator, functools.partial(float, seconds))
            if seconds > self.eval_seconds / 2:  # else they came from the cache
                self.eval_seconds = seconds
            fit = functools.partial(
                cross_validate, features, self.labels, prior_of, self.fold_of, (), self.weights
            )
            outputs, layers = launch.run_on_main(self.accelerator, fit)
            self.add(self.source_probe(knobs, f", {name}"), outputs)
            if "image_size" not in knobs:
                self.starts.append((self.tried[-1], layers[0]))
            if knobs["preprocessing"] == "chapter":
                fit = functools.partial(self.cross_validate_probe, features)
                self.add(Candidate(f"probe, {name}", "probe", {}), launch.run_on_main(self.accelerator, fit))

    def geometry_name(self, knobs: dict) -> str:
        """Return a geometry in words."""
        kept = "aspect kept" if knobs["preprocessing"] == "model" else "squashed"
        return f"{kept}, {knobs.get('image_size', self.size)} pixels"

    def extractor(self, knobs: dict) -> tuple[FeatureExtractor, Callable]:
        """Return what computes features in a geometry, and the prior of the source's classes."""
        config, size = self.config, knobs.get("image_size", self.config.data.image_size)
        net = load_source(config.model.model, config.model.weights, size)
        data_config = source_data_config(net, knobs["preprocessing"], size)
        given, names = config.model.source_class, self.photos.label_names
        sources = heads.match_classes(net, names, given, "source-probe")
        prior_of = functools.partial(heads.source_prior, net.get_classifier(), sources)
        net = net.to(self.accelerator.device, memory_format=MEMORY_FORMAT)
        return FeatureExtractor(self.accelerator, net, self.photos, data_config, self.workers), prior_of

    def cross_validate_probe(self, features: np.ndarray) -> np.ndarray:
        """Return log-probabilities [N, classes] of the recipe "probe", each by a fit without that fold."""
        outputs = np.zeros((len(self.labels), self.labels.max() + 1))
        for fold in range(self.fold_of.max() + 1):
            learned, held_back = self.fold_of != fold, self.fold_of == fold
            seed, balanced = self.config.run.seed, self.weights is not None
            layer = Layer(*heads.probe_head(features[learned], self.labels[learned], seed, (), balanced))
            outputs[held_back] = scipy.special.log_softmax(layer.logits(features[held_back]), axis=1)
        return outputs

    def try_crops(self) -> None:
        """Try the best geometry with random crops to learn from, which also tell how to crop in training."""
        best = min((each for each in self.tried if each.candidate.recipe == "source-probe"), key=self.score)
        geometry = best.candidate.knobs
        scale = (geometry.get("image_size", self.size) / self.size) ** 2
        extractor, prior_of = self.extractor(geometry)
        features = extractor.split("train", self.config.run.seed).features.numpy()
        for name, crop in CROPS.items():
            cost = VIEWS * len(self.labels) * self.eval_seconds + self.test_seconds()
            if scale * cost + 2 * FIXED_SECONDS > self.left():
                return
            area, flip = crop["min_crop_area"], crop["flip"]
            views = extractor.crops("train", VIEWS, area, self.config.run.seed, flip)
            views = [view.features.numpy() for view in views]
            fit = functools.partial(
                cross_validate, features, self.labels, prior_of, self.fold_of, views, self.weights
            )
            knobs = geometry | crop
            knobs |= {"augmentation": "crop", "cache_features": False, "probe_views": VIEWS}
            outputs, _ = launch.run_on_main(self.accelerator, fit)
            self.add(self.source_probe(knobs, f", {self.geometry_name(geometry)}, {name}"), outputs)
            self.cropped.append((self.tried[-1], crop))

    def try_training(self) -> None:
        """Try fine-tuning the whole network on all folds but the first, tested on that one."""
        start, layer = min(self.starts, key=lambda pair: self.score(pair[0]))
        crop = next(iter(CROPS.values()))
        if self.cropped:
            crop = min(self.cropped, key=lambda pair: self.score(pair[0]))[1]
        geometry = start.candidate.knobs
        ways = [Candidate("full fine-tuning", "full", {**geometry, **crop})]
        if self.config.run.minutes is not None:
            other = next(each for each in CROPS.values() if each != crop)
            light = {**geometry, **crop, "head_init": "source-probe", "probe_views": VIEWS}
            ways.append(Candidate("light fine-tuning", "light", light))
            ways.append(Candidate("full fine-tuning, other crops", "full", {**geometry, **other}))
        for way in ways:
            count, epochs = len(self.labels), self.trial_epochs(way)
            cost = epochs * count * (FOLDS - 1) / FOLDS * self.train_seconds
            final = FEWEST_EPOCHS if way.recipe == "full" else RECIPES[way.recipe].optim.epochs
            cost += final * (count * self.train_seconds + self.test_seconds()) + FIXED_SECONDS
            if cost <= self.left():
                self.train_part(way, layer)

    def trial_epochs(self, way: Candidate) -> int:
        """Return the epochs on a part of train."""
        return TRIAL_EPOCHS if way.recipe == "full" else RECIPES[way.recipe].optim.epochs

    def train_part(self, way: Candidate, layer: Layer) -> None:
        """Train a candidate from a fitted head on all folds but the first, and test it on that one."""
        epochs, rows = self.trial_epochs(way), np.flatnonzero(self.fold_of == 0)
        best = min(self.tried, key=self.score)
        hopeless = HOPELESS * best.losses[np.searchsorted(best.rows, rows)].mean()
        job = self.build_part(way, rows, layer)
        begun, given_up = time.perf_counter(), False
        for epoch in range(1, epochs + 1):
            job.train_loader.batch_sampler.seek(epoch)
            title = f"{way.name} on a part, epoch {epoch}/{epochs}"
            steps = engine.train_steps(
                self.accelerator, job.state, job.train_loader, job.config.optim, job.eval_modules, title
            )
            for step, _ in enumerate(steps):
                if launch.stop_requested(self.accelerator, self.stop, step):
                    raise launch.StoppedError
            job.state.totals.zero_()
            if epoch == 1:
                seconds = (time.perf_counter() - begun) / (len(self.labels) - len(rows))
                seconds = functools.partial(float, seconds)
                self.train_seconds = launch.run_on_main(self.accelerator, seconds)
            if epoch in (epochs // 2, epochs):
                losses, correct = self.evaluate_part(job, rows)
                given_up = epoch < epochs and losses.mean() > hopeless
                if given_up:
                    break
        launch.release(self.accelerator)
        self.tried.append(Tried(way, rows, losses, correct, given_up))
        self.accelerator.print(self.describe(self.tried[-1]))

    def build_part(self, way: Candidate, rows: np.ndarray, layer: Layer) -> Job:
        """Return the job of a candidate that trains on all photos but these rows, from a fitted head."""
        train, epochs = self.photos.splits["train"], self.trial_epochs(way)
        part = {"train": train.select(np.setdiff1d(np.arange(len(train)), rows)), "test": train.select(rows)}
        knobs = {**way.knobs, "head_init": "linear", "probe_views": 0, "source_class": (), "epochs": epochs}
        config = settle(self.config, way.recipe, knobs | {"compile": False})
        with contextlib.redirect_stdout(io.StringIO()):
            job = build(config, self.accelerator, Photos(part, self.photos.data_dir))
        heads.set_head(job.net, *layer)
        return job

    def evaluate_part(self, job: Job, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-loss [n] of the held-back photos, and whether each is right [n]."""
        state = job.state
        network = state.average.module if state.average else state.model
        sharding.broadcast_state(network)
        probabilities, _ = engine.predict(
            self.accelerator, network, job.eval_loaders["test"], "held-back part", stop=self.stop
        )
        return self.scores_of(np.log(np.maximum(probabilities.double().cpu().numpy(), 1e-30)), rows)

    def scores_of(self, log_probabilities: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weighted log-loss [n] of photos and whether each is right [n]."""
        labels = self.labels[rows]
        losses = -log_probabilities[np.arange(len(rows)), labels]
        if self.weights is not None:
            losses = losses * self.weights[labels]
        return losses, log_probabilities.argmax(axis=1) == labels

    def add(self, candidate: Candidate, log_probabilities: np.ndarray) -> None:
        """Record a candidate that was cross-validated on all photos."""
        rows = np.arange(len(self.labels))
        self.tried.append(Tried(candidate, rows, *self.scores_of(log_probabilities, rows)))
        self.accelerator.print(self.describe(self.tried[-1]))

    def reference(self) -> Tried:
        """Return the best candidate of those that were cross-validated."""
        whole = [each for each in self.tried if len(each.rows) == len(self.labels)]
        return min(whole, key=lambda each: each.losses.mean())

    def score(self, tried: Tried) -> float:
        """Return the estimated log-loss on all photos.

        For one that was tested on a part: that of the best cross-validated one, plus their difference there.
        """
        if len(tried.rows) == len(self.labels):
            return float(tried.losses.mean())
        best = self.reference()
        return float(best.losses.mean() + (tried.losses - best.losses[tried.rows]).mean())

    def row(self, tried: Tried) -> dict:
        """Return what choice.json says of one candidate; `_se` are standard errors."""
        count, losses = len(tried.rows), tried.losses
        accuracy = float(tried.correct.mean())
        if count < len(self.labels):
            losses = losses - self.reference().losses[tried.rows]
        how = "cross-validation" if count == len(self.labels) else "part held back"
        return {
            "name": tried.candidate.name,
            "recipe": tried.candidate.recipe,
            "knobs": tried.candidate.knobs,
            "log_loss": round(self.score(tried), 4),
            "log_loss_se": round(float(losses.std() / math.sqrt(count)), 4),
            "accuracy": round(accuracy, 4),
            "accuracy_se": round(math.sqrt(accuracy * (1 - accuracy) / count), 4),
            "photos": count,
            "how": how + (", given up" if tried.given_up else ""),
        }

    def describe(self, tried: Tried) -> str:
        """Return a line of the table."""
        row = self.row(tried)
        return (
            f"{row['name']:<58} {row['log_loss']:>7.3f} ± {row['log_loss_se']:.3f}"
            f" {row['accuracy']:>7.3f} ± {row['accuracy_se']:.3f}  {row['photos']} photos, {row['how']}"
        )

    def table(self) -> str:
        """Return all candidates, the best first."""
        head = f"{'tried on parts of train':<58} {'log-loss':>9}        {'accuracy':>8}"
        return "\n".join([head, *(self.describe(each) for each in sorted(self.tried, key=self.score))])
