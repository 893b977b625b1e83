"""Fitted output layers: a logistic regression, or the source classifier's own vectors."""

import re
from collections.abc import Sequence

import numpy as np
import scipy.special
import timm.data
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hotdog_hf.data.loaders import FeatureDataset
from hotdog_hf.errors import UserError

PROBE_FOLDS = 5
# Inverse regularisation strengths to choose from, for standardised features.
PROBE_STRENGTHS = tuple(10.0**power for power in np.arange(-4, 1.5, 0.5))


def fit_head(
    net: torch.nn.Module,
    head_init: str,
    split_features: FeatureDataset,
    views: Sequence[FeatureDataset],
    source_head: torch.nn.Linear,
    source_classes: Sequence[int | None] | None,
) -> None:
    """Fit the output layer to the training photos' features, as `head_init` says.

    `split_features` are of the photos as in evaluation, each of `views` of one random crop per photo.
    """
    features = split_features.features.numpy()
    if head_init == "probe":
        crops = [view.features.numpy() for view in views]
        set_head(net, *probe_head(features, split_features.labels, split_features.seed, crops))
    else:
        set_head(net, *class_vector_head(source_head, features, source_classes))


def set_head(net: torch.nn.Module, weight: np.ndarray, bias: np.ndarray) -> None:
    """Write weight [classes, D] and bias [classes] into the output layer."""
    head = net.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.copy_(torch.as_tensor(bias))


def probe_head(
    features: np.ndarray, labels: np.ndarray, seed: int, views: Sequence[np.ndarray] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the output layer: weight [classes, D] and bias [classes] of a logistic regression.

    Fitted to features [N, D], and to `views` of the same photos [N, D] each, standardised by their mean and
    deviation, which are then folded into the layer. The L2 penalty is the one with the lowest log-loss in
    stratified cross-validation, evaluated on the `features` of photos of which no view was used to fit.
    Raises `UserError` if a class has a single photo.
    """
    fewest = int(np.bincount(labels).min())
    if fewest < 2:
        raise UserError("--head-init probe needs at least 2 training photos of every class")
    # Newton's method without the D x D matrix, solving which took most of a probe's time.
    regression = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=5000)
    pipeline = make_pipeline(StandardScaler(), regression)
    split = StratifiedKFold(min(PROBE_FOLDS, fewest), shuffle=True, random_state=seed).split(labels, labels)
    starts = np.arange(1 + len(views))[:, None] * len(labels)
    folds = [((starts + fitted).ravel(), held_out) for fitted, held_out in split]
    strengths = {"logisticregression__C": PROBE_STRENGTHS}
    search = GridSearchCV(pipeline, strengths, scoring="neg_log_loss", cv=folds)
    everything = np.concatenate([features, *views]).astype(np.float64)
    scaler, regression = search.fit(everything, np.tile(labels, 1 + len(views))).best_estimator_
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # for two classes scikit-learn fits the difference of logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def class_vector_head(
    source_head: torch.nn.Linear, features: np.ndarray, sources: Sequence[int | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Build the output layer of the source classifier's own rows (Dive into Deep Learning, 14.2, exercise 4).

    Class i gets row `sources[i]` of `source_head`, weight and bias, so that its logit is the source's own.
    At most one class has none (None): it stands for all other source classes. The small softmax would agree
    with the source's if its logit were the log-sum-exp of theirs, which is not linear; for every
    distribution q over them it is at least sum(q z) + entropy(q), a linear layer (Gibbs' inequality).
    Averaged over the training photos' features [N, D] that bound is tightest at q = softmax(mean of z), which
    is used. The plain mean of the rows is the bound for a uniform q: it counts a teapot as much as a
    cheeseburger.
    """
    rows = source_head.weight.detach().cpu().numpy().astype(np.float64)
    biases = np.zeros(len(rows))
    if source_head.bias is not None:
        biases = source_head.bias.detach().cpu().numpy().astype(np.float64)
    if None in sources:
        taken = [index for index in sources if index is not None]
        others = np.setdiff1d(np.arange(len(rows)), taken)
        mean_logits = rows[others] @ features.mean(axis=0) + biases[others]
        share = scipy.special.softmax(mean_logits)
        rest = share @ rows[others], share @ biases[others] + scipy.special.entr(share).sum()
    chosen = [rest if index is None else (rows[index], biases[index]) for index in sources]
    return np.stack([weight for weight, _ in chosen]), np.array([bias for _, bias in chosen])


def match_classes(
    source: torch.nn.Module, label_names: Sequence[str], given: Sequence[str]
) -> list[int | None]:
    """Return the source class of each class: the one given as "name=class", else the one with the same name.

    A class is an index or a name of the source (ImageNet's, or a saved model's own). One class may have none.
    Raises `UserError` for classes that cannot be matched.
    """
    known = _source_names(source)
    chosen = {name: known.get(_plain(name)) for name in label_names}
    for entry in given:
        name, _, value = entry.rpartition("=")
        if name not in chosen:
            raise UserError(
                f"--source-class {entry}: {name!r} is none of the classes {', '.join(label_names)}"
            )
        index = int(value) if value.isdecimal() else known.get(_plain(value))
        if index is None or index >= source.num_classes:
            raise UserError(f"--source-class {entry}: the source has no class {value!r}")
        chosen[name] = index
    found = [index for index in chosen.values() if index is not None]
    unmatched = [name for name, index in chosen.items() if index is None]
    if not found or len(unmatched) > 1:
        raise UserError(
            f"--head-init class-vector finds no source class for {', '.join(unmatched)}; name them, as in"
            f" --source-class {unmatched[0]}=934 (one class may stand for all the others)"
        )
    if len(set(found)) < len(found):
        raise UserError(f"--source-class: two classes share one source class: {chosen}")
    if unmatched and len(found) == source.num_classes:
        raise UserError(f"--head-init class-vector: no source class is left to stand for {unmatched[0]}")
    return list(chosen.values())


def _source_names(source: torch.nn.Module) -> dict[str, int]:
    """Return the source's class indices by name; ImageNet's classes have several names each."""
    if own := source.pretrained_cfg.get("label_names"):
        return {_plain(name): index for index, name in enumerate(own)}
    subset = timm.data.infer_imagenet_subset(source)
    if subset is None:
        return {}
    info = timm.data.ImageNetInfo(subset)
    names: dict[str, int] = {}
    for index in range(info.num_classes()):
        for name in info.index_to_description(index).split(", "):
            names.setdefault(_plain(name), index)
    return names


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()
