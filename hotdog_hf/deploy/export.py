"""Export of a saved model to one ONNX file that predicts without torch."""

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from PIL import Image

from hotdog_hf.data.images import normalize, resize_and_crop
from hotdog_hf.errors import UserError
from hotdog_hf.model import neighbors, network, saved
from hotdog_hf.model.predictor import NEEDS_ONNX, load_predictor

if TYPE_CHECKING:
    import onnx

    # Makes a network smaller: (network, label_names, data_config, its neighbours) -> (network, neighbours).
    Kept = neighbors.Neighbors | None
    Shrink = Callable[[onnx.ModelProto, list[str], dict, Kept], tuple[onnx.ModelProto, Kept]]

# The first version of the operators that can resize a photo.
DEFAULT_OPSET = 18
# How far an exported model's probabilities may be from PyTorch's.
EXPORT_TOLERANCE = 1e-4
# How far, on average, a photo resized by the graph may be from Pillow's: 1 of 255. Noise is the worst case.
RESIZE_TOLERANCE = 1.0


def export_onnx(
    name: str | os.PathLike,
    out: str | os.PathLike,
    opset: int = DEFAULT_OPSET,
    *,
    takes_photos: bool = False,
    shrink: "Shrink | None" = None,
    tolerance: float = EXPORT_TOLERANCE,
) -> float:
    """Write a saved model as an ONNX file with class names and preprocessing inside.

    Its input is `pixel_values`, float32 [batch, 3, height, width], or, if it `takes_photos`, one `image`, RGB
    bytes [H, W, 3] of any size. Its output is `probabilities`, and for a model with neighbours also
    `distance`, see `model.neighbors`. They are compared with PyTorch's before the file is written; returns
    the largest difference for the same pixels. Raises `UserError`, and leaves `out` as it was, if that is not
    below `tolerance` or the model cannot be exported.
    """
    check_extra()
    import onnx

    net = saved.load_model(name)
    label_names, data_config = network.label_names_of(net), network.data_config_of(net)
    calibration, kept = net.pretrained_cfg["calibration"], saved.neighbors_of(net)
    outputs = _Outputs(net, with_features=kept is not None).eval()
    pictures = _noise()
    images = np.stack([resize_and_crop(Image.fromarray(picture), data_config) for picture in pictures])
    samples = torch.from_numpy(normalize(images, data_config))
    with torch.inference_mode():
        expected = [output.numpy() for output in outputs(samples)]
    _fix_padding(outputs, samples[:1])
    exported = _to_onnx(outputs, samples[:2], opset, name)
    if shrink:
        exported, kept = shrink(exported, label_names, data_config, kept)
    about = {"label_names": json.dumps(label_names), "data_config": json.dumps(data_config)}
    if calibration:
        about["calibration"] = json.dumps(calibration)
    if kept:
        from hotdog_hf.deploy import distance

        exported = distance.add_distance(exported, kept)
        about |= distance.describe_distances(kept)
        expected[1] = neighbors.distances(neighbors.unit_roots(expected[1]), kept.features)
    onnx.helper.set_model_props(exported, about)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as scratch:
            part = Path(scratch) / "model.onnx"
            onnx.save(exported, part)
            difference = _difference(part, images, *expected)
            if not difference < tolerance:
                raise UserError(f"{name} as ONNX is {difference:.0e} away from PyTorch; nothing was written")
            if takes_photos:
                onnx.save(_taking_photos(exported, data_config, pictures), part)
                load_predictor(part).predict(pictures, measure=kept is not None)
            part.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return difference


def check_extra() -> None:
    """Raise `UserError` without the extra [onnx], before any work."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(NEEDS_ONNX) from error


class _Outputs(torch.nn.Module):
    """Probabilities [N, classes], and with features also the input of the output layer [N, D]."""

    def __init__(self, net: torch.nn.Module, with_features: bool):
        super().__init__()
        self.net, self.with_features = net, with_features

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.with_features:
            return (self.net(images).softmax(dim=1),)
        logits, features = network.forward_with_features(self.net, images)
        return logits.softmax(dim=1), features


def _difference(
    file: Path, images: np.ndarray, probabilities: np.ndarray, distances: np.ndarray | None = None
) -> float:
    """Return the largest difference between a file's outputs for images and those of PyTorch."""
    predictor, largest = load_predictor(file), 0.0
    for count in (1, len(images)):  # batch sizes that the exporter has not seen
        rows, measured = predictor.predict(images[:count], measure=distances is not None)
        apart = [np.abs(rows - probabilities[:count]).max()]
        if distances is not None:
            apart.append(np.abs(measured - distances[:count]).max())
        largest = float(np.max([largest, *apart]))  # which is NaN if one of them is
    return largest


def _fix_padding(net: torch.nn.Module, sample: torch.Tensor) -> None:
    """Give convolutions that compute their padding from their input what they compute for `sample`.

    A file's input has one size. Padding that is computed each time cannot become a part of the convolution,
    and in int8, it is done in float32.
    """
    same = {name: conv for name, conv in net.named_modules() if isinstance(conv, timm.layers.Conv2dSame)}
    sizes = {}
    hooks = [
        conv.register_forward_pre_hook(lambda conv, inputs: sizes.update({conv: inputs[0].shape[2:]}))
        for conv in same.values()
    ]
    with torch.inference_mode():
        net(sample)
    for hook in hooks:
        hook.remove()
    for name, conv in same.items():
        knobs = zip(sizes[conv], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        height, width = (timm.layers.get_same_padding(*knob) for knob in knobs)
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        plain = torch.nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        plain.load_state_dict(conv.state_dict())
        net.set_submodule(name, torch.nn.Sequential(torch.nn.ZeroPad2d(sides), plain).eval())


def _noise() -> list[np.ndarray]:
    """Return pictures of noise, uint8 [H, W, 3]: wide, tall, smaller and larger than a network's input."""
    draw = np.random.default_rng(0).integers
    return [draw(0, 256, (height, width, 3), np.uint8) for height, width in ((60, 40), (40, 60), (300, 200))]


def _to_onnx(net: _Outputs, samples: torch.Tensor, opset: int, name: str | os.PathLike) -> "onnx.ModelProto":
    import onnx

    buffer, batch = io.BytesIO(), {0: "batch"}
    output_names = ["probabilities", "features"][: 1 + net.with_features]
    try:
        with warnings.catch_warnings():
            # This exporter is the older one, as it says each time; the newer one needs onnxscript.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net,
                (samples,),
                buffer,
                dynamo=False,
                opset_version=opset,
                input_names=["pixel_values"],
                output_names=output_names,
                dynamic_axes=dict.fromkeys(["pixel_values", *output_names], batch),
            )
    except Exception as error:  # the exporter's errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot export {name} with opset {opset}: {reason}") from error
    return onnx.load_from_string(buffer.getvalue())


def _taking_photos(
    exported: "onnx.ModelProto", data_config: dict, pictures: list[np.ndarray]
) -> "onnx.ModelProto":
    """Put the preprocessing in front of a network, after a comparison with Pillow's."""
    from hotdog_hf.deploy import preprocessing

    difference = preprocessing.difference_to_pillow(pictures, data_config)
    if not difference < RESIZE_TOLERANCE:
        raise UserError(
            f"--input bytes: resized photos are {difference:.1f} of 255 away from Pillow's with this version"
            " of ONNX Runtime; update it, or use --input pixels. Nothing was written"
        )
    return preprocessing.add_preprocessing(exported, data_config)
