"""What a GPU does otherwise: `make test-gpu` runs it there; the CPU runs the same tests, as far as it can."""

import contextlib
import gc
import json
import re
import signal
import socket
from types import SimpleNamespace
from unittest import mock

import book_loop
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_MODEL, begin, run
from PIL import Image
from test_resume import StopAfter, assert_same_run, numbers_of
from torch.utils._python_dispatch import TorchDispatchMode

from hotdog_hf.config import OptimConfig, parse_train_config
from hotdog_hf.data import loaders, on_device
from hotdog_hf.data.images import decode_image, resize_and_crop
from hotdog_hf.data.splits import load_photos
from hotdog_hf.data.transforms import train_transform
from hotdog_hf.errors import UserError
from hotdog_hf.model import predictor
from hotdog_hf.training import engine, job, launch, loop, optim
from hotdog_hf.training.state import TrainState

GPU = pytest.mark.gpu
LEARNING = ("--optimizer", "adamw", "--loss-reduction", "mean", "--learning-rate", 1e-3)
# How far probabilities on a GPU may be from the CPU's: other orders of the same sums; 8 bits of bf16.
BOUNDS = {"no": 1e-4, "bf16": 3e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """The kind of device that everything runs on, with settings of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.param == "cpu"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield request.param
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def config_of(weights, data_dir, run_dir, *flags):
    words = ["--data-dir", data_dir, "--output-dir", run_dir, "--model", TINY_MODEL, "--weights", weights]
    return parse_train_config([str(word) for word in (*words, "--image-size", 64, "--batch-size", 8, *flags)])


def accelerator_of(config, device):
    knobs = config.run
    accelerator = launch.build_accelerator(knobs.precision, num_threads=1, deterministic=knobs.deterministic)
    assert accelerator.device.type == device
    return accelerator


def train_on(device, weights, data_dir, run_dir, *flags, stop=None):
    """Train in this process, and return the rows of its metrics."""
    config = config_of(weights, data_dir, run_dir, *flags)
    with mock.patch.object(loop, "draw_figures", lambda *_: None):  # which takes half of the time
        finished = loop.train(config, accelerator_of(config, device), stop or SimpleNamespace(number=0))
    assert finished == (None if stop else run_dir)
    return numbers_of(run_dir)


@pytest.mark.parametrize(
    ("device", "precision", "name"),
    [
        ("cpu", "no", "float32"),
        ("cpu", "bf16", "bf16"),
        pytest.param("cuda", "no", "float32", marks=GPU),
        pytest.param("cuda", "tf32", "tf32", marks=GPU),
        pytest.param("cuda", "bf16", "bf16", marks=GPU),
        pytest.param("cuda", "fp16", "fp16", marks=GPU),
    ],
    indirect=["device"],
)
def test_it_learns_in_each_precision_and_says_which(
    device, precision, name, tiny_weights, photos_dir, tmp_path, capsys
):
    flags = (*LEARNING, "--epochs", 4, "--precision", precision)
    rows = train_on(device, tiny_weights, photos_dir, tmp_path / "run", *flags)
    assert rows[-1]["test_accuracy"] > 0.9 and rows[3]["train_loss"] < rows[0]["train_loss"]
    assert re.search(rf"1 x {device} \(.*\), {name}, ", capsys.readouterr().out)


def test_on_a_gpu_the_default_is_bf16(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    monkeypatch.setattr(launch, "gpu_has_bf16", lambda: True)
    asked = []

    def stop_here(**knobs):
        asked.append(knobs)
        raise InterruptedError

    monkeypatch.setattr(launch, "Accelerator", stop_here)
    with pytest.raises(InterruptedError):
        launch.build_accelerator("auto")
    assert asked[0]["mixed_precision"] == "bf16" and not asked[0]["cpu"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--momentum", 0.9, "--gradient-accumulation-steps", 2),
        ("--optimizer", "adamw", "--ema-decay", 0.5, "--precision", "bf16"),
        ("--crop-on-device", "--num-workers", 1),
    ],
    ids=["momentum", "adamw", "crops"],
)
def test_a_run_resumes_to_the_very_bit_with_a_fused_optimizer_on_channels_last_weights(
    device, flags, tiny_weights, photos_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(optim, "use_fused", lambda _: True)
    flags = ("--epochs", 2, "--learning-rate", 1e-3, "--deterministic", *flags)
    train_on(device, tiny_weights, photos_dir, tmp_path / "undisturbed", *flags)
    train_on(device, tiny_weights, photos_dir, tmp_path / "run", *flags, stop=StopAfter(6))
    train_on(device, tiny_weights, photos_dir, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_gpu_gets_channels_last_weights_and_a_fused_optimizer(device, tiny_weights, photos_dir, tmp_path):
    config = config_of(
        tiny_weights, photos_dir, tmp_path / "run", "--optimizer", "adamw", "--precision", "no"
    )
    built = job.build(config, accelerator_of(config, device))
    built.train_loader.batch_sampler.seek(1)
    for _ in engine.train_steps(built.accelerator, built.state, built.train_loader, config.optim):
        pass
    optimizer = built.state.optimizer.optimizer
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {device == "cuda"}
    kernels = [value for value in built.net.parameters() if value.ndim == 4 and value.shape[1] > 1]
    assert kernels and all(value.is_contiguous(memory_format=torch.channels_last) for value in kernels)
    assert all(optimizer.state[value]["exp_avg"].stride() == value.stride() for value in kernels)
    assert next(built.net.parameters()).device.type == built.state.totals.device.type == device


def test_a_compiled_network_learns_the_same(device, tiny_weights, photos_dir, tmp_path, monkeypatch):
    """On the CPU traced but not translated, which would take a compiler and a minute."""
    compiled, compile_module = [], torch.nn.Module.compile

    def noted(self):
        compiled.append(self)
        compile_module(self, **({"backend": "eager"} if device == "cpu" else {}))

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    flags = (*LEARNING, "--epochs", 1, "--precision", "bf16")
    plain = train_on(device, tiny_weights, photos_dir, tmp_path / "plain", *flags)
    fast = train_on(device, tiny_weights, photos_dir, tmp_path / "compiled", *flags, "--compile")
    assert len(compiled) == 1
    assert fast[-1]["test_loss"] == pytest.approx(plain[-1]["test_loss"], abs=BOUNDS["bf16"])


def a_state(device, *, kind="sgd", ema_decay=0.0):
    """Return a small network on a device, with all that training changes."""
    net = book_loop.network("eval").to(device, memory_format=torch.channels_last)
    groups = optim.parameter_groups(net, learning_rate=1e-3, head_lr_mult=10)
    optimizer = optim.build_optimizer(groups, kind, 0.9 if kind == "sgd" else 0.0, fused=device == "cuda")
    schedule = optim.build_schedule(optimizer, "cosine", 100, 0.1)
    average = optim.build_average(net, ema_decay)
    return TrainState(net, optimizer, schedule, average, totals=torch.zeros(3, device=device))


def test_an_average_follows_the_weights_as_torchs_own(device):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    net = book_loop.network("train").to(device).train()
    ours = optim.build_average(net, decay=0.75)
    torchs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        net(torch.randn(4, 3, 32, 32, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update_parameters(net)
        torchs.update_parameters(net)
    expected = torchs.state_dict()
    assert expected.keys() == ours.state_dict().keys() and int(ours.n_averaged) == 4
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]) or not value.is_floating_point()
    assert not torch.equal(ours.module.fc.weight, net.fc.weight)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_the_loop_trains_as_the_books_on_a_cpu(device, accumulation_steps, tmp_path):
    book_loop.main(tmp_path / "ours.safetensors", "sum", accumulation_steps, "eval")
    ours, plain = safetensors.torch.load_file(tmp_path / "ours.safetensors"), book_loop.plain_loop("eval")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_a_frozen_body_gives_the_cpus_features(device, tiny_weights, photos_dir, tmp_path, monkeypatch):
    flags = ("--recipe", "probe", "--precision", "no")
    ours = train_on(device, tiny_weights, photos_dir, tmp_path / "ours", *flags)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = train_on("cpu", tiny_weights, photos_dir, tmp_path / "cpu", *flags)
    assert ours[-1]["test_loss"] == pytest.approx(on_cpu[-1]["test_loss"], abs=BOUNDS["no"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_predictions_and_report_are_the_cpus(
    device, precision, tiny_weights, photos_dir, tmp_path, monkeypatch
):
    train_on(device, tiny_weights, photos_dir, tmp_path / "run", *LEARNING, "--epochs", 1)
    folder = tmp_path / "run/model"
    if device == "cpu":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    asked = predictor.load_predictor(folder, precision)
    assert asked.leaves_cpu_free == (device == "cuda")
    photos = sorted((photos_dir / "test").glob("*/*.png"))
    images = [resize_and_crop(decode_image(str(photo)), asked.data_config) for photo in photos]
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in images]).float() / 255
    mean, std = (torch.tensor(asked.data_config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        expected = net((pixels - mean) / std).softmax(dim=1)
    ours = torch.from_numpy(asked.probabilities(torch.stack(list(map(torch.from_numpy, images))).numpy()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=BOUNDS[precision])
    if precision == "no":
        report = ("python", ROOT / "scripts/report.py", folder, "--data-dir", photos_dir)
        done = run(*report, "--output-dir", tmp_path / "report")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "report/metrics.json").read_text())
        final = numbers_of(tmp_path / "run")[-1]
        assert found["confusion_matrix"] == final["test_confusion_matrix"]


def held_bytes(device):
    """Return the memory held by tensors now; on a GPU the most that was held since the last question."""
    gc.collect()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return sum(storages.values())


def test_ten_epochs_take_the_memory_of_two(device, tiny_weights, photos_dir, tmp_path, monkeypatch):
    held, end_epoch = [], loop.end_epoch

    def noting(*args):
        evaluation = end_epoch(*args)
        held.append(held_bytes(device))
        return evaluation

    monkeypatch.setattr(loop, "end_epoch", noting)
    flags = ("--epochs", 10, "--optimizer", "adamw", "--ema-decay", 0.9)
    train_on(device, tiny_weights, photos_dir, tmp_path / "run", *flags)
    assert len(held) == 10 and held[1] > 2**20
    assert max(held[2:]) <= held[1] + 2**14, held


class NothingWaits(TorchDispatchMode):
    """Stands for a GPU's own check: raises if code reads a tensor of the device, or copies one and waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        result = func(*args, **kwargs)  # reading a number of a meta tensor raises by itself
        devices = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if moves and len(devices) > 1 and waits:
            raise AssertionError(f"{func} between {devices} waits for the device")
        return result


@contextlib.contextmanager
def nothing_waits(device):
    if device != "cuda":
        with NothingWaits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class CopyOfNothing:
    """Stands for `engine.HostCopy` on a device whose numbers nobody can read."""

    def __init__(self, values):
        assert values.device.type == "meta"

    def read(self):
        return torch.tensor(1.0)


@pytest.fixture(params=["meta", pytest.param("cuda", marks=GPU)])
def stepping(request, monkeypatch):
    """A device on which reading a number while stepping is an error: on a CPU, tensors without any."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if request.param == "meta":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.setattr(engine, "HostCopy", CopyOfNothing)
    accelerator = launch.build_accelerator("no", num_threads=1)
    if request.param == "meta":
        monkeypatch.setattr(type(accelerator), "device", torch.device("meta"))
    yield accelerator, request.param
    AcceleratorState._reset_state(reset_partial_state=True)


def geometry_of(size, interpolation="bilinear"):
    """Return a network's preprocessing."""
    half = (0.5,) * 3
    return {"input_size": (3, size, size), "interpolation": interpolation, "mean": half, "std": half}


@pytest.mark.parametrize(("interpolation", "bound"), [("bilinear", 2), ("bicubic", 8)])
def test_crops_cut_on_the_device_are_those_of_the_cpu(device, interpolation, bound, tmp_path, monkeypatch):
    """Of a small photo, of a large one that is decoded at a reduced size, of a PNG; some are flipped.

    Pillow resizes some photos vertically first, which matters where the cubic filter leaves the bytes.
    """
    rng = np.random.default_rng(0)
    for number, (size, kind) in enumerate([((90, 60), "jpg"), ((700, 900), "jpg"), ((50, 80), "png")]):
        noise = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8)).resize(size)
        for split in ("train", "test"):
            for name in "ab":
                folder = tmp_path / split / name
                folder.mkdir(parents=True, exist_ok=True)
                noise.rotate(number + len(name)).save(folder / f"{number}.{kind}")
    rows, crop = load_photos(tmp_path)["train"], train_transform(geometry_of(32, interpolation), None, 0.2)
    one_by_one = loaders.PhotoDataset(rows, crop, 3)
    monkeypatch.setattr(on_device, "PIXELS_AT_ONCE", 2 * 113 * 90)  # so that a batch is cut in parts
    together = on_device.DevicePhotoDataset(rows, crop, 3, None, torch.device(device))
    assert set(together.reductions) == {1, 8} and together.canvas == (113, 90)

    keys = [(epoch, index) for epoch in (1, 2, 3) for index in range(len(rows))]
    expected = torch.stack([one_by_one[key]["pixel_values"] for key in keys])
    places = torch.stack([together[key]["pixel_values"] for key in keys])
    assert 0 < places[:, 5].mean() < 1
    inputs = together.network_input(places.to(device)).cpu()
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    difference = (inputs * 127.5 + 127.5).round() - expected
    assert difference.abs().max() <= bound and (difference != 0).float().mean() < 0.1


def test_photos_that_do_not_fit_are_refused_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 2 * 10**9))
    on_device.check_memory(499_999_999, 1000, torch.device("cuda"))
    with pytest.raises(UserError, match=r"1000 decoded photos need .* more than 50% of"):
        on_device.check_memory(600_000_000, 1000, torch.device("cuda"))


@pytest.mark.parametrize(
    ("kind", "ema_decay", "knobs", "crop_on_device"),
    [
        ("sgd", 0.0, {"gradient_accumulation_steps": 2}, False),
        ("adamw", 0.9, {"loss_reduction": "mean", "label_smoothing": 0.1}, False),
        ("sgd", 0.0, {}, True),
    ],
)
def test_no_step_waits_for_the_device(stepping, photos_dir, kind, ema_decay, knobs, crop_on_device):
    accelerator, device = stepping
    rows, crop = load_photos(photos_dir)["train"], train_transform(geometry_of(32))
    photo_set = loaders.PhotoDataset(rows, crop, 0)
    if crop_on_device:
        photo_set = on_device.DevicePhotoDataset(rows, crop, 0, None, accelerator.device)
    loader = loaders.train_loader(photo_set, 4)
    loader.batch_sampler.seek(1)
    state = a_state(device, kind=kind, ema_decay=ema_decay)
    if device == "cuda":  # accelerate would move what is on no device to the CPU
        state.model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    steps = engine.train_steps(accelerator, state, loader, OptimConfig(batch_size=4, **knobs))
    next(steps), next(steps)  # memory, and what is sent to the device once
    with nothing_waits(device):
        assert len([next(steps) for _ in range(4)]) == 4


def test_the_check_would_notice(stepping):
    """Each thing that a step must not do is an error under it."""
    _, device = stepping
    values = torch.zeros(3, device=device)
    for wait in (lambda: values.sum().item(), lambda: bool(values[0] > 0), lambda: torch.zeros(3).to(device)):
        with nothing_waits(device), pytest.raises((RuntimeError, AssertionError)):
            wait()


def test_a_loss_is_read_a_step_late_and_never_twice(device):
    """The check of a step reads the loss of the one before, which has arrived by then."""
    read, accelerator = [], launch.build_accelerator("no", num_threads=1)

    class Noted(engine.HostCopy):
        def read(self):
            read.append(float(super().read()))
            return self.values

    check = engine.FiniteCheck(accelerator, None)
    original, engine.HostCopy = engine.HostCopy, Noted
    try:
        for number in range(3):
            check(torch.tensor(float(number), device=device), torch.zeros(1), [0.1])
            assert read == [float(before) for before in range(number)]
        check.last()
    finally:
        engine.HostCopy = original
    assert read == [0.0, 1.0, 2.0]


def test_two_processes_share_a_device(device, tmp_path):
    """By gloo: NCCL refuses two processes on one GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = ("python", ROOT / "tests/two_on_one.py", tmp_path / "two.safetensors")
    processes = [begin(*command, RANK=str(rank), **env) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert [process.returncode for process in processes] == [0, 0], ended
    ours, plain = safetensors.torch.load_file(tmp_path / "two.safetensors"), book_loop.plain_loop("eval")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
