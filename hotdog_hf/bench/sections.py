"""The sections of the benchmark, and what each compares."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotdog_hf.bench.processes import FinishedProcess, fresh_cache, run_process, task_result
from hotdog_hf.bench.setup import Setup, repeated_photos, version_of
from hotdog_hf.config import RECIPES

OUR_FROZEN_EPOCHS, PLAIN_FROZEN_EPOCHS = 11, 2
MEMORY_COPIES = (1, 10, 100)
# Small, so that the network's own memory does not hide the growth.
MEMORY_STEPS, MEMORY_BATCH = 3, 16
PIPELINE_BATCHES = (1, 8, 32)
OUR_PREDICT_BATCH = 32
LIMIT = "limit: tensors in memory"
# Milliseconds a photo of a device that learns and of a core that decodes, and cores: the device is slower,
# the cores are, or both are as fast as an H200 with ResNet-18 and 15 cores.
SIMULATIONS = ((1, 1, 4), (1, 8, 4), (0.085, 4, 15))
SIMULATED_PHOTOS, SIMULATED_EPOCHS = 2000, 5


@dataclass(frozen=True)
class Variant:
    """One candidate of a section: `measure(folder, round)` returns its results."""

    section: str
    name: str
    measure: Callable[[Path, int], dict]
    # Measured once: the result is not a time.
    once: bool = False


# Sections. Every function returns the variants in the order in which they take turns.


def _trained(finished: FinishedProcess, run_dir: Path, setup: Setup) -> dict:
    """Return the speed of a run of scripts/train.py: from its first step until its last epoch is evaluated.

    `identity.json` is written last before the first step. Between epochs the run saves its state and draws
    its curves, which is included.
    """
    start = (run_dir / "identity.json").stat().st_mtime - finished.started_at
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
        env=fresh_cache(setup.work / "cache" / (cache or folder.name)),
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


def _limit(setup: Setup) -> Callable[[Path, int], dict]:
    def measure(folder: Path, _round: int) -> dict:
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
        seconds = task_result(finished)["epoch_seconds"]
        speed = len(seconds) * setup.train / sum(seconds)
        return {"value": speed, "epoch_seconds": seconds, "command": finished.command}

    return measure


def training(setup: Setup) -> list[Variant]:
    """Photos per second over whole epochs: ours, the chapter's plain loop, and the limit in memory."""

    def ours(*words: object) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            finished = _ours(setup, folder, "chapter", "--epochs", setup.epochs, "--seed", seed, *words)
            return _trained(finished, folder / "run", setup)

        return measure

    # On a GPU ours uses bf16 if it can, on a CPU only if asked to; the plain loop never does.
    if setup.gpus:
        other = [
            ("ours, float32", ours("--precision", "no")),
            ("ours, crops cut on the GPU", ours("--crop-on-device")),
            ("ours, crops cut on the GPU, compiled", ours("--crop-on-device", "--compile")),
        ]
    else:
        other = [("ours, bf16", ours("--precision", "bf16"))] if setup.bf16 else []
    workers = ("--channels-last", "--num-workers", setup.workers)
    variants = [
        ("ours", ours()),
        *other,
        ("plain loop", _plain(setup)),
        ("plain loop, channels_last", _plain(setup, "--channels-last")),
        (f"plain loop, channels_last, {setup.workers} loader processes", _plain(setup, *workers)),
        (LIMIT, _limit(setup)),
    ]
    return [Variant("training", name, measure) for name, measure in variants]


def cache(setup: Setup) -> list[Variant]:
    """Photos per second in epochs after the first, with photos decoded in every epoch and only once."""

    def ours(images: str, *words: object) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            flags = ("--epochs", max(setup.epochs, 2), "--seed", seed, *words)
            place = "off" if images == "off" else folder / images
            finished = _ours(setup, folder, "chapter", *flags, "--cache-images", place)
            result = _trained(finished, folder / "run", setup)
            first, *later = result["epoch_seconds"]
            speeds = {"first_epoch": setup.train / first, "value": len(later) * setup.train / sum(later)}
            return result | speeds

        return measure

    on_gpu = [("kept and cropped on the GPU", ours("off", "--crop-on-device"))] if setup.gpus else []
    variants = [
        ("decoded in every epoch", ours("off")),
        ("decoded once", ours("decoded")),
        *on_gpu,
        (LIMIT, _limit(setup)),
    ]
    return [Variant("cache", name, measure) for name, measure in variants]


def simulated(setup: Setup) -> list[Variant]:
    """Share of their time that a simulated device or simulated cores work, in epochs after the first."""

    def share(device_ms: float, decode_ms: float, cores: int) -> Callable[[Path, int], dict]:
        def measure(folder: Path, seed: int) -> dict:
            copies = max(SIMULATED_PHOTOS // setup.train, 1)
            flags = setup.train_flags(folder / "run", "scratch", "--epochs", SIMULATED_EPOCHS, "--seed", seed)
            photos = repeated_photos(setup, copies)
            flags += ["--data-dir", str(photos), "--num-workers", str(cores), "--no-neighbors"]
            words = setup.task(
                "simulated", flags=flags, device_ms=device_ms, decode_ms=decode_ms, cores=cores
            )
            env = fresh_cache(setup.work / "cache" / folder.name) | {"ACCELERATE_USE_CPU": "true"}
            finished = run_process(words, folder, env=env)
            result = task_result(finished)
            value = max(result["device_seconds"], result["core_seconds"]) / result["seconds"]
            return {"value": value, **result, "command": finished.command}

        return measure

    return [
        Variant(
            "simulated",
            f"{device_ms:g} ms a photo, {cores} cores that take {decode_ms:g} ms",
            share(device_ms, decode_ms, cores),
        )
        for device_ms, decode_ms, cores in SIMULATIONS
    ]


def accuracy(setup: Setup) -> list[Variant]:
    """Test accuracy over the seconds since the start of the command, for each recipe; seed = round."""

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
    """Seconds per epoch after the first with a frozen body: with cached features, and in a plain loop."""

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
    """Photos per second of predictions on the test folder, after the model is loaded."""

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
            result = task_result(finished)
            speed = result["images"] / result["seconds"]
            return {"value": speed, **result, "seconds_in_all": finished.seconds, "command": finished.command}

        return measure

    variants = [("ours, torch", predict("ours", setup.saved_model, OUR_PREDICT_BATCH))]
    if setup.bf16:
        in_bf16 = predict("ours", setup.saved_model, OUR_PREDICT_BATCH, "bf16")
        variants.append(("ours, torch, bf16", in_bf16))
    if setup.onnx and version_of("onnxruntime"):
        exported = {"ours, ONNX": setup.onnx} | {f"ours, ONNX {p}": file for p, file in setup.smaller.items()}
        variants += [(name, predict("ours", file, OUR_PREDICT_BATCH)) for name, file in exported.items()]
    if version_of("transformers"):
        variants += [
            (f"transformers pipeline, batch {size}", predict("transformers", setup.saved_model, size))
            for size in PIPELINE_BATCHES
        ]
    variants.append(("timm, plain forward", predict("timm", setup.saved_model, OUR_PREDICT_BATCH)))
    return [Variant("prediction", name, measure) for name, measure in variants]


def memory(setup: Setup) -> list[Variant]:
    """Peak memory of listing a data folder, some training steps and evaluation, for growing folders."""

    # The same full batches for every size, so that only the number of photos differs.
    batch_size = min(setup.step_size, setup.train, MEMORY_BATCH)
    steps = max(min(MEMORY_STEPS, setup.train // batch_size), 1)

    def peak(copies: int) -> Callable[[Path, int], dict]:
        def measure(folder: Path, _round: int) -> dict:
            words = setup.task(
                "memory",
                data_dir=str(repeated_photos(setup, copies)),
                batch_size=batch_size,
                steps=steps,
                **setup.network(),
            )
            finished = run_process(words, folder)
            found = task_result(finished)
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
            if number == 1 and setup.gpus:  # multi_gpu.yaml needs two or more GPUs
                launcher[-1] = setup.root / "configs/one_gpu.yaml"
            launcher += ["--num_processes", number]
            flags = ("--epochs", 1, "--seed", seed, "--num-threads", max(setup.threads // number, 1))
            finished = _ours(setup, folder, "chapter", *flags, launcher=tuple(launcher))
            return _trained(finished, folder / "run", setup)

        return measure

    return [Variant("processes", "1 process", launched(1)), Variant("processes", "2 processes", launched(2))]


def startup(setup: Setup) -> list[Variant]:
    """Seconds until a script responds: --help of each, the first training step, the first prediction."""

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
        result = task_result(finished)
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
    for section in (
        startup,
        prediction,
        profile,
        memory,
        frozen,
        exact,
        cache,
        simulated,
        training,
        processes,
        accuracy,
    )
}
