import os
import sys

import book_loop
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run

from hotdog_hf.data import loaders
from hotdog_hf.errors import UserError
from hotdog_hf.training import engine, launch

TWO_PROCESSES = (
    "accelerate", "launch", "--config_file", ROOT / "accelerate_config.yaml", "--num_processes", 2,
)  # fmt: skip


def assert_same_weights(path, net, tolerance=1e-6):
    ours, plain = safetensors.torch.load_file(path), net.state_dict()
    assert set(ours) == set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)


def test_our_loop_trains_as_the_books(tmp_path):
    book_loop.main(tmp_path / "ours.safetensors")
    trained = book_loop.plain_loop("train")
    assert_same_weights(tmp_path / "ours.safetensors", trained)
    untrained = book_loop.network("train").state_dict()
    assert not torch.allclose(trained.state_dict()["fc.weight"], untrained["fc.weight"])


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_two_processes_train_as_the_book_does_with_one(tmp_path, accumulation_steps):
    out = tmp_path / "two.safetensors"
    done = run(*TWO_PROCESSES, ROOT / "tests/book_loop.py", out, "sum", accumulation_steps, "eval")
    assert done.stdout.startswith("2 "), done.stderr
    assert_same_weights(out, book_loop.plain_loop("eval"))


@pytest.mark.parametrize("accumulation_steps", [2, 3, 8])
def test_accumulation_changes_memory_and_nothing_else(tmp_path, accumulation_steps):
    out = tmp_path / "pieces.safetensors"
    book_loop.main(out, "sum", accumulation_steps, "eval")
    assert_same_weights(out, book_loop.plain_loop("eval"))


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_a_mean_loss_is_a_sum_with_a_rate_divided_by_the_batch(tmp_path, monkeypatch, accumulation_steps):
    """With 16 photos in batches of 8 and no decay, the mean's step at rate 8 r is the sum's at rate r."""
    monkeypatch.setattr(book_loop, "COUNT", 16)
    monkeypatch.setattr(book_loop, "WEIGHT_DECAY", 0.0)
    summed = book_loop.plain_loop("eval")
    monkeypatch.setattr(book_loop, "LEARNING_RATE", book_loop.LEARNING_RATE * 8)
    book_loop.main(tmp_path / "mean.safetensors", "mean", accumulation_steps, "eval")
    assert_same_weights(tmp_path / "mean.safetensors", summed)


class Numbered(torch.utils.data.Dataset):
    """Images of one pixel that say their own index, in `predict`'s form."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"pixel_values": torch.full((1, 1, 1), float(index)), "labels": index % 2}

    def network_input(self, pixel_values):
        return pixel_values


def test_predictions_come_in_order_one_a_photo():
    accelerator = launch.build_accelerator("no", num_threads=1)
    loader = accelerator.prepare(loaders.eval_loader(Numbered(11), 4))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2))
    probabilities, labels = engine.predict(accelerator, net, loader)
    expected = net(torch.arange(11.0)[:, None]).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)
    assert labels.tolist() == [index % 2 for index in range(11)]
    assert not net.training


def test_a_world_that_is_not_the_one_launched_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without RANK and MASTER_ADDR the process sees itself alone
    with pytest.raises(UserError, match="2 processes were asked for, but this one sees 1"):
        launch.build_accelerator("no")


def test_a_launcher_that_starts_one_process_of_two_is_an_error(photos_dir, tmp_path, train):
    done = train(
        photos_dir,
        tmp_path / "run",
        launcher=("accelerate", "launch", "--cpu", "--num_processes", "2"),
        fresh=True,  # our only sign of it is the launcher's command line
    )
    assert "error: 2 processes were asked for, but this one sees 1" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says something of CPUs")
def test_on_a_cpu_precision_is_float32_unless_asked_and_never_fp16(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert launch.precision_of(launch.build_accelerator("auto", num_threads=1)) == "no"
    for precision in ("fp16", "tf32"):
        with pytest.raises(UserError, match=f"{precision} does nothing on a CPU"):
            launch.build_accelerator(precision)
    assert os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"


def test_float32_is_float32_in_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's own default
    accelerator = launch.build_accelerator("no", num_threads=1)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert "float32" in launch.describe_hardware(accelerator)


def test_a_missing_tracker_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[wandb\]"'):
        launch.build_accelerator("no", "wandb")


def test_a_launcher_that_compiles_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="--dynamo_backend give --compile"):
        launch.build_accelerator()


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DEEPSPEED is not supported; .* configs/fsdp.yaml"):
        launch.build_accelerator()


@pytest.mark.parametrize(
    ("version", "may_shard", "precision", "message"),
    [
        ("1", True, "no", "FSDP is version 1; use fsdp_version: 2"),
        ("2", False, "no", r"only scripts/train.py shards a network"),
        ("2", True, "fp16", "fp16"),
        ("2", True, "no", "several processes: use --num_processes 2 or more"),
    ],
)
def test_pieces_that_would_not_work_are_refused(monkeypatch, version, may_shard, precision, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UserError, match=message):
        launch.build_accelerator(precision, num_threads=1, may_shard=may_shard)


def test_a_compiled_network_learns_the_same_and_keeps_its_names(
    tiny_weights, photos_dir, tmp_path, monkeypatch
):
    """Traced but not translated, which would take a compiler and a minute."""
    from test_resume import numbers_of, train_here  # which imports this module

    compiled, compile_module = [], torch.nn.Module.compile

    def traced(self):
        compiled.append(self)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        train_here(tiny_weights, photos_dir, tmp_path / name, "--epochs", 1, "--ema-decay", 0.5, *flags)
    assert len(compiled) == 1
    plain, ours = (numbers_of(tmp_path / name)[-1] for name in ("plain", "compiled"))
    assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    weights = [
        safetensors.torch.load_file(tmp_path / name / "model/model.safetensors")
        for name in ("plain", "compiled")
    ]
    assert weights[0].keys() == weights[1].keys()


FILL_TWICE = """
import resource, torch
from hotdog_hf import machine
machine.keep_freed_memory()
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(megabytes * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(2300), faults(1000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is asked for it")
def test_more_than_two_gigabytes_are_used_again_without_page_faults():
    done = run("python", "-c", FILL_TWICE)
    first, second = map(int, done.stdout.split())
    assert second < first / 100, done.stdout


def test_the_next_run_of_a_study_starts_with_a_loss_scale_of_its_own():
    accelerator = launch.build_accelerator("no", num_threads=1)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    fresh = accelerator.scaler.state_dict()
    accelerator.scaler.scale(torch.ones(1))
    accelerator.scaler.update(2.0)  # as after overflows
    assert accelerator.scaler.state_dict() != fresh
    launch.release(accelerator)
    assert accelerator.scaler.state_dict() == fresh
    accelerator.scaler = None
