"""Runs that are killed, stopped, or hindered, and how they go on."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from conftest import ROOT, TINY_MODEL, begin, run
from faults import Faults, exit_code_in_fork
from test_engine import TWO_PROCESSES

from hotdog_hf.config import parse_train_config
from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.errors import UserError
from hotdog_hf.training import checkpoint, engine, launch, loop
from hotdog_hf.training.job import build
from hotdog_hf.training.run_dir import check_same_run, resume_command
from hotdog_hf.training.state import Progress, TrainState

# Kills of the whole process group in each setting; more by HOTDOG_KILLS=20.
KILLS = int(os.environ.get("HOTDOG_KILLS", "2"))
# In a whole run, a kill before one in so many changes of the disk; before each by HOTDOG_EVERY_FAULT=1.
EVERY_FAULT = int(os.environ.get("HOTDOG_EVERY_FAULT", "7"))
FLAGS = ("--epochs", 5, "--batch-size", 4, "--momentum", 0.9, "--schedule", "cosine", "--learning-rate", 1e-4)
EVERY_STEP = ("--checkpoint-every", 1, "--resume", "auto")


def numbers_of(run_dir):
    """The run's metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "train_seconds", "examples_per_second", "loading_seconds", "computing_seconds")
    clock += ("evaluating_seconds", "share_of_limit")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


class StopAfter:
    """Stands for a signal that arrives in the given training step, counted from the start of the script."""

    def __init__(self, steps):
        self.steps = steps

    @property
    def number(self):  # train.py asks once after every step, and after every batch of an evaluation
        self.steps -= sys._getframe(2).f_code.co_name != "_gather"
        return signal.SIGTERM if self.steps == 0 else 0


def train_here(weights, data_dir, run_dir, *flags, stop=None, draws=False):
    """Train as the fixture `train` does, but in this process, which costs no imports.

    Without figures, unless it `draws` them: they take half of the time.
    """
    words = ["--data-dir", data_dir, "--output-dir", run_dir, "--model", TINY_MODEL, "--weights", weights]
    words += ["--image-size", 64, "--batch-size", 8, *flags]
    config = parse_train_config([str(word) for word in words])
    accelerator = launch.build_accelerator(config.run.precision, num_threads=1)
    with contextlib.nullcontext() if draws else mock.patch.object(loop, "draw_figures", lambda *_: None):
        finished = loop.train(config, accelerator, stop or SimpleNamespace(number=0))
    assert finished == (None if stop else run_dir)


def assert_same_run(run_dir, reference):
    assert numbers_of(run_dir) == numbers_of(reference)
    ours, theirs = (
        safetensors.torch.load_file(folder / "model/model.safetensors") for folder in (run_dir, reference)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (run_dir / "predictions.csv").read_bytes() == (reference / "predictions.csv").read_bytes()


@pytest.fixture(scope="module")
def reference(train, photos_dir, tmp_path_factory):
    """The undisturbed run."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    done = train(photos_dir, run_dir, *FLAGS)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def start(photos_dir, tiny_weights):
    """Start a training script in a process group of its own, without waiting; all are killed at the end."""
    started = []

    def start_train(run_dir, *flags, launcher=(sys.executable,), data_dir=photos_dir):
        script = (ROOT / "scripts/train.py", "--data-dir", data_dir, "--output-dir", run_dir)
        model = ("--model", TINY_MODEL, "--weights", tiny_weights, "--image-size", 64, "--num-threads", 1)
        process = begin(*launcher, *script, *model, *flags)
        started.append(process)
        return process

    yield start_train
    for process in started:
        kill_group(process)


def kill_group(process):
    """Kill -9 the process and its group; processes that a launcher puts into other groups go as well."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        child.kill()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process, seconds=120):
    """Wait until `condition()` holds or the process has ended; say which."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    raise AssertionError("timed out")


def newest(run_dir):
    found = checkpoint.latest(run_dir)
    return found and found.name


@pytest.mark.parametrize(
    ("launcher", "workers"), [((sys.executable,), 0), ((sys.executable,), 2), (TWO_PROCESSES, 0)]
)
def test_a_run_killed_at_any_moment_goes_on_to_the_very_bit(
    start, train, photos_dir, reference, tmp_path, launcher, workers
):
    if launcher == TWO_PROCESSES:
        reference = tmp_path / "reference"
        assert train(photos_dir, reference, *FLAGS, launcher=launcher).returncode == 0
    run_dir, kills, chance = tmp_path / "run", 0, random.Random(workers)
    flags = (*FLAGS, *EVERY_STEP, "--num-workers", workers)
    while True:
        process, before = start(run_dir, *flags, launcher=launcher), newest(run_dir)
        # A moment after the first new checkpoint: in a step, in a checkpoint's writing, in an evaluation.
        if not wait_for(lambda before=before: newest(run_dir) != before, process) or kills == KILLS:
            break
        time.sleep(chance.uniform(0, 0.5))
        kill_group(process)
        kills += 1
    out, err = process.communicate()
    assert process.returncode == 0, err
    print(f"{kills} kills, each resumed")
    assert kills == 0 or "resumed from" in out
    assert_same_run(run_dir, reference)
    assert len(list((run_dir / "checkpoints").iterdir())) <= 3, "two are kept, and one may be half written"


def test_a_whole_run_is_killed_before_changes_of_the_disk(
    tiny_weights, photos_dir, tmp_path, monkeypatch, capfd
):
    """From the folder's making to the model card; test_checkpoint.py has every change that matters.

    All starts are forks of one process that has the photos and the network ready.
    """
    flags = ("--recipe", "frozen", "--epochs", 2, "--checkpoint-every", 2, "--keep-checkpoints", 1)
    faults, job = Faults(monkeypatch), built(tiny_weights, photos_dir, *flags)
    monkeypatch.setattr(
        loop.plots, "plot_curves", lambda *_: None
    )  # the slowest, and nothing depends on them
    monkeypatch.setattr(loop.plots, "plot_samples", lambda *_: None)

    def start(run_dir, number=None, resume=None):
        def run_here():
            set_seed(0)
            run_config = dataclasses.replace(job.config.run, output_dir=str(run_dir), resume=resume)
            ready = dataclasses.replace(job, config=dataclasses.replace(job.config, run=run_config))
            with monkeypatch.context() as patch, faults.before(number, faults.exit) as changes:
                patch.setattr(loop, "build", lambda *_: ready)
                loop.train(ready.config, job.accelerator, SimpleNamespace(number=0))
            (tmp_path / "changes").write_text("\n".join(changes))

        return exit_code_in_fork(run_here)

    assert start(tmp_path / "whole") == 0, capfd.readouterr().err
    total = len((tmp_path / "changes").read_text().splitlines())
    numbers = range(1, total + 1, EVERY_FAULT)
    for number in numbers:
        run_dir = tmp_path / str(number)
        assert start(run_dir, number) == 77
        assert start(run_dir, resume="auto") == 0, capfd.readouterr().err
        assert_same_run(run_dir, tmp_path / "whole")
        shutil.rmtree(run_dir)
    print(f"{len(numbers)} of {total} faults, as many identical ends")


def built(weights, data_dir, *flags):
    """A training that is ready to begin."""
    words = ["--data-dir", data_dir, "--model", TINY_MODEL, "--weights", weights, "--image-size", 64]
    config = parse_train_config([str(word) for word in (*words, "--batch-size", 8, *flags)])
    return build(config, launch.build_accelerator(config.run.precision, num_threads=1))


def test_each_process_has_random_numbers_of_its_own_for_dropout(tiny_weights, photos_dir, monkeypatch):
    states = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        built(tiny_weights, photos_dir)
        states.append(torch.get_rng_state())
    assert torch.equal(states[1], states[2]) and not torch.equal(states[0], states[1])


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_starts(tiny_weights, photos_dir, tmp_path):
    flags = ("--recipe", "frozen", "--epochs", 2)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, stop=StopAfter(6))
    file = checkpoint.latest(tmp_path / "run") / "state.json"
    content = json.loads(file.read_text())
    first = content["progress"]["run_seconds"]
    assert 0 < first < 100
    content["progress"]["run_seconds"] = 1000.0  # as if the first start had been long
    file.write_text(json.dumps(content))
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, "--resume", "auto")
    final = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert 1000 < final["seconds"] < 1100


def test_a_checkpoint_of_an_older_version_is_resumed(tiny_weights, photos_dir, tmp_path):
    """Its progress had no seconds of the whole run, its optimizer had said it is not fused."""
    flags = ("--epochs", 2, "--momentum", 0.9)
    train_here(tiny_weights, photos_dir, tmp_path / "undisturbed", *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, stop=StopAfter(6))
    file = checkpoint.latest(tmp_path / "run") / "state.json"
    content = json.loads(file.read_text())
    del content["progress"]["run_seconds"]
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = False
    file.write_text(json.dumps(content))
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_results_are_written_before_the_speed_is_measured(
    tiny_weights, photos_dir, tmp_path, monkeypatch, capsys
):
    """It takes the memory of a second network."""
    here, written = tmp_path / "run", {}

    def measure(*_):
        written["files"] = {path.name for path in (*here.iterdir(), *(here / "model").iterdir())}
        written["rows"] = numbers_of(here)
        raise torch.OutOfMemoryError("no room for a copy")

    monkeypatch.setattr(engine, "measure_speed", measure)
    train_here(tiny_weights, photos_dir, here, "--epochs", 1)
    assert {"predictions.csv", "README.md", "metrics.jsonl"} <= written["files"]
    assert written["rows"][-1]["final"] and written["rows"] == numbers_of(here)
    assert "was not measured: not enough memory" in capsys.readouterr().out


@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_the_average_of_the_weights_goes_on_to_the_very_bit(tiny_weights, photos_dir, tmp_path, stop_after):
    """Steps 1-4 are epoch 1, 5-8 epoch 2; the saved model is the average."""
    flags = ("--epochs", 2, "--learning-rate", 1e-3, "--ema-decay", 0.9)
    train_here(tiny_weights, photos_dir, tmp_path / "undisturbed", *flags)
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, stop=StopAfter(stop_after))
    assert newest(tmp_path / "run") == f"step-{stop_after:08}"
    train_here(tiny_weights, photos_dir, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    state = safetensors.torch.load_file(checkpoint.latest(tmp_path / "run") / "state.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "run/model/model.safetensors")
    assert torch.equal(saved["fc.weight"], state["average.module.fc.weight"])
    assert not torch.equal(saved["fc.weight"], state["model.fc.weight"])


def test_an_average_follows_weights_and_statistics_by_its_formula():
    from book_loop import network

    from hotdog_hf.training import optim

    assert optim.build_average(network("train"), decay=0) is None
    net = network("train").train()
    average, expected = optim.build_average(net, decay=0.75), None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        net(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
        now = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}
        old = expected or now
        expected = {name: 0.75 * old[name] + 0.25 * value for name, value in now.items()}
    ours = average.module.state_dict()
    assert "bn1.running_mean" in expected and not torch.equal(ours["fc.weight"], now["fc.weight"])
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_an_average_keeps_the_indices_of_a_networks_positions():
    """Averaged and cut to whole numbers, some of them would be one less."""
    from hotdog_hf.training import optim

    net = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1,), num_heads=(1,))
    average = optim.build_average(net, decay=0.95)
    for _ in range(3):
        average.update_parameters(net)
    indices = dict(net.named_buffers())
    assert "layers.0.blocks.0.attn.relative_position_index" in indices
    assert all(torch.equal(value, indices[name]) for name, value in average.module.named_buffers())


@pytest.fixture
def bf16_accelerator():
    """An accelerator in another precision than that of the other tests in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield launch.build_accelerator("bf16", num_threads=1)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_average_is_judged_in_the_runs_own_precision(bf16_accelerator, dataset):
    from book_loop import network

    from hotdog_hf.training import optim

    net = network("train")
    average = optim.build_average(net, decay=0.5)
    loader = bf16_accelerator.prepare(loaders.eval_loader(dataset, 8))
    prepared, _ = engine.predict(bf16_accelerator, bf16_accelerator.prepare(net), loader)
    averaged, _ = engine.predict(bf16_accelerator, average.module, loader)
    assert torch.equal(averaged, prepared)


@pytest.fixture
def dataset(photos_dir):
    config = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return loaders.PhotoDataset(load_photos(photos_dir)["train"], transforms.train_transform(config), seed=1)


def test_an_evaluation_keeps_no_memory_of_loader_processes(dataset):
    """Each piece of it is an open file, of which a process may have 1,024."""
    files, accelerator = [], Accelerator(cpu=True)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    net.register_forward_hook(lambda *_: files.append(psutil.Process().num_fds()))
    loader = accelerator.prepare(loaders.eval_loader(dataset, 1, num_workers=1))
    assert len(engine.predict(accelerator, net, loader)[1]) == len(files) == 25
    assert max(files) - files[5] < 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_the_rest_of_an_epoch_has_the_same_photos_and_pixels(dataset, workers, rank, world_size):
    loader = loaders.train_loader(dataset, 4, rank=rank, world_size=world_size, num_workers=workers)
    loader.batch_sampler.seek(epoch=3)
    whole = list(loader)
    for step in (0, 1, len(whole) - 1, len(whole)):
        loader.batch_sampler.seek(epoch=3, first_step=step)
        rest = list(loader)
        assert len(rest) == len(whole) - step == len(loader.batch_sampler.step_sizes())
        for ours, theirs in zip(rest, whole[step:], strict=True):
            assert ours["index"].tolist() == theirs["index"].tolist()
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_stops_after_the_step_and_the_printed_command_goes_on(
    start, reference, tmp_path, number, code
):
    run_dir = tmp_path / "run"
    process = start(run_dir, *FLAGS, "--num-workers", 2)
    assert wait_for(lambda: newest(run_dir), process)
    os.killpg(process.pid, number)  # as a terminal does: workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "stopping after the current step" in err and "Traceback" not in err
    [command] = re.findall(r"resume with: python (.*)", out)
    done = run("python", *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_at_once(number):
    """Even if no step ends; but not what comes within a second, which a terminal and a launcher both send."""

    def hang(signals, seconds_later):
        stop = launch.StopSignal()
        for _ in range(signals):
            os.kill(os.getpid(), number)
            assert stop.number == number and stop.exit_code == 128 + number
            stop.time -= seconds_later

    assert exit_code_in_fork(lambda: hang(1, seconds_later=2)) == 0
    assert exit_code_in_fork(lambda: hang(3, seconds_later=0)) == 0
    assert exit_code_in_fork(lambda: hang(2, seconds_later=2)) == -number


@pytest.mark.parametrize(
    ("flags", "launcher", "message"),
    [
        (("--momentum", 0.5), ("python",), "--momentum was 0.9, is 0.5. Start a new run"),
        (("--seed", 1), ("python",), "--seed was 0, is 1"),
        (("--epochs", 6), ("python",), "--epochs was 5, is 6. Add --resume-anyway"),
        ((), TWO_PROCESSES, "1 processes were used, now 2"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_named(
    train, photos_dir, reference, tmp_path, flags, launcher, message
):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    given = [
        value for pair in zip(FLAGS[::2], FLAGS[1::2], strict=True) if pair[0] not in flags for value in pair
    ]
    done = train(photos_dir, run_dir, *given, *flags, "--resume", "auto", launcher=launcher)
    assert done.returncode != 0 and message in done.stderr
    assert numbers_of(run_dir) == numbers_of(reference)


def test_more_epochs_go_on_when_told_to(train, photos_dir, reference, tmp_path):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    flags = ("--epochs", 6, *FLAGS[2:], "--resume", "auto", "--resume-anyway")
    done = train(photos_dir, run_dir, *flags)
    assert done.returncode == 0, done.stderr
    assert [row.get("epoch") for row in numbers_of(run_dir)] == [1, 2, 3, 4, 5, 6, None]
    assert numbers_of(run_dir)[:5] == numbers_of(reference)[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "train/hotdog/003.png").unlink(),
            r"1 photos differ, first train/hotdog/003\.png \(removed\)",
        ),
        (
            lambda f: shutil.copy(f / "test/hotdog/000.png", f / "test/hotdog/x.png"),
            r"hotdog/x\.png \(added\)",
        ),
        (lambda f: os.utime(f / "train/hotdog/003.png", (1, 1)), r"hotdog/003\.png \(changed\)"),
    ],
)
def test_other_photos_are_not_gone_on_with(photos_dir, tmp_path, change, message):
    folder = shutil.copytree(photos_dir, tmp_path / "photos")
    described = {"config": {"epochs": 1}, "num_processes": 1, "precision": "no"}
    before = described | {"photos": Photos(load_photos(folder), folder).manifest()}
    check_same_run(before, before, anyway=False)
    change(folder)
    now = described | {"photos": Photos(load_photos(folder), folder).manifest()}
    with pytest.raises(UserError, match=message):
        check_same_run(before, now, anyway=True)


def test_a_validation_split_cut_by_an_older_rule_is_not_resumed():
    before = {"config": {}, "num_processes": 1, "precision": "no", "photos": {}}
    check_same_run(before, before | {"cut_by_content": False}, anyway=False)
    with pytest.raises(UserError, match="cut off by another rule: train has copies"):
        check_same_run(before, before | {"cut_by_content": True}, anyway=True)


def test_a_run_that_did_not_know_a_knob_yet_had_its_default():
    before = {"config": {}, "num_processes": 1, "precision": "no", "photos": {}}
    check_same_run(before, before | {"config": {"class_weights": "none"}}, anyway=False)
    with pytest.raises(UserError, match="--class-weights was none, is balanced"):
        check_same_run(before, before | {"config": {"class_weights": "balanced"}}, anyway=True)


def test_another_precision_is_not_gone_on_with():
    before = {"config": {}, "num_processes": 1, "precision": "fp16", "photos": {}}
    with pytest.raises(UserError, match="the precision was fp16, is no"):
        check_same_run(before, before | {"precision": "no"}, anyway=True)


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "2"}, "accelerate launch --config_file accelerate_config.yaml --num_processes 2"),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "accelerate launch --config_file configs/fsdp.yaml --num_processes 2",
        ),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"},
            "accelerate launch --config_file configs/two_nodes.yaml --num_processes 4 --machine_rank 0"
            " --main_process_ip node0",
        ),
    ],
)
def test_the_command_that_goes_on_launches_as_before(monkeypatch, env, launcher):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["scripts/train.py", "--epochs", "3", "--resume", "x"])
    assert (
        resume_command(Path("runs/it"))
        == f"{launcher} scripts/train.py --epochs 3 --output-dir runs/it --resume auto"
    )


def test_two_runs_into_one_folder_at_once_are_refused(start, train, photos_dir, tmp_path):
    process = start(tmp_path / "run", "--epochs", 100000)
    assert wait_for(lambda: newest(tmp_path / "run"), process)
    done = train(photos_dir, tmp_path / "run", "--epochs", 100000, "--batch-size", 128, "--resume", "auto")
    assert done.returncode == 2 and "another process is running in" in done.stderr


@pytest.mark.parametrize(
    ("resume", "output_dir", "message"),
    [
        ("auto", None, "--resume auto needs --output-dir"),
        ("{tmp}", None, "no checkpoint there"),
        ("{run}", "{tmp}", "leave out --output-dir"),
    ],
)
def test_what_cannot_be_resumed_is_said(reference, tmp_path, resume, output_dir, message):
    resume, output_dir = (
        value and value.format(tmp=tmp_path, run=reference) for value in (resume, output_dir)
    )
    with pytest.raises(UserError, match=message):
        checkpoint.find(resume, output_dir)


def test_a_checkpoint_is_found_by_run_by_folder_and_by_auto(reference):
    newest_one = checkpoint.latest(reference)
    for resume, output_dir in ((str(reference), None), (str(newest_one), None), ("auto", str(reference))):
        assert checkpoint.find(resume, output_dir) == newest_one
    assert checkpoint.find("auto", str(reference / "new")) is None and checkpoint.find(None, None) is None


def test_a_checkpoint_holds_no_pickle(reference):
    assert {path.name for path in checkpoint.latest(reference).iterdir()} == {
        "state.safetensors",
        "state.json",
    }


def test_a_loss_that_is_not_finite_stops_with_step_rates_and_photos(train, photos_dir, tmp_path):
    done = train(photos_dir, tmp_path / "run", "--learning-rate", 1e20, "--epochs", 2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert re.match(
        r"error: epoch 1, after \d+ steps: the loss became (nan|inf) at learning rates from 1e\+20 to", line
    )
    assert ".png" in line and "Last good checkpoint: none" in line
    assert checkpoint.latest(tmp_path / "run") is None


def test_weights_that_the_last_step_of_an_epoch_broke_stop_the_run_too(train, photos_dir, tmp_path):
    done = train(photos_dir, tmp_path / "run", "--learning-rate", 1e30, "--batch-size", 1000, "--epochs", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "epoch 1, after 1 steps: the network's output became NaN on" in done.stderr
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_photo_that_becomes_unreadable_is_named_and_the_steps_before_are_kept(
    train, photos_dir, tmp_path, split
):
    folder = shutil.copytree(photos_dir, tmp_path / "photos")
    # Found good by the check, whose cache goes by size and time, and broken since.
    assert run("python", ROOT / "scripts/check_data.py", folder, cwd=tmp_path).returncode in (0, 1)
    broken = sorted((folder / split / "hotdog").iterdir())[-1]
    content, times = broken.read_bytes(), broken.stat()
    broken.write_bytes(b"x" * len(content))
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = train(folder, tmp_path / "run", "--epochs", 2)
    assert done.returncode == 2 and f"cannot read {broken}" in done.stderr
    assert str(checkpoint.latest(tmp_path / "run")) in done.stderr
    broken.write_bytes(content)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = train(folder, tmp_path / "run", "--epochs", 2, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    train(folder, tmp_path / "undisturbed", "--epochs", 2)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_024_000, 1_024_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_good(train, photos_dir, tmp_path):
    """A limit on file sizes stands for the full disk: the first write beyond it fails."""
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED)
    done = train(photos_dir, tmp_path / "run", *FLAGS, launcher=("python", limited))
    err = done.stderr
    assert done.returncode == 2 and "Traceback" not in err
    assert "cannot write" in err and str(tmp_path / "run") in err
    assert checkpoint.latest(tmp_path / "run") is None


def test_a_dying_process_ends_all_within_seconds_and_is_named(start, tmp_path):
    launcher = start(tmp_path / "run", "--epochs", 100000, launcher=TWO_PROCESSES)
    assert wait_for(lambda: newest(tmp_path / "run"), launcher)
    _, second = psutil.Process(launcher.pid).children()
    second.kill()
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and re.search(r"rank\s*: 1 ", err)
    assert not second.is_running()


def test_the_random_state_comes_back(tmp_path):
    import numpy as np
    from book_loop import network

    from hotdog_hf.training import optim

    accelerator = launch.build_accelerator("no", num_threads=1)
    net = network("train")
    groups = optim.parameter_groups(net, learning_rate=1e-3, head_lr_mult=1)
    net, optimizer = accelerator.prepare(net, optim.build_optimizer(groups, "adamw"))
    schedule = optim.build_schedule(optimizer, "cosine", 10)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    schedule.step()
    progress = Progress(total_steps=1)
    state = TrainState(net, optimizer, schedule, None, progress, torch.ones(3))
    folder = checkpoint.save(tmp_path, accelerator, state, keep=1)
    state.progress, state.totals = Progress(), torch.zeros(3)
    expected = random.random(), np.random.rand(), torch.rand(1), optimizer.param_groups[0]["lr"]
    moments = {key: value.clone() for key, value in optimizer.state_dict()["state"][0].items()}
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    schedule.step()
    checkpoint.load(checkpoint.read(folder), accelerator, state)
    assert (random.random(), np.random.rand(), torch.rand(1), optimizer.param_groups[0]["lr"]) == expected
    assert state.progress.total_steps == 1 and state.totals.tolist() == [1, 1, 1]
    restored = optimizer.state_dict()["state"][0]
    assert all(torch.equal(restored[key], value) for key, value in moments.items())
    assert isinstance(folder, Path)
