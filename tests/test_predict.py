import csv
import io
import itertools
import json
import os
import queue
import struct
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import ROOT, run
from PIL import Image
from test_hub import target

import hotdog_hf
from hotdog_hf.data import transforms
from hotdog_hf.data.images import decode_image, normalize, preprocess, resize_and_crop
from hotdog_hf.deploy.export import export_onnx
from hotdog_hf.errors import UserError
from hotdog_hf.model import network
from hotdog_hf.model.predictor import (
    Prediction,
    decision_rule,
    find_images,
    format_header,
    format_prediction,
    load_predictor,
    predict_paths,
)
from hotdog_hf.model.saved import save_model

PREDICT = ROOT / "scripts/predict.py"
# Runs a script and says on standard error which of the slow libraries it has imported.
TELL_IMPORTS = """
import atexit, runpy, sys
slow = {"torch", "torchvision", "timm", "datasets", "transformers", "numpy"}
atexit.register(lambda: print("imported:", *sorted(slow & set(sys.modules)), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = target()
    photos = np.stack([preprocess(picture(seed), network.data_config_of(net)) for seed in range(8)])
    with torch.no_grad():  # so that its answers differ from picture to picture
        net.get_classifier().weight.mul_(20)
        net.get_classifier().bias.sub_(net(torch.from_numpy(photos)).mean(dim=0))
    return net


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    return save_model(net, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(saved, out)
    return out


@pytest.mark.parametrize("kind", ["saved", "exported"])
def test_three_lines_of_python_predict(kind, tmp_path, request):
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    classify = hotdog_hf.load_predictor(request.getfixturevalue(kind))
    one = classify(str(paths[1]))
    assert list(one) == ["hotdog", "not-hotdog"] and sum(one.values()) == pytest.approx(1)
    assert [list(row.values()) for row in classify(paths)] == [
        pytest.approx(list(classify(path).values()), abs=1e-6) for path in paths
    ]
    assert classify(paths)[1] == pytest.approx(one, abs=1e-6)
    assert classify(Image.open(paths[1])) == classify(paths[1].read_bytes()) == one
    assert classify([]) == []
    with pytest.raises(UserError, match=r"no-such\.png"):
        classify(tmp_path / "no-such.png")


@pytest.mark.parametrize("kind", ["saved", "exported"])
def test_with_flip_a_photo_and_its_mirror_image_count_the_same(kind, request):
    plain, flipped = (load_predictor(request.getfixturevalue(kind), tta=tta) for tta in ("none", "flip"))
    images = np.stack([plain.prepare(picture(seed)) for seed in range(3)])
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    expected = (plain.probabilities(images) + plain.probabilities(mirrored)) / 2
    assert np.abs(expected - plain.probabilities(images)).max() > 0.01
    np.testing.assert_allclose(flipped.probabilities(images), expected, atol=1e-6)
    np.testing.assert_allclose(flipped.probabilities(mirrored), expected, atol=1e-6)


@pytest.fixture
def album(tmp_path):
    """A folder with 5 pictures on 3 levels, a broken one, and files that are none."""
    album = tmp_path / "album"
    for number, name in enumerate(["b.png", "a.JPG", "z/c.png", "d/e/f.png", "d/g.png"]):
        draw(album / name, number)
    (album / "d/broken.png").write_text("<html>not found</html>")
    (album / "notes.txt").write_text("no image")
    (album / "._a.jpg").write_text("of a Mac's zip")
    return album


ALBUM_ORDER = ["a.JPG", "b.png", "d/broken.png", "d/g.png", "d/e/f.png", "z/c.png"]


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((50, 70))


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_preprocessing_without_torch_is_timms(crop_mode, interpolation):
    rng = np.random.default_rng(0)
    sizes = [(300, 200), (97, 131), (64, 64), (33, 20), (20, 501), (73, 72)]
    for (width, height), input_size, crop_pct in itertools.product(
        sizes, [(64, 64), (63, 63), (48, 80), (81, 40)], [0.875, 1.0, 0.9, 1.2]
    ):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        data_config = {
            "input_size": (3, *input_size),
            "interpolation": interpolation,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
        expected = timm.data.create_transform(**data_config)(image).numpy()
        ours = preprocess(image, json.loads(json.dumps(data_config)))  # as it comes out of a file: with lists
        assert ours.dtype == np.float32 and ours.shape == (3, *input_size) and ours.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6, err_msg=f"{image.size} {data_config}")


def test_a_batch_is_preprocessed_to_the_bits_of_its_pictures(net):
    data_config = network.data_config_of(net)
    pictures = [picture(seed) for seed in range(3)]
    one_by_one = np.stack([preprocess(image, data_config) for image in pictures])
    batch = np.stack([resize_and_crop(image, data_config) for image in pictures])
    assert batch.dtype == np.uint8 and batch.shape == (3, *one_by_one.shape[2:], 3)
    assert np.array_equal(normalize(batch, data_config), one_by_one)
    to_input = transforms.Normalize(data_config["mean"], data_config["std"])
    on_device = to_input(torch.from_numpy(batch).permute(0, 3, 1, 2))
    assert on_device.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(on_device.numpy(), one_by_one)


@pytest.mark.parametrize(("name", "value"), [("crop_mode", "random"), ("interpolation", "random")])
def test_preprocessing_that_cannot_be_done_is_named(net, name, value):
    with pytest.raises(UserError, match=f"{name} 'random'"):
        preprocess(Image.new("RGB", (8, 8)), network.data_config_of(net) | {name: value})


def test_preprocessing_survives_a_line_of_pixels(net):
    for crop_mode in ("squash", "center", "border"):
        preprocess(Image.new("RGB", (900, 1)), network.data_config_of(net) | {"crop_mode": crop_mode})


def test_images_are_found_in_the_order_asked_for(album, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/deep").mkdir(parents=True)
    (tmp_path / "[1].png").write_bytes(b"")
    stdin = b"album/b.png\n\nempty\nalbum/z\r\ngone.png\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    asked = [
        "album/notes.txt",
        "nope",
        "",
        "album",
        "-",
        "album/*.p*",
        "album/**",
        "x/*.png",
        "empty",
        "[1].png",
    ]
    found = [str(item) for item in find_images(asked)]
    assert found == [
        "album/notes.txt",  # named, so taken whatever its suffix
        "no such file or folder: nope",
        "no such file or folder: ",
        *(f"album/{name}" for name in ALBUM_ORDER),
        *("album/b.png", "no image in empty", "album/z/c.png", "no such file or folder: gone.png"),
        "album/b.png",
        *(f"album/{name}" for name in sorted([*ALBUM_ORDER, "notes.txt"])),
        "nothing matches x/*.png",
        "no image in empty",
        "[1].png",  # exists, so it is no pattern
    ]
    assert [str(item) for item in find_images(["-"])] == ["no paths on stdin"]


def test_names_that_no_file_can_have_are_reported():
    assert all(isinstance(item, UserError) for item in find_images(["a" * 5000, "a\0b"]))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_reported(album):
    (album / "z").chmod(0)
    *_, last = find_images([str(album)])
    (album / "z").chmod(0o700)
    assert isinstance(last, UserError) and "cannot list" in str(last)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_predictions_are_the_models_in_order(album, net, saved, batch_size):
    transform = timm.data.create_transform(**network.data_config_of(net))
    results = list(predict_paths(load_predictor(saved), [str(album)], np.argmax, batch_size))
    assert len(results) == len(ALBUM_ORDER)
    for name, result in zip(ALBUM_ORDER, results, strict=True):
        if name == "d/broken.png":
            assert isinstance(result, UserError) and "d/broken.png" in str(result)
            continue
        with torch.no_grad():
            row = net(transform(decode_image(album / name))[None]).softmax(dim=1)[0]
        assert result.path == str(album / name)
        assert result.label == ("hotdog", "not-hotdog")[row.argmax()]
        assert list(result.probabilities) == ["hotdog", "not-hotdog"]
        np.testing.assert_allclose(list(result.probabilities.values()), row, atol=1e-4)
    assert len({result.label for result in results if isinstance(result, Prediction)}) == 2


@pytest.mark.parametrize("free", [False, True])
def test_an_answer_comes_before_the_next_path_is_needed(album, exported, free):
    paths = queue.Queue()
    asked = iter(lambda: paths.get(timeout=10), None)  # raises where it is asked for more than it has
    predictor = load_predictor(exported)._replace(leaves_cpu_free=free)
    results = predict_paths(predictor, asked, np.argmax, batch_size=1)
    for name in ("a.JPG", "b.png"):
        paths.put(str(album / name))
        assert next(results).path == str(album / name)
    paths.put(None)
    assert list(results) == []


@pytest.mark.parametrize("free", [False, True])
def test_a_batch_is_read_ahead_where_that_slows_nothing_down_and_no_more(album, exported, free):
    taken = []
    endless = (taken.append(1) or str(album / "b.png") for _ in itertools.count())
    predictor = load_predictor(exported)._replace(leaves_cpu_free=free)
    results = predict_paths(predictor, endless, np.argmax, batch_size=4)
    for count, _ in enumerate(itertools.islice(results, 40)):
        assert len(taken) <= 4 * (count // 4 + 1 + free)
    results.close()


@pytest.mark.parametrize(
    ("label_names", "positive_label", "threshold", "row", "chosen"),
    [
        (["hotdog", "other"], None, None, [0.4, 0.6], 1),
        (["hotdog", "other"], None, 0.4, [0.4, 0.6], 0),  # at least
        (["hotdog", "other"], None, 0.9, [0.8, 0.2], 1),
        (["hotdog", "other"], "other", 0.2, [0.8, 0.2], 1),
        (["cat", "dog"], "dog", 0.3, [0.6, 0.4], 1),
        (["a", "b", "c"], "b", 0.3, [0.6, 0.3, 0.1], 1),
        (["a", "b", "c"], "b", 0.9, [0.05, 0.8, 0.15], 2),  # the best of the others
        (["a", "b", "c"], None, None, [0.1, 0.2, 0.7], 2),
        (["cat", "dog"], None, 0.5, None, "needs a --positive-label, one of: cat, dog"),
        (["hotdog", "b", "c"], None, 0.5, None, "needs a --positive-label"),
        (["hotdog", "other"], "hot dog", None, None, "'hot dog' is none of the classes"),
    ],
)
def test_the_decision(label_names, positive_label, threshold, row, chosen):
    if row is None:
        with pytest.raises(UserError, match=chosen):
            decision_rule(label_names, positive_label, threshold)
    else:
        assert decision_rule(label_names, positive_label, threshold)(np.array(row)) == chosen


@pytest.mark.parametrize("path", ['a,"b".png', "a\nb.png", "a\rb.png", "ü.png", "\udcff.png", "\x1b[31m.png"])
def test_odd_file_names_stay_themselves(path):
    prediction = Prediction(path, "hot, dog", {"hot, dog": 0.75, "ü": 0.25})
    line = format_prediction("jsonl", prediction)
    assert "\n" not in line and json.loads(line) == {
        "path": path,
        "label": "hot, dog",
        "probability": 0.75,
        "probabilities": {"hot, dog": 0.75, "ü": 0.25},
    }
    text = format_header("csv", ["hot, dog", "ü"]) + "\n" + format_prediction("csv", prediction) + "\n"
    header, row = csv.reader(io.StringIO(text, newline=""))
    assert header == ["path", "label", "probability", "hot, dog", "ü"]
    assert row == [path, "hot, dog", "0.7500", "0.7500", "0.2500"]
    line = format_prediction("table", prediction)
    assert line.isprintable() and line.startswith("hot, dog    0.7500  0.2500  ")


@pytest.fixture
def odd_album(album):
    draw(album / "two, lines\n.png", 7)
    odd = os.fsdecode(b"\xff.png")  # not UTF-8
    try:
        draw(album / odd, 8)
    except OSError:
        pytest.skip("this file system takes no such name")
    return album


def test_the_script_predicts_what_it_can_and_names_the_rest(odd_album, saved, exported):
    """The torch path and the ONNX path, which imports no torch, say the same."""
    flags = ("--format", "csv", "--batch-size", 3)
    asked = (odd_album, "no/su\nch.png", odd_album / "*.jpeg")
    tables = []
    for name in (saved, exported):
        done = subprocess.run(
            [sys.executable, "-c", TELL_IMPORTS, PREDICT, name, *asked, *map(str, flags)],
            capture_output=True, timeout=240, check=False, cwd=ROOT,
        )  # fmt: skip
        errors, text = done.stderr.decode(), done.stdout.decode(errors="surrogateescape")
        assert done.returncode == 1, errors
        assert [line for line in errors.splitlines() if not line.startswith("imported:")] == [
            line for line in errors.splitlines() if line.startswith("error: ")
        ]
        for message in (
            "d/broken.png as an image",
            r"no such file or folder: no/su\nch.png",
            "nothing matches",
        ):
            assert errors.count(message) == 1
        assert ("imported: numpy\n" in errors) == (name == exported)
        tables.append(list(csv.reader(io.StringIO(text, newline=""))))
    torch_table, onnx_table = tables
    names = sorted(["a.JPG", "b.png", "two, lines\n.png", os.fsdecode(b"\xff.png")])
    paths = [str(odd_album / name) for name in (*names, "d/g.png", "d/e/f.png", "z/c.png")]
    assert [row[0] for row in torch_table] == ["path", *paths]
    assert [row[:2] for row in onnx_table] == [row[:2] for row in torch_table]
    numbers = [np.array([row[2:] for row in table[1:]], float) for table in tables]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1.01e-4)


def test_bf16_is_a_choice_that_an_exported_model_has_not(saved, exported):
    batch = np.stack([np.asarray(picture(seed).resize((64, 64))) for seed in range(8)])
    whole, half = (load_predictor(saved, precision).probabilities(batch) for precision in ("no", "bf16"))
    assert half.dtype == np.float32 and not np.array_equal(whole, half)
    np.testing.assert_allclose(half, whole, rtol=0, atol=0.1)
    with pytest.raises(UserError, match="--precision bf16 is for saved models"):
        load_predictor(exported, "bf16")


def test_the_table_is_the_default_and_threshold_decides(album, exported):
    command = ("sh", "-c", 'printf "%s\n" "$2/b.png" "$2/a.JPG" | "$0" "$1" "$3" - --threshold 1.0')
    done = run(*command, sys.executable, PREDICT, album, exported)
    assert done.returncode == 0, done.stderr
    header, first, second = (line.split() for line in done.stdout.splitlines())
    assert header == ["label", "hotdog", "not-hotdog", "path"]
    assert [first[0], first[3], second[0], second[3]] == [
        "not-hotdog", str(album / "b.png"), "not-hotdog", str(album / "a.JPG"),
    ]  # fmt: skip
    assert done.stderr == ""  # no bar in a log file


def test_a_reader_that_leaves_early_ends_it_quietly(album, exported):
    paths = " ".join(["'" + str(album / "b.png") + "'"] * 200)
    done = run(
        "sh", "-c", f'"$0" "$1" "$2" {paths} --batch-size 1 | head -2', sys.executable, PREDICT, exported
    )
    assert len(done.stdout.splitlines()) == 2 and done.stderr == ""


@pytest.mark.parametrize("output", ["pipe", "terminal"])
def test_the_bar_is_where_the_predictions_are_not(album, exported, output):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # tqdm draws none on 0 columns
    command = [sys.executable, PREDICT, exported, album / "b.png"]
    stdout = theirs if output == "terminal" else subprocess.PIPE
    process = subprocess.Popen(command, stdout=stdout, stderr=theirs)
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, shown
    assert (b"img" in shown) == (output == "pipe")


def read_terminal(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says so where the other side has been closed
        return b""


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--help",), 0, "Paths on stdin"),
        (("model.onnx",), 2, "PATH... is missing"),
        (("model.onnx", "a.png", "--threshold", "1.5"), 2, "--threshold must be from 0 to 1, got 1.5"),
        (("model.onnx", "a.png", "--coverage", "0.9", "--tta", "flip"), 2, "does not go with --tta"),
        (("model.onnx", "a.png", "--batch-size", "0"), 2, "--batch-size must be at least 1, got 0"),
        (("no/such/model.onnx", "a.png"), 2, "error: no such model: no/such/model.onnx"),
        (("/no/such/model", "a.png"), 2, "error: /no/such/model is not a saved model"),
    ],
)
def test_a_mistake_is_one_clear_line(flags, code, message):
    done = run("python", "-c", TELL_IMPORTS, PREDICT, *flags)
    printed = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == code
    assert message.lower() in printed.lower() and "Traceback" not in printed
    if "error:" not in message:
        assert "imported:\n" in done.stderr + "\n"


def test_a_file_that_is_no_exported_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / "page.onnx").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"cannot load .*page\.onnx"):
        load_predictor(tmp_path / "page.onnx")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "other",
        *([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])] for name in "xy"),
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[opset]), tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other\.onnx was not made by scripts/export\.py"):
        load_predictor(tmp_path / "other.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[onnx\]"'):
        load_predictor(tmp_path / "other.onnx")
