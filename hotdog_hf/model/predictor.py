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
from hotdog_hf.model import calibration

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

    def __call__(self, images: Source | Sequence[Source]) -> dict[str, float] | list[dict[str, float]]:
        """Return the probability of each class, by its name; a list of such dicts for a list of images.

        An image is a path, the bytes of a file, or a PIL image. Raises `UserError` for one that cannot be
        read.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        found = []
        batch_size = 1 if self.takes_photos else CALL_BATCH
        for start in range(0, len(images), batch_size):
            batch = [self.prepare(Photo(image)) for image in images[start : start + batch_size]]
            rows = self.probabilities(np.stack(batch)).tolist()
            found += [dict(zip(self.label_names, row, strict=True)) for row in rows]
        return found

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


def load_predictor(name: str | os.PathLike, precision: str = "no") -> Predictor:
    """Load a saved model, or a .onnx file of `export_onnx`; `UserError` if there is none.

    A saved model computes in float32 ("no") or "bf16", an exported one as it was exported.
    """
    if Path(name).suffix != ".onnx":
        return _load_saved(name, precision)
    if precision != "no":
        raise UserError(f"--precision {precision} is for saved models; {name} computes as it was exported")
    return _load_exported(Path(name))


def _load_saved(name: str | os.PathLike, precision: str) -> Predictor:
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

    @torch.inference_mode()
    def probabilities(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        with autocast:
            logits = net(to_input(batch))
        return logits.float().softmax(dim=1).cpu().numpy()

    return Predictor(
        network.label_names_of(net),
        data_config,
        probabilities,
        device != "cpu",
        net=net,
        calibration=net.pretrained_cfg["calibration"],
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

    def probabilities(images: Sequence[np.ndarray]) -> np.ndarray:
        if takes_photos:
            return np.stack([session.run(["probabilities"], {"image": image})[0] for image in images])
        return session.run(["probabilities"], {"pixel_values": normalize(images, data_config)})[0]

    return Predictor(
        json.loads(about["label_names"]),
        data_config,
        probabilities,
        takes_photos=takes_photos,
        calibration=json.loads(about.get("calibration", "null")),
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
) -> Iterator[Prediction | UserError]:
    """Yield a prediction for every image, or the `UserError` that explains why there is none, in order.

    With the `set_limit` of `calibration.set_limit`, each also has its set of classes.

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
            rows = iter(predictor.probabilities(np.stack(readable)) if readable else [])
            for item in batch:
                if isinstance(item, UserError):
                    yield item
                    continue
                row = next(rows)
                values = dict(zip(label_names, row.astype(float).round(4).tolist(), strict=True))
                classes = None
                if set_limit is not None:
                    within = calibration.classes_within(row, set_limit)
                    classes = tuple(label_names[i] for i in np.argsort(-row, kind="stable") if within[i])
                yield Prediction(item[0], label_names[choose(row)], values, classes)


def _read(found: str | UserError, predictor: Predictor) -> tuple[str, np.ndarray] | UserError:
    if isinstance(found, UserError):
        return found
    try:
        return found, predictor.prepare(Photo(found))
    except UserError as error:
        return error


def format_header(style: str, label_names: list[str], with_sets: bool = False) -> str | None:
    """Return the line above the predictions, or None if the style has none."""
    if style == "csv":
        return _csv_line(["path", "label", "probability", *label_names, *(["set"] if with_sets else [])])
    end = f"{'set':<{_set_width(label_names)}}  path" if with_sets else "path"
    return _table_line("label", label_names, label_names, end) if style == "table" else None


def format_prediction(style: str, prediction: Prediction) -> str:
    """Return one line as "table", "jsonl" or "csv"; a csv cell may span several."""
    path, label, probabilities, classes = prediction
    if style == "jsonl":
        row = {"path": path, "label": label, "probability": probabilities[label]}
        row |= {"probabilities": probabilities}
        return json.dumps(row if classes is None else row | {"set": classes})
    values = [f"{value:.4f}" for value in probabilities.values()]
    if style == "csv":
        sets = [] if classes is None else ["|".join(classes)]
        return _csv_line([path, label, f"{probabilities[label]:.4f}", *values, *sets])
    end = printable(path)
    if classes is not None:
        shown = ", ".join(classes) or EMPTY_SET
        end = f"{shown:<{_set_width(probabilities)}}  {end}"
    return _table_line(label, values, list(probabilities), end)


def _set_width(label_names: Iterable[str]) -> int:
    """Return the width of the column of sets: all classes of two, at most 40 letters."""
    return min(max(len(", ".join(label_names)), len(EMPTY_SET)), 40)


def _table_line(label: str, values: list[str], label_names: list[str], path: str) -> str:
    # The path comes last: the widths before it are known without having seen every path.
    columns = [f"{value:>{max(len(name), 6)}}" for value, name in zip(values, label_names, strict=True)]
    return "  ".join([f"{label:<{max(map(len, ['label', *label_names]))}}", *columns, path])


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n")
