"""Resizing, cropping and normalising as ONNX operators, so that a model takes a photo as it was decoded.

The graph does what `images.preprocess` does with Pillow. ONNX Runtime's antialiased Resize of bytes computes
as Pillow's did up to version 12: horizontally, then vertically, with 8-bit results. Pillow 13 resizes some
photos vertically first; up to a fifth of their bytes then differ by 1. Other runtimes may be further away.
"""

import math
from collections.abc import Iterable

import numpy as np
import onnx
import onnx.compose
import onnx.parser
import onnxruntime
from PIL import Image

from hotdog_hf.data.images import preprocess
from hotdog_hf.errors import UserError

# The first version of the operators that has an antialiased Resize.
PREPROCESSING_OPSET = 18
# As Pillow's filters: a = -0.5 in the bicubic one, and what is beyond the border has no weight.
RESIZE_MODES = {"bilinear": 'mode = "linear"', "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5'}
CROP_MODES = ("squash", "center", "border")


def add_preprocessing(network: onnx.ModelProto, data_config: dict) -> onnx.ModelProto:
    """Return a model from `image`, RGB bytes [H, W, 3] of any size, to `probabilities` [classes].

    `network` takes `pixel_values` [batch, 3, height, width] and returns `probabilities` [batch, classes]; so
    it is with other outputs.
    Raises `UserError` for a crop mode, an interpolation or an opset with which this cannot be done.
    """
    [opset] = {entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")}
    front = preprocessing_model(data_config, opset, network.ir_version)
    merged = onnx.compose.merge_models(
        onnx.compose.add_prefix(front, "preprocessing/", rename_inputs=False, rename_outputs=False),
        network,
        io_map=[("pixel_values", "pixel_values")],
        producer_name="hotdog_hf",
    )
    # One photo has one row of each output, which is what is left of the batch.
    outputs = {output.name: f"{output.name}/rows" for output in merged.graph.output}
    for node in merged.graph.node:
        node.output[:] = [outputs.get(name, name) for name in node.output]
        node.input[:] = [outputs.get(name, name) for name in node.input]
    merged.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "first_axis"))
    for output in merged.graph.output:
        squeeze = onnx.helper.make_node("Squeeze", [outputs[output.name], "first_axis"], [output.name])
        merged.graph.node.append(squeeze)
        del output.type.tensor_type.shape.dim[0]
    onnx.checker.check_model(merged)
    return merged


def difference_to_pillow(pictures: Iterable[np.ndarray], data_config: dict) -> float:
    """Return the mean difference between the graph's resized bytes and Pillow's, in steps of 255."""
    model = preprocessing_model(data_config).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    std = np.array(data_config["std"], np.float32)[:, None, None]
    differences = [
        session.run(None, {"image": picture})[0][0] - preprocess(Image.fromarray(picture), data_config)
        for picture in pictures
    ]
    return float(np.mean(np.abs(differences) * std * 255))


def preprocessing_model(
    data_config: dict, opset: int = PREPROCESSING_OPSET, ir_version: int = 8
) -> onnx.ModelProto:
    """Return the model from `image`, RGB bytes [H, W, 3], to `pixel_values`, float32 [1, 3, height, width].

    Raises `UserError` for a crop mode, an interpolation or an opset with which this cannot be done.
    """
    crop_mode, interpolation = data_config.get("crop_mode") or "center", str(data_config["interpolation"])
    for name, value, known in (
        ("crop_mode", crop_mode, CROP_MODES),
        ("interpolation", interpolation, tuple(RESIZE_MODES)),
    ):
        if value not in known:
            raise UserError(
                f"--input bytes: {name} {value!r} is none of {', '.join(known)}; --input pixels leaves it to"
                " the caller"
            )
    if opset < PREPROCESSING_OPSET:
        raise UserError(f"--input bytes needs --opset {PREPROCESSING_OPSET} or higher, got {opset}")
    height, width = data_config["input_size"][-2:]
    fill = [round(255 * value) if crop_mode == "border" else 0 for value in data_config["mean"]]
    return onnx.parser.parse_model(f"""
        <ir_version: {ir_version}, opset_import: ["" : {opset}]>
        preprocessing (uint8[image_height, image_width, 3] image)
            => (float[1, 3, {height}, {width}] pixel_values)
        <
            int64[1] zero = {{0}}, int64[1] two = {{2}}, double[1] half = {{0.5}},
            int64[2] no_padding = {{0, 0}}, int64[2] height_and_width = {{2, 3}}, int64[2] one_rgb = {{1, 3}},
            int64[2] input_size = {{{height}, {width}}}, int64[4] input_shape = {{1, 3, {height}, {width}}},
            float white = {{255}}, float[3, 1, 1] fill = {_numbers(fill)},
            float[3, 1, 1] mean = {_numbers(data_config["mean"])},
            float[3, 1, 1] std = {_numbers(data_config["std"])}
        >
        {{
            shape = Shape (image)
            image_size = Slice (shape, zero, two)
            {_resized_size((height, width), data_config.get("crop_pct") or 0.875, crop_mode)}
            planes = Transpose <perm = [2, 0, 1]> (image)
            photo = Unsqueeze (planes, zero)
            resized_shape = Concat <axis = 0> (one_rgb, resized_size)
            resized = Resize <antialias = 1, exclude_outside = 1, {RESIZE_MODES[interpolation]}>
                (photo, , , resized_shape)

            excess = Sub (resized_size, input_size)
            to_cut = Max (excess, zero)
            to_cut_double = Cast <to = {onnx.TensorProto.DOUBLE}> (to_cut)
            half_cut = Mul (to_cut_double, half)
            even_cut = Round (half_cut)
            start = Cast <to = {onnx.TensorProto.INT64}> (even_cut)
            end = Add (start, input_size)
            cropped = Slice (resized, start, end, height_and_width)

            lack = Sub (input_size, resized_size)
            to_pad = Max (lack, zero)
            pad_before = Div (to_pad, two)
            pad_after = Sub (to_pad, pad_before)
            pads = Concat <axis = 0> (no_padding, pad_before, no_padding, pad_after)
            floats = Cast <to = {onnx.TensorProto.FLOAT}> (cropped)
            from_fill = Sub (floats, fill)
            padded = Pad (from_fill, pads)
            filled = Add (padded, fill)
            canvas = Reshape (filled, input_shape)

            fractions = Div (canvas, white)
            centered = Sub (fractions, mean)
            pixel_values = Div (centered, std)
        }}
    """)


def _resized_size(input_size: tuple[int, int], crop_pct: float, crop_mode: str) -> str:
    """Return the operators from `image_size` to `resized_size`, the height and width before the crop."""
    goal = tuple(math.floor(side / crop_pct) for side in input_size)
    constant = f"goal = Constant <value = int64[2] {{{goal[0]}, {goal[1]}}}> ()\n"
    if crop_mode == "squash":
        return constant + "resized_size = Identity (goal)"
    if crop_mode == "center" and goal[0] == goal[1]:  # as torchvision: the longer side is rounded down
        return (
            constant
            + """
            shorter = ReduceMin (image_size)
            scaled = Mul (image_size, goal)
            resized_size = Div (scaled, shorter)
        """
        )
    return (
        constant
        + f"""
            sides = Cast <to = {onnx.TensorProto.DOUBLE}> (image_size)
            goals = Cast <to = {onnx.TensorProto.DOUBLE}> (goal)
            ratios = Div (sides, goals)
            ratio = {"ReduceMax" if crop_mode == "border" else "ReduceMin"} (ratios)
            exact = Div (sides, ratio)
            rounded = Round (exact)
            whole = Cast <to = {onnx.TensorProto.INT64}> (rounded)
            one = Constant <value = int64[1] {{1}}> ()
            resized_size = Max (whole, one)
    """
    )


def _numbers(values: Iterable[float]) -> str:
    return f"{{{', '.join(map(repr, map(float, values)))}}}"
