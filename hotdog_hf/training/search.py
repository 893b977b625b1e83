"""What the recipe "best" tries on parts of train: fitted heads by cross-validation, then fine-tuning."""

import contextlib
import dataclasses
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special
import torch
from accelerate import Accelerator

from hotdog_hf.config import RECIPES, TrainConfig, differences, override
from hotdog_hf.data.groups import content_groups, stratified_folds
from hotdog_hf.data.splits import Photos
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.errors import UserError
from hotdog_hf.model import heads, network
from hotdog_hf.model.regression import Layer, cross_validate
from hotdog_hf.model.source import check_size, load_source, source_data_config
from hotdog_hf.training import engine, launch, sharding
from hotdog_hf.training.budget import TRAIN_SHARES, TRIAL_EPOCHS, VIEWS, Budget, Costs, Sizes
from hotdog_hf.training.candidates import HEADER, Board, Candidate, Tried
from hotdog_hf.training.features import FeatureExtractor
from hotdog_hf.training.job import Job, build, keep_decoded

FOLDS = 4
# How to crop: from a quarter of the photo, with flips, or gentler, where photos must not be mirrored: their
# mirror images have a log-loss that is higher by over so many standard errors, as of digits or hand signs.
CROPS, GENTLE_CROPS = {"min_crop_area": 0.25, "flip": True}, {"min_crop_area": 0.5, "flip": False}
MIRRORED_ERRORS = 3
# On as few folds as hold back so many photos, fine-tunings are tested, and mirror images.
ENOUGH_HELD_BACK, ENOUGH_MIRRORED = 75, 200
# Sizes that are tried beside the model's own, as multiples of it: a larger one to evaluate, and crops that
# take half the time.
LARGER, SMALLER_CROPS = 10 / 7, 5 / 7
# Light fine-tuning is not tried if a full one has this share of the fitted heads' log-loss, or less.
MUCH_BETTER = 0.5
# A full fine-tuning is given up if its log-loss is over so many times that of the best head: halfway, if it
# has made so many steps by then. Fewer steps tell little of how it ends, as do a light one's first epochs.
TELLING_STEPS, HOPELESS = 60, 2.0


def check_flags(config: TrainConfig) -> None:
    """Raise `UserError` for flags that a fine-tuning to be tried does not take: now, not after the heads."""
    for recipe in TRIAL_EPOCHS:
        try:
            settle(config, recipe, {})
        except ValueError as error:
            raise UserError(f"--recipe best also tries {recipe}, for which {error}") from error


def other_size(source: torch.nn.Module, own: int, times: float) -> int | None:
    """Return a side in pixels of about so many times the model's own, if the network takes it."""
    side = round(own * times / 32) * 32
    if side == 0 or (side - own) * (times - 1) <= 0:
        return None
    try:
        check_size(source, side)
    except UserError:
        return None
    return side


def settle(config: TrainConfig, recipe: str, knobs: dict) -> TrainConfig:
    """Return the config of a candidate: its recipe and knobs, and the flags given with recipe "best"."""
    # On all of train: no photos are held back to choose an epoch, unless the user asks for it.
    given = {"val_fraction": config.data.val_fraction, "keep": "last", "evaluate": config.run.evaluate}
    given |= {**differences(config), "minutes": None}
    if recipe == "probe":
        given.pop("source_class", None)
    if not RECIPES[recipe].optim.epochs:  # these flags are for what trains more than a fitted head
        for name in ("crop_on_device", "ema_decay"):
            given.pop(name, None)
    return override(RECIPES[recipe], **given | knobs)


class Geometry(NamedTuple):
    """A way to preprocess, with the source-probe that was tried in it."""

    tried: Tried
    # The features of train [N, D], and for each fold the head that learned nothing of it.
    features: np.ndarray
    layers: list[Layer]
    # Makes the prior of the source's classes.
    prior_of: Callable


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
        # What was tried to preprocess, and what computes features in the best way so far.
        self.geometries: list[Geometry] = []
        self.extractor: FeatureExtractor | None = None
        # How to crop and flip in training, and what the log-loss of mirrored photos is.
        self.crop, self.mirrored = CROPS, None
        train, workers = photos.splits["train"], config.data.num_workers
        self.workers = launch.default_workers(accelerator) if workers is None else workers
        self.labels = np.asarray(train["label"][:])
        self.weights = None
        if config.optim.class_weights == "balanced":
            self.weights = heads.class_weights(np.bincount(self.labels))
        self.board = Board(self.labels, self.weights, config.run.calibrate)
        source = load_source(config.model.model, config.model.weights, config.data.image_size)
        network.require_linear_head(source)
        data_config = source_data_config(source, "model", config.data.image_size)
        own = data_config["input_size"][-1]
        sizes = Sizes(
            own,
            larger=None if config.data.image_size else other_size(source, own, LARGER),
            smaller_crops=None if minutes is None else other_size(source, own, SMALLER_CROPS),
        )
        # A photo is read by each way to preprocess it, by each crop, and in every epoch.
        self.photos = photos = keep_decoded(config, accelerator, photos, data_config, reads=2)
        source.to(accelerator.device)
        # Reading and decoding come on top of what is measured on photos in memory.
        speeds = [1.2 * each for each in engine.measure_speed(accelerator, source, own)]
        speeds = launch.run_on_main(accelerator, lambda: speeds)
        others = sum(len(rows) for name, rows in photos.splits.items() if name != "train")
        train_seconds = {recipe: share * speeds[0] for recipe, share in TRAIN_SHARES.items()}
        costs = Costs(own, len(self.labels), others, train_seconds, speeds[1])
        self.folds = launch.run_on_main(accelerator, self._folds)
        # The folds that fine-tunings are tested on.
        self.trial_folds = self.first_folds(ENOUGH_HELD_BACK)
        learned = [len(learned) for learned, _ in self.trial_folds]
        self.mirrored_folds = self.first_folds(ENOUGH_MIRRORED)
        mirrored = sum(len(held_back) for _, held_back in self.mirrored_folds) / len(self.labels)
        self.budget = Budget(costs, sizes, learned, mirrored, config.run.neighbors, minutes, self.left)

    def _folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        train = self.photos.splits["train"]
        # Of the first process alone, which fits the heads.
        self.groups = content_groups(train, progress=self.accelerator.is_main_process)
        return stratified_folds(self.labels, self.groups, FOLDS, self.config.run.seed)

    def first_folds(self, photos: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return as few folds as hold back so many photos, or all."""
        held_back = np.cumsum([len(held_back) for _, held_back in self.folds])
        return self.folds[: 1 + int(np.searchsorted(held_back, photos))]

    def left(self) -> float:
        """Return the seconds that are left of --minutes, the same on every process."""
        return launch.run_on_main(self.accelerator, lambda: self.end - time.perf_counter())

    def run(self) -> tuple[Candidate, str, dict | None]:
        """Try the candidates; return the chosen one, why, and what calibrates it if it is a fine-tuning."""
        if not self.folds:
            why = "a class has one photo, or copies of one, so there is nothing to test on"
            return Candidate("source-probe", "source-probe", {}), why, None
        self.accelerator.print(f"{self.budget.describe()}\n{HEADER}")
        self.try_heads()
        self.test_mirrored()
        self.try_crops()
        self.try_training()
        best, why = self.board.best()
        chosen = best.candidate
        if chosen.recipe in TRIAL_EPOCHS and self.config.run.minutes is not None:
            epochs = self.budget.final_epochs(chosen)
            chosen = chosen._replace(knobs={**chosen.knobs, "epochs": epochs})
            why += f"; {epochs} epochs fit into the time"
        return chosen, why, best.calibration

    def try_heads(self) -> None:
        """Try heads fitted to cached features, in up to three geometries, by cross-validation."""
        geometries = [{"preprocessing": "model"}, {"preprocessing": "chapter"}]
        if self.budget.sizes.larger:
            geometries.append({"preprocessing": "model", "image_size": self.budget.sizes.larger})
        for knobs in geometries:
            candidate = Candidate(f"source-probe, {self.geometry_name(knobs)}", "source-probe", knobs)
            pass_seconds = self.budget.costs.features(self.budget.sizes.evaluated(candidate))
            mirrored = self.budget.costs.features(self.budget.sizes.own, self.budget.mirrored)
            if self.board.tried and not self.budget.has_time(pass_seconds, candidate, mirrored):
                continue
            extractor, prior_of = self.extractor_of(knobs)
            begun = time.perf_counter()
            features = extractor.split("train", self.config.run.seed).features.numpy()
            seconds = (time.perf_counter() - begun) / pass_seconds * self.budget.costs.eval_seconds
            seconds = launch.run_on_main(self.accelerator, functools.partial(float, seconds))
            if seconds > self.budget.costs.eval_seconds / 2:  # else they came from the cache
                self.budget.costs.correct(seconds)
            fit = functools.partial(
                cross_validate, features, self.labels, prior_of, self.folds, (), self.weights
            )
            outputs, layers = launch.run_on_main(self.accelerator, fit)
            geometry = Geometry(self.show(self.board.add(candidate, outputs)), features, layers, prior_of)
            self.geometries.append(geometry)
            if geometry is self.best_geometry():
                self.extractor = extractor
            if knobs["preprocessing"] == "chapter":
                fit = functools.partial(self.cross_validate_probe, features, ())
                probe = Candidate(f"probe, {self.geometry_name(knobs)}", "probe", knobs)
                self.show(self.board.add(probe, launch.run_on_main(self.accelerator, fit)))

    def best_geometry(self, own_size: bool = False) -> Geometry:
        """Return the geometry whose source-probe has the lowest log-loss, or that of the model's own size."""
        geometries = [
            each
            for each in self.geometries
            if not own_size or self.budget.sizes.evaluated(each.tried.candidate) == self.budget.sizes.own
        ]
        return min(geometries, key=lambda each: each.tried.losses.mean())

    def geometry_name(self, knobs: dict) -> str:
        """Return a geometry in words."""
        kept = "aspect kept" if knobs["preprocessing"] == "model" else "squashed"
        return f"{kept}, {knobs.get('image_size', self.budget.sizes.own)} pixels"

    def extractor_of(self, knobs: dict) -> tuple[FeatureExtractor, Callable]:
        """Return what computes features in a geometry, and the prior of the source's classes."""
        config, size = self.config, knobs.get("image_size", self.config.data.image_size)
        net = load_source(config.model.model, config.model.weights, size)
        data_config = source_data_config(net, knobs["preprocessing"], size)
        given, names = config.model.source_class, self.photos.label_names
        sources = heads.match_classes(net, names, given, "source-probe")
        prior_of = functools.partial(heads.source_prior, net.get_classifier(), sources)
        net = net.to(self.accelerator.device, memory_format=MEMORY_FORMAT)
        tools = self.accelerator, net, self.photos, data_config, self.workers, self.stop
        return FeatureExtractor(*tools), prior_of

    def cross_validate_probe(self, features: np.ndarray, views: Sequence[np.ndarray]) -> np.ndarray:
        """Return log-probabilities [N, classes] of the recipe "probe", each by a fit without that fold."""
        outputs = np.zeros((len(self.labels), self.labels.max() + 1))
        for learned, held_back in self.folds:
            seed, balanced, groups = self.config.run.seed, self.weights is not None, self.groups[learned]
            own, other = features[learned], [view[learned] for view in views]
            layer, _ = heads.fit_probe(own, self.labels[learned], seed, other, balanced, groups)
            outputs[held_back] = scipy.special.log_softmax(layer.logits(features[held_back]), axis=1)
        return outputs

    def test_mirrored(self) -> None:
        """Crop gently, without flips, if heads do clearly worse on the mirror images of held-back photos."""
        best, folds = self.best_geometry(), self.mirrored_folds
        rows = np.concatenate([held_back for _, held_back in folds])
        head = best.tried.candidate
        seconds = self.budget.costs.features(self.budget.sizes.evaluated(head), self.budget.mirrored)
        if seconds > self.left() - self.budget.finish(head):
            return
        extractor = dataclasses.replace(self.extractor, photos=self.part(train=rows))
        features = extractor.split("train", mirrored=True).features.numpy()
        parts = np.split(features, np.cumsum([len(held_back) for _, held_back in folds])[:-1])
        logits = [layer.logits(part) for layer, part in zip(best.layers, parts, strict=False)]
        losses = self.board.losses(scipy.special.log_softmax(np.concatenate(logits), axis=1), rows)
        before = best.tried.losses[rows]
        rise = losses - before
        error = rise.std() / math.sqrt(len(rise))
        clear = launch.run_on_main(self.accelerator, lambda: bool(rise.mean() > MIRRORED_ERRORS * error))
        self.crop = GENTLE_CROPS if clear else CROPS
        self.mirrored = {
            "photos": len(rows),
            "log_loss": round(float(before.mean()), 4),
            "log_loss_mirrored": round(float(losses.mean()), 4),
            "difference_se": round(float(error), 4),
            "flip": self.crop["flip"],
        }
        self.accelerator.print(
            f"log-loss of mirrored photos: {losses.mean():.3f} instead of {before.mean():.3f}"
            f" (± {error:.3f}), so {'no flips' if clear else 'flips'} in training"
        )

    def try_crops(self) -> None:
        """Try the best head with random crops to learn from."""
        best, area, flip = self.board.reference().candidate, self.crop["min_crop_area"], self.crop["flip"]
        crops = {**self.crop, "augmentation": "crop", "cache_features": False, "probe_views": VIEWS}
        name = f"{best.name}, crops from {area:.0%}, {'flips' if flip else 'no flips'}"
        candidate = Candidate(name, best.recipe, best.knobs | crops)
        seconds = self.budget.costs.features(self.budget.sizes.evaluated(candidate), VIEWS)
        if not self.budget.has_time(seconds, candidate):
            return
        [geometry] = (each for each in self.geometries if each.tried.candidate.knobs == best.knobs)
        extractor = self.extractor
        if geometry is not self.best_geometry():
            extractor, _ = self.extractor_of(best.knobs)
        views = extractor.crops("train", VIEWS, area, self.config.run.seed, flip)
        views, features = [view.features.numpy() for view in views], geometry.features

        def fit() -> np.ndarray:
            if best.recipe == "probe":
                return self.cross_validate_probe(features, views)
            prior_of = geometry.prior_of
            outputs, _ = cross_validate(features, self.labels, prior_of, self.folds, views, self.weights)
            return outputs

        self.show(self.board.add(candidate, launch.run_on_main(self.accelerator, fit)))

    def try_training(self) -> None:
        """Try fine-tuning on all folds but one, tested on that one."""
        start, own_start = self.best_geometry(), self.best_geometry(own_size=True)
        full = {**own_start.tried.candidate.knobs, **self.crop, "epochs": self.budget.epochs("full")}
        self.try_way(Candidate("full fine-tuning", "full", full), own_start.layers)
        heads_best, best = (self.board.score(each) for each in (self.board.reference(), self.board.best()[0]))
        if best >= MUCH_BETTER * heads_best:
            geometry = start.tried.candidate.knobs
            light = {**geometry, **self.crop}
            if "image_size" in geometry:
                # On crops of the model's own size: things in crops are larger than in the whole photo, so
                # that larger photos in evaluation suit them (Touvron et al. 2019, arXiv 1906.06423).
                light["train_image_size"] = self.budget.sizes.own
            name = f"light fine-tuning, {self.geometry_name(geometry)}"
            way, layers = Candidate(name, "light", light), start.layers
            smaller = self.budget.sizes.smaller_crops
            if smaller and not self.budget.trial_epochs_in_time(way):
                geometry, layers = own_start.tried.candidate.knobs, own_start.layers
                light = {**geometry, **self.crop, "train_image_size": smaller}
                name = f"light fine-tuning, {self.geometry_name(geometry)}, crops of {smaller}"
                way = Candidate(name, "light", light)
            self.try_way(way, layers)
        if self.config.run.minutes is not None and self.board.best()[0].candidate.recipe == "full":
            other = GENTLE_CROPS if self.crop == CROPS else CROPS
            self.try_way(Candidate("full fine-tuning, other crops", "full", full | other), own_start.layers)

    def try_way(self, way: Candidate, layers: list[Layer]) -> None:
        """Try a fine-tuning from fitted heads, if there is time for it: fewer epochs if there is little."""
        epochs = self.budget.trial_epochs_in_time(way)
        if not epochs:
            self.accelerator.print(f"{way.name}: not tried, as there is no time for it")
            return
        parts = []
        for fold, layer in zip(self.trial_folds, layers, strict=False):
            try:
                part, given_up = self.train_part(way, layer, fold, epochs)
            except engine.NonFiniteLossError:  # on all processes at once
                launch.release(self.accelerator)
                self.accelerator.print(f"{way.name}: given up, as its loss became NaN or infinite")
                return
            if part is None:  # slower than expected
                self.try_way(way, layers)
                return
            parts.append(part)
            if given_up:
                break
        rows = np.concatenate([held_back for _, held_back in self.trial_folds[: len(parts)]])
        self.show(self.board.add(way, np.concatenate(parts), rows, given_up))

    def train_part(
        self, way: Candidate, layer: Layer, fold: tuple[np.ndarray, np.ndarray], epochs: int
    ) -> tuple[np.ndarray | None, bool]:
        """Train a candidate from a fitted head on all folds but one, and test it on that one.

        Returns log-probabilities [n, classes] of the held-back photos, and whether it was given up; None for
        them if the first epoch took so long that there is no time for the others.
        """
        learned, rows = fold
        hopeless = HOPELESS * self.board.reference().losses[rows].mean()
        job = self.build_part(way, layer, fold, epochs)
        telling = way.recipe == "full" and epochs // 2 * len(job.train_loader) >= TELLING_STEPS
        begun, outputs, given_up = time.perf_counter(), None, False
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
                seconds = (time.perf_counter() - begun) / len(learned) / self.budget.sizes.share(way)
                seconds = functools.partial(float, seconds)
                self.budget.costs.train_seconds[way.recipe] = launch.run_on_main(self.accelerator, seconds)
                if self.budget.epochs_in_time(way) < epochs - 1:
                    break
            if epoch == epochs or (epoch == epochs // 2 and telling):
                outputs = self.evaluate_part(job)
                given_up = way.recipe == "full" and self.board.losses(outputs, rows).mean() > hopeless
                if given_up:
                    break
        launch.release(self.accelerator)
        return outputs, given_up

    def build_part(
        self, way: Candidate, layer: Layer, fold: tuple[np.ndarray, np.ndarray], epochs: int
    ) -> Job:
        """Return the job of a candidate that trains on all folds but one, from a fitted head."""
        learned, rows = fold
        knobs = {**way.knobs, "head_init": "linear", "probe_views": 0, "source_class": (), "epochs": epochs}
        config = settle(self.config, way.recipe, knobs | {"compile": False})
        with contextlib.redirect_stdout(io.StringIO()):
            job = build(config, self.accelerator, self.part(train=learned, test=rows))
        heads.set_head(job.net, *layer)
        return job

    def part(self, **rows: np.ndarray) -> Photos:
        """Return splits of these names that hold these rows of train."""
        train = self.photos.splits["train"]
        splits = {name: train.select(kept) for name, kept in rows.items()}
        return Photos(splits, self.photos.data_dir, cache=self.photos.cache)

    def evaluate_part(self, job: Job) -> np.ndarray:
        """Return log-probabilities [n, classes] of the held-back photos."""
        state = job.state
        network = state.average.module if state.average else state.model
        sharding.broadcast_state(network)
        probabilities, _ = engine.predict(
            self.accelerator, network, job.eval_loaders["test"], "held-back part", stop=self.stop
        )
        return np.log(np.maximum(probabilities.double().cpu().numpy(), 1e-30))

    def show(self, tried: Tried) -> Tried:
        """Print the line of the table of a candidate that was tried, and return it."""
        self.accelerator.print(self.board.describe(tried))
        return tried
