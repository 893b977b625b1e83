"""The Accelerate loop: where training and evaluation pass through the network."""

import contextlib
import gc
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from accelerate import Accelerator
from tqdm import tqdm

from hotdog_hf.data import IGNORED_LABEL
from hotdog_hf.errors import UserError

BAR_REFRESH_SECONDS = 0.5
# Convolutions run faster on it, on CPUs and on GPUs with tensor cores; the numbers are the same.
MEMORY_FORMAT = torch.channels_last
MAX_WORKERS = 8


def build_accelerator(
    precision: str = "auto",
    tracker: str = "none",
    num_threads: int | None = None,
    deterministic: bool = False,
) -> Accelerator:
    """Create the Accelerator for the hardware at hand, with exactly the processes that were launched.

    `precision` "auto" is what `accelerate launch` was told, else bf16 on a GPU with bf16 units, else float32:
    on a CPU without them bf16 was 60 times slower. Raises `UserError` where processes do not see each other.
    """
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if (
            precision == "no"
            and torch.cuda.is_available()
            and torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            precision = "bf16"
    if precision == "fp16" and on_cpu:
        raise UserError(
            "--precision fp16 does nothing on a CPU; use --precision no, or bf16 where the CPU has it"
        )
    # Without `cpu`, processes launched for a machine that has no GPU would not find each other.
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        # accelerate itself would go on without it
        raise UserError(f'--tracker {tracker} is not installed: pip install -e ".[{tracker}]"')
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=".",  # until the run's folder is known,
    )
    wanted = _launched_processes()
    if wanted != accelerator.num_processes:
        raise UserError(
            f"{wanted} processes were asked for, but this one sees {accelerator.num_processes}; use"
            " `accelerate launch --config_file accelerate_config.yaml --num_processes N scripts/train.py`"
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
    if on_cpu:
        torch.set_num_threads(num_threads or _default_threads())
    return accelerator


def _default_threads() -> int:
    """Return this process's share of the cores; `accelerate launch` sets OMP_NUM_THREADS=1 everywhere."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    return max(cores // _local_processes(), 1)


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _launched_processes() -> int:
    """Return how many processes the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one and tells it nothing; its command line is read.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    launcher = psutil.Process().parent()
    with contextlib.suppress(psutil.Error):
        words = launcher.cmdline() if launcher else []
        if any("accelerate" in word for word in words[:3]) and "launch" in words[:4]:
            for flag, value in itertools.pairwise(words):
                if flag in ("--num_processes", "--num-processes") and value.isdigit():
                    return max(int(value), 1)
    return 1


def describe_hardware(accelerator: Accelerator) -> str:
    """Return what the run computes on: device, processes, precision."""
    device = accelerator.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{accelerator.num_processes} x {device.type} ({name}), {precision}"


def default_workers(accelerator: Accelerator) -> int:
    """Return the number of loader processes: none on a CPU, else this GPU's share of the cores."""
    if accelerator.device.type == "cpu":
        return 0
    return min(MAX_WORKERS, (os.cpu_count() or 1) // _local_processes())


def start_tracker(accelerator: Accelerator, run_dir: Path, knobs: dict) -> None:
    """Start the tracker the accelerator was built with, if any, in the run's folder."""
    accelerator.project_configuration.logging_dir = str(run_dir)
    accelerator.init_trackers("hotdog_hf", config=knobs)


def finish(accelerator: Accelerator, *prepared: object) -> list:
    """End the run: trackers closed, and the prepared objects given up in time.

    With a distributed model still alive at exit, about one run in ten of two CPU processes aborts after its
    work is done ("terminate called without an active exception"): assign the result over the last references.
    """
    released = accelerator.free_memory(*prepared)
    gc.collect()
    accelerator.end_training()
    return released


def train_steps(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    totals: torch.Tensor,
    *,
    loss_reduction: str,
    accumulation_steps: int = 1,
    title: str = "",
) -> Iterator[None]:
    """Train over the rest of an epoch, yielding after every optimizer step.

    Each batch of `loader` is this process's share of one step. `totals` [3] (sums of loss, correct answers,
    photos) grows in place: measured on the augmented photos while the weights move, as in the chapter.
    """
    model.train()
    bar = tqdm(desc=title, unit="img", leave=False, disable=_no_bar(accelerator))
    bar.total, unchecked = loader.batch_sampler.size, None
    bar.update(loader.batch_sampler.photos_skipped())
    for batch, step_size in zip(loader, loader.batch_sampler.step_sizes(), strict=True):
        images = batch["pixel_values"].to(accelerator.device, memory_format=MEMORY_FORMAT, non_blocking=True)
        labels = batch["labels"].to(accelerator.device, non_blocking=True)
        # DDP averages the gradients of the processes: times their number they are the sum over the whole
        # batch, exact for a short last batch too; divided by its size they are the mean.
        scale = accelerator.num_processes / (step_size if loss_reduction == "mean" else 1)
        pieces = list(zip(images.chunk(accumulation_steps), labels.chunk(accumulation_steps), strict=True))
        for number, (image_piece, label_piece) in enumerate(pieces, start=1):
            last = number == len(pieces)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                logits = model(image_piece)
                loss = F.cross_entropy(logits, label_piece, reduction="sum", ignore_index=IGNORED_LABEL)
                accelerator.backward(loss * scale)
            totals += _batch_totals(loss, logits, label_piece)
        if unchecked:  # one step late, so that the GPU never waits for the answer
            _require_finite(*unchecked)
        unchecked = (loss.detach(), batch["index"], loader.dataset, schedule.get_last_lr())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update(step_size)
        _show(bar, totals)
        yield
    if unchecked:
        _require_finite(*unchecked)
    bar.close()


class NonFiniteLossError(UserError):
    """The loss has become NaN or infinite."""


def _require_finite(
    loss: torch.Tensor, indices: torch.Tensor, dataset: torch.utils.data.Dataset, rates: list[float]
) -> None:
    if not torch.isfinite(loss):
        names = [dataset.name_of(index) for index in indices[:5].tolist()]
        raise NonFiniteLossError(
            f"the loss became {loss.item()} at learning rates from {min(rates):.3g} to {max(rates):.3g},"
            f" on {len(indices)} photos: {', '.join(names)}{', ...' if len(indices) > 5 else ''}"
        )


def epoch_row(accelerator: Accelerator, totals: torch.Tensor, seconds: float) -> dict[str, float]:
    """Return the epoch's loss (mean per photo) and accuracy over all processes, its seconds and its speed."""
    loss_sum, correct, count = accelerator.reduce(totals).tolist()
    return {
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "train_seconds": seconds,
        "examples_per_second": count / seconds,
    }


def log(accelerator: Accelerator, row: dict, step: int) -> None:
    """Send numbers to the tracker; one that has gone away never ends a run."""
    try:
        accelerator.log(row, step=step)
    except Exception as error:  # whatever a tracker's network client raises
        accelerator.print(f"warning: the tracker took no numbers: {type(error).__name__}: {error}")


def pass_size(accelerator: Accelerator, batch_size: int, accumulation_steps: int) -> int:
    """Return how many photos of a batch one process takes through the network at once."""
    return math.ceil(batch_size / (accelerator.num_processes * accumulation_steps))


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process has `flag` set; every process gets the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(int(flag), device=accelerator.device)).item() > 0


def _batch_totals(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss.detach(), correct, (labels != IGNORED_LABEL).sum()])


def _show(bar: tqdm, totals: torch.Tensor) -> None:
    """Write loss and accuracy so far behind the bar, seldom: reading them waits for the GPU."""
    now = time.perf_counter()
    if not bar.disable and now - getattr(bar, "shown_at", 0) > BAR_REFRESH_SECONDS:
        loss_sum, correct, count = totals.tolist()
        bar.set_postfix(loss=f"{loss_sum / count:.3f}", acc=f"{correct / count:.3f}", refresh=False)
        bar.shown_at = now


def _no_bar(accelerator: Accelerator) -> bool | None:
    """None lets tqdm decide: a bar on a terminal, none in a log file."""
    return None if accelerator.is_main_process else True


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: torch.nn.Module, loader: torch.utils.data.DataLoader, title: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities [N, classes] and labels [N] of all N photos, in order, on every process.

    `loader` was prepared by the accelerator; the copies it makes to fill the last batch are dropped again.
    """
    model.eval()
    probabilities, labels = [], []
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=_no_bar(accelerator)):
        images = batch["pixel_values"].to(memory_format=MEMORY_FORMAT)
        gathered = accelerator.gather_for_metrics((model(images).float().softmax(dim=1), batch["labels"]))
        probabilities.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
    probabilities, labels = torch.cat(probabilities), torch.cat(labels)
    expected = len(loader.dataset)
    assert len(labels) == expected, f"{len(labels)} predictions for {expected} photos"
    return probabilities, labels
