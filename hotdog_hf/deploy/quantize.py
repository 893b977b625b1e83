"""Smaller exported networks: float16 weights, or 8-bit integers calibrated on photos."""

import contextlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from tqdm import tqdm

from hotdog_hf.data.images import normalize, open_photo, resize_and_crop
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model.neighbors import Neighbors
from hotdog_hf.model.predictor import NEEDS_ONNX

try:
    import onnx
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from hotdog_hf.deploy.distance import refit_distances
except ModuleNotFoundError as error:
    raise UserError(NEEDS_ONNX) from error

CALIBRATION_PHOTOS = 128
BATCH_SIZE = 32
# What is tried for int8: a scale for each channel of the weights or one for all, and activations up to their
# extremes or without the outermost 0.01 %. The latter counts all activations of a batch, so that few photos
# are in memory at a time.
CALIBRATION_BATCH = 8
CANDIDATES = {
    "per channel": {"per_channel": True},
    "per tensor": {"per_channel": False},
    "per channel without outliers": {
        "per_channel": True,
        "calibrate_method": quantization.CalibrationMethod.Percentile,
        "extra_options": {"CalibPercentile": 99.99, "CalibStridedMinMax": 1},
    },
}
# Of a data folder without validation photos, this fraction of train measures the accuracy.
VAL_FRACTION = 0.2
# The first version of the operators that has one scale per channel.
INT8_OPSET = 13
# How far probabilities may be from PyTorch's; what int8 changes is measured on photos instead.
TOLERANCES = {"fp16": 5e-2, "int8": math.inf}


class Int8Result(NamedTuple):
    """The network in 8-bit integers, its neighbours if any, and the accuracies (fractions) that chose it."""

    network: onnx.ModelProto
    neighbors: Neighbors | None
    kept: str
    accuracies: dict[str, float]
    num_photos: int

    def describe(self) -> str:
        """Return the accuracies in one line."""
        values = ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in self.accuracies.items())
        return f"accuracy on {self.num_photos} validation photos: {values}; {self.kept} is kept"


def shrink(
    network: onnx.ModelProto,
    label_names: list[str],
    data_config: dict,
    neighbors: Neighbors | None,
    *,
    precision: str,
    data_dir: str | os.PathLike | None = None,
    max_drop: float = 0.5,
) -> tuple[onnx.ModelProto, Neighbors | None]:
    """Return the network in "fp16" or "int8", as `export_onnx` asks for it; print what int8 loses."""
    if precision == "fp16":
        return to_fp16(network), neighbors
    result = to_int8(network, label_names, data_config, data_dir, max_drop, neighbors)
    print(result.describe())
    return result.network, result.neighbors


def to_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with its float32 weights stored as float16; it computes in float32.

    Few CPUs compute in float16: a network in it would run as one in float32 among casts. The casts of weights
    are done once, when the file is loaded.
    """
    smaller = onnx.ModelProto()
    smaller.CopyFrom(network)
    casts = []
    for tensor in smaller.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue  # biases and scales are few
        values = onnx.numpy_helper.to_array(tensor)
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(f"--precision fp16: weights of {tensor.name} do not fit into float16")
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}/fp16"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    for node in reversed(casts):
        smaller.graph.node.insert(0, node)
    return smaller


def to_int8(
    network: onnx.ModelProto,
    label_names: list[str],
    data_config: dict,
    data_dir: str | os.PathLike,
    max_drop: float = 0.5,
    neighbors: Neighbors | None = None,
) -> Int8Result:
    """Quantize weights and activations to 8 bits (static, QDQ) in several ways; keep the best.

    Ranges come from training photos, accuracies from validation photos: those of the data folder, or a fifth
    of train, which is then not calibrated on. `neighbors` get the distances that fit the best one, see
    `distance.refit_distances`. Raises `UserError` if it loses more than `max_drop` percentage points, or for
    an opset with which this cannot be done.
    """
    [opset] = {entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")}
    if opset < INT8_OPSET:
        raise UserError(f"--precision int8 needs --opset {INT8_OPSET} or higher, got {opset}")
    photos = Photos(load_photos(data_dir, VAL_FRACTION), data_dir)
    if photos.label_names != label_names:
        raise UserError(
            f"{data_dir} has the classes {', '.join(photos.label_names)}, the model {', '.join(label_names)};"
            " calibrate on photos of the model's classes"
        )
    train = photos.splits["train"]  # sorted by class or shuffled, so sample all of it
    chosen = np.linspace(0, len(train) - 1, min(CALIBRATION_PHOTOS, len(train))).round().astype(int)
    calibration, _ = _read(train.select(chosen.tolist()), data_config)
    images, labels = _read(photos.splits["validation"], data_config)

    whole = _accuracy(network, images, labels, data_config)
    found, accuracies = {}, {}
    for name, options in tqdm(CANDIDATES.items(), desc="int8", unit="try", disable=None):
        found[f"int8 {name}"] = _quantize(network, normalize(calibration, data_config), **options)
        accuracies[f"int8 {name}"] = _accuracy(found[f"int8 {name}"], images, labels, data_config)
    best = max(accuracies, key=accuracies.__getitem__)  # the first of equals
    result = Int8Result(found[best], neighbors, best, {"float32": whole, **accuracies}, len(labels))
    lost = 100 * (whole - accuracies[best])
    if lost > max_drop:
        raise UserError(
            f"--precision int8 loses {lost:.2f} points of accuracy, more than --max-drop {max_drop:g}"
            f" ({result.describe()}); photos that the model has learned may exaggerate this: train with"
            " --val-fraction 0.2 to hold some back, use --precision fp16, or a higher --max-drop. Nothing was"
            " written"
        )
    if neighbors:
        features = [_run(each, "features", images, data_config) for each in (network, found[best])]
        result = result._replace(neighbors=refit_distances(neighbors, *features))
    return result


def _read(rows: datasets.Dataset, data_config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return photos as bytes [N, H, W, 3] and their labels [N]."""
    images = np.stack([resize_and_crop(open_photo(row), data_config) for row in rows])
    return images, np.array(rows["label"])


def _accuracy(network: onnx.ModelProto, images: np.ndarray, labels: np.ndarray, data_config: dict) -> float:
    return float((_run(network, "probabilities", images, data_config).argmax(axis=1) == labels).mean())


def _run(network: onnx.ModelProto, output: str, images: np.ndarray, data_config: dict) -> np.ndarray:
    """Return one output of a network for photos as bytes [N, H, W, 3]."""
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    batches = (images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE))
    rows = [session.run([output], {"pixel_values": normalize(batch, data_config)})[0] for batch in batches]
    return np.concatenate(rows)


class _Batches(quantization.CalibrationDataReader):
    def __init__(self, inputs: np.ndarray):
        self.batches = np.array_split(inputs, -(-len(inputs) // CALIBRATION_BATCH))
        self.left = iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else {"pixel_values": batch}


def _quantize(network: onnx.ModelProto, inputs: np.ndarray, **options: object) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        source, prepared, out = (Path(scratch, f"{name}.onnx") for name in ("source", "prepared", "out"))
        onnx.save(network, source)
        # Folds BatchNorm into convolutions; shapes are known without the symbolic inference.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            out,
            _Batches(inputs),
            quant_format=quantization.QuantFormat.QDQ,
            # On an x86 CPU with VNNI, other pairs of types take three times as long in ONNX Runtime.
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_kept_in_float32(onnx.load(prepared)),
            **options,
        )
        return onnx.load(out)


def _kept_in_float32(network: onnx.ModelProto) -> list[str]:
    """Return the output layer, which is fast and matters for accuracy, and softmax."""
    nodes = network.graph.node
    names = [node.name for node in nodes if node.op_type == "Softmax"]
    return names + [node.name for node in nodes if node.op_type == "Gemm"][-1:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the quantizer prints: its steps, and the advice to prepare the model, which has been done."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
