"""The folder of one training run: made once, never shared, its records written line by line."""

import dataclasses
import json
import os
import time
from pathlib import Path

from hotdog_hf.errors import UserError


def default_run_dir(recipe: str) -> Path:
    """Return `runs/<recipe>-<time>`."""
    return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def create_run_dir(path: str | os.PathLike, config: object) -> Path:
    """Make the run's folder with its config in it; `UserError` where another run is, or no place."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # "x": of two runs that start into one folder, the file system lets one win.
        with (folder / "config.json").open("x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(config), file, indent=2)
            file.write("\n")
    except FileExistsError as error:
        if not folder.is_dir():
            raise UserError(f"--output-dir {folder} is a file") from error
        raise UserError(f"{folder} holds a run already; give another --output-dir or remove it") from error
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from error
    return folder


def append_metrics(run_dir: Path, row: dict) -> None:
    """Add one JSON line to `metrics.jsonl`."""
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def flatten(config: object) -> dict[str, str | int | float | bool]:
    """Return a config's knobs in one level, for trackers, which refuse None and nested values."""
    groups = dataclasses.asdict(config)
    knobs = {name: value for name, value in groups.items() if not isinstance(value, dict)}
    for group in groups.values():
        knobs |= group if isinstance(group, dict) else {}
    return {name: "" if value is None else value for name, value in knobs.items()}


def numbers(row: dict) -> dict[str, float]:
    """Return the plain numbers of a metrics row, which is what trackers plot."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def describe_epoch(row: dict, eval_split: str) -> str:
    """Return the line printed after an epoch."""
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.3f}, train acc {row['train_accuracy']:.3f}, "
        f"{eval_split} loss {row[f'{eval_split}_loss']:.3f}, "
        f"{eval_split} acc {row[f'{eval_split}_accuracy']:.3f}, {row['examples_per_second']:.1f} examples/sec"
    )


def final_row(rows: list[dict], test_scores: dict, seconds: float) -> dict:
    """Return the last line of `metrics.jsonl`: the kept model's test scores, seconds, and training speed."""
    examples = sum(row["examples_per_second"] * row["train_seconds"] for row in rows)
    return {
        "final": True,
        "train_loss": rows[-1]["train_loss"],
        "train_accuracy": rows[-1]["train_accuracy"],
        **{f"test_{name}": value for name, value in test_scores.items()},
        "examples_per_second": examples / sum(row["train_seconds"] for row in rows),
        "seconds": seconds,
    }


def describe_final(final: dict, run_dir: Path, hardware: str) -> str:
    """Return the chapter's closing lines and where the results are."""
    return (
        f"loss {final['train_loss']:.3f}, train acc {final['train_accuracy']:.3f}, "
        f"test acc {final['test_accuracy']:.3f}\n"
        f"{final['examples_per_second']:.1f} examples/sec on {hardware}, {final['seconds']:.0f} s in all\n"
        f"model: {run_dir}/model   numbers: {run_dir}/metrics.jsonl"
        f"   pictures: {run_dir}/curves.png, {run_dir}/samples.png"
    )
