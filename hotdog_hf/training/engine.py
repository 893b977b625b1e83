"""The loop over steps: the only place where training and evaluation pass through the network."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from hotdog_hf.data.loaders import IGNORED_LABEL, FeatureDataset
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.errors import UserError
from hotdog_hf.training import sharding

BAR_REFRESH_SECONDS = 0.5


class NonFiniteLossError(UserError):
    """The loss, or an answer of the network, has become NaN or infinite."""


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


def micro_batch_size(accelerator: Accelerator, batch_size: int, accumulation_steps: int) -> int:
    """Return how many photos of a batch one process takes through the network at once."""
    return math.ceil(batch_size / (accelerator.num_processes * accumulation_steps))


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
    forward: Callable[[torch.Tensor], torch.Tensor],
    title: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, labels = [], []
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=_no_bar(accelerator)):
        output = forward(loader.dataset.network_input(batch["pixel_values"]))
        gathered = accelerator.gather_for_metrics((output, batch["labels"]))
        outputs.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    expected = len(loader.dataset)
    assert len(labels) == expected, f"{len(labels)} answers for {expected} photos"
    return outputs, labels
