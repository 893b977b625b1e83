"""The folder of one training run: its lock, its records, and what is printed of it."""

import csv
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np

from hotdog_hf.errors import UserError
from hotdog_hf.files import write_json, write_text

# A launcher passes on the signal that the terminal has sent already: within this time two are one.
SAME_SIGNAL_SECONDS = 1.0


def default_run_dir(recipe: str) -> Path:
    """Return `runs/<recipe>-<time>`."""
    return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_run_dir(path: str | os.PathLike, resume: bool = False) -> tuple[Path, filelock.FileLock]:
    """Make the run's folder, or with `resume` enter one that exists; return it with the lock that is held.

    The lock is the system's and ends with the process, however that ends; keep it referenced. Raises
    `UserError` where another run is or was, or where nothing can be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        if not resume and (folder / "config.json").exists():
            raise UserError(
                f"{folder} holds a run already; give another --output-dir, or go on with it by --resume auto"
            )
    except filelock.Timeout as error:
        raise UserError(f"another process is running in {folder}; give another --output-dir") from error
    except FileExistsError as error:
        raise UserError(f"--output-dir {folder} is a file") from error
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from error
    return folder, lock


def read_identity(run_dir: Path) -> dict:
    """Read what `write_identity` wrote: the config, the number of processes and the photos of a run."""
    try:
        return json.loads((run_dir / "identity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} cannot be gone on with: {error}") from error


def write_identity(run_dir: Path, identity: dict, skipped: list[Path]) -> None:
    """Write what makes the run this one, its config also by itself, and the photos left out, if any."""
    write_json(run_dir / "identity.json", identity)
    write_json(run_dir / "config.json", identity["config"])
    if skipped:
        write_json(run_dir / "skipped_images.json", [str(path) for path in skipped])


def write_metrics(run_dir: Path, rows: list[dict]) -> None:
    """Write `metrics.jsonl`, a line an epoch and the final one, whole or not at all."""
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_text(run_dir / "metrics.jsonl", lines)


def write_predictions(
    path: Path, names: Sequence[str], probabilities: np.ndarray, labels: np.ndarray, label_names: list[str]
) -> None:
    """Write a CSV line a photo: its name, true and predicted label, and a probability a class."""
    # File names in another encoding leave as the bytes they came as.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "true_label", "predicted_label", *label_names])
        for name, label, row in zip(names, labels, probabilities, strict=True):
            numbers = (f"{value:.9g}" for value in row)  # as many digits as a float32 has
            writer.writerow([name, label_names[label], label_names[row.argmax()], *numbers])


class StopSignal:
    """SIGTERM, Ctrl-C or SIGUSR1 (SLURM's warning) as a wish to stop after the step; a second one kills."""

    def __init__(self) -> None:
        self.number, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.number and now - self.time > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.time = int(number), now
            said = "stopping after the next training step, and saving; once more to end at once"
            print(f"\n{signal.Signals(number).name}: {said}", file=sys.stderr, flush=True)

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


def resume_command(run_dir: Path) -> str:
    """Return the command line that goes on with this run; other scripts than train.py find it themselves."""
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"]
    if processes != "1":
        config, machines = "accelerate_config.yaml", ""
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            config = "configs/fsdp.yaml"
        if processes != os.environ.get("LOCAL_WORLD_SIZE", processes):
            config = "configs/two_nodes.yaml"
            machines = f" --machine_rank 0 --main_process_ip {os.environ.get('MASTER_ADDR')}"
        launcher = shlex.split(
            f"accelerate launch --config_file {config} --num_processes {processes}{machines}"
        )
    if Path(sys.argv[0]).name != "train.py":
        return shlex.join([*launcher, *sys.argv])
    words, given = [], iter(sys.argv)
    for word in given:
        if word in ("--output-dir", "--resume"):
            next(given, None)
        elif not word.startswith(("--output-dir=", "--resume=")):
            words.append(word)
    return shlex.join([*launcher, *words, "--output-dir", str(run_dir), "--resume", "auto"])


def numbers(row: dict) -> dict[str, float]:
    """Return the plain numbers of a metrics row, which is what trackers plot."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def scores_of(row: dict, split: str) -> dict:
    """Return the scores of one split out of a metrics row."""
    prefix = f"{split}_"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def describe_epoch(row: dict, eval_split: str) -> str:
    """Return the line printed after an epoch."""
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.3f}, train acc {row['train_accuracy']:.3f}, "
        f"{eval_split} loss {row[f'{eval_split}_loss']:.3f}, "
        f"{eval_split} acc {row[f'{eval_split}_accuracy']:.3f}, {row['examples_per_second']:.1f} examples/sec"
    )


def final_row(rows: list[dict], test_scores: dict, seconds: float) -> dict:
    """Return the last line of `metrics.jsonl`: the kept model's test scores, seconds, and training speed.

    The speed is that of the epochs; where there is none, of solving the head.
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


def describe_final(final: dict, run_dir: Path, hardware: str) -> str:
    """Return the chapter's closing lines, where the time went, and where the results are."""
    share = final.get("share_of_limit")
    limit = "" if share is None else f"; {share:.0%} of the speed on photos in memory"
    return (
        f"loss {final['train_loss']:.3f}, train acc {final['train_accuracy']:.3f}, "
        f"test acc {final['test_accuracy']:.3f}\n"
        f"{final['examples_per_second']:.1f} examples/sec on {hardware}, {final['seconds']:.0f} s in all: "
        f"{final['loading_seconds']:.0f} loading, {final['computing_seconds']:.0f} computing, "
        f"{final['evaluating_seconds']:.0f} evaluating{limit}\n"
        f"model: {run_dir}/model   numbers: {run_dir}/metrics.jsonl"
        f"   pictures: {run_dir}/curves.png, {run_dir}/samples.png"
    )
