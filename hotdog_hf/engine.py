"""The Accelerate loop: where training and evaluation pass through the network."""

import contextlib
import copy
import gc
import importlib.util
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import timm
import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from hotdog_hf import sharding
from hotdog_hf.data import IGNORED_LABEL, FeatureDataset
from hotdog_hf.errors import UserError
from hotdog_hf.machine import allowed_cores, cpu_has_bf16, keep_freed_memory
from hotdog_hf.pixels import MEMORY_FORMAT

BAR_REFRESH_SECONDS = 0.5
MAX_WORKERS = 8
# On a CPU, one core in so many decodes; with fewer cores the loop decodes between the steps.
CORES_A_WORKER = 16


class NonFiniteLossError(UserError):
    """The loss, or an answer of the network, has become NaN or infinite."""


def build_accelerator(
    precision: str = "auto",
    tracker: str = "none",
    num_threads: int | None = None,
    deterministic: bool = False,
    may_shard: bool = False,
) -> Accelerator:
    """Create the Accelerator for the hardware at hand, with exactly the processes that were launched.

    `precision` "auto" is what `accelerate launch` was told, else bf16 on a GPU with bf16 units, else float32:
    on a CPU without them bf16 was 60 times slower. Raises `UserError` where processes do not see each other.
    """
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision == "no" and gpu_has_bf16():
            precision = "bf16"
    if precision in ("fp16", "tf32") and on_cpu:
        raise UserError(
            f"--precision {precision} does nothing on a CPU; use --precision no, or bf16 where the CPU has it"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("leave out the launcher's --dynamo_backend and give --compile to scripts/train.py")
    for way in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise UserError(
                f"the launcher's {way} is not built in here; for a large network: configs/fsdp.yaml"
            )
    fsdp_plugin = sharding.plugin()
    if fsdp_plugin and not may_shard:
        raise UserError("only scripts/train.py cuts a network into pieces (FSDP); launch this without it")
    if fsdp_plugin and precision == "fp16":
        raise UserError("--precision fp16 does not go with FSDP here; use bf16 or no")
    # Torch's own default is TF32 in convolutions and float32 in all else.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        # accelerate itself would go on without it
        raise UserError(f'--tracker {tracker} is not installed: pip install -e ".[{tracker}]"')
    accelerator = Accelerator(
        cpu=on_cpu,  # without it, processes launched for a machine that has no GPU would not find each other
        mixed_precision="no" if precision == "tf32" else precision,
        fsdp_plugin=fsdp_plugin,
        log_with=None if tracker == "none" else tracker,
        project_dir=".",  # until the run's folder is known
    )
    wanted = _launched_processes()
    if wanted != accelerator.num_processes:
        raise UserError(
            f"{wanted} processes were asked for, but this one sees {accelerator.num_processes}; use"
            " `accelerate launch --config_file accelerate_config.yaml --num_processes N scripts/train.py`"
        )
    if fsdp_plugin and accelerator.num_processes == 1:
        raise UserError("FSDP cuts a network over several processes: --num_processes 2 or more")
    if fsdp_plugin and on_cpu:
        sharding.shard_on_cpu(accelerator, fsdp_plugin)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
    if on_cpu:
        torch.set_num_threads(num_threads or _default_threads())
        keep_freed_memory()
    return accelerator


def _default_threads() -> int:
    """Return this process's share of the cores; `accelerate launch` sets OMP_NUM_THREADS=1 everywhere."""
    cores = min(psutil.cpu_count(logical=False) or allowed_cores(), allowed_cores())
    return max((cores - _cpu_workers()) // _local_processes(), 1)


def _cpu_workers() -> int:
    """Return how many cores decode photos while the others compute."""
    return allowed_cores() // CORES_A_WORKER


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


def gpu_has_bf16() -> bool:
    """Tell whether there is a GPU that multiplies in bf16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_of(accelerator: Accelerator) -> str:
    """Return the arithmetic of this run: "no" (float32), "tf32", "bf16" or "fp16"."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else accelerator.mixed_precision


def describe_hardware(accelerator: Accelerator) -> str:
    """Return what the run computes on: device, processes, precision."""
    device = accelerator.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    precision = {"no": "float32"}.get(precision_of(accelerator), precision_of(accelerator))
    sharded = ", sharded (FSDP)" if accelerator.is_fsdp2 else ""
    return f"{accelerator.num_processes} x {device.type} ({name}), {precision}{sharded}"


def bf16_hint(accelerator: Accelerator) -> str | None:
    """Say that a CPU has an arithmetic that this run does not use; its numbers would be other ones."""
    if accelerator.device.type == "cpu" and precision_of(accelerator) == "no" and cpu_has_bf16():
        return "this CPU has bf16 too: --precision bf16 may be twice as fast, or slower, as the network is"
    return None


def describe_versions() -> str:
    """Return the versions that the numbers depend on."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


def default_workers(accelerator: Accelerator) -> int:
    """Return the number of loader processes: a CPU's few spare cores, or this GPU's share of all of them."""
    if accelerator.device.type == "cpu":
        return _cpu_workers() // _local_processes()
    return min(MAX_WORKERS, allowed_cores() // _local_processes())


def start_tracker(accelerator: Accelerator, run_dir: Path, knobs: dict) -> None:
    """Start the tracker the accelerator was built with, if any, in the run's folder."""
    accelerator.project_configuration.logging_dir = str(run_dir)
    # Trackers refuse what is no plain value.
    simple = {name: value if isinstance(value, (int, float)) else str(value) for name, value in knobs.items()}
    accelerator.init_trackers("hotdog_hf", config=simple)


def finish(accelerator: Accelerator, *prepared: object) -> list:
    """End the run: trackers closed, and the prepared objects given up in time.

    With a distributed model still alive at exit, about one run in ten of two CPU processes aborts after its
    work is done ("terminate called without an active exception"): assign the result over the last references.
    """
    released = accelerator.free_memory(*prepared)
    gc.collect()
    accelerator.end_training()
    return released


def release(accelerator: Accelerator) -> None:
    """Give up what was prepared for one training, before the next in the same process."""
    accelerator.free_memory()
    gc.collect()


def measure_speed(
    accelerator: Accelerator, net: torch.nn.Module, image_size: int, batch_size: int = 16
) -> tuple[float, float]:
    """Return the seconds that a photo in memory takes in training and in evaluation, over all processes.

    By one pass each of `batch_size` photos through a copy of `net`.
    """
    if not sharding.is_sharded(net):
        net = copy.deepcopy(net).to(accelerator.device, memory_format=MEMORY_FORMAT)
    images = torch.zeros(batch_size, 3, image_size, image_size, device=accelerator.device)
    images, seconds = images.to(memory_format=MEMORY_FORMAT), []
    for learn in (True, True, False):  # the first only warms up
        started = time.perf_counter()
        net.train(learn)
        with torch.set_grad_enabled(learn), accelerator.autocast():
            output = net(images).float().sum()
        if learn:
            output.backward()
        output.item()  # waits for a GPU
        seconds.append((time.perf_counter() - started) / len(images) / accelerator.num_processes)
    return seconds[1], seconds[2]


def train_steps(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    totals: torch.Tensor,
    *,
    loss_reduction: str,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
    average: AveragedModel | None = None,
    eval_modules: Sequence[torch.nn.Module] = (),
    title: str = "",
) -> Iterator[float]:
    """Train over the rest of an epoch; after every optimizer step, yield the seconds it waited for photos.

    Each batch of `loader` is this process's share of one step. `totals` [3] (sums of loss, correct answers,
    photos) grows in place: measured on the augmented photos while the weights move, as in the chapter. The
    modules in `resting` stay in evaluation mode; `average` follows the weights.
    """
    model.train()
    for module in eval_modules:
        module.eval()
    bar = tqdm(desc=title, unit="img", leave=False, disable=_no_bar(accelerator))
    bar.sum_processes, pending_loss = loader.batch_sampler.size, None
    bar.update(loader.batch_sampler.photos_skipped())
    batches, sharded = _timed(loader), sharding.is_sharded(model)
    for (batch, waited), step_size in zip(batches, loader.batch_sampler.step_sizes(), strict=True):
        pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        images = loader.dataset.network_input(pixel_values)
        labels = batch["labels"].to(accelerator.device, non_blocking=True)
        # DDP averages the gradients of the processes: times their number they are the sum over the whole
        # batch, exact for a short last batch too; divided by its size they are the mean.
        scale = accelerator.num_processes / (step_size if loss_reduction == "mean" else 1)
        micro_batches = list(
            zip(images.chunk(accumulation_steps), labels.chunk(accumulation_steps), strict=True)
        )
        if sharded:
            # They fetch the weights together, so that each needs as many micro-batches: this one is ignored.
            padding_batch = (images[:1], torch.full_like(labels[:1], IGNORED_LABEL))
            micro_batches = [padding_batch] * (accumulation_steps - len(micro_batches)) + micro_batches
        for number, (image_piece, label_piece) in enumerate(micro_batches, start=1):
            # Adding up gradients here spares copies the network; sharded it would cost whole gradients.
            sync_gradients = sharded or number == len(micro_batches)
            with contextlib.nullcontext() if sync_gradients else accelerator.no_sync(model):
                with accelerator.autocast():  # FSDP does not bring it along, as DDP does
                    logits = model(image_piece).float()
                loss = F.cross_entropy(
                    logits,
                    label_piece,
                    reduction="sum",
                    ignore_index=IGNORED_LABEL,
                    label_smoothing=label_smoothing,
                )
                accelerator.backward(loss * scale)
            totals += _batch_totals(loss, logits, label_piece)
        if pending_loss:  # one step late, so that the GPU never waits for the answer
            _require_finite(*pending_loss)
        # All processes find out together, so that none waits for one that has ended.
        pending_loss = (
            accelerator.reduce(loss.detach()),
            batch["index"],
            loader.dataset,
            schedule.get_last_lr(),
        )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(accelerator.unwrap_model(model))
        bar.update(step_size)
        _show(bar, totals)
        yield waited
    if pending_loss:
        _require_finite(*pending_loss)
    bar.close()


def _timed(loader: torch.utils.data.DataLoader) -> Iterator[tuple[dict, float]]:
    """Yield each batch with the seconds that it kept the loop waiting."""
    batches = iter(loader)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _require_finite(
    loss: torch.Tensor, indices: torch.Tensor, dataset: torch.utils.data.Dataset, rates: list[float]
) -> None:
    if not torch.isfinite(loss):
        names = [dataset.name_of(index) for index in indices[:5].tolist()]
        raise NonFiniteLossError(
            f"the loss became {loss.item()} at learning rates from {min(rates):.3g} to {max(rates):.3g},"
            f" on {len(indices)} photos: {', '.join(names)}{', ...' if len(indices) > 5 else ''}"
            "; start a new run with a lower --learning-rate"
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


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer as the launch wants them: one process, copies (DDP), or pieces (FSDP)."""
    if accelerator.is_fsdp2:
        return sharding.prepare(accelerator, model, optimizer, average)
    return accelerator.prepare(model, optimizer)


def broadcast_state(model: torch.nn.Module) -> None:
    """Give every process the first one's weights and BatchNorm statistics; those each counts on its own."""
    broadcast([value for value in model.state_dict().values() if not isinstance(value, DTensor)])


@torch.no_grad()
def totals_of(
    accelerator: Accelerator,
    head: torch.nn.Module,
    split_features: FeatureDataset,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return totals [3], as `train_steps` counts them, of a head on features that every process has."""
    labels = torch.as_tensor(split_features.labels, device=accelerator.device)
    logits = head(split_features.features.to(accelerator.device))
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    totals = _batch_totals(loss, logits, labels)
    return totals / accelerator.num_processes


def log(accelerator: Accelerator, row: dict, step: int) -> None:
    """Send numbers to the tracker; one that has gone away never ends a run."""
    try:
        accelerator.log(row, step=step)
    except Exception as error:  # whatever a tracker's network client raises
        accelerator.print(f"warning: the tracker took no numbers: {type(error).__name__}: {error}")


def micro_batch_size(accelerator: Accelerator, batch_size: int, accumulation_steps: int) -> int:
    """Return how many photos of a batch one process takes through the network at once."""
    return math.ceil(batch_size / (accelerator.num_processes * accumulation_steps))


def run_on_main(accelerator: Accelerator, function: Callable[[], object]) -> object:
    """Return on every process what `function` answers on the first, which alone may have the run's folder.

    Its `UserError` is raised on every process, so that none waits for one that has ended.
    """
    output = error = None
    if accelerator.is_main_process:
        try:
            output = function()
        except UserError as raised:
            error = str(raised)
    output, error = broadcast_object_list([output, error])
    if error is not None:
        raise UserError(error)
    return output


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process has `flag` set; every process gets the same answer."""
    return sum_processes(accelerator, int(flag)) > 0


def sum_processes(accelerator: Accelerator, number: int) -> int:
    """Return the sum over all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.reduce(torch.tensor(number, device=accelerator.device)).item())


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
    Raises `NonFiniteLossError` for weights that give no number any more.
    """
    model.eval()

    def probabilities_of(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():  # an average of the weights was never prepared
            return model(images).float().softmax(dim=1)

    probabilities, labels = _gather(accelerator, loader, probabilities_of, title)
    sharding.reshard(model)
    if (broken := ~probabilities.isfinite().all(dim=1)).any():
        first = loader.dataset.name_of(int(broken.nonzero()[0]))
        raise NonFiniteLossError(
            f"the network's answer became NaN, on {int(broken.sum())} photos: {first}, ..."
        )
    return probabilities, labels


@torch.no_grad()
def pooled_features(
    accelerator: Accelerator, net: torch.nn.Module, loader: torch.utils.data.DataLoader, title: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the output layer of the bare network `net` gets, [N, D], and labels [N], as `predict` does.

    Raises `UserError` for a network whose answer is not its output layer of these.
    """
    net.eval()
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def features_of(images: torch.Tensor) -> torch.Tensor:
        passed.clear()
        with accelerator.autocast():
            output = net(images)
        if len(passed) != 1 or not torch.equal(passed[0][1], output):
            raise UserError("this model does more than one linear layer to its features; choose another")
        return passed[0][0].float()

    hook = net.get_classifier().register_forward_hook(
        lambda _, inputs, output: passed.append((inputs[0], output))
    )
    try:
        return _gather(accelerator, loader, features_of, title)
    finally:
        hook.remove()


def _gather(
    accelerator: Accelerator,
    loader: torch.utils.data.DataLoader,
    output: Callable[[torch.Tensor], torch.Tensor],
    title: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, labels = [], []
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=_no_bar(accelerator)):
        output = output(loader.dataset.network_input(batch["pixel_values"]))
        gathered = accelerator.gather_for_metrics((output, batch["labels"]))
        outputs.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    expected = len(loader.dataset)
    assert len(labels) == expected, f"{len(labels)} answers for {expected} photos"
    return outputs, labels
