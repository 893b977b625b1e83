"""The ONNX file that takes photos, smaller ones, and what is built on them."""

import functools
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from test_hub import target

from hotdog_hf.data.images import decode_image, preprocess, resize_and_crop
from hotdog_hf.deploy import export, preprocessing, quantize
from hotdog_hf.errors import UserError
from hotdog_hf.model import network, saved
from hotdog_hf.model.predictor import load_predictor, predict_paths

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(60, 40), (40, 60), (64, 64), (300, 211), (1, 1), (1, 500), (500, 1), (3, 7), (65, 63)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model whose probabilities differ from photo to photo."""
    torch.manual_seed(0)
    net = target()
    config = network.data_config_of(net)
    with torch.no_grad():
        net.get_classifier().weight.mul_(200)
        inputs = np.stack([preprocess(smooth(40, 60, seed), config) for seed in range(4)])
        net.get_classifier().bias.sub_(net(torch.from_numpy(inputs)).mean(dim=0))
    return saved.save_model(net, tmp_path_factory.mktemp("saved") / "model")


def smooth(height, width, seed=0):
    """A photo as cameras make them: neighbouring pixels are alike."""
    waves = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("input_size", "crop_pct"), [((64, 64), 0.875), ((48, 64), 1.0)])
@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_graph_prepares_a_photo_as_pillow_does(input_size, crop_pct, crop_mode, interpolation):
    config = {
        "input_size": (3, *input_size),
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "mean": MEAN,
        "std": STD,
    }
    model = preprocessing.preprocessing_model(config)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for size in SIZES:
        photo = smooth(*size)
        [[actual]] = session.run(None, {"image": np.asarray(photo)})
        expected = preprocess(photo, config)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        steps = np.abs(actual - expected) * np.array(STD)[:, None, None] * 255
        assert steps.max() < (2.01 if interpolation == "bilinear" else 4.01) and steps.mean() < 0.4, size


@pytest.mark.parametrize(
    ("changes", "opset", "message"),
    [
        ({"crop_mode": "corner"}, 18, "crop_mode 'corner' is none of squash, center, border; --input pixels"),
        ({"interpolation": "lanczos"}, 18, "interpolation 'lanczos' is none of bilinear, bicubic"),
        ({}, 17, "--input bytes needs --opset 18 or higher, got 17"),
    ],
)
def test_what_the_graph_cannot_do_is_refused(changes, opset, message):
    config = {"input_size": (3, 8, 8), "interpolation": "bilinear", "mean": MEAN, "std": STD} | changes
    with pytest.raises(UserError, match=message):
        preprocessing.preprocessing_model(config, opset)


def test_a_file_that_takes_photos_says_what_the_model_says(model, tmp_path):
    for number, size in enumerate([(300, 211), (40, 60), (900, 90)]):
        smooth(*size, seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no image")
    out = tmp_path / "bytes.onnx"
    done = run("python", ROOT / "scripts/export.py", model, out, "--input", "bytes")
    assert done.returncode == 0, done.stderr
    assert "opset 18" in done.stdout and onnx.load(out).opset_import[0].version == 18

    session = onnxruntime.InferenceSession(out)
    [image], [probabilities] = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[2]) == ("image", "tensor(uint8)", 3)
    assert (probabilities.name, probabilities.shape) == ("probabilities", [2])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["label_names"]) == ["hotdog", "not-hotdog"]

    theirs, ours = load_predictor(model), load_predictor(out)
    assert ours.takes_photos and ours.label_names == theirs.label_names
    photos = [decode_image(tmp_path / f"{number}.png") for number in range(3)]
    expected = theirs.probabilities(np.stack([resize_and_crop(p, theirs.data_config) for p in photos]))
    assert np.ptp(expected[:, 0]) > 0.1
    np.testing.assert_allclose(ours.probabilities([np.asarray(p) for p in photos]), expected, atol=0.01)

    *readable, broken = predict_paths(ours, [str(tmp_path / f"{n}.png") for n in range(4)], np.argmax)
    np.testing.assert_allclose([list(p.probabilities.values()) for p in readable], expected, atol=0.01)
    assert isinstance(broken, UserError)


def test_a_runtime_that_resizes_otherwise_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setitem(preprocessing.RESIZE_MODES, "bilinear", 'mode = "cubic", cubic_coeff_a = -3.0')
    with pytest.raises(UserError, match="of 255 away from Pillow's"):
        export.export_onnx(model, tmp_path / "model.onnx", takes_photos=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def network_and_config(model, tmp_path_factory):
    """The same model as ONNX in float32, its class names and its preprocessing."""
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    export.export_onnx(model, out)
    predictor = load_predictor(out)
    return onnx.load(out), predictor.label_names, predictor.data_config


def test_fp16_halves_the_file_and_hardly_changes_what_it_says(model, tmp_path, photos_dir):
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    export.export_onnx(model, whole)
    done = run("python", ROOT / "scripts/export.py", model, half, "--precision", "fp16", "--input", "bytes")
    assert done.returncode == 0, done.stderr
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    photos = sorted(photos_dir.glob("test/*/*.png"))
    expected, actual = load_predictor(whole)(photos), load_predictor(half)(photos)
    for row, other in zip(expected, actual, strict=True):
        assert row == pytest.approx(other, abs=0.02) and row != other


def test_padding_that_is_computed_from_the_input_is_fixed(tmp_path):
    """It kept an EfficientNet's activations in float32."""
    saved.save_model(target("tf_mobilenetv3_small_minimal_100"), tmp_path / "model")
    export.export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Pad" in operators and not operators & {"Shape", "Gather", "Ceil"}


def test_weights_beyond_float16_are_refused(network_and_config):
    network = onnx.ModelProto()
    network.CopyFrom(network_and_config[0])
    kernel = next(tensor for tensor in network.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(kernel) * 1e9
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    with pytest.raises(UserError, match=f"weights of {kernel.name} do not fit into float16"):
        quantize.to_fp16(network)


def test_int8_is_calibrated_on_photos_and_the_best_kind_is_kept(network_and_config, photos_dir):
    network, label_names, data_config = network_and_config
    result = quantize.to_int8(network, label_names, data_config, photos_dir, max_drop=100)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in result.network.graph.node}
    weights = [tensor for tensor in result.network.graph.initializer if len(tensor.dims) == 4]
    assert weights and {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    whole, *tried = result.accuracies
    assert whole == "float32" and tried == [f"int8 {name}" for name in quantize.CANDIDATES]
    assert result.kept == max(tried, key=result.accuracies.__getitem__)
    assert result.num_photos == 5 and "float32" in result.describe()


def test_int8_that_loses_too_much_is_refused_and_nothing_is_written(model, tmp_path, photos_dir, monkeypatch):
    accuracies = iter([0.9, 0.8, 0.85, 0.84])
    monkeypatch.setattr(quantize, "_accuracy", lambda *_: next(accuracies))
    monkeypatch.setattr(quantize, "_quantize", lambda network, *_, **__: network)
    options = {"precision": "int8", "data_dir": photos_dir, "max_drop": 4.9}
    message = r"loses 5.00 points .*more than --max-drop 4.9 .*int8 per tensor 0.8500.*Nothing was written"
    with pytest.raises(UserError, match=message):
        export.export_onnx(
            model, tmp_path / "model.onnx", shrink=functools.partial(quantize.shrink, **options)
        )
    assert list(tmp_path.iterdir()) == []


def test_photos_of_other_classes_calibrate_nothing(network_and_config, photos_dir):
    network, _, data_config = network_and_config
    with pytest.raises(UserError, match="has the classes hotdog, not-hotdog, the model cat, dog"):
        quantize.to_int8(network, ["cat", "dog"], data_config, photos_dir)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--precision", "int8"), "--precision int8 needs photos: --data-dir"),
        (("--max-drop", 101), "--max-drop must be from 0 to 100, got 101"),
    ],
)
def test_what_int8_needs_is_said_at_once(tmp_path, flags, message):
    done = run("python", ROOT / "scripts/export.py", "model", "model.onnx", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stdout + done.stderr
