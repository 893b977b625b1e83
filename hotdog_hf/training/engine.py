"""The loop over steps: the only forward and backward passes of training and evaluation."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from accelerate import Accelerator
from tqdm import tqdm

from hotdog_hf.config import OptimConfig
from hotdog_hf.data.loaders import IGNORED_LABEL, FeatureDataset
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.errors import UserError
from hotdog_hf.model import network
from hotdog_hf.training import launch, sharding
from hotdog_hf.training.state import TrainState

BAR_REFRESH_SECONDS = 0.5
# Passes of each kind by which the speed on a GPU is measured.
GPU_PASSES = 20


class NonFiniteLossError(UserError):
    """The loss, a weight, or an output of the network has become NaN or infinite.

    The weights that caused it are from `steps_since` steps before.
    """

    def __init__(self, message: str, steps_since: int = 0):
        super().__init__(message)
        self.steps_since = steps_since


def measure_speed(
    accelerator: Accelerator, net: torch.nn.Module, image_size: int, batch_size: int = 16
) -> tuple[float, float]:
    """Return the seconds per photo of training and of evaluation on photos in memory, over all processes.

    Measured with a pass each of `batch_size` photos through a copy of `net`, or the mean of several on a GPU,
    where one pass is mostly the time to start it.
    """
    passes = 1 if accelerator.device.type == "cpu" else GPU_PASSES
    if not sharding.is_sharded(net):
        net = copy.deepcopy(net).to(accelerator.device, memory_format=MEMORY_FORMAT)
    images = torch.zeros(batch_size, 3, image_size, image_size, device=accelerator.device)
    images, seconds = images.to(memory_format=MEMORY_FORMAT), []
    for learn in (True, True, False):  # the first is a warm-up
        started = time.perf_counter()
        net.train(learn)
        for _ in range(passes):
            with torch.set_grad_enabled(learn), accelerator.autocast():
                output = net(images).float().sum()
            if learn:
                output.backward()
        output.item()  # waits for a GPU
        photos = passes * len(images) * accelerator.num_processes
        seconds.append((time.perf_counter() - started) / photos)
    return seconds[1], seconds[2]


def train_steps(
    accelerator: Accelerator,
    state: TrainState,
    loader: torch.utils.data.DataLoader,
    config: OptimConfig,
    eval_modules: Sequence[torch.nn.Module] = (),
    title: str = "",
) -> Iterator[float]:
    """Train over the rest of an epoch; after every optimizer step, yield the seconds spent waiting for data.

    Each batch of `loader` is this process's share of one step. `state.totals` [3] (sums of loss, correct
    predictions, photos) is updated in place: measured on the augmented photos while the weights change, as in
    the chapter. `eval_modules` stay in evaluation mode. Raises `NonFiniteLossError`.
    """
    set_train_mode(state.model, eval_modules)
    check_finite = FiniteCheck(accelerator, loader.dataset)
    state.check_finite = check_finite.last
    with progress_bar(accelerator, loader, title) as bar:
        for batch, step_size, data_seconds in timed_batches(loader):
            step_loss = forward_backward(accelerator, state, loader.dataset, batch, step_size, config)
            check_finite(step_loss, batch["index"], state.schedule.get_last_lr())
            state.optimizer.step()
            state.schedule.step()
            state.optimizer.zero_grad()
            if state.average:
                state.average.update_parameters(accelerator.unwrap_model(state.model))
            bar.update(step_size)
            show_totals(bar, state.totals)
            yield data_seconds
        check_finite.last()


def forward_backward(
    accelerator: Accelerator,
    state: TrainState,
    dataset: torch.utils.data.Dataset,
    batch: dict,
    step_size: int,
    config: OptimConfig,
) -> torch.Tensor:
    """Accumulate the gradients of one step over its micro-batches; return this process's sum of the losses.

    `batch` is this process's share of the `step_size` photos of the step.
    """
    images = dataset.network_input(batch["pixel_values"].to(accelerator.device, non_blocking=True))
    labels = batch["labels"].to(accelerator.device, non_blocking=True)
    # DDP averages the gradients over the processes: times their number this is the sum over the whole batch,
    # also for a short last batch; divided by its size it is the mean.
    scale = accelerator.num_processes / (step_size if config.loss_reduction == "mean" else 1)
    sharded = sharding.is_sharded(state.model)
    micro_batches = split_batch(images, labels, config.gradient_accumulation_steps, sharded)
    step_loss = torch.zeros((), device=accelerator.device)
    for number, (images, labels) in enumerate(micro_batches, start=1):
        # DDP exchanges gradients once per step; FSDP would otherwise keep them unsharded.
        sync_gradients = sharded or number == len(micro_batches)
        with contextlib.nullcontext() if sync_gradients else accelerator.no_sync(state.model):
            alone = network.single_photo(state.model) if len(images) == 1 else contextlib.nullcontext()
            with alone, accelerator.autocast():  # FSDP does not bring its own, as DDP does
                logits = state.model(images).float()
            loss = F.cross_entropy(
                logits,
                labels,
                weight=state.class_weights,
                reduction="sum",
                ignore_index=IGNORED_LABEL,
                label_smoothing=config.label_smoothing,
            )
            accelerator.backward(loss * scale)
        state.totals += _batch_totals(loss, logits, labels)
        step_loss += loss.detach()
    return step_loss


def split_batch(
    images: torch.Tensor, labels: torch.Tensor, count: int, sharded: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split a batch into at most `count` micro-batches; exactly `count` if the network is sharded.

    Sharded processes gather the weights together, so each needs the same number of passes: a short batch is
    padded with micro-batches whose labels the loss ignores.
    """
    micro_batches = list(zip(images.chunk(count), labels.chunk(count), strict=True))
    if not sharded:
        return micro_batches
    padding_batch = (images[:1], torch.full_like(labels[:1], IGNORED_LABEL))
    return [padding_batch] * (count - len(micro_batches)) + micro_batches


def set_train_mode(model: torch.nn.Module, eval_modules: Sequence[torch.nn.Module]) -> None:
    """Put a network in training mode, except for the `eval_modules` in it."""
    model.train()
    for module in eval_modules:
        module.eval()


class HostCopy:
    """An asynchronous copy of a tensor from a GPU to main memory.

    Reading the tensor on the GPU would wait for everything queued since, and leave the GPU idle.
    """

    def __init__(self, values: torch.Tensor):
        self.values, self.arrived = values, None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self.arrived:
            self.arrived.synchronize()
        return self.values


class FiniteCheck:
    """Raises `NonFiniteLossError` for a loss that is not finite, one step late so that no GPU is left idle.

    All processes see the sum over them, so they raise together and none waits for one that has ended.
    """

    def __init__(self, accelerator: Accelerator, dataset: torch.utils.data.Dataset):
        self.accelerator, self.dataset = accelerator, dataset
        self.pending: tuple[HostCopy, torch.Tensor, list[float]] | None = None

    def __call__(self, loss: torch.Tensor, indices: torch.Tensor, rates: list[float]) -> None:
        """Check the loss of the previous step; keep this one with its photos and learning rates."""
        self.last()
        self.pending = HostCopy(self.accelerator.reduce(loss)), indices, rates

    def last(self, broken: str | None = None) -> None:
        """Check the pending loss, if any; `broken` names a tensor that the step has made not finite."""
        if self.pending is None:
            return
        copied, indices, rates = self.pending
        loss = copied.read()
        lost = not torch.isfinite(loss)
        if lost or broken:
            names = [self.dataset.name_of(index) for index in indices[:5].tolist()]
            what = f"the loss became {loss.item()}" if lost else f"{broken} became NaN or infinite"
            raise NonFiniteLossError(
                f"{what} at learning rates from {min(rates):.3g} to {max(rates):.3g},"
                f" on {len(indices)} photos: {', '.join(names)}{', ...' if len(indices) > 5 else ''}"
                "; start a new run with a lower --learning-rate",
                steps_since=1 if lost else 0,
            )


def timed_batches(loader: torch.utils.data.DataLoader) -> Iterator[tuple[dict, int, float]]:
    """Yield each batch, its number of photos over all processes, and the seconds the loop waited for it."""
    batches, step_sizes = iter(loader), iter(loader.batch_sampler.step_sizes())
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            assert next(step_sizes, None) is None, "the loader must yield every batch it announces"
            return
        yield batch, next(step_sizes), time.perf_counter() - started


def progress_bar(accelerator: Accelerator, loader: torch.utils.data.DataLoader, title: str) -> tqdm:
    """Return the progress bar of an epoch, in photos, advanced by those that a resumed epoch skips."""
    sampler = loader.batch_sampler
    return tqdm(
        desc=title,
        unit="img",
        leave=False,
        disable=no_bar(accelerator),
        total=sampler.size,
        initial=sampler.photos_skipped(),
    )


@torch.no_grad()
def totals_of(
    accelerator: Accelerator,
    head: torch.nn.Module,
    split_features: FeatureDataset,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return totals [3], as `train_steps` counts them, of a head on features that every process has."""
    labels = torch.as_tensor(split_features.labels, device=accelerator.device)
    logits = head(split_features.features.to(accelerator.device))
    loss = F.cross_entropy(
        logits, labels, weight=class_weights, reduction="sum", label_smoothing=label_smoothing
    )
    totals = _batch_totals(loss, logits, labels)
    return totals / accelerator.num_processes


def _batch_totals(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss.detach(), correct, (labels != IGNORED_LABEL).sum()])


def show_totals(bar: tqdm, totals: torch.Tensor) -> None:
    """Show loss and accuracy next to the bar, now and then, as of the previous call."""
    now = time.perf_counter()
    if not bar.disable and now - getattr(bar, "shown_at", 0) > BAR_REFRESH_SECONDS:
        if copied := getattr(bar, "copied", None):
            loss_sum, correct, count = copied.read().tolist()
            bar.set_postfix(loss=f"{loss_sum / count:.3f}", acc=f"{correct / count:.3f}", refresh=False)
        bar.copied, bar.shown_at = HostCopy(totals.clone()), now


def no_bar(accelerator: Accelerator) -> bool | None:
    """Return tqdm's `disable`: None on the main process, for a bar on a terminal and none in a log file."""
    return None if accelerator.is_main_process else True


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Compute in float32 inside the context, without TF32, like the loaders of a saved model."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@torch.no_grad()
def predict(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    title: str = "",
    float32: bool = False,
    stop: launch.StopSignal | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities [N, classes] and labels [N] of all N photos, in order, on every process.

    `loader` must be prepared by the accelerator; the photos it repeats to fill the last batch are dropped.
    `float32` overrides the run's precision, if `model` is sharded or not prepared. Raises `StoppedError` if a
    process was told to stop, and `NonFiniteLossError` if an output is NaN or infinite.
    """
    model.eval()

    def probabilities_of(images: torch.Tensor) -> torch.Tensor:
        # An average of the weights is never prepared, so it has no autocast of its own.
        with in_float32() if float32 else accelerator.autocast():
            return model(images).float().softmax(dim=1)

    probabilities, labels = _gather(accelerator, loader, probabilities_of, title, stop)
    sharding.reshard(model)
    _check_finite(probabilities, loader)
    return probabilities, labels


@torch.no_grad()
def predict_with_features(
    accelerator: Accelerator, net: torch.nn.Module, loader: torch.utils.data.DataLoader, title: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return probabilities and labels as `predict` does, and features as `pooled_features`, in one pass."""
    net.eval()

    def outputs_of(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            logits, features = network.forward_with_features(net, images)
        return torch.cat([logits.float().softmax(dim=1), features], dim=1)

    outputs, labels = _gather(accelerator, loader, outputs_of, title)
    classes = net.get_classifier().out_features
    probabilities, features = outputs[:, :classes], outputs[:, classes:]
    _check_finite(probabilities, loader)
    return probabilities, labels, features


def _check_finite(probabilities: torch.Tensor, loader: torch.utils.data.DataLoader) -> None:
    if (broken := ~probabilities.isfinite().all(dim=1)).any():
        first = loader.dataset.name_of(int(broken.nonzero()[0]))
        raise NonFiniteLossError(
            f"the network's output became NaN on {int(broken.sum())} photos: {first}, ..."
        )


@torch.no_grad()
def pooled_features(
    accelerator: Accelerator,
    net: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    title: str = "",
    float32: bool = False,
    stop: launch.StopSignal | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input of the output layer of the bare network `net`, [N, D], and labels [N], like `predict`.

    Raises `network.NoFeaturesError` if the network's output is not that of its output layer.
    """
    net.eval()

    def features_of(images: torch.Tensor) -> torch.Tensor:
        with in_float32() if float32 else accelerator.autocast():
            return network.forward_with_features(net, images)[1]

    features, labels = _gather(accelerator, loader, features_of, title, stop)
    sharding.reshard(net)
    return features, labels


def _gather(
    accelerator: Accelerator,
    loader: torch.utils.data.DataLoader,
    forward: Callable[[torch.Tensor], torch.Tensor],
    title: str,
    stop: launch.StopSignal | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    pending, outputs, labels = [], [], []

    def read() -> None:
        for copied, kept in zip(pending, (outputs, labels), strict=True):
            kept.append(copied.read().cpu().clone())  # not a loader process's memory, which holds a file open

    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=no_bar(accelerator)):
        output = forward(loader.dataset.network_input(batch["pixel_values"]))
        copies = [HostCopy(part) for part in accelerator.gather((output, batch["labels"]))]
        if pending:
            read()  # those of the batch before, so that a GPU has work meanwhile
        pending = copies
        if stop and launch.stop_requested(accelerator, stop, len(outputs)):
            raise launch.StoppedError
    read()
    expected = len(loader.dataset)
    # Several processes fill their last batches with photos from the beginning.
    outputs, labels = torch.cat(outputs)[:expected], torch.cat(labels)[:expected]
    assert len(labels) == expected, f"{len(labels)} outputs for {expected} photos"
    return outputs, labels
