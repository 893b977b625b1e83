"""The benchmark's measurements: each in a process of its own, interleaved, repeated, kept as they come.

No torch here: the process that waits must cost nothing, neither time nor memory.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hotdog_hf.config import RECIPES
from hotdog_hf.errors import UserError, message_of
from hotdog_hf.files import write_json
from hotdog_hf.machine import allowed_cores, cache_dir

POLL_SECONDS = 0.02
# What every measured process gets: its lines come when they are written, and no look at the Hub takes time.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
OUR_FROZEN_EPOCHS, PLAIN_FROZEN_EPOCHS = 11, 2
MEMORY_COPIES = (1, 10, 100)
# Small, so that the network's own memory does not hide what grows.
MEMORY_STEPS, MEMORY_BATCH = 3, 16
PIPELINE_BATCHES = (1, 8, 32)
OUR_PREDICT_BATCH = 32
CHAPTER_BATCH = RECIPES["chapter"].optim.batch_size
VERSIONS = "torch torchvision timm accelerate datasets transformers onnxruntime pillow numpy".split()


@dataclass(frozen=True)
class Setup:
    """What all measurements share."""

    # The repository, the folder of what is made for the benchmark, and the photos of each split in it.
    root: Path
    work: Path
    photos: Path
    train: int
    test: int
    classes: tuple[str, ...]
    # The network: a timm name, a file of weights, the side of its input.
    model: str
    weights: Path
    image_size: int
    # A model trained from it, as a folder and, where it could be exported, as an ONNX file.
    saved_model: Path
    onnx: Path | None
    # Photos a step where it is not the recipe's own, and epochs of the training section.
    batch_size: int | None
    epochs: int
    recipes: tuple[str, ...]
    # Threads on a CPU, loader processes to offer the plain loop and ours, and the GPUs.
    threads: int
    workers: int
    gpus: int
    # Whether the GPUs, or else the CPU, multiply in bf16.
    bf16: bool

    @property
    def step_size(self) -> int:
        """Photos per step where the recipe is the chapter's."""
        return self.batch_size or CHAPTER_BATCH

    def script(self, name: str, *words: object) -> list[str]:
        """Return the command that runs one of the scripts."""
        return [sys.executable, str(self.root / "scripts" / name), *map(str, words)]

    def task(self, name: str, /, **knobs: object) -> list[str]:
        """Return the command that runs a part of `hotdog_hf.bench_tasks`."""
        return task_command(name, num_threads=self.threads, **knobs)

    def network(self) -> dict:
        """Return the knobs of a task that builds the network itself."""
        return {
            "name": self.model,
            "weights": str(self.weights),
            "image_size": self.image_size,
            "precision": "auto",
        }

    def train_flags(self, run_dir: Path, recipe: str, *words: object) -> list[str]:
        """Return the flags of scripts/train.py for a run of a recipe."""
        batch = ["--batch-size", self.batch_size] if self.batch_size else []
        given = {
            "--recipe": recipe,
            "--data-dir": self.photos,
            "--model": self.model,
            "--weights": "none" if recipe == "scratch" else self.weights,
            "--image-size": self.image_size,
            "--num-threads": self.threads,
            "--output-dir": run_dir,
        }
        return [str(word) for pair in given.items() for word in pair] + [*map(str, batch), *map(str, words)]

    def plain_loop(self, *words: object) -> list[str]:
        """Return the command of the chapter's plain loop with our numbers."""
        given = {
            "--model": self.model,
            "--weights": self.weights,
            "--image-size": self.image_size,
            "--batch-size": self.step_size,
            "--num-threads": self.threads,
        }
        return self.script("plain_loop.py", self.photos, *(w for pair in given.items() for w in pair), *words)


@dataclass(frozen=True)
class Variant:
    """One of the things that a section compares: `measure(folder, round)` returns its numbers."""

    section: str
    name: str
    measure: Callable[[Path, int], dict]
    # Measured once: its answer is no time.
    once: bool = False


# Processes.


class MeasurementError(Exception):
    """A measured process failed; the message has its last words."""


@dataclass(frozen=True)
class FinishedProcess:
    """A process that has ended: when it started, its seconds, and the rows that it wrote with their times."""

    command: str
    started_at: float
    seconds: float
    until_seconds: float | None
    rows: list[tuple[float, dict]]


def run_process(
    words: list[str],
    folder: Path,
    *,
    rows_file: Path | None = None,
    until: Callable[[], bool] | None = None,
    env: dict[str, str] | None = None,
) -> FinishedProcess:
    """Run a command to its end, and measure it; `folder` takes its output.

    `watched` is a file of JSON lines that it writes (None: its output); each line is noted with its time.
    Where `until` turns true the time is noted, and the process told to stop.
    """
    out, errors = folder / "output.txt", folder / "errors.txt"
    command = shlex.join(["python" if word == sys.executable else word for word in words])
    rows: list[tuple[float, dict]] = []
    until_seconds = None
    with out.open("wb") as out_file, errors.open("wb") as error_file:
        started_at, started = time.time(), time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=out_file,
            stderr=error_file,
            env=os.environ | ENVIRONMENT | (env or {}),
            start_new_session=True,  # so that it can be ended with all that it starts
        )
        try:
            while True:
                code = process.poll()
                seconds = time.perf_counter() - started
                rows += [(seconds, row) for row in _json_lines(rows_file or out)[len(rows) :]]
                if until and until_seconds is None and until():
                    until_seconds = seconds
                    process.terminate()  # of one that has ended it does nothing
                if code is not None:
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    text = errors.read_text(encoding="utf-8", errors="replace")
    if until_seconds is None and (code or until):
        said = [line for line in text.splitlines() if line.strip()] or ["nothing said"]
        lines = [line for line in said if line.startswith("error")] or said
        raise MeasurementError(f"`{command}` ended with {code}: {lines[-1]}")
    return FinishedProcess(
        command=command,
        started_at=started_at,
        seconds=seconds,
        until_seconds=until_seconds,
        rows=rows,
    )


def _fresh_cache(folder: Path) -> dict[str, str]:
    """Return the environment of a process that finds none of hotdog_hf's caches, but the libraries' own."""
    before = cache_dir().parent
    hub = os.environ.get("HF_HOME") or str(before / "huggingface")
    fonts = os.environ.get("MPLCONFIGDIR") or str(before / "matplotlib")
    return {"XDG_CACHE_HOME": str(folder.resolve()), "HF_HOME": hub, "MPLCONFIGDIR": fonts}


def _json_lines(file: Path) -> list[dict]:
    """Return the finished lines of a file that are JSON objects."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def task_command(name: str, /, **knobs: object) -> list[str]:
    """Return the command that runs a part of `hotdog_hf.bench_tasks`."""
    return [sys.executable, "-m", "hotdog_hf.bench_tasks", name, json.dumps(knobs)]


def _task_result(finished: FinishedProcess) -> dict:
    return finished.rows[-1][1]


# What is there to measure with.


def prepare(
    work: Path,
    root: Path,
    *,
    data_dir: str,
    photos: int | None,
    model: str,
    weights: str,
    image_size: int | None,
    batch_size: int | None,
    epochs: int,
    recipes: tuple[str, ...],
    num_threads: int | None,
) -> tuple[Setup, dict]:
    """Make all that the measurements need in `work`; return it, and the machine's description.

    `photos` is the most to take of each class and split. Raises `UserError` where the data or the network is
    not there.
    """
    if data_dir.startswith("hf://"):
        raise UserError("the benchmark compares with loops that read folders: give a folder as --data-dir")
    # The one process that may fetch what is not there yet.
    hub_offline = os.environ.get("HF_HUB_OFFLINE", "0")
    folder = work / "prepare"
    folder.mkdir(parents=True)
    words = task_command(
        "prepare",
        data_dir=data_dir,
        name=model,
        weights=weights,
        image_size=image_size,
        out=str(work),
        num_threads=num_threads,
    )
    try:
        found = _task_result(run_process(words, folder, env={"HF_HUB_OFFLINE": hub_offline}))
    except MeasurementError as error:
        raise UserError(str(error).partition(": error: ")[2] or str(error)) from error
    files = {
        split: {name: paths[:photos] for name, paths in classes.items()}
        for split, classes in found["files"].items()
    }
    link_photos(files, work / "photos")
    cores = allowed_cores()
    gpus = len(found["gpus"])
    setup = Setup(
        root=root,
        work=work,
        photos=work / "photos",
        train=sum(map(len, files["train"].values())),
        test=sum(map(len, files["test"].values())),
        classes=tuple(files["train"]),
        model=model,
        weights=work / "source.safetensors",
        image_size=found["image_size"],
        saved_model=work / "model",
        onnx=None if found["not_exported"] else work / "model.onnx",
        batch_size=batch_size,
        epochs=epochs,
        recipes=recipes,
        threads=num_threads or found["threads"],
        workers=min(cores, 8),
        gpus=gpus,
        bf16=found["bf16"],
    )
    machine = {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": found["gpus"],
        "threads": setup.threads,
        "bf16": setup.bf16,
        "not_exported": found["not_exported"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
    }
    return setup, machine


def link_photos(files: dict[str, dict[str, list[str]]], target: Path, copies: int = 1) -> Path:
    """Make a data folder of links to files by split and class, each of them `copies` times."""
    for split, classes in files.items():
        for name, paths in classes.items():
            folder = target / split / name
            folder.mkdir(parents=True)
            for number, path in enumerate(map(Path, paths)):
                for copy in range(copies):
                    link = folder / f"{number:05}-{copy:03}{path.suffix}"
                    link.symlink_to(path.resolve())
    return target


def _repeated(setup: Setup, copies: int) -> Path:
    """Return a data folder with every photo so many times; made when first asked for."""
    target = setup.work / f"photos-{copies}x"
    if not target.exists():
        files = {
            split: {name: sorted(map(str, (setup.photos / split / name).iterdir())) for name in setup.classes}
            for split in ("train", "test")
        }
        link_photos(files, target, copies)
    return target


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def commit_of(root: Path) -> str | None:
    """Return the commit of the repository, with a plus where files differ from it; None outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain"], stderr=subprocess.DEVNULL)
        return commit.decode().strip() + ("+" if changed.strip() else "")
    return None


# Sections: what each compares. Every function returns the variants in the order in which they take turns.


def _trained(finished: FinishedProcess, run_dir: Path, setup: Setup) -> dict:
    """Return the speed of a run of scripts/train.py: from its first step until its last epoch is judged.

    The photos of `samples.png` are drawn last before the first step. Between the epochs the run saves its
    state and draws its curves, which is counted.
    """
    start = (run_dir / "samples.png").stat().st_mtime - finished.started_at
    ends = [seconds for seconds, row in finished.rows if row.get("epoch")]
    final = finished.rows[-1][1]
    return {
        "value": len(ends) * setup.train / (ends[-1] - start),
        "epoch_seconds": [end - before for before, end in zip([start, *ends], ends, strict=False)],
        "seconds_in_all": finished.seconds,
        "test_accuracy": final["test_accuracy"],
        "command": finished.command,
    }


def _ours(
    setup: Setup,
    folder: Path,
    recipe: str,
    *words: object,
    launcher: tuple = (),
    cache: str | None = None,
    until: Callable[[], bool] | None = None,
) -> FinishedProcess:
    """Run scripts/train.py to `folder`/run, with the caches called `cache`, or without any."""
    run_dir = folder / "run"
    script, flags = setup.script("train.py"), setup.train_flags(run_dir, recipe, *words)
    command = [*map(str, launcher), script[1], *flags] if launcher else [*script, *flags]
    return run_process(
        command,
        folder,
        rows_file=run_dir / "metrics.jsonl",
        until=until,
        env=_fresh_cache(setup.work / "cache" / (cache or folder.name)),
    )


def _plain(setup: Setup, *words: object) -> Callable[[Path, int], dict]:
    def measure(folder: Path, seed: int) -> dict:
        finished = run_process(setup.plain_loop("--epochs", setup.epochs, "--seed", seed, *words), folder)
        rows = [row for _, row in finished.rows]
        seconds = [row["seconds"] for row in rows]
        return {
            "value": len(rows) * setup.train / sum(seconds),
            "epoch_seconds": seconds,
            "seconds_in_all": finished.seconds,
            "test_accuracy": rows[-1]["test_accuracy"],
            "command": finished.command,
        }

    return measure


def training(setup: Setup) -> list[Variant]:
    """Photos per second over whole epochs: ours, the chapter's plain loop, and the limit in memory."""

    def ours(*words: object) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            finished = _ours(setup, folder, "chapter", "--epochs", setup.epochs, "--seed", seed, *words)
            return _trained(finished, folder / "run", setup)

        return measure

    def limit(folder: Path, _round: int) -> dict:
        words = setup.task(
            "limit",
            train=setup.train,
            test=setup.test,
            batch_size=setup.step_size,
            epochs=1,
            classes=setup.classes,
            **setup.network(),
        )
        finished = run_process(words, folder)
        seconds = _task_result(finished)["epoch_seconds"]
        speed = len(seconds) * setup.train / sum(seconds)
        return {"value": speed, "epoch_seconds": seconds, "command": finished.command}

    # On a GPU ours computes in bf16 where it can, on a CPU where it is asked to; the plain loop never does.
    if setup.gpus:
        other = [("ours, float32", ours("--precision", "no"))]
    else:
        other = [("ours, bf16", ours("--precision", "bf16"))] if setup.bf16 else []
    workers = ("--channels-last", "--num-workers", setup.workers)
    variants = [
        ("ours", ours()),
        *other,
        ("plain loop", _plain(setup)),
        ("plain loop, channels_last", _plain(setup, "--channels-last")),
        (f"plain loop, channels_last, {setup.workers} loader processes", _plain(setup, *workers)),
        ("limit: tensors in memory", limit),
    ]
    return [Variant("training", name, measure) for name, measure in variants]


def accuracy(setup: Setup) -> list[Variant]:
    """Test accuracy against seconds since the command was given, for each recipe; seed = round."""

    def recipe(name: str, cached: bool = False) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            cache = f"{name}-{seed}"
            if cached and not (setup.work / "cache" / cache).exists():
                (folder / "before").mkdir()
                _ours(setup, folder / "before", name, "--seed", seed, cache=cache)
            finished = _ours(setup, folder, name, "--seed", seed, cache=cache)
            curve = [
                [seconds, row["test_accuracy"]] for seconds, row in finished.rows if "test_accuracy" in row
            ]
            last = finished.rows[-1][1]["test_accuracy"]
            facts = {"seconds_in_all": finished.seconds, "command": finished.command}
            return {"curve": curve, "test_accuracy": last, **facts}

        return measure

    variants = []
    for name in setup.recipes:
        variants.append(Variant("accuracy", name, recipe(name)))
        if RECIPES[name].model.cache_features:
            variants.append(Variant("accuracy", f"{name}, features cached before", recipe(name, cached=True)))
    return variants


def frozen(setup: Setup) -> list[Variant]:
    """Seconds of an epoch after the first where the body is frozen: with cached features, and plainly."""

    def ours(folder: Path, seed: int) -> dict:
        finished = _ours(setup, folder, "frozen", "--epochs", OUR_FROZEN_EPOCHS, "--seed", seed)
        ends = [seconds for seconds, row in finished.rows if row.get("epoch")]
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
        final = finished.rows[-1][1]
        return {"value": seconds, "test_accuracy": final["test_accuracy"], "command": finished.command}

    def plain(folder: Path, seed: int) -> dict:
        flags = ("--freeze-body", "--no-augment", "--channels-last")
        words = setup.plain_loop("--epochs", PLAIN_FROZEN_EPOCHS, "--seed", seed, *flags)
        finished = run_process(words, folder)
        rows = [row for _, row in finished.rows]
        seconds = sum(row["seconds"] for row in rows[1:]) / (len(rows) - 1)
        return {"value": seconds, "test_accuracy": rows[-1]["test_accuracy"], "command": finished.command}

    return [Variant("frozen", "ours, features cached", ours), Variant("frozen", "plain frozen loop", plain)]


def prediction(setup: Setup) -> list[Variant]:
    """Photos per second of predictions on the test folder, the model being loaded."""

    def predict(
        how: str, model_file: Path, batch_size: int, precision: str = "no"
    ) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            words = setup.task(
                "predict",
                how=how,
                model_dir=str(model_file),
                data_dir=str(setup.photos / "test"),
                batch_size=batch_size,
                precision=precision,
            )
            finished = run_process(words, folder)
            result = _task_result(finished)
            speed = result["images"] / result["seconds"]
            return {"value": speed, **result, "seconds_in_all": finished.seconds, "command": finished.command}

        return measure

    variants = [("ours, torch", predict("ours", setup.saved_model, OUR_PREDICT_BATCH))]
    if setup.bf16:
        in_bf16 = predict("ours", setup.saved_model, OUR_PREDICT_BATCH, "bf16")
        variants.append(("ours, torch, bf16", in_bf16))
    if setup.onnx and _version("onnxruntime"):
        variants.append(("ours, ONNX", predict("ours", setup.onnx, OUR_PREDICT_BATCH)))
    if _version("transformers"):
        variants += [
            (f"transformers pipeline, batch {size}", predict("transformers", setup.saved_model, size))
            for size in PIPELINE_BATCHES
        ]
    variants.append(("timm, plain forward", predict("timm", setup.saved_model, OUR_PREDICT_BATCH)))
    return [Variant("prediction", name, measure) for name, measure in variants]


def memory(setup: Setup) -> list[Variant]:
    """Peak memory of listing a data folder, some training steps and evaluation, as the folder grows."""

    # The same full batches whatever the size, so that the number of photos alone differs.
    batch_size = min(setup.step_size, setup.train, MEMORY_BATCH)
    steps = max(min(MEMORY_STEPS, setup.train // batch_size), 1)

    def peak(copies: int) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            words = setup.task(
                "memory",
                data_dir=str(_repeated(setup, copies)),
                batch_size=batch_size,
                steps=steps,
                **setup.network(),
            )
            finished = run_process(words, folder)
            found = _task_result(finished)
            result = {"value": found["peak_bytes"] / 2**20, "steps": steps, "batch_size": batch_size}
            return result | found | {"command": finished.command}

        return measure

    return [Variant("memory", f"{copies}x", peak(copies)) for copies in MEMORY_COPIES]


def processes(setup: Setup) -> list[Variant]:
    """Photos per second over an epoch of training with 1 and with 2 processes on the same machine."""
    if setup.gpus == 1 or (setup.gpus == 0 and setup.threads < 2):
        return []  # two processes would share one device

    def launched(number: int) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            file = setup.root / "configs" / ("multi_gpu.yaml" if setup.gpus else "cpu.yaml")
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
            if number == 1 and setup.gpus:  # the launcher's several GPUs are two or more
                launcher[-1] = setup.root / "configs/one_gpu.yaml"
            launcher += ["--num_processes", number]
            flags = ("--epochs", 1, "--seed", seed, "--num-threads", max(setup.threads // number, 1))
            finished = _ours(setup, folder, "chapter", *flags, launcher=tuple(launcher))
            return _trained(finished, folder / "run", setup)

        return measure

    return [Variant("processes", "1 process", launched(1)), Variant("processes", "2 processes", launched(2))]


def startup(setup: Setup) -> list[Variant]:
    """Seconds until a script answers: --help of each, the first step of training, the first prediction."""

    def helped(name: str) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            finished = run_process(setup.script(name, "--help"), folder)
            return {"value": finished.seconds, "command": finished.command}

        return measure

    def first_step(folder: Path, _round: int) -> dict:
        flags = ("--epochs", 1, "--batch-size", min(8, setup.train), "--checkpoint-every", 1)
        done = folder / "run/checkpoints/step-00000001"
        finished = _ours(setup, folder, "chapter", *flags, until=done.exists)
        return {"value": finished.until_seconds, "command": finished.command}

    def first_prediction(model_file: Path) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            photos, out = setup.photos / "test", folder / "output.txt"
            words = setup.script("predict.py", model_file, photos, "--format", "jsonl")
            finished = run_process(words, folder, until=lambda: out.stat().st_size > 0)
            return {"value": finished.until_seconds, "command": finished.command}

        return measure

    scripts = sorted(path.name for path in (setup.root / "scripts").glob("*.py"))
    variants = [(f"{name} --help", helped(name)) for name in scripts]
    variants.append(("train.py, first step of 8 photos", first_step))
    variants.append(("predict.py, first 32 photos", first_prediction(setup.saved_model)))
    if setup.onnx:
        variants.append(("predict.py with ONNX, first 32 photos", first_prediction(setup.onnx)))
    return [Variant("startup", name, measure) for name, measure in variants]


def profile(setup: Setup) -> list[Variant]:
    """Where an epoch's time goes."""

    def measure(folder: Path, _round: int) -> dict:
        words = setup.task(
            "profile",
            data_dir=str(setup.photos),
            batch_size=setup.step_size,
            num_workers=None,
            **setup.network(),
        )
        finished = run_process(words, folder)
        result = _task_result(finished)
        return {"value": sum(result["seconds_by"].values()), **result, "command": finished.command}

    variants = [Variant("profile", "an epoch", measure)]
    if shutil.which("py-spy"):

        def flame(folder: Path, _round: int) -> dict:
            picture = setup.work.parent / "flame.svg"
            flags = setup.train_flags(folder / "run", "chapter", "--epochs", 1)
            spied = ["py-spy", "record", "--output", str(picture), "--rate", "50", "--"]
            finished = run_process([*spied, *setup.script("train.py", *flags)], folder)
            return {"value": finished.seconds, "command": finished.command}

        variants.append(Variant("profile", "flame.svg of py-spy", flame, once=True))
    return variants


def exact(setup: Setup) -> list[Variant]:
    """The final metrics with and without loader processes, with and without the cache of features."""
    frozen_flags = ("--epochs", 2)
    knobs = {
        "chapter, 0 loader processes": ("chapter", "--epochs", 1, "--num-workers", 0),
        "chapter, 2 loader processes": ("chapter", "--epochs", 1, "--num-workers", 2),
        "frozen, features cached": ("frozen", *frozen_flags),
        "frozen, not cached": ("frozen", *frozen_flags, "--no-cache-features"),
    }

    def measure_with(words: tuple) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            finished = _ours(setup, folder, *words)
            final = finished.rows[-1][1]
            metrics = {name: value for name, value in final.items() if not re.search("second|share", name)}
            return {"value": final["test_loss"], "metrics": metrics, "command": finished.command}

        return measure

    return [Variant("exact", name, measure_with(words), once=True) for name, words in knobs.items()]


SECTIONS: dict[str, Callable[[Setup], list[Variant]]] = {
    section.__name__: section
    for section in (startup, prediction, profile, memory, frozen, exact, training, processes, accuracy)
}


# Results.


class Results:
    """Every number measured so far, in a file that is whole after each of them."""

    def __init__(self, file: Path, facts: dict, sections: list[str]) -> None:
        """Start the `sections` anew; others stay, where the file is of the same `facts`."""
        self.file, self.content = file, {"facts": json.loads(json.dumps(facts)), "measurements": []}
        with contextlib.suppress(OSError, ValueError, KeyError):
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["facts"] == self.content["facts"]:
                kept = [row for row in before["measurements"] if row["section"] not in sections]
                self.content["measurements"] = kept
        write_json(self.file, self.content)

    def add(self, variant: Variant, number: int, by: dict, numbers: dict) -> None:
        """Keep the numbers of one measurement, and by what it was made."""
        row = {"section": variant.section, "variant": variant.name, "round": number, **by, **numbers}
        self.content["measurements"].append(row)
        write_json(self.file, self.content)


def plan(setup: Setup, sections: list[str], repeats: int) -> dict[str, list[tuple[Variant, int]]]:
    """Return each section's variants and rounds, interleaved: A B C A B C."""
    planned = {}
    for name in sections:
        variants = SECTIONS[name](setup)
        turns = [(variant, number) for number in range(repeats) for variant in variants]
        planned[name] = [(variant, number) for variant, number in turns if number == 0 or not variant.once]
    return planned


def measure(setup: Setup, variant: Variant, number: int) -> dict:
    """Measure once, in a folder that is removed; an `error` stands for the numbers where it failed."""
    name = re.sub(r"\W+", "-", f"{variant.section}-{variant.name}-{number}")
    folder = setup.work / name
    folder.mkdir()
    try:
        return variant.measure(folder, number)
    except MeasurementError as error:
        return {"error": message_of(UserError(str(error)))}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Caches of the recipes are used again in the same round, by the variants that find them.
        shutil.rmtree(setup.work / "cache" / name, ignore_errors=True)
