"""The results of a run: metric rows, predictions.csv, and the lines printed on the console."""

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from hotdog_hf import metrics
from hotdog_hf.config import TrainConfig
from hotdog_hf.files import write_text
from hotdog_hf.metrics import MAX_TABLE_CLASSES
from hotdog_hf.model import calibration


def epoch_row(accelerator: Accelerator, totals: torch.Tensor, seconds: float) -> dict[str, float]:
    """Return an epoch's loss (mean per photo) and accuracy over all processes, its seconds and its speed."""
    loss_sum, correct, count = accelerator.reduce(totals).tolist()
    return {
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "train_seconds": seconds,
        "examples_per_second": count / seconds,
    }


def epoch_scores(scores: dict, split: str) -> dict:
    """Return an epoch's scores of a split under the names of a metrics row.

    Every checkpoint holds the rows of all epochs: with many classes only the final row has the confusion
    matrix, a million numbers for 1,000 classes.
    """
    large = len(scores["confusion_matrix"]) > MAX_TABLE_CLASSES
    kept = {name: value for name, value in scores.items() if not (large and name == "confusion_matrix")}
    return {f"{split}_{name}": value for name, value in kept.items()}


def write_metrics(run_dir: Path, rows: list[dict]) -> None:
    """Write `metrics.jsonl` atomically: one line per epoch, and the final one."""
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_text(run_dir / "metrics.jsonl", lines)


def write_predictions(
    path: Path, names: Sequence[str], probabilities: np.ndarray, labels: np.ndarray, label_names: list[str]
) -> None:
    """Write one CSV line per photo: its name, true and predicted label, and one probability per class."""
    # File names in another encoding are written as the bytes they were read as.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "true_label", "predicted_label", *label_names])
        for name, label, row in zip(names, labels, probabilities, strict=True):
            numbers = (f"{value:.9g}" for value in row)  # as many digits as a float32 has
            writer.writerow([name, label_names[label], label_names[row.argmax()], *numbers])


def numbers(row: dict) -> dict[str, float]:
    """Return the plain numbers of a metrics row, which trackers can plot."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def scores_of(row: dict, split: str) -> dict:
    """Return the scores of one split from a metrics row."""
    prefix = f"{split}_"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def describe_epoch(row: dict, eval_split: str) -> str:
    """Return the line printed after an epoch, with the scores of `eval_split` if it was evaluated.

    Epoch 0 is the start of a run whose output layer was fitted before any training.
    """
    title = f"epoch {row['epoch']}" if row["epoch"] else "epoch 0 (the fitted output layer)"
    parts = []
    for split in ("train", eval_split):
        if f"{split}_loss" in row:
            parts += [
                f"{split} loss {row[f'{split}_loss']:.3f}",
                f"{split} acc {row[f'{split}_accuracy']:.3f}",
            ]
    return f"{title}: {', '.join(parts)}, {row['examples_per_second']:.1f} examples/sec"


def final_row(rows: list[dict], test_scores: dict, seconds: float) -> dict:
    """Return the last line of `metrics.jsonl`: the saved model's test scores, seconds, and training speed.

    The speed is that of the epochs, or of fitting the head if there are none.
    """
    epochs = [row for row in rows if row["epoch"] > 0] or rows
    examples = sum(row["examples_per_second"] * row["train_seconds"] for row in epochs)
    trained, loading, evaluating = (
        sum(row[name] for row in rows) for name in ("train_seconds", "loading_seconds", "evaluating_seconds")
    )
    return {
        "final": True,
        "train_loss": rows[-1]["train_loss"],
        "train_accuracy": rows[-1]["train_accuracy"],
        **{f"test_{name}": value for name, value in test_scores.items()},
        "examples_per_second": examples / sum(row["train_seconds"] for row in epochs),
        "loading_seconds": loading,
        "computing_seconds": trained - loading,
        "evaluating_seconds": evaluating,
        "seconds": seconds,
    }


def calibration_row(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """Return the temperature, and log-loss and calibration error on test before and after."""
    before = calibration.uncalibrated(probabilities, temperature)
    return {
        "temperature": temperature,
        "test_uncalibrated_loss": metrics.log_loss(before, labels),
        "test_calibration_error": metrics.calibration_error(probabilities, labels),
        "test_uncalibrated_calibration_error": metrics.calibration_error(before, labels),
    }


def describe_final(final: dict, run_dir: Path, hardware: str) -> str:
    """Return the chapter's closing lines, where the time went, where the results are, and what to do next."""
    share = final.get("share_of_limit")
    limit = "" if share is None else f", {share:.0%} of the speed with all photos decoded in memory"
    model = shlex.quote(f"{run_dir}/model")
    return (
        f"loss {final['train_loss']:.3f}, train acc {final['train_accuracy']:.3f}, "
        f"test acc {final['test_accuracy']:.3f}\n"
        f"{_describe_calibration(final)}"
        f"{final['examples_per_second']:.1f} examples/sec on {hardware}{limit}\n"
        f"{final['seconds']:.0f} s in all, of which {final['loading_seconds']:.0f} loading photos, "
        f"{final['computing_seconds']:.0f} training, {final['evaluating_seconds']:.0f} evaluating\n"
        f"model:    {run_dir}/model\n"
        f"numbers:  {run_dir}/metrics.jsonl\n"
        f"pictures: {run_dir}/curves.png, {run_dir}/samples.png\n"
        f"report:   python scripts/report.py {model}\n"
        f"predict:  python scripts/predict.py {model} PHOTO"
    )


def waiting_hint(final: dict, config: TrainConfig, device_type: str) -> str | None:
    """Return what to do about a GPU that waited for photos for most of the training; None if it did not."""
    on_crops = config.data.augmentation == "crop" and not config.data.streaming
    waited = final["loading_seconds"] > final["computing_seconds"]
    if device_type == "cpu" or not on_crops or config.data.crop_on_device or not waited:
        return None
    return (
        "the GPU waited for photos most of the time: --crop-on-device keeps the decoded photos in its memory"
        " and cuts the crops there"
    )


def _describe_calibration(final: dict) -> str:
    if "temperature" not in final:
        return ""
    if final["temperature"] == 1:
        error = final["test_calibration_error"]
        return f"probabilities are as trained (temperature 1): test calibration error {error:.4f}\n"
    return (
        f"calibrated with temperature {final['temperature']:.3f}: test loss"
        f" {final['test_uncalibrated_loss']:.4f} -> {final['test_loss']:.4f}, calibration error"
        f" {final['test_uncalibrated_calibration_error']:.4f} -> {final['test_calibration_error']:.4f}\n"
    )
