"""Fitted output layers: a logistic regression, or the source classifier's own vectors."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.special
import timm.data
import torch
from tqdm import tqdm

from hotdog_hf.data.groups import content_groups, stratified_folds
from hotdog_hf.data.loaders import FeatureDataset
from hotdog_hf.errors import UserError
from hotdog_hf.model import solver
from hotdog_hf.model.regression import Layer, Prior, fit_regression

# Rows of the source's output layer that stand for one of our classes; None: all those of no other class.
SourceClasses = tuple[int, ...] | None

PROBE_FOLDS = 5
# Inverse regularisation strengths to choose from, for standardised features.
PROBE_STRENGTHS = tuple(10.0**power for power in np.arange(-4, 1.5, 0.5))


def fit_head(
    net: torch.nn.Module,
    head_init: str,
    split_features: FeatureDataset,
    views: Sequence[FeatureDataset],
    source_head: torch.nn.Linear,
    sources: Sequence[SourceClasses] | None,
    balanced: bool = False,
) -> np.ndarray | None:
    """Fit the output layer to the training photos' features, as `head_init` says.

    Returns the logits [N, classes] that cross-validation has for each photo from a layer that did not learn
    it; None if there was none.

    `split_features` has the photos as in evaluation, each of `views` a random crop of every one of them;
    `sources` are the source classes of ours, None: those that the photos look like. `balanced` weights the
    photos so that every class counts the same.
    """
    features, labels = split_features.features.numpy(), split_features.labels
    held_out = None
    crops, seed = [view.features.numpy() for view in views], split_features.seed
    if head_init == "probe":
        groups = groups_of(split_features)
        layer, held_out = fit_probe(features, labels, seed, crops, balanced, groups)
    elif head_init == "source-probe":
        prior_of = functools.partial(source_prior, source_head, sources)
        weights = class_weights(np.bincount(labels)) if balanced else None
        groups = groups_of(split_features)
        layer, held_out = fit_regression(features, labels, prior_of, seed, crops, weights, groups)
    elif sources is None:
        layer = similar_head(source_head, features, labels)
    else:
        layer = class_vector_head(source_head, features, sources)
    set_head(net, *layer)
    return held_out


def groups_of(split_features: FeatureDataset) -> np.ndarray:
    """Return the group [N] of each photo: copies and near duplicates, and what the column group names.

    Raises `UserError` if all photos of a class are in one named group.
    """
    named, labels = split_features.groups, split_features.labels
    sizes = [(len(of_class), len(np.unique(of_class))) for of_class in _by_class(named, labels)]
    if any(groups < 2 <= photos for photos, groups in sizes):
        raise UserError("a probe's folds need two groups or more of every class: see the column group")
    return content_groups(split_features.rows)


def _by_class(values: np.ndarray | None, labels: np.ndarray) -> list[np.ndarray]:
    return [] if values is None else [values[labels == label] for label in np.unique(labels)]


def single_photo_warning(head_init: str, counts: dict[str, int]) -> str | None:
    """Say what a probe does if a class has a single photo, by the photos of each class; None if none has."""
    single = [name for name, count in counts.items() if count == 1]
    if not single or head_init not in ("probe", "source-probe"):
        return None
    return (
        f"warning: one training photo of {', '.join(single)}: without cross-validation the strength of the"
        " penalty is a fixed one; with two photos or more of every class it is chosen"
    )


def set_head(net: torch.nn.Module, weight: np.ndarray, bias: np.ndarray) -> None:
    """Write weight [classes, D] and bias [classes] into the output layer."""
    head = net.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.copy_(torch.as_tensor(bias))


@solver.one_blas_thread()
def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    seed: int,
    views: Sequence[np.ndarray] = (),
    balanced: bool = False,
    groups: np.ndarray | None = None,
) -> tuple[Layer, np.ndarray | None]:
    """Fit the output layer: weight [classes, D] and bias [classes] of a logistic regression.

    On features [N, D], and on `views` of the same photos [N, D] each, standardised with their own mean and
    deviation, which are then folded into the layer. The strength of the L2 penalty is that of the lowest
    log-loss in stratified cross-validation, which scores by the `features` of photos of which no view was
    learned, nor of one in the same of `groups` [N], which number photos that show the same. With a single
    photo or group of some class there are no folds, and nothing to standardise by: the features are centred,
    and the penalty is `regression.UNTESTED_STRENGTH`. `balanced` weights the photos, in the loss and in the
    cross-validation, so that every class counts the same.

    Also returns the logits [N, classes] of each photo by the layer that did not learn it, NaN of photos that
    no fold held back; None without folds.
    """
    weights = class_weights(np.bincount(labels)) if balanced else np.ones(labels.max() + 1)
    folds = stratified_folds(labels, groups, PROBE_FOLDS, seed, solver.ENOUGH_HELD_BACK)
    if not folds:
        return fit_regression(features, labels, lambda *_: None, seed, views, weights, groups)
    everything = np.concatenate([features, *views])
    mean, deviation = everything.mean(axis=0, dtype=np.float64), everything.std(axis=0, dtype=np.float64)
    # Features that are the same on all photos, but for rounding, take no part.
    deviation[deviation <= 1e-7 * np.abs(mean)] = np.inf
    coordinates = (everything - mean) / deviation
    axes = solver.principal_axes(coordinates)
    coordinates = coordinates @ axes.T
    targets = np.tile(labels, 1 + len(views))
    strength, start, held_out = _choose_strength(coordinates, targets, weights, len(labels), folds)
    penalty = _mean_penalty(strength, len(targets), len(weights))
    for accuracy in (solver.ROUGH, solver.FINE, solver.EXACT):
        start = _probe_problem(coordinates, targets, weights, accuracy).solve(penalty, start)
    coefficients, bias, _ = start
    weight = coefficients.T @ axes / deviation
    return Layer(weight, bias - weight @ mean), held_out


def _mean_penalty(strength: float, rows: int, classes: int) -> float:
    """Return the penalty of a mean log-loss for an inverse strength C of scikit-learn's.

    Of two classes scikit-learn fits one difference of logits, whose penalty is twice that of the two.
    """
    return (2 if classes == 2 else 1) / (strength * rows)


def _probe_problem(
    coordinates: np.ndarray, labels: np.ndarray, weights: np.ndarray, accuracy: solver.Accuracy
) -> solver.SoftmaxRegression:
    rows = solver.Rows(coordinates, labels, weights[labels] / len(labels))
    return solver.SoftmaxRegression(rows, len(weights), accuracy)


def _choose_strength(
    coordinates: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    num_photos: int,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float, solver.Solution, np.ndarray]:
    """Return the strength of the lowest log-loss on held-back photos, and a solution near that of all photos.

    The third is the logits [N, classes] of each photo at that strength, by the fold that held it back.

    From the strongest penalty on, each fit starts from the one before, until the loss has risen twice.
    """
    coordinates, num_views = coordinates.astype(np.float32), len(labels) // num_photos - 1
    problems = []
    for learned, _ in folds:
        rows = solver.rows_of_photos(learned, num_photos, num_views)
        problems.append(_probe_problem(coordinates[rows], labels[rows], weights, solver.ROUGH))
    solutions = [problem.start() for problem in problems]
    losses, starts = [], []
    with tqdm(total=len(PROBE_STRENGTHS), desc="probe", leave=False, disable=None) as bar:
        for strength in PROBE_STRENGTHS:
            loss, held_logits = 0.0, np.full((num_photos, len(weights)), np.nan, np.float32)
            for number, (problem, (_, held_back)) in enumerate(zip(problems, folds, strict=True)):
                penalty = _mean_penalty(strength, len(problem.labels), len(weights))
                solutions[number] = problem.solve(penalty, solutions[number])
                coefficients, bias, _ = solutions[number]
                logits, held_labels = coordinates[held_back] @ coefficients + bias, labels[held_back]
                held_logits[held_back] = logits
                loss += float(weights[held_labels] @ solver.log_losses(logits, held_labels))
            losses.append(loss)
            if loss == min(losses):
                held_out = held_logits
            starts.append(solutions[0])
            bar.update()
            if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
                break
    best = int(np.argmin(losses))
    return PROBE_STRENGTHS[best], starts[best], held_out


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Return the weight of each class's photos that lets all classes count the same; 1 on average."""
    return counts.sum() / (len(counts) * counts)


def class_vector_head(
    source_head: torch.nn.Linear, features: np.ndarray, sources: Sequence[SourceClasses]
) -> Layer:
    """Build the output layer of the source classifier's own rows (Dive into Deep Learning, 14.2, exercise 4).

    Class i gets the rows `sources[i]` of `source_head`; if it is a single one, its logit is the source's own.
    The one class that may have none (None) stands for all other source classes. What makes the small softmax
    agree with the source's is the log-sum-exp of their logits, which is not linear; for every distribution q
    over them it is at least sum(q z) + entropy(q), a linear layer (Gibbs' inequality). Averaged over the
    training photos' features [N, D] that bound is tightest at q = softmax(mean of z), which is used. The
    plain mean of the rows is the bound for a uniform q: it counts a teapot as much as a cheeseburger.
    """
    rows, biases = _layer_of(source_head)
    taken = [index for indices in sources for index in indices or ()]
    others = np.setdiff1d(np.arange(len(rows)), taken)
    chosen = [others if indices is None else np.array(indices) for indices in sources]
    mean = features.mean(axis=0)
    return _stack(_bound(rows[indices], biases[indices], mean) for indices in chosen)


def similar_head(source_head: torch.nn.Linear, features: np.ndarray, labels: np.ndarray) -> Layer:
    """Build an output layer of the source classes that the photos of each of ours look like.

    The idea is LEEP's (arXiv 2002.12462): what the source says of a class's photos tells which of its
    classes stand for it. Each class gets the bound of `class_vector_head` over all rows of the source, with
    q = softmax(mean of z over the photos of the class), which is tightest for those.
    """
    rows, biases = _layer_of(source_head)
    means = [features[labels == label].mean(axis=0) for label in range(labels.max() + 1)]
    return _stack(_bound(rows, biases, mean) for mean in means)


def source_prior(
    source_head: torch.nn.Linear,
    sources: Sequence[SourceClasses] | None,
    features: np.ndarray,
    labels: np.ndarray,
) -> Prior:
    """Return what the source says of our classes, for `fit_regression`.

    Logits of source classes that were named are the source's own and need no bias; those of classes found by
    the photos depend on how many rows share in them.
    """
    if sources is None:
        return Prior(similar_head(source_head, features, labels), calibrated=False)
    return Prior(class_vector_head(source_head, features, sources), calibrated=True)


def _layer_of(head: torch.nn.Linear) -> Layer:
    weight = head.weight.detach().cpu().numpy().astype(np.float64)
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().cpu().numpy().astype(np.float64)
    return Layer(weight, bias)


def _stack(outputs: Iterable[tuple[np.ndarray, float]]) -> Layer:
    """Return the layer of these outputs: a vector and a bias each."""
    vectors, biases = zip(*outputs, strict=True)
    return Layer(np.stack(vectors), np.array(biases))


def _bound(rows: np.ndarray, biases: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the linear bound on the log-sum-exp of these rows, tightest at the `mean` features."""
    if len(rows) == 1:
        return rows[0], biases[0]
    share = scipy.special.softmax(rows @ mean + biases)
    return share @ rows, share @ biases + scipy.special.entr(share).sum()


def match_classes(
    source: torch.nn.Module,
    label_names: Sequence[str],
    given: Sequence[str],
    head_init: str = "class-vector",
) -> list[SourceClasses] | None:
    """Return the source classes of each of ours: those given as "name=class", else the one of the same name.

    A class is an index, a range of them (151-268), or a name of the source (ImageNet's, or a saved model's
    own); commas separate several. One class may have none. Returns None if the training photos are to find
    them: for "auto", and for head_init "source-probe" if several of ours have no source class. Raises
    `UserError` for what cannot be matched.
    """
    if "auto" in given:
        return None
    known = _source_names(source)
    same = {name: _index_of(name, known) for name in label_names}
    chosen = {name: () if index is None else (index,) for name, index in same.items()}
    asked: dict[str, tuple[int, ...]] = {}
    for entry in given:
        name, _, value = entry.rpartition("=")
        if name not in chosen:
            raise UserError(
                f"--source-class {entry}: {name!r} is none of the classes {', '.join(label_names)}"
            )
        asked[name] = asked.get(name, ()) + _indices(entry, value, known, source.num_classes)
    chosen |= {name: tuple(dict.fromkeys(indices)) for name, indices in asked.items()}
    found = [index for indices in chosen.values() for index in indices]
    unmatched = [name for name, indices in chosen.items() if not indices]
    if not found or len(unmatched) > 1:
        if head_init == "source-probe" and not given:
            return None
        raise UserError(
            f"--head-init {head_init} finds no source class for {', '.join(unmatched)}; name them, as in"
            f" --source-class {unmatched[0]}=934 (one class may stand for all the others), or let the"
            " training photos find them: --source-class auto"
        )
    if len(set(found)) < len(found):
        twice = {name: list(indices) for name, indices in chosen.items()}
        raise UserError(f"--source-class: two classes share one source class: {twice}")
    if unmatched and len(found) == source.num_classes:
        raise UserError(f"--head-init {head_init}: no source class is left to stand for {unmatched[0]}")
    return [indices or None for indices in chosen.values()]


def _indices(entry: str, value: str, known: dict[str, int], num_classes: int) -> tuple[int, ...]:
    """Return the source classes that a value means: "934", "151-268", "tabby", or several with commas."""
    indices: list[int] = []
    for part in value.split(",") if _index_of(value, known) is None else [value]:
        span = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if span:
            first, last = int(span[1]), int(span[2] or span[1])
            part_indices = range(first, last + 1)
        else:
            index = _index_of(part, known)
            part_indices = [] if index is None else [index]
        if not part_indices or max(part_indices) >= num_classes:
            raise UserError(f"--source-class {entry}: the source has no class {part!r}")
        indices += part_indices
    return tuple(indices)


def describe_sources(
    source: torch.nn.Module, label_names: Sequence[str], sources: Sequence[SourceClasses] | None
) -> str:
    """Return a line that says which source classes stand for ours."""
    if sources is None:
        return "source classes: those that the training photos look like"
    names = {index: name for name, index in reversed(_source_names(source).items())}

    def describe(indices: SourceClasses) -> str:
        if indices is None:
            return "all others"
        if len(indices) > 3:
            return f"{len(indices)} classes"
        return " + ".join(names.get(index, str(index)) for index in indices)

    pairs = [f"{name} = {describe(indices)}" for name, indices in zip(label_names, sources, strict=True)]
    return f"source classes: {', '.join(pairs)}"


def _source_names(source: torch.nn.Module) -> dict[str, int]:
    """Return the source's class indices by name; ImageNet's classes have several names each."""
    if own := source.pretrained_cfg.get("label_names"):
        # Its own names first: "a" and "A" are two classes, as "c" and "c++" are.
        exact = {name: index for index, name in enumerate(own)}
        plain = {_plain(name): index for index, name in enumerate(own)}
        return exact | {name: index for name, index in plain.items() if name and name not in exact}
    subset = timm.data.infer_imagenet_subset(source)
    if subset is None:
        return {}
    info = timm.data.ImageNetInfo(subset)
    names: dict[str, int] = {}
    for index in range(info.num_classes()):
        for name in info.index_to_description(index).split(", "):
            names.setdefault(_plain(name), index)
    return names


def _index_of(name: str, known: dict[str, int]) -> int | None:
    return known.get(name, known.get(_plain(name)))


def _plain(name: str) -> str:
    # A Mac's folders have "é" as two characters.
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name)).strip().lower()
