import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, draw_photos, network_inputs
from PIL import Image
from test_engine import TWO_PROCESSES

from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.splits import load_photos
from hotdog_hf.model import network, saved


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chapter_run(train, photos_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "chapter"
    return train(photos_dir, run_dir, "--epochs", 2), run_dir


def test_a_run_leaves_what_the_readme_promises(chapter_run):
    done, run_dir = chapter_run
    assert done.returncode == 0, done.stderr
    records = {".lock", "checkpoints", "config.json", "identity.json", "metrics.jsonl", "predictions.csv"}
    assert {path.name for path in run_dir.iterdir()} == records | {"curves.png", "model", "samples.png"}
    first, second, final = metrics_of(run_dir)
    assert (first["epoch"], second["epoch"], final["final"]) == (1, 2, True)
    assert final["test_accuracy"] == second["test_accuracy"]
    assert np.sum(final["test_confusion_matrix"], axis=1).tolist() == [6, 5]
    assert final["seconds"] > 0 and final["examples_per_second"] > 0
    for picture in ("curves.png", "samples.png"):
        assert min(Image.open(run_dir / picture).size) > 100


def test_a_run_prints_what_the_chapter_prints(chapter_run):
    done, run_dir = chapter_run
    final = metrics_of(run_dir)[-1]
    for line in (
        "seed 0",
        "not-hotdog         12          5",
        "all                25         11",
        "ROC-AUC are computed for the class hotdog (--positive-label)",
        "source head: Linear(in_features=96, out_features=1000, bias=True)",
        "target head: Linear(in_features=96, out_features=2, bias=True)",
        "head                              194     0.0005         0.001",
        f"loss {final['train_loss']:.3f}, train acc {final['train_accuracy']:.3f}, "
        f"test acc {final['test_accuracy']:.3f}",
        f"{final['examples_per_second']:.1f} examples/sec on 1 x ",
    ):
        assert line in done.stdout


def test_the_saved_model_says_what_the_run_said(chapter_run, photos_dir):
    _, run_dir = chapter_run
    net = saved.load_model(run_dir / "model")
    rows = load_photos(photos_dir)["test"]
    test_set = loaders.PhotoDataset(rows, transforms.eval_transform(network.data_config_of(net)))
    with torch.no_grad():
        chosen = net(network_inputs(test_set)).argmax(dim=1).tolist()
    confusion = np.zeros((2, 2), int)
    np.add.at(confusion, (rows["label"][:], chosen), 1)
    assert confusion.tolist() == metrics_of(run_dir)[-1]["test_confusion_matrix"]


def weights_of(run_dir):
    return safetensors.torch.load_file(run_dir / "model/model.safetensors")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(chapter_run, train, photos_dir, tmp_path):
    first = weights_of(chapter_run[1])
    train(photos_dir, tmp_path / "same", "--epochs", 2, "--num-workers", 2)
    train(photos_dir, tmp_path / "other", "--epochs", 2, "--seed", 1)
    assert all(torch.equal(value, first[name]) for name, value in weights_of(tmp_path / "same").items())
    assert not torch.equal(weights_of(tmp_path / "other")["fc.weight"], first["fc.weight"])


def test_two_processes_count_every_photo_once(train, photos_dir, tmp_path):
    done = train(photos_dir, tmp_path / "run", "--epochs", 1, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert "2 x " in done.stdout
    final = metrics_of(tmp_path / "run")[-1]
    assert np.sum(final["test_confusion_matrix"]) == 11, "an odd number: one process has a photo more"
    assert saved.load_model(tmp_path / "run/model").num_classes == 2


def test_a_network_learns_from_scratch_and_keeps_its_best_epoch(train, photos_dir, tmp_path):
    data_flags = ("--val-fraction", 0.2, "--keep", "best", "--recipe", "scratch", "--weights", "none")
    step_flags = ("--optimizer", "adamw", "--learning-rate", 3e-3, "--loss-reduction", "mean", "--epochs", 12)
    rate_flags = ("--schedule", "cosine", "--warmup-fraction", 0.1, "--layer-decay", 0.9)
    flags = (*data_flags, *step_flags, *rate_flags, "--no-decay-norm-and-bias")
    done = train(photos_dir, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    *rows, final = metrics_of(tmp_path / "run")
    assert "test_accuracy" not in rows[0], (
        "where there is a validation split, test is looked at once, at the end"
    )
    assert max(row["validation_accuracy"] for row in rows) >= 0.8
    assert final["test_accuracy"] >= 0.8


def test_three_classes_without_a_positive_one(train, tmp_path):
    for split in ("train", "validation", "test"):
        draw_photos(tmp_path / "photos" / split, {"a": 4, "b": 4, "c": 3})
    done = train(tmp_path / "photos", tmp_path / "run", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    final = metrics_of(tmp_path / "run")[-1]
    assert np.shape(final["test_confusion_matrix"]) == (3, 3) and "test_macro_f1" in final
    assert "are computed as means over the classes" in done.stdout


def test_a_tracker_gets_the_numbers(train, photos_dir, tmp_path):
    done = train(photos_dir, tmp_path / "run", "--epochs", 1, "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/hotdog_hf"))
    events.Reload()
    assert {"train_loss", "test_accuracy"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data-dir", "no/such/folder"), "error: no such data folder: no/such/folder"),
        (("--model", "resnet81"), "error: --model 'resnet81' is not a timm model; did you mean"),
        (("--model", "test_vit"), "are no weights of test_vit"),
        (("--learning-rate", "-1"), "--learning-rate must be above 0, got -1.0"),
        (("--keep", "best"), "error: --keep best needs a validation split"),
        (("--output-dir", "/proc/no/run"), "error: --output-dir /proc/no/run cannot be written"),
        (("--output-dir", ROOT / "LICENSE"), "LICENSE is a file"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(train, photos_dir, tmp_path, flags, message):
    done = train(photos_dir, tmp_path / "run", *flags)
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def break_photos(folder):
    (folder / "train/hotdog/003.png").write_bytes(b"<html>not an image</html>")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shutil.rmtree(f / "test/hotdog"), "class 'hotdog' is in .*train but not in test"),
        (lambda f: [p.unlink() for p in (f / "train/hotdog").iterdir()], "no image in .*train/hotdog"),
        (
            lambda f: [shutil.rmtree(f / s / "hotdog") for s in ("train", "test")],
            "at least two class folders",
        ),
        (break_photos, r"1 of 36 photos cannot be used: cannot read .*train/hotdog/003\.png as an image"),
    ],
)
def test_bad_photos_are_named(train, photos_dir, tmp_path, harm, message):
    folder = shutil.copytree(photos_dir, tmp_path / "photos")
    harm(folder)
    done = train(folder, tmp_path / "run")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert re.search(message, line) and "Traceback" not in done.stderr


def test_bad_photos_are_skipped_when_told_to_and_listed(train, photos_dir, tmp_path):
    folder = shutil.copytree(photos_dir, tmp_path / "photos")
    break_photos(folder)
    done = train(folder, tmp_path / "run", "--epochs", 1, "--bad-images", "skip", launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert "\nall                24         11\n" in done.stdout
    assert json.loads((tmp_path / "run/skipped_images.json").read_text()) == [
        str(folder / "train/hotdog/003.png")
    ]


def test_two_runs_do_not_share_a_folder(chapter_run, train, photos_dir):
    done = train(photos_dir, chapter_run[1])
    assert done.returncode == 2 and "already holds a run" in done.stderr


def test_the_default_data_is_downloaded_or_the_error_says_how(train, tmp_path):
    """Without a network, in an empty folder: the chapter's address, and the way that needs none."""
    done = train("data/hotdog", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "could not get https://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip" in done.stderr
    assert "make demo" in done.stderr
