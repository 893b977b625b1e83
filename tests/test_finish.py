"""The end of a run: evaluations that are stopped, the numbers of the card, and what is written first."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import TINY_MODEL
from test_resume import assert_same_run, newest, numbers_of, train_here

from hotdog_hf.classification import ClassificationReport
from hotdog_hf.config import RunConfig, parse_train_config
from hotdog_hf.data import loaders
from hotdog_hf.data.splits import load_photos
from hotdog_hf.data.transforms import eval_transform
from hotdog_hf.errors import UserError
from hotdog_hf.model import saved
from hotdog_hf.model.network import data_config_of, label_names_of
from hotdog_hf.model.source import load_source
from hotdog_hf.training import card, engine, launch, records


@pytest.fixture
def own_accelerator():
    """Leave the accelerator of the other tests in this process out of it: precision is chosen once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def scores_of_a_plain_loader(folder, data_dir):
    """The test scores of a saved model by a plain loop in float32."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    rows = load_photos(data_dir)["test"]
    photo_set = loaders.PhotoDataset(rows, eval_transform(data_config_of(net)))
    pixels = torch.stack([row["pixel_values"] for row in photo_set])
    with torch.no_grad():
        probabilities = net(photo_set.network_input(pixels)).softmax(dim=1)
    return ClassificationReport(label_names_of(net)).compute(
        predictions=probabilities.numpy(), references=photo_set.labels
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--learning-rate", 0.003),
        ("--recipe", "frozen", "--learning-rate", 0.01),
        ("--ema-decay", 0.5, "--val-fraction", 0.2, "--keep", "best"),
    ],
    ids=["trained", "frozen", "averaged"],
)
def test_in_bf16_the_final_numbers_are_those_of_every_loader(
    own_accelerator, tiny_weights, photos_dir, tmp_path, flags
):
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--precision", "bf16", "--epochs", 2, *flags)
    final = numbers_of(tmp_path / "run")[-1]
    plain = scores_of_a_plain_loader(tmp_path / "run/model", photos_dir)
    assert final["test_loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert final["test_confusion_matrix"] == plain["confusion_matrix"]


def test_in_bf16_the_output_layer_computes_in_float32(own_accelerator, tiny_weights, photos_dir, tmp_path):
    net = load_source(TINY_MODEL, str(tiny_weights))
    from hotdog_hf.model.network import replace_head
    from hotdog_hf.model.source import source_data_config

    net = replace_head(net, ["a", "b"], source_data_config(net, "chapter", 64))
    assert repr(net.get_classifier()) == "Linear(in_features=96, out_features=2, bias=True)"
    accelerator = launch.build_accelerator("bf16", num_threads=1)
    images = torch.randn(2, 3, 64, 64)
    with accelerator.autocast():
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        logits = net(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    head = net.get_classifier()
    expected = torch.nn.functional.linear(features.float(), head.weight, head.bias)
    assert torch.equal(logits, expected)


class StopInEvaluation:
    """Stands for a signal that arrives in the given evaluation of a run."""

    def __init__(self, monkeypatch, evaluation):
        self.number, predict = 0, engine.predict

        def told_meanwhile(*args):
            nonlocal evaluation
            evaluation -= 1
            self.number = 15 if evaluation == 0 else 0
            return predict(*args)

        monkeypatch.setattr(engine, "predict", told_meanwhile)


@pytest.mark.parametrize(
    ("flags", "evaluation", "checkpoint"),
    [
        (("--momentum", 0.9), 1, "step-00000004"),
        # The third evaluation is that of the saved model, whose weights are in no checkpoint.
        (("--val-fraction", 0.2, "--ema-decay", 0.5, "--keep", "best"), 3, "step-00000006"),
        # The first is that of a solved head.
        (("--recipe", "light", "--epochs", 2, "--batch-size", 8, "--val-fraction", 0.2), 1, "step-00000000"),
    ],
)
def test_a_signal_in_an_evaluation_stops_it_and_the_run_resumes_to_the_very_bit(
    tiny_weights, photos_dir, tmp_path, monkeypatch, flags, evaluation, checkpoint
):
    flags = ("--epochs", 2, *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "undisturbed", *flags)
    with monkeypatch.context() as patched:
        stop = StopInEvaluation(patched, evaluation)
        train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, stop=stop)
    assert newest(tmp_path / "run") == checkpoint
    assert not (tmp_path / "run/predictions.csv").exists()
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize(("processes", "device", "asked"), [(1, "cuda", 20), (2, "cpu", 20), (2, "cuda", 2)])
def test_several_gpus_are_asked_to_stop_at_every_tenth_step(monkeypatch, processes, device, asked):
    questions = []
    monkeypatch.setattr(launch, "any_process", lambda _, flag: questions.append(flag) or flag)
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    stopped = [launch.stop_requested(accelerator, SimpleNamespace(number=15), step) for step in range(1, 21)]
    assert len(questions) == asked == sum(stopped)


def test_what_a_run_found_is_written_before_its_speed_is_measured(
    tiny_weights, photos_dir, tmp_path, monkeypatch, capsys
):
    """A copy of a network may not fit into a GPU beside it."""

    def no_memory(*_):
        names = {path.name for path in (tmp_path / "run").iterdir()} | {
            path.name for path in (tmp_path / "run/model").iterdir()
        }
        assert {"predictions.csv", "README.md", "model.safetensors"} <= names
        assert numbers_of(tmp_path / "run")[-1]["final"]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "measure_speed", no_memory)
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 1)
    said = capsys.readouterr().out
    assert "was not measured: not enough memory" in said and "photos decoded in memory" not in said
    final = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert "share_of_limit" not in final


def test_a_run_is_not_resumed_with_fewer_epochs_than_it_has_finished(tiny_weights, photos_dir, tmp_path):
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 3)
    anyway = ("--resume", "auto", "--resume-anyway")
    with pytest.raises(UserError, match="has finished 3 epochs; give --epochs 4 or more"):
        train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 2, *anyway)
    assert json.loads((tmp_path / "run/config.json").read_text())["optim"]["epochs"] == 3
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 3, *anyway)
    train_here(tiny_weights, photos_dir, tmp_path / "run", "--epochs", 4, *anyway)
    assert [row.get("epoch") for row in numbers_of(tmp_path / "run")] == [1, 2, 3, 4, None]


def test_a_seed_that_numpy_refuses_is_refused_at_once():
    assert RunConfig(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ValueError, match="--seed must be from 0 to 4294967295, got 4294967296"):
        RunConfig(seed=2**32)


def test_a_saved_vision_transformer_is_fitted_to_another_input_size(photos_dir, tmp_path):
    net = timm.create_model("test_vit", num_classes=2)
    net.pretrained_cfg |= {"label_names": ["hotdog", "not-hotdog"]}
    saved.save_model(net, tmp_path / "vit")
    size = 2 * net.pretrained_cfg["input_size"][-1]
    fitted = load_source("test_vit", str(tmp_path / "vit"), size)
    assert fitted(torch.zeros(1, 3, size, size)).shape == (1, 2)
    assert torch.equal(fitted.head.weight, net.head.weight)
    assert load_source("test_vit", str(tmp_path / "vit"), None).pos_embed.shape == net.pos_embed.shape


def test_a_run_evaluated_only_at_the_end_is_the_same_run(tiny_weights, photos_dir, tmp_path, capsys):
    flags = ("--epochs", 2, "--frozen-share", 0.5, "--head-init", "probe")
    train_here(tiny_weights, photos_dir, tmp_path / "all", *flags)
    capsys.readouterr()
    train_here(tiny_weights, photos_dir, tmp_path / "end", *flags, "--evaluate", "end", draws=True)
    said = capsys.readouterr().out
    weights = [tmp_path / f"{name}/model/model.safetensors" for name in ("all", "end")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    every, end = (numbers_of(tmp_path / name) for name in ("all", "end"))
    assert every[-1] == end[-1] and every[-2] == end[-2]
    assert [("test_loss" in row, row["train_loss"]) for row in end[:-2]] == [
        (False, row["train_loss"]) for row in every[:-2]
    ]
    assert said.count("test loss") == 1 and (tmp_path / "end/curves.png").stat().st_size > 5000
    before, after = safetensors.torch.load_file(tiny_weights), safetensors.torch.load_file(weights[0])
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    stages = {name.split(".")[0] for name in before}
    assert stages - {name.split(".")[0] for name in before.keys() - same} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
    }


@pytest.mark.parametrize(
    ("flags", "device", "loading", "hint"),
    [
        ([], "cuda", 6.0, True),
        ([], "cuda", 4.0, False),
        ([], "cpu", 6.0, False),
        (["--crop-on-device"], "cuda", 6.0, False),
        (["--augmentation", "none"], "cuda", 6.0, False),
    ],
)
def test_a_gpu_that_waited_for_photos_is_told_of_crops_on_the_device(flags, device, loading, hint):
    final = {"loading_seconds": loading, "computing_seconds": 5.0}
    line = records.waiting_hint(final, parse_train_config(flags), device)
    assert ("--crop-on-device" in line) if hint else line is None


def test_the_last_lines_say_where_everything_is_and_what_to_do_next():
    final = {"train_loss": 0.5, "train_accuracy": 0.75, "test_accuracy": 0.7, "examples_per_second": 12.3}
    final |= {"loading_seconds": 1, "computing_seconds": 20, "evaluating_seconds": 3, "seconds": 40}
    told = records.describe_final(final | {"share_of_limit": 0.9}, Path("runs/a"), "1 x cpu").splitlines()
    assert told[1] == "12.3 examples/sec on 1 x cpu, 90% of the speed with all photos decoded in memory"
    assert told[2] == "40 s in all, of which 1 loading photos, 20 training, 3 evaluating"
    assert all(len(line) <= 100 for line in told)
    assert "report:   python scripts/report.py runs/a/model" in told
    told = records.describe_final(final, Path("my runs/a"), "1 x cpu").splitlines()
    assert [shlex.split(line)[3] for line in told[-2:]] == ["my runs/a/model"] * 2
    final |= {"test_loss": 0.3, "test_calibration_error": 0.02}
    final |= {"test_uncalibrated_loss": 0.4, "test_uncalibrated_calibration_error": 0.05}
    for temperature, words in (
        (0.8, "calibrated with temperature 0.800: test loss 0.4000 -> 0.3000, calibration error 0.0500 ->"),
        (1.0, "probabilities are as trained (temperature 1): test calibration error 0.0200"),
    ):
        told = records.describe_final(final | {"temperature": temperature}, Path("runs/a"), "1 x cpu")
        assert told.splitlines()[1].startswith(words)


def test_epoch_0_is_said_to_be_the_fitted_output_layer():
    row = {"train_loss": 0.5, "train_accuracy": 0.75, "examples_per_second": 12.3}
    told = [records.describe_epoch(row | {"epoch": epoch}, "test") for epoch in (0, 1)]
    assert told[0].startswith("epoch 0 (the fitted output layer): train loss 0.500, train acc 0.750")
    assert told[1].startswith("epoch 1: train loss 0.500")


def test_the_cards_interval_has_a_width_even_if_no_photo_is_wrong():
    scores, counts = {"test_confusion_matrix": [[6, 0], [0, 5]]}, {"test": {"a": 6, "b": 5}}
    limits = card._limits(["a", "b"], counts, scores, None)
    assert "The 95 % interval of its accuracy is 0.741 to 1.000 (Wilson)" in limits
