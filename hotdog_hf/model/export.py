"""A saved model -> one ONNX file that predicts without torch."""

import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hotdog_hf.data.images import normalize, resize_and_crop
from hotdog_hf.errors import UserError
from hotdog_hf.model import network, saved
from hotdog_hf.model.predictor import NEEDS_ONNX, load_predictor

# How far an exported model's probabilities may be from PyTorch's.
EXPORT_TOLERANCE = 1e-4


def export_onnx(name: str | os.PathLike, out: str | os.PathLike, opset: int = 17) -> float:
    """Write a saved model as an ONNX file with class names and preprocessing inside, for any batch size.

    It is compared with PyTorch before it takes its place; returns the largest difference of a probability.
    Raises `UserError`, and leaves `out` as it was, where they disagree or the model cannot be exported.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 (asked for here, before the work)
    except ModuleNotFoundError as error:
        raise UserError(NEEDS_ONNX) from error
    net = saved.load_model(name)
    label_names, data_config = network.label_names_of(net), network.data_config_of(net)
    net = torch.nn.Sequential(net, torch.nn.Softmax(dim=1)).eval()
    draw = np.random.default_rng(0).integers
    pictures = [
        draw(0, 256, (height, width, 3), np.uint8) for height, width in ((60, 40), (40, 60), (300, 200))
    ]
    images = np.stack([resize_and_crop(Image.fromarray(picture), data_config) for picture in pictures])
    samples = torch.from_numpy(normalize(images, data_config))
    with torch.inference_mode():
        expected = net(samples).numpy()
    buffer, batch = io.BytesIO(), {0: "batch"}
    try:
        with warnings.catch_warnings():
            # This exporter is the older one, as it says each time; the newer one needs onnxscript.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net,
                (samples[:2],),
                buffer,
                dynamo=False,
                opset_version=opset,
                input_names=["pixel_values"],
                output_names=["probabilities"],
                dynamic_axes={"pixel_values": batch, "probabilities": batch},
            )
    except Exception as error:  # the exporter's errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot export {name} with opset {opset}: {reason}") from error
    exported = onnx.load_from_string(buffer.getvalue())
    about = {"label_names": json.dumps(label_names), "data_config": json.dumps(data_config)}
    onnx.helper.set_model_props(exported, about)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as scratch:
            part = Path(scratch) / "model.onnx"
            onnx.save(exported, part)
            again = load_predictor(part).probabilities
            # At two batch sizes that the exporter has not seen.
            rows = np.concatenate([again(images[:1]), again(images)])
            difference = float(np.abs(rows - expected[[0, 0, 1, 2]]).max())
            if not difference < EXPORT_TOLERANCE:
                raise UserError(f"{name} as ONNX is {difference:.0e} away from PyTorch; nothing was written")
            part.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return difference
