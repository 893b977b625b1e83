import argparse
import importlib.util
import json
import sys
import time

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY_MODEL, network_inputs, run
from PIL import Image

from hotdog_hf.bench import runner
from hotdog_hf.bench.page import (
    ACTIVITIES,
    TITLES,
    Measured,
    baseline_of,
    digits,
    greatest_difference,
    targets,
    write_report,
)
from hotdog_hf.bench.processes import MeasurementError, run_process
from hotdog_hf.bench.runner import Results, measure, plan
from hotdog_hf.bench.sections import SECTIONS, Variant, prediction, processes, training
from hotdog_hf.bench.setup import Setup, enlarge_photos, link_photos
from hotdog_hf.bench.simulation import Device, simulated
from hotdog_hf.bench.tasks import Stopwatch, limit, memory, peak_memory, predict, profile
from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.splits import load_photos
from hotdog_hf.model import saved
from hotdog_hf.model.network import data_config_of, replace_head
from hotdog_hf.model.predictor import load_predictor, predict_paths
from hotdog_hf.model.source import load_source, source_data_config
from hotdog_hf.training import engine

CLASSES = ["hotdog", "not-hotdog"]


@pytest.fixture
def network(tiny_weights):
    knobs = {"name": TINY_MODEL, "weights": str(tiny_weights), "image_size": 64}
    return knobs | {"num_threads": 1, "precision": "no"}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tiny_weights, photos_dir):
    """A model that says one class of half the test photos and the other of the rest."""
    source = load_source(TINY_MODEL, str(tiny_weights), 64)
    net = replace_head(source, CLASSES, source_data_config(source, "chapter", 64)).eval()
    test_set = loaders.PhotoDataset(
        load_photos(photos_dir)["test"], transforms.eval_transform(data_config_of(net))
    )
    with torch.no_grad():
        logits = net(network_inputs(test_set))
        lower, upper = (logits[:, 0] - logits[:, 1]).sort().values[5:7]
        net.get_classifier().bias[0] -= (lower + upper) / 2
    return saved.save_model(net, tmp_path_factory.mktemp("bench") / "model")


# What is measured, in this process.


def test_the_limit_steps_over_as_many_photos_as_an_epoch(network, monkeypatch):
    seen = {True: [], False: []}
    step = timm.models.resnet.ResNet.forward

    def counted(self, images):
        seen[self.training].append(len(images))
        return step(self, images)

    monkeypatch.setattr(timm.models.resnet.ResNet, "forward", counted)
    found = limit(train=11, test=5, batch_size=4, epochs=2, classes=CLASSES, **network)
    assert len(found["epoch_seconds"]) == 2 and min(found["epoch_seconds"]) > 0
    assert seen[False].pop(0) == 1  # a blank photo, to see that the network takes this size
    # The first step of four photos warms up, in the mode of a model just loaded.
    assert sum(map(sum, seen.values())) == 4 + 2 * (11 + 5) and seen[False][-2:] == [4, 1]


def test_memory_is_that_of_a_folder_as_large_as_it_is(network, photos_dir):
    found = memory(data_dir=str(photos_dir), batch_size=8, steps=2, **network)
    assert found["photos"] == 36
    before = found["peak_bytes"]
    block = np.ones(300 * 2**20, np.uint8)
    assert peak_memory() > max(before, block.nbytes)


def test_the_profile_counts_every_moment_once(network, photos_dir):
    found = profile(data_dir=str(photos_dir), batch_size=8, num_workers=0, **network)
    assert set(found["seconds_by"]) == set(ACTIVITIES)
    assert min(found["seconds_by"].values()) > 0
    assert any("convolution" in operator["name"] for operator in found["operators"])
    assert sum(operator["share"] for operator in found["operators"]) <= 1


def test_a_stopwatch_gives_each_moment_to_the_innermost_name(monkeypatch):
    now = iter([0, 1, 3, 6, 10, 20, 25, 35, 36])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch(lambda: None)
    with watch("waiting"), watch("decode"):  # from 1 to 10, and within it from 3 to 6
        pass
    with watch("evaluation"), watch("decode"):  # from 20 to 36, with all that is in it
        pass
    assert watch.seconds == {"other": 1 + 10, "waiting": 2 + 4, "decode": 3, "evaluation": 16}


def test_a_simulated_device_works_through_its_queue_while_the_loop_goes_on():
    device, started = Device(0.01), time.perf_counter()
    device.queue(20, training=True)
    device.queue(30, training=False)
    queued = time.perf_counter()
    copied = device.copy(torch.ones(2))
    assert copied.read().tolist() == [1, 1]
    assert queued - started < 0.05 and 0.3 <= time.perf_counter() - started < 0.6
    assert device.seconds == pytest.approx(0.3)


@pytest.mark.parametrize(("device_ms", "decode_ms"), [(40, 1), (1, 40)])
def test_a_simulated_training_waits_for_the_slower_of_device_and_cores(
    tmp_path, photos_dir, device_ms, decode_ms
):
    flags = ["--recipe", "scratch", "--data-dir", photos_dir, "--model", TINY_MODEL, "--weights", "none"]
    flags += ["--batch-size", 8, "--epochs", 3, "--num-workers", 2, "--no-neighbors", "--output-dir"]
    times = {"device_ms": device_ms, "decode_ms": decode_ms}
    copies = engine.HostCopy
    found = simulated(flags=[*map(str, flags), str(tmp_path / "run")], cores=2, num_threads=1, **times)
    assert engine.HostCopy is copies
    # Two epochs of 25 photos and 11 of test, and the evaluation of the saved model is not counted.
    assert found["device_seconds"] == pytest.approx(2 * (25 + 11 / 3) * device_ms / 1000)
    # Some of the second epoch's photos were decoded in the first, and those of test only then.
    assert 25 <= found["core_seconds"] * 1000 / decode_ms * 2 <= 2 * 25
    slower = max(found["device_seconds"], found["core_seconds"])
    assert slower <= found["seconds"] < slower + 5
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows[:3]] == [1, 2, 3]


@pytest.mark.parametrize("how", ["ours", "timm", "transformers"])
def test_every_way_of_predicting_says_the_same(how, saved_model, photos_dir):
    folder = str(photos_dir / "test")
    knobs = {"model_dir": str(saved_model), "data_dir": folder, "batch_size": 4, "num_threads": 1}
    found = predict(how=how, **knobs)
    assert found["images"] == 11 and found["seconds"] > 0
    predictor = load_predictor(saved_model)
    answers = predict_paths(predictor, [folder], np.argmax)
    assert found["labels"] == [answer.label for answer in answers]
    assert set(found["labels"]) == set(CLASSES)


def plain_loop(capsys, photos_dir, tiny_weights, **knobs):
    """Return the rows that scripts/plain_loop.py prints."""
    spec = importlib.util.spec_from_file_location("plain_loop", ROOT / "scripts/plain_loop.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    defaults = {
        "data_dir": photos_dir,
        "weights": tiny_weights,
        "model": TINY_MODEL,
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "image_size": 64,
        "num_workers": 0,
        "num_threads": 1,
        "seed": 0,
        "channels_last": False,
        "freeze_body": False,
        "no_augment": True,
    }
    script.main(argparse.Namespace(**defaults | knobs))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_plain_loop_learns_and_channels_last_changes_its_speed_alone(capsys, photos_dir, tiny_weights):
    rows = plain_loop(capsys, photos_dir, tiny_weights, epochs=6)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["test_accuracy"] >= 0.8
    other = plain_loop(capsys, photos_dir, tiny_weights, epochs=2, channels_last=True)
    losses = [[row["train_loss"] for row in those[:2]] for those in (rows, other)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_the_plain_frozen_loop_moves_the_head_alone(capsys, photos_dir, tiny_weights, monkeypatch):
    nets, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: nets.append(create(*a, **k)) or nets[-1])
    rows = plain_loop(capsys, photos_dir, tiny_weights, freeze_body=True)
    assert rows[1]["train_loss"] != rows[0]["train_loss"]
    source = create(TINY_MODEL, pretrained=True, pretrained_cfg_overlay={"file": tiny_weights}).state_dict()
    for name, value in nets[0].state_dict().items():
        assert name.startswith("fc") or value.equal(source[name]), name
    assert {name for name, value in nets[0].named_parameters() if value.grad is not None} == {
        "fc.weight",
        "fc.bias",
    }


# How it is measured.


def python(code, folder, **knobs):
    return run_process([sys.executable, "-c", code], folder, **knobs)


def test_a_process_is_timed_by_what_it_writes(tmp_path):
    code = "import time; print('{\"row\": 1}'); time.sleep(0.5); print('no row'); print('{\"row\": 2}')"
    ended = python(code, tmp_path)
    (first, one), (second, two) = ended.rows
    assert (one, two) == ({"row": 1}, {"row": 2}) and 0.4 < second - first < 1.5 and second <= ended.seconds
    assert ended.command.startswith("python -c ")


def test_a_process_that_fails_says_why(tmp_path):
    code = "import sys; sys.exit('error: no such thing')"
    with pytest.raises(MeasurementError, match="exited with 1: error: no such thing"):
        python(code, tmp_path)


def test_a_process_is_stopped_when_it_has_come_far_enough(tmp_path):
    mark = tmp_path / "mark"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    ended = python(code, tmp_path, until=mark.exists)
    assert 0 < ended.until_seconds <= ended.seconds < 30
    with pytest.raises(MeasurementError):
        python("pass", tmp_path, until=(tmp_path / "never").exists)


def test_variants_take_turns(monkeypatch):
    variants = [Variant("s", name, None, once=name == "c") for name in "abc"]
    monkeypatch.setattr(runner, "SECTIONS", {"s": lambda setup: variants, "t": lambda setup: []})
    turns = plan(None, ["s", "t"], 2)
    said = [(variant.name, number) for variant, number in turns["s"]]
    assert said == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1)] and turns["t"] == []


def setup_of(photos_dir, tiny_weights, work, **knobs):
    defaults = {
        "root": ROOT,
        "work": work,
        "photos": photos_dir,
        "train": 25,
        "test": 11,
        "classes": tuple(CLASSES),
        "model": TINY_MODEL,
        "weights": tiny_weights,
        "image_size": 64,
        "saved_model": work / "model",
        "onnx": work / "model.onnx",
        "not_exported": None,
        "smaller": {"fp16": work / "fp16.onnx", "int8": work / "int8.onnx"},
        "batch_size": 8,
        "epochs": 2,
        "recipes": ("chapter", "probe", "light"),
        "threads": 1,
        "workers": 1,
        "gpus": 0,
        "bf16": False,
    }
    return Setup(**defaults | knobs)


def test_every_target_speaks_of_something_that_is_measured(photos_dir, tiny_weights, tmp_path):
    setup = setup_of(photos_dir, tiny_weights, tmp_path, threads=2)
    assert SECTIONS.keys() == TITLES.keys()
    rows = []
    for name, section in SECTIONS.items():
        numbers = {"value": 1.0, "curve": [[1.0, 0.5]], "test_accuracy": 0.5, "metrics": {"loss": 0.5}}
        rows += [
            {"section": name, "variant": variant.name, "round": 0} | numbers for variant in section(setup)
        ]
    measured = Measured(rows)
    assert len(targets(measured)) == 16
    assert all(baseline_of(measured, name) in [None, *measured.variants(name)] for name in SECTIONS)


@pytest.mark.parametrize(("gpus", "threads", "count"), [(0, 1, 0), (0, 2, 2), (1, 16, 0), (2, 16, 2)])
def test_two_processes_need_two_cores_or_two_gpus(gpus, threads, count, photos_dir, tiny_weights, tmp_path):
    setup = setup_of(photos_dir, tiny_weights, tmp_path, threads=threads, gpus=gpus)
    assert len(processes(setup)) == count


def test_links_repeat_every_photo(photos_dir, tmp_path):
    files = {
        split: {name: sorted(map(str, (photos_dir / split / name).iterdir())) for name in CLASSES}
        for split in ("train", "test")
    }
    folder = link_photos(files, tmp_path / "many", 3)
    links = sorted((folder / "test/hotdog").iterdir())
    assert len(links) == 18 and len({link.resolve() for link in links}) == 6
    assert links[0].name == "00000-000.png" and links[0].read_bytes()


def test_results_keep_other_sections_of_the_same_machine_and_knobs(tmp_path, capsys):
    file = tmp_path / "results.json"
    results = Results(file, {"knobs": (1, 2)}, ["a", "b"])
    for section in "ab":
        results.add(Variant(section, "ours", None), 0, {"by": "me"}, {"value": 1.0})
    assert [row["section"] for row in json.loads(file.read_text())["measurements"]] == ["a", "b"]
    again = Results(file, {"knobs": (1, 2)}, ["b"])
    assert [row["section"] for row in again.content["measurements"]] == ["a"]
    assert Results(file, {"knobs": (1, 3)}, ["b"]).content["measurements"] == []
    kept = json.loads((tmp_path / "before-results.json").read_text())
    assert [row["section"] for row in kept["measurements"]] == ["a"]
    assert f"it is now {tmp_path / 'before-results.json'}" in capsys.readouterr().out
    file.write_text("[]")  # of another program
    assert Results(file, {"knobs": (1, 3)}, ["b"]).content["measurements"] == []


def measured_rows(*rows, **more):
    """The content of results.json with these measurements."""
    origin = {"round": 0, "by": "me", "commit": None, "load": 0.0, "command": "train"}
    about = {"cores": 1, "threads": 1, "memory_gb": 1, "system": "none", "python": "3", "cpu": "one"}
    machine = about | {"gpus": [], "versions": {}}
    facts = {"data_dir": "photos", "train": 1, "test": 1, "enlarge": None, "image_size": 64, "epochs": 1}
    facts |= {"model": "tiny", "weights": "none", "machine": machine}
    return {"facts": facts, "measurements": [origin | row | more for row in rows]}


def test_the_page_is_written_if_what_others_are_compared_with_failed(tmp_path):
    failed = {"error": "no memory"}
    reached = {"variant": "probe", "curve": [[9.0, 0.8]], "test_accuracy": 0.8, "seconds_in_all": 9.5}
    results = measured_rows(
        {"section": "accuracy", "variant": "chapter"} | failed,
        {"section": "accuracy"} | reached,
        {"section": "profile", "variant": "an epoch"} | failed,
        {"section": "profile", "variant": "flame.svg of py-spy", "value": 1.0},
    )
    write_report(tmp_path, results)
    page = (tmp_path / "README.md").read_text()
    assert "accuracy, chapter, round 0: no memory" in page and "profile, an epoch, round 0: no memory" in page
    assert "no accuracy to reach" in page and "| probe | not reached |" in page


def test_why_there_is_no_exported_model_is_told_with_what_would_have_used_it(tmp_path):
    why = {"not_exported": "an operator is missing"}
    for section, told in (("prediction", True), ("processes", False)):
        row = {"section": section, "variant": "ours", "value": 1.0, "labels": []}
        write_report(tmp_path, measured_rows(row, **why))
        assert ("No ONNX file: an operator is missing." in (tmp_path / "README.md").read_text()) is told


# What the numbers say.


def rows_of(section, **values):
    return [
        {"section": section, "variant": name.replace("_", " "), "round": number, "value": value}
        for name, those in values.items()
        for number, value in enumerate(those)
    ]


def test_ratios_are_taken_round_by_round():
    measured = Measured(rows_of("training", ours=[10, 40, 30], plain_loop=[5, 10, 30]))
    ratio = measured.ratio("training", "ours", "plain loop")
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2, 1, 4, 3)
    assert ratio.scaled(digits) == "2.00 (1.00 to 4.00)"
    [target] = targets(measured)
    assert target.met and target.bound == 1.3
    slower = Measured(rows_of("training", ours=[10], plain_loop=[9]))
    assert not targets(slower)[0].met


def test_memory_that_was_measured_for_one_size_alone_meets_no_target():
    assert targets(Measured(rows_of("memory", **{"1x": [100.0]}))) == []


def curve(variant, number, *points):
    row = {"section": "accuracy", "variant": variant, "round": number, "curve": points}
    return row | {"test_accuracy": points[-1][1]}


def test_the_accuracy_to_reach_is_the_mean_of_the_chapters_own():
    measured = Measured(
        [
            curve("chapter", 0, [100, 0.5], [200, 0.9], [300, 0.8]),
            curve("chapter", 1, [100, 0.5], [300, 0.9]),
            curve("probe", 0, [10, 0.6], [15, 0.86]),
            curve("probe", 1, [10, 0.84]),
        ]
    )
    assert measured.values("accuracy", "chapter") == {0: 300, 1: 300}
    assert measured.values("accuracy", "probe") == {0: 15}, "in round 1 it stays below 0.85"
    [target] = targets(measured)
    assert target.found.median == 20 and not target.met


@pytest.mark.parametrize(
    ("gpus", "bf16", "other"),
    [
        (0, False, []),
        (0, True, ["ours, bf16"]),
        (1, True, ["ours, float32", "ours, crops cut on the GPU", "ours, crops cut on the GPU, compiled"]),
    ],
)
def test_ours_is_measured_in_the_other_precision_too(gpus, bf16, other, photos_dir, tiny_weights, tmp_path):
    setup = setup_of(photos_dir, tiny_weights, tmp_path, gpus=gpus, bf16=bf16)
    assert [row.name for row in training(setup) if row.name.startswith("ours,")] == other
    assert ("ours, torch, bf16" in [row.name for row in prediction(setup)]) == bf16


def test_metrics_that_differ_are_found():
    def row(variant, **metrics):
        return {"section": "exact", "variant": variant, "round": 0, "value": 0, "metrics": metrics}

    same = [
        row("chapter, 0", loss=0.5, matrix=[[1, 2], [3, 4]]),
        row("chapter, 2", loss=0.5, matrix=[[1, 2], [3, 4]]),
    ]
    other = [*same[:1], row("chapter, 2", loss=0.5, matrix=[[1, 2], [4, 3]])]
    assert greatest_difference(Measured(same), "chapter") == 0
    assert greatest_difference(Measured(other), "chapter") == 1
    assert greatest_difference(Measured(same[:1]), "chapter") is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (0.0123, "0.0123"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")]
)
def test_numbers_have_three_digits(value, text):
    assert digits(value) == text


# All of it, as a user runs it.


@pytest.fixture(scope="module")
def flags(photos_dir, tiny_weights):
    return (
        *("--data-dir", photos_dir, "--model", TINY_MODEL, "--weights", tiny_weights, "--image-size", 64),
        *("--batch-size", 8, "--num-threads", 1, "--photos", 6, "--epochs", 1),
    )


def test_the_benchmark_leaves_numbers_a_page_and_pictures(flags, tmp_path):
    out = tmp_path / "bench"
    words = ("python", ROOT / "scripts/benchmark.py", *flags, "--output-dir", out, "--repeats", 1)
    done = run(*words, "--only", "profile", "frozen")
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name for path in out.iterdir()} - {"flame.svg"}  # where py-spy is installed
    assert written == {"README.md", "results.json", "profile.png", "frozen.png"}
    assert min(Image.open(out / "profile.png").size) > 100
    page = (out / "README.md").read_text()
    for text in ("12 for training and 11 for test", "| plain frozen loop |", "One core decodes and crops "):
        assert text in page
    assert "frozen body, epochs after the first: plain / ours" in done.stdout and "Failed" not in page
    results = json.loads((out / "results.json").read_text())
    assert all(row["value"] > 0 for row in results["measurements"])


def test_the_first_answer_of_every_script_is_timed(photos_dir, tiny_weights, tmp_path):
    setup = setup_of(photos_dir, tiny_weights, tmp_path)
    variants = SECTIONS["startup"](setup)
    scripts = [f"{path.name} --help" for path in sorted((ROOT / "scripts").glob("*.py"))]
    assert [variant.name for variant in variants][: len(scripts)] == scripts
    for variant in (variants[0], next(each for each in variants if "first step" in each.name)):
        assert measure(setup, variant, 0)["value"] > 0
    assert not list(tmp_path.glob("startup*"))


def test_our_training_is_timed_from_its_first_step_and_with_a_cache_after_its_first_epoch(
    photos_dir, tiny_weights, tmp_path
):
    setup = setup_of(photos_dir, tiny_weights, tmp_path)
    once = next(variant for variant in SECTIONS["cache"](setup) if variant.name == "decoded once")
    (tmp_path / "once").mkdir()
    numbers = once.measure(tmp_path / "once", 0)
    first, second = numbers["epoch_seconds"]
    assert min(first, second) > 0 and first + second < numbers["seconds_in_all"]
    assert (numbers["first_epoch"], numbers["value"]) == pytest.approx((25 / first, 25 / second))
    assert 0 <= numbers["test_accuracy"] <= 1
    assert len(list((tmp_path / "once/decoded").rglob("*.rgb"))) == 36


def test_enlarged_photos_have_the_side_that_was_asked_for(photos_dir, tmp_path):
    files = {"test": {name: sorted(map(str, (photos_dir / "test" / name).iterdir())) for name in CLASSES}}
    enlarged = enlarge_photos(files, tmp_path / "enlarged", 400)
    for name in CLASSES:
        assert len(enlarged["test"][name]) == len(files["test"][name])
        for before, after in zip(files["test"][name], enlarged["test"][name], strict=True):
            with Image.open(before) as small, Image.open(after) as large:
                assert large.format == "JPEG" and max(large.size) == 400
                assert large.resize(small.size).getpixel((9, 9)) != (0, 0, 0)
                assert large.width / large.height == pytest.approx(small.width / small.height, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--enlarge", 8), "--enlarge must be at least 16, got 8"),
        (("--data-dir", "no/such/folder"), "error: no such data folder: no/such/folder"),
        (("--data-dir", "hf://datasets/a/b"), "error: the benchmark compares with loops that read folders"),
        (("--repeats", 0), "--repeats must be at least 1, got 0"),
        (("--recipes", "probe"), "--recipes must include chapter"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(wrong, message, tmp_path):
    done = run("python", ROOT / "scripts/benchmark.py", "--output-dir", tmp_path / "bench", *wrong)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and message in printed and "Traceback" not in printed, printed
