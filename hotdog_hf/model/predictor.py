"""Predictions of a saved or exported model: labels and probabilities of images, batch by batch.

No torch at import: an exported model (.onnx) predicts with ONNX Runtime alone.
"""

import csv
import functools
import glob
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from hotdog_hf.data.images import IMAGE_SUFFIXES, Photo, Source, normalize, resize_and_crop
from hotdog_hf.errors import UserError, printable
from hotdog_hf.machine import allowed_cores, keep_freed_memory
from hotdog_hf.model import calibration, neighbors
from hotdog_hf.model.neighbors import KEEP, UNKNOWN
from hotdog_hf.model.places import check_model

if TYPE_CHECKING:
    import torch

MAX_DECODERS = 8
# Images of a long list per forward pass.
CALL_BATCH = 32
# A set of classes that has none: no class is probable enough.
EMPTY_SET = "(none)"
NEEDS_ONNX = 'this needs onnx and onnxruntime: pip install -e ".[onnx]"'


class Predictor(NamedTuple):
    """A model ready to predict: call it with images, or `probabilities` with RGB bytes.

    `probabilities` maps uint8 [N, H, W, 3], resized and cropped, to float32 [N, classes]. A predictor that
    `takes_photos` does that itself: its photos may have any size, and are given one or several as a list.
    """

    label_names: list[str]
    data_config: dict
    probabilities: Callable[[Sequence[np.ndarray]], np.ndarray]
    # Whether it computes on a device other than the CPU, which can decode meanwhile.
    leaves_cpu_free: bool = False
    takes_photos: bool = False
    # The network of a saved model, for what needs more than its probabilities.
    net: "torch.nn.Module | None" = None
    # What `calibration.calibrate` kept with the model, if there were held-out photos.
    calibration: dict | None = None
    # Like `probabilities`, with the distance [N] of each image to the training photos; None unless the model
    # has kept `held_out_distances`, see `model.neighbors`.
    with_distances: Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]] | None = None
    held_out_distances: Sequence[float] | None = None

    def __call__(
        self, images: Source | Sequence[Source], *, reject: bool = False, keep: float = KEEP
    ) -> dict[str, float] | list[dict[str, float] | None] | None:
        """Return the probability of each class, by its name; a list of such dicts for a list of images.

        An image is a path, the bytes of a file, or a PIL image. With `reject`, None is the answer for those
        that are unlike the training photos; of photos like these, a share of `keep` gets its answer. Raises
        `UserError` for an image that cannot be read, or for a model that cannot reject.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], reject=reject, keep=keep)[0]
        limit = self.distance_limit(keep) if reject else None
        found = []
        batch_size = 1 if self.takes_photos else CALL_BATCH
        for start in range(0, len(images), batch_size):
            batch = [self.prepare(Photo(image)) for image in images[start : start + batch_size]]
            rows, distances = self.predict(np.stack(batch), limit is not None)
            answers = [dict(zip(self.label_names, row, strict=True)) for row in rows.tolist()]
            unknown = [False] * len(rows) if limit is None else distances > limit
            found += [None if far else answer for answer, far in zip(answers, unknown, strict=True)]
        return found

    def predict(
        self, images: Sequence[np.ndarray], measure: bool
    ) -> tuple[np.ndarray, np.ndarray | list[None]]:
        """Return probabilities [N, classes] and distances [N]; without `measure`, these are None."""
        if measure:
            return self.with_distances(images)
        return self.probabilities(images), [None] * len(images)

    def distance_limit(self, keep: float = KEEP, name: object = "the model") -> float:
        """Return the distance beyond which a photo is unknown, see `neighbors.distance_limit`."""
        return neighbors.distance_limit(self.held_out_distances, keep, name)

    def prepare(self, image: Photo | Image.Image) -> np.ndarray:
        """Return a photo or an RGB image as `probabilities` takes it, uint8 [H, W, 3]."""
        if not self.takes_photos:
            return resize_and_crop(image, self.data_config)
        # All of a JPEG's pixels: other runtimes, such as the one in a browser, cannot decode fewer.
        return np.asarray(image.decode() if isinstance(image, Photo) else image)


class Prediction(NamedTuple):
    """The prediction for one image; the probabilities have 4 digits."""

    path: str
    label: str
    probabilities: dict[str, float]
    # The classes that together keep a promised coverage, the most probable first; None if none was asked for.
    classes: tuple[str, ...] | None = None
    # The distance to the training photos; None unless asked for. Of an unknown photo, the label is `UNKNOWN`.
    distance: float | None = None


def load_predictor(name: str | os.PathLike, precision: str = "no", tta: str = "none") -> Predictor:
    """Load a saved model, or a .onnx file of `export_onnx`; `UserError` if there is none.

    A saved model computes in float32 ("no") or "bf16", an exported one as it was exported. With `tta` "flip",
    probabilities are the mean of those of the photo and of its mirror image.
    """
    if Path(name).suffix == ".onnx":
        if precision != "no":
            raise UserError(
                f"--precision {precision} is for saved models; {name} computes as it was exported"
            )
        predictor = _load_exported(Path(name))
    else:
        predictor = _load_saved(name, precision)
    return predictor if tta == "none" else _with_mirror(predictor)


def _with_mirror(predictor: Predictor) -> Predictor:
    """Return a predictor that also looks at every photo in the mirror; distances are those of the photo."""

    def averaged(images: Sequence[np.ndarray], probabilities: np.ndarray) -> np.ndarray:
        mirrored = np.stack([np.ascontiguousarray(image[:, ::-1]) for image in images])
        return (probabilities + predictor.probabilities(mirrored)) / 2

    def with_distances(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        probabilities, distances = predictor.with_distances(images)
        return averaged(images, probabilities), distances

    return predictor._replace(
        probabilities=lambda images: averaged(images, predictor.probabilities(images)),
        with_distances=predictor.with_distances and with_distances,
    )


def _load_saved(name: str | os.PathLike, precision: str) -> Predictor:
    check_model(name)
    import torch

    from hotdog_hf.data import transforms
    from hotdog_hf.model import network, saved

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # which is torch's default for convolutions
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    net = saved.load_model(name).to(device, memory_format=transforms.MEMORY_FORMAT)
    data_config = network.data_config_of(net)
    to_input = transforms.Normalize(data_config["mean"], data_config["std"])

    kept = saved.neighbors_of(net)

    def pixels(images: np.ndarray) -> torch.Tensor:
        return to_input(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))

    @torch.inference_mode()
    def probabilities(images: np.ndarray) -> np.ndarray:
        with autocast:
            logits = net(pixels(images))
        return logits.float().softmax(dim=1).cpu().numpy()

    @torch.inference_mode()
    def with_distances(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with autocast:
            logits, features = network.forward_with_features(net, pixels(images))
        found = neighbors.distances(neighbors.unit_roots(features.cpu().numpy()), kept.features)
        return logits.float().softmax(dim=1).cpu().numpy(), found

    return Predictor(
        network.label_names_of(net),
        data_config,
        probabilities,
        device != "cpu",
        net=net,
        calibration=net.pretrained_cfg["calibration"],
        with_distances=with_distances if kept else None,
        held_out_distances=kept.held_out_distances if kept else None,
    )


def _load_exported(path: Path) -> Predictor:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(NEEDS_ONNX) from error
    if not path.is_file():
        raise UserError(f"no such model: {path}")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise UserError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
    about = session.get_modelmeta().custom_metadata_map
    if not {"label_names", "data_config"} <= set(about):
        raise UserError(f"{path} was not made by scripts/export.py: it names no classes or no preprocessing")

    data_config = json.loads(about["data_config"])
    takes_photos = session.get_inputs()[0].name == "image"  # exported with --input bytes

    def outputs(images: Sequence[np.ndarray], *names: str) -> list[np.ndarray]:
        if not takes_photos:
            return session.run(names, {"pixel_values": normalize(images, data_config)})
        rows = [session.run(names, {"image": image}) for image in images]
        return [np.stack(output) for output in zip(*rows, strict=True)]

    held_out_distances = json.loads(about.get("held_out_distances", "null"))
    return Predictor(
        json.loads(about["label_names"]),
        data_config,
        lambda images: outputs(images, "probabilities")[0],
        takes_photos=takes_photos,
        calibration=json.loads(about.get("calibration", "null")),
        with_distances=held_out_distances and (lambda images: outputs(images, "probabilities", "distance")),
        held_out_distances=held_out_distances,
    )


def decision_rule(
    label_names: list[str], positive_label: str | None = None, threshold: float | None = None
) -> Callable[[np.ndarray], int]:
    """Return the rule from an image's probabilities [classes] to the index of its label.

    Without a threshold, the most probable class. With one, the positive class if its probability is at least
    the threshold, else the best of the others; the positive class is the one given, or "hotdog" of two.
    Raises `UserError` if there is none.
    """
    if positive_label is None and len(label_names) == 2 and "hotdog" in label_names:
        positive_label = "hotdog"
    if positive_label is not None and positive_label not in label_names:
        raise UserError(
            f"--positive-label {positive_label!r} is none of the classes: {', '.join(label_names)}"
        )
    if threshold is None:
        return lambda probabilities: int(np.argmax(probabilities))
    if positive_label is None:
        raise UserError(f"--threshold needs a --positive-label, one of: {', '.join(label_names)}")
    positive = label_names.index(positive_label)
    others = [index for index in range(len(label_names)) if index != positive]
    return lambda probabilities: (
        positive if probabilities[positive] >= threshold else max(others, key=probabilities.__getitem__)
    )


def find_images(paths: Iterable[str]) -> Iterator[str | UserError]:
    """Yield image files in the order of `paths`: files, folders (recursively), patterns, "-" (stdin).

    Only one folder's names are in memory at a time, sorted. A missing path is yielded as a `UserError`.
    """
    for path in paths:
        if path == "-":
            # Bytes, so that a file name in another encoding is found too.
            lines = filter(None, (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer))
            found = itertools.chain.from_iterable(map(_expand, lines))
            yield from itertools.chain([next(found, UserError("no paths on stdin"))], found)
        else:
            yield from _expand(path)


def _expand(path: str) -> Iterator[str | UserError]:
    if os.path.isdir(path):  # noqa: PTH112 (pathlib's raises for an overlong name and takes "" for ".")
        yield from _walk(path)
    elif os.path.lexists(path):
        yield path
    elif set("*?[") & set(path):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (pathlib wants no absolute pattern)
        if "**" in path:  # matches folders, and the files in them as well
            matches = [match for match in matches if not Path(match).is_dir()]
        yield from itertools.chain.from_iterable(map(_expand, matches))
        if not matches:
            yield UserError(f"nothing matches {path}")
    else:
        yield UserError(f"no such file or folder: {path}")


def _walk(folder: str) -> Iterator[str | UserError]:
    problems, empty = [], True
    for parent, folders, files in os.walk(folder, onerror=problems.append):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                empty = False
                yield os.path.join(parent, name)  # noqa: PTH118 (pathlib's would drop a leading ./)
    yield from (UserError(f"cannot list {error.filename}: {error.strerror}") for error in problems)
    if empty and not problems:
        yield UserError(f"no image in {folder}")


def predict_paths(
    predictor: Predictor,
    paths: Iterable[str],
    choose: Callable[[np.ndarray], int],
    batch_size: int = 32,
    set_limit: float | None = None,
    distance_limit: float | None = None,
) -> Iterator[Prediction | UserError]:
    """Yield a prediction for every image, or the `UserError` that explains why there is none, in order.

    With the `set_limit` of `calibration.set_limit`, each also has its set of classes. With a
    `distance_limit`, photos beyond it are `UNKNOWN`, and their set is empty.

    Cores share the decoding of a batch: while a GPU works on the one before, but in turns with a network on
    the CPU, for they would slow each other down. No more is held in memory: of a predictor that takes photos
    at their full size, one at a time.
    """
    images, label_names = find_images(paths), predictor.label_names
    read = functools.partial(_read, predictor=predictor)
    batch_size = 1 if predictor.takes_photos else batch_size
    with ThreadPoolExecutor(1 + min(allowed_cores(), MAX_DECODERS)) as pool:

        def read_batch() -> list[tuple[str, np.ndarray] | UserError]:
            return list(pool.map(read, itertools.islice(images, batch_size)))

        ahead = pool.submit(read_batch) if predictor.leaves_cpu_free else None
        while batch := ahead.result() if ahead else read_batch():
            # Listed in a thread too: whoever writes to stdin gets predictions before the next path.
            ahead = pool.submit(read_batch) if ahead else None
            readable = [item[1] for item in batch if not isinstance(item, UserError)]
            measure = distance_limit is not None
            outputs = zip(*predictor.predict(np.stack(readable), measure), strict=True) if readable else None
            for item in batch:
                if isinstance(item, UserError):
                    yield item
                    continue
                row, distance = next(outputs)
                unknown = measure and distance > distance_limit
                values = dict(zip(label_names, row.astype(float).round(4).tolist(), strict=True))
                label, classes = UNKNOWN if unknown else label_names[choose(row)], None
                if set_limit is not None:
                    within = calibration.classes_within(row, set_limit) & (not unknown)
                    classes = tuple(label_names[i] for i in np.argsort(-row, kind="stable") if within[i])
                yield Prediction(
                    item[0], label, values, classes, distance if distance is None else float(distance)
                )


def _read(found: str | UserError, predictor: Predictor) -> tuple[str, np.ndarray] | UserError:
    if isinstance(found, UserError):
        return found
    try:
        return found, predictor.prepare(Photo(found))
    except UserError as error:
        return error


def format_header(
    style: str, label_names: list[str], with_sets: bool = False, with_distances: bool = False
) -> str | None:
    """Return the line above the predictions, or None if the style has none."""
    more = ["set"] * with_sets + ["distance"] * with_distances
    if style == "csv":
        return _csv_line(["path", "label", "probability", *label_names, *more])
    if style != "table":
        return None
    return _table_line(
        "label",
        label_names,
        label_names,
        "path",
        "set" if with_sets else None,
        "distance" if with_distances else None,
    )


def format_prediction(style: str, prediction: Prediction) -> str:
    """Return one line as "table", "jsonl" or "csv"; a csv cell may span several.

    An unknown photo has no probability of its label.
    """
    path, label, probabilities, classes, distance = prediction
    probability = probabilities.get(label)
    if style == "jsonl":
        row = {"path": path, "label": label, "probability": probability, "probabilities": probabilities}
        row |= {} if classes is None else {"set": classes}
        return json.dumps(row if distance is None else row | {"distance": round(distance, 4)})
    values = [f"{value:.4f}" for value in probabilities.values()]
    measured = None if distance is None else f"{distance:.4f}"
    if style == "csv":
        sets = [] if classes is None else ["|".join(classes)]
        known = "" if probability is None else f"{probability:.4f}"
        return _csv_line([path, label, known, *values, *sets, *([measured] if measured else [])])
    shown = None if classes is None else ", ".join(classes) or EMPTY_SET
    return _table_line(label, values, list(probabilities), printable(path), shown, measured)


def _table_line(
    label: str,
    values: list[str],
    label_names: list[str],
    path: str,
    classes: str | None = None,
    distance: str | None = None,
) -> str:
    # The path comes last: the widths before it are known without having seen every path.
    columns = [f"{value:>{max(len(name), 6)}}" for value, name in zip(values, label_names, strict=True)]
    names = ["label", *label_names]
    if distance is not None:
        columns.append(f"{distance:>8}")
        names.append(UNKNOWN)
    if classes is not None:
        # All classes of two, at most 40 letters.
        width = min(max(len(", ".join(label_names)), len(EMPTY_SET)), 40)
        columns.append(f"{classes:<{width}}")
    return "  ".join([f"{label:<{max(map(len, names))}}", *columns, path])


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n")
