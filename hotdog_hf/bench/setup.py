"""The setup of the benchmark: photos, weights, a saved model, and a description of the machine."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from hotdog_hf.bench.processes import MeasurementError, run_process, task_command, task_result
from hotdog_hf.config import RECIPES
from hotdog_hf.data.images import decode_image
from hotdog_hf.errors import UserError
from hotdog_hf.machine import allowed_cores

CHAPTER_BATCH = RECIPES["chapter"].optim.batch_size
VERSIONS = "torch torchvision timm accelerate datasets transformers onnxruntime pillow numpy".split()


@dataclass(frozen=True)
class Setup:
    """What all measurements have in common."""

    # The repository, the working folder, the photos in it, and their number per split.
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
    # A model trained from it, as a folder and, if it could be exported, as an ONNX file.
    saved_model: Path
    onnx: Path | None
    # Why not.
    not_exported: str | None
    # The ONNX file in "fp16" and "int8".
    smaller: dict[str, Path]
    # Photos per step, if not the recipe's own, and epochs of the training section.
    batch_size: int | None
    epochs: int
    recipes: tuple[str, ...]
    # CPU threads, loader processes that the plain loop and ours may use, and GPUs.
    threads: int
    workers: int
    gpus: int
    # Whether the GPUs, or without them the CPU, have bf16 arithmetic.
    bf16: bool

    @property
    def step_size(self) -> int:
        """Photos per step of the chapter's recipe."""
        return self.batch_size or CHAPTER_BATCH

    def script(self, name: str, *words: object) -> list[str]:
        """Return the command that runs one of the scripts."""
        return [sys.executable, str(self.root / "scripts" / name), *map(str, words)]

    def task(self, name: str, /, **knobs: object) -> list[str]:
        """Return the command that runs a part of `hotdog_hf.bench.tasks`."""
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
        """Return the command of the chapter's plain loop with the same settings."""
        given = {
            "--model": self.model,
            "--weights": self.weights,
            "--image-size": self.image_size,
            "--batch-size": self.step_size,
            "--num-threads": self.threads,
        }
        return self.script("plain_loop.py", self.photos, *(w for pair in given.items() for w in pair), *words)


# Preparation.


def prepare(
    work: Path,
    root: Path,
    *,
    data_dir: str,
    photos: int | None,
    enlarge: int | None,
    model: str,
    weights: str,
    image_size: int | None,
    batch_size: int | None,
    epochs: int,
    recipes: tuple[str, ...],
    num_threads: int | None,
    exported: bool,
) -> tuple[Setup, dict]:
    """Create everything that the measurements need in `work`; return it, and the machine's description.

    `photos` is the maximum per class and split, `enlarge` the longer side that they get; ONNX files are made
    if `exported`. Raises `UserError` if the data or the network is missing.
    """
    if data_dir.startswith("hf://"):
        raise UserError("the benchmark compares with loops that read folders: give a folder as --data-dir")
    # Only this process may download what is missing.
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
        exported=exported,
    )
    try:
        found = task_result(run_process(words, folder, env={"HF_HUB_OFFLINE": hub_offline}))
    except MeasurementError as error:
        raise UserError(str(error).partition(": error: ")[2] or str(error)) from error
    files = {
        split: {name: paths[:photos] for name, paths in classes.items()}
        for split, classes in found["files"].items()
    }
    link_photos(enlarge_photos(files, work / "enlarged", enlarge) if enlarge else files, work / "photos")
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
        onnx=work / "model.onnx" if exported and not found["not_exported"] else None,
        not_exported=found["not_exported"],
        smaller={precision: Path(file) for precision, file in found["smaller"].items()},
        batch_size=batch_size,
        epochs=epochs,
        recipes=recipes,
        threads=num_threads or found["threads"],
        workers=min(allowed_cores(), 8),
        gpus=len(found["gpus"]),
        bf16=found["bf16"],
    )
    found = {"threads": setup.threads, "bf16": setup.bf16, "gpus": found["gpus"]}
    return setup, _describe_machine() | found


def _describe_machine() -> dict:
    return {
        "cpu": _cpu_name(),
        "cores": allowed_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in VERSIONS},
    }


def link_photos(files: dict[str, dict[str, list[str]]], target: Path, copies: int = 1) -> Path:
    """Create a data folder of links to files by split and class, `copies` of each."""
    for split, classes in files.items():
        for name, paths in classes.items():
            folder = target / split / name
            folder.mkdir(parents=True)
            for number, path in enumerate(map(Path, paths)):
                for copy in range(copies):
                    link = folder / f"{number:05}-{copy:03}{path.suffix}"
                    link.symlink_to(path.resolve())
    return target


def enlarge_photos(
    files: dict[str, dict[str, list[str]]], target: Path, side: int
) -> dict[str, dict[str, list[str]]]:
    """Write the photos as JPEGs of quality 92 whose longer side is `side`; return their paths likewise."""
    enlarged = {}
    bar = tqdm(desc="enlarging", unit="img", leave=False, disable=None)
    for split, classes in files.items():
        enlarged[split] = {name: [] for name in classes}
        for name, paths in classes.items():
            folder = target / split / name
            folder.mkdir(parents=True)
            for number, path in enumerate(paths):
                photo = decode_image(path)
                size = tuple(max(round(edge * side / max(photo.size)), 1) for edge in photo.size)
                file = folder / f"{number:05}.jpg"
                photo.resize(size, Image.Resampling.BICUBIC).save(file, quality=92)
                enlarged[split][name].append(str(file))
                bar.update()
    bar.close()
    return enlarged


def repeated_photos(setup: Setup, copies: int) -> Path:
    """Return a data folder with `copies` of every photo, created on first use."""
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


def version_of(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def commit_of(root: Path) -> str | None:
    """Return the commit of the repository, with a plus if files differ from it; None outside git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain"], stderr=subprocess.DEVNULL)
        return commit.decode().strip() + ("+" if changed.strip() else "")
    return None
