"""What the benchmark measures besides the scripts, each in its own process.

python -m hotdog_hf.bench.tasks NAME '{"knob": "value"}' prints its result as one line of JSON, the last.
"""

import contextlib
import functools
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from accelerate import Accelerator

from hotdog_hf.bench.simulation import replaced, simulated
from hotdog_hf.config import RECIPES, DataConfig
from hotdog_hf.data import loaders, transforms
from hotdog_hf.data.images import IMAGE_SUFFIXES, Photo
from hotdog_hf.data.prepare import open_photos
from hotdog_hf.data.splits import Photos, load_photos
from hotdog_hf.deploy import export
from hotdog_hf.errors import UserError, exit_on_user_error
from hotdog_hf.machine import cpu_has_bf16
from hotdog_hf.model import saved
from hotdog_hf.model.network import replace_head
from hotdog_hf.model.predictor import decision_rule, load_predictor, predict_paths
from hotdog_hf.model.source import load_source, source_data_config
from hotdog_hf.training import engine, launch, optim
from hotdog_hf.training.state import TrainState

PROFILED_STEPS, PROFILED_PHOTOS = 2, 64
TOP_OPERATORS = 10


def prepare(
    *,
    data_dir: str,
    name: str,
    weights: str,
    image_size: int | None,
    out: str,
    num_threads: int | None,
    exported: bool,
) -> dict:
    """Fetch or draw the photos and check them; write source, saved model and perhaps ONNX files.

    Returns the photos by split and class, and facts about the machine.
    """
    folder = Path(out)
    accelerator = launch.build_accelerator("no", num_threads=num_threads)
    rows = open_photos(DataConfig(data_dir=data_dir), 0, accelerator).splits
    label_names = rows["train"].features["label"].names
    source = load_source(name, weights, image_size)
    tensors = {key: value.contiguous() for key, value in source.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "source.safetensors")
    data_config = source_data_config(source, "chapter", image_size)
    saved.save_model(replace_head(source, label_names, data_config), folder / "model")
    not_exported, smaller = None, {}
    if exported:
        try:
            export.export_onnx(folder / "model", folder / "model.onnx")
            smaller = _export_smaller(folder, data_dir)
        except UserError as error:
            not_exported = str(error)
    return {
        "files": {
            split: {
                label_names[label]: [row["image"]["path"] for row in rows[split] if row["label"] == label]
                for label in range(len(label_names))
            }
            for split in ("train", "test")
        },
        "image_size": data_config["input_size"][-1],
        "not_exported": not_exported,
        "smaller": smaller,
        "threads": torch.get_num_threads(),
        "bf16": launch.gpu_has_bf16() or (accelerator.device.type == "cpu" and cpu_has_bf16()),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _export_smaller(folder: Path, data_dir: str) -> dict[str, str]:
    """Write the ONNX file in fp16 and int8, whose speeds do not depend on what the model has learned."""
    from hotdog_hf.deploy import quantize  # which needs the extra [onnx]

    written = {}
    for precision in ("fp16", "int8"):
        shrink = functools.partial(quantize.shrink, precision=precision, data_dir=data_dir, max_drop=100)
        file = folder / f"{precision}.onnx"
        with contextlib.suppress(UserError):  # too few photos, or an operator that cannot be converted
            export.export_onnx(folder / "model", file, shrink=shrink, tolerance=math.inf)
            written[precision] = str(file)
    return written


class Job(NamedTuple):
    """The chapter's training, ready to start."""

    accelerator: Accelerator
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    data_config: dict

    def steps(self, loader: torch.utils.data.DataLoader) -> Iterator:
        """Train for one epoch of the loader, yielding after every step."""
        totals = torch.zeros(3, device=self.accelerator.device)
        state = TrainState(self.net, self.optimizer, self.schedule, totals=totals)
        return engine.train_steps(self.accelerator, state, loader, RECIPES["chapter"].optim)


def _build(
    name: str, weights: str, image_size: int, classes: list[str], num_threads: int | None, precision: str
) -> Job:
    """Build the network and its optimizer as scripts/train.py does for the chapter's recipe."""
    knobs = RECIPES["chapter"].optim
    accelerator = launch.build_accelerator(precision, num_threads=num_threads)
    torch.manual_seed(0)
    source = load_source(name, weights, image_size)
    data_config = source_data_config(source, "chapter", image_size)
    net = replace_head(source, classes, data_config)
    net = net.to(accelerator.device, memory_format=transforms.MEMORY_FORMAT)
    groups = optim.parameter_groups(
        net,
        learning_rate=knobs.learning_rate,
        head_lr_mult=knobs.head_lr_mult,
        weight_decay=knobs.weight_decay,
    )
    optimizer = optim.build_optimizer(groups, knobs.optimizer, fused=optim.use_fused(accelerator))
    net, optimizer = accelerator.prepare(net, optimizer)
    return Job(accelerator, net, optimizer, optim.build_schedule(optimizer, "constant", 1), data_config)


def limit(*, train: int, test: int, batch_size: int, epochs: int, **network: object) -> dict:
    """Step and evaluate on random tensors in the device's memory: the fastest possible epoch."""
    job = _build(**network)
    device, size = job.accelerator.device, job.data_config["input_size"]
    images = torch.randn(min(batch_size, max(train, test)), *size, device=device)
    images = images.to(memory_format=transforms.MEMORY_FORMAT)
    labels = torch.randint(len(network["classes"]), (len(images),), device=device)

    def step(count: int) -> None:
        loss = F.cross_entropy(job.net(images[:count]), labels[:count], reduction="sum")
        job.accelerator.backward(loss)
        job.optimizer.step()
        job.optimizer.zero_grad()

    step(len(images))  # warm-up: memory, and a GPU's choice of algorithms
    seconds = []
    for _ in range(epochs):
        _synchronize(device)
        started = time.perf_counter()
        job.net.train()
        for count in _batches(train, batch_size):
            step(count)
        job.net.eval()
        with torch.no_grad():
            for count in _batches(test, batch_size):
                job.net(images[:count])
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"epoch_seconds": seconds}


def _batches(count: int, batch_size: int) -> list[int]:
    return [min(batch_size, count - start) for start in range(0, count, batch_size)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(*, data_dir: str, batch_size: int, steps: int, **network: object) -> dict:
    """List all photos of a folder, train some steps on it, evaluate as many batches: the peak memory."""
    rows = load_photos(data_dir)
    photos = Photos(rows, data_dir)
    _kept = photos.manifest(), photos.digest()  # what a run keeps of every photo
    job = _build(classes=rows["train"].features["label"].names, **network)
    train_set = loaders.PhotoDataset(rows["train"], transforms.train_transform(job.data_config))
    loader = loaders.train_loader(train_set, batch_size)
    loader.batch_sampler.seek(1)
    for _, _ in zip(range(steps), job.steps(loader), strict=False):
        pass
    some = rows["test"].select(range(min(steps * batch_size, len(rows["test"]))))
    test_set = loaders.PhotoDataset(some, transforms.eval_transform(job.data_config))
    test_loader = job.accelerator.prepare(loaders.eval_loader(test_set, batch_size))
    engine.predict(job.accelerator, job.net, test_loader)
    on_gpu = torch.cuda.max_memory_allocated() if job.accelerator.device.type == "cuda" else None
    count = len(rows["train"]) + len(rows["test"])
    return {"photos": count, "peak_bytes": peak_memory(), "gpu_bytes": on_gpu}


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    with contextlib.suppress(OSError):  # not on every system
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource  # Windows has none

    # This also counts the parent at the time it started this process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds of the main thread by name, each moment counted once: for the innermost name."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.names: list[str] = []
        self.last, self.synchronize = time.perf_counter(), synchronize

    def _count(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        name = self.names[-1] if self.names else "other"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside the context under `name`."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Count from now on under `name`; inside the evaluation, under "evaluation"."""
        if threading.current_thread() is threading.main_thread():
            self._count()
            self.names.append("evaluation" if "evaluation" in self.names else name)

    def leave(self) -> None:
        """Return to the previous name."""
        if threading.current_thread() is threading.main_thread():
            self._count()
            self.names.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the function with its time counted under `name`."""

        def counted(*args: object, **kwargs: object) -> object:
            with self(name):
                return function(*args, **kwargs)

        return counted


class _CountedLoader:
    """A loader that counts the wait for each batch under "waiting"."""

    def __init__(self, loader: torch.utils.data.DataLoader, watch: Stopwatch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[dict]:
        batches = iter(self.loader)
        while True:
            with self.watch("waiting"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def profile(*, data_dir: str, batch_size: int, num_workers: int | None, **network: object) -> dict:
    """Train an epoch and evaluate; return the main thread's seconds by activity, and the top operators.

    Photos decoded by loader processes cost the main thread only the waiting.
    """
    rows = load_photos(data_dir)
    job = _build(classes=rows["train"].features["label"].names, **network)
    accelerator = job.accelerator
    workers = launch.default_workers(accelerator) if num_workers is None else num_workers
    watch = Stopwatch(lambda: _synchronize(accelerator.device))
    transform = transforms.train_transform(job.data_config)
    train_set = loaders.PhotoDataset(rows["train"], transform)
    test_set = loaders.PhotoDataset(rows["test"], transforms.eval_transform(job.data_config))
    loader = loaders.train_loader(train_set, batch_size, num_workers=workers)
    test_loader = accelerator.prepare(loaders.eval_loader(test_set, batch_size, num_workers=workers))

    # The operators first, without the stopwatch; these steps are also the warm-up.
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if accelerator.device.type == "cuda" else []
    loader.batch_sampler.seek(1)
    with torch.profiler.profile(activities=activities) as profiler:
        for _, _ in zip(range(PROFILED_STEPS), job.steps(loader), strict=False):
            pass

    # In the main thread, so that decoding and augmenting can be told apart.
    train_set.threads, some = 1, range(min(PROFILED_PHOTOS, len(train_set)))
    started = time.perf_counter()
    for index in some:
        train_set.pixel_values(1, index)
    core_speed = len(some) / (time.perf_counter() - started)
    job.net.register_forward_pre_hook(lambda *_: watch.enter("forward"))
    job.net.register_forward_hook(lambda *_: watch.leave())
    job.optimizer.step = watch.timed("step", job.optimizer.step)
    with (
        replaced(accelerator, "backward", watch.timed("backward", accelerator.backward)),
        replaced(Photo, "decode", watch.timed("decode", Photo.decode)),
        replaced(transform, "pixels", watch.timed("augment", transform.pixels)),
    ):
        loader.batch_sampler.seek(2)
        watch.last = time.perf_counter()
        for _ in job.steps(_CountedLoader(loader, watch)):
            pass
    with watch("evaluation"):
        engine.predict(accelerator, job.net, test_loader)
    with watch("other"):
        pass
    return {
        "seconds_by": watch.seconds,
        "core_speed": core_speed,
        "step_speed": len(train_set) / sum(watch.seconds[name] for name in ("forward", "backward", "step")),
        "operators": _operators(profiler),
        "num_workers": workers,
    }


def _operators(profiler: torch.profiler.profile) -> list[dict]:
    """Return the operators that take the most time, without those they call: name, share, calls."""
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
    }
    total = sum(time for time, _ in spent.values()) or 1
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:TOP_OPERATORS]
    return [{"name": name, "share": time / total, "calls": calls} for name, (time, calls) in top]


def predict(
    *,
    how: str,
    model_dir: str,
    data_dir: str,
    batch_size: int,
    num_threads: int | None,
    precision: str = "no",
) -> dict:
    """Predict every image of a folder: the labels, the seconds to load the model, and those to predict."""
    started = time.perf_counter()
    if num_threads and not torch.accelerator.is_available():
        torch.set_num_threads(num_threads)
    if how == "ours":
        labels_of = _ours(model_dir, batch_size, precision)
    else:
        labels_of = {"transformers": _transformers, "timm": _timm}[how](model_dir, batch_size)
    files = sorted(str(path) for path in Path(data_dir).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    loaded, cpu = time.perf_counter(), time.process_time()
    labels = labels_of(data_dir, files)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    assert len(labels) == len(files), f"{len(labels)} labels for {len(files)} images"
    return {
        "images": len(files),
        "load_seconds": loaded - started,
        "seconds": ended - loaded,
        "cpu_seconds": cpu_ended - cpu,
        "labels": labels,
    }


Labels = Callable[[str, list[str]], list[str]]


def _ours(model_file: str, batch_size: int, precision: str) -> Labels:
    """Return a predictor like that of scripts/predict.py, of a saved model or an ONNX file."""
    predictor = load_predictor(model_file, precision)
    choose = decision_rule(predictor.label_names)

    def labels_of(data_dir: str, _files: list[str]) -> list[str]:
        found = list(predict_paths(predictor, [data_dir], choose, batch_size))
        return [prediction.label for prediction in sorted(found, key=lambda prediction: prediction.path)]

    return labels_of


def _transformers(model_dir: str, batch_size: int) -> Labels:
    import transformers

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = transformers.pipeline("image-classification", model=model_dir, device=device)
    return lambda _, files: [scores[0]["label"] for scores in pipe(files, batch_size=batch_size)]


def _timm(model_dir: str, batch_size: int) -> Labels:
    """Return a plain forward pass: timm's model, transform and folder, torch's loader."""
    import timm

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    net = timm.create_model(f"local-dir:{model_dir}", pretrained=True).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    names = net.pretrained_cfg["label_names"]

    @torch.inference_mode()
    def labels_of(data_dir: str, _files: list[str]) -> list[str]:
        dataset = timm.data.ImageDataset(data_dir, transform=transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size)
        indices = [net(images.to(device)).argmax(dim=1).tolist() for images, _ in loader]
        labels = [names[index] for batch in indices for index in batch]
        files = [dataset.filename(index, absolute=True) for index in range(len(dataset))]
        return [label for _, label in sorted(zip(files, labels, strict=True))]

    return labels_of


TASKS = {task.__name__: task for task in (prepare, limit, memory, profile, predict, simulated)}

if __name__ == "__main__":
    with exit_on_user_error():
        print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
