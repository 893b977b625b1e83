"""Training on a simulated device, with photos from simulated cores: what else makes it wait?

Both only sleep, so a machine with few cores and no GPU shows how long a fast one would wait for the rest.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator

import torch

from hotdog_hf.config import parse_train_config
from hotdog_hf.training import engine, launch, loop
from hotdog_hf.training.job import Job

# A pass without gradients takes a third of a training step.
EVALUATION_SHARE = 1 / 3


class Device:
    """A device that works through a queue of passes while the loop continues, as a GPU does."""

    def __init__(self, seconds_a_photo: float):
        self.seconds_a_photo, self.seconds, self.free_at = seconds_a_photo, 0.0, 0.0

    def queue(self, photos: int, training: bool) -> None:
        """Queue a pass over some photos."""
        seconds = photos * self.seconds_a_photo * (1 if training else EVALUATION_SHARE)
        self.seconds += seconds
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def copy(self, values: torch.Tensor) -> "DeviceCopy":
        """Return a copy that arrives once all that is queued is done, in place of `engine.HostCopy`."""
        return DeviceCopy(values, self.free_at)


class DeviceCopy(engine.HostCopy):
    """A tensor that can be read from some time on."""

    def __init__(self, values: torch.Tensor, arrives_at: float):
        super().__init__(values)
        self.arrives_at = arrives_at

    def read(self) -> torch.Tensor:
        """Wait until the copy has arrived and return it."""
        time.sleep(max(self.arrives_at - time.perf_counter(), 0))
        return self.values


class Cores:
    """Cores that take their time to decode a photo, and return a blank one."""

    def __init__(self, number: int, seconds_a_photo: float):
        self.number, self.seconds_a_photo = number, seconds_a_photo
        self.free, self.decoded = multiprocessing.BoundedSemaphore(number), multiprocessing.Value("q")
        self.blank = torch.empty(0)

    @property
    def seconds(self) -> float:
        """How long they have worked, if the photos were shared evenly."""
        return self.decoded.value * self.seconds_a_photo / self.number

    def decode(self, _epoch: int, _index: int) -> torch.Tensor:
        """Return a photo as `PhotoDataset.pixel_values` does."""
        with self.free:
            time.sleep(self.seconds_a_photo)
        with self.decoded:
            self.decoded.value += 1
        return self.blank


def simulate(job: Job, device: Device, cores: Cores) -> Job:
    """Return the job with passes and photos that only take time; the head alone is computed and learned."""
    net, head = job.net, job.net.get_classifier()

    def forward(photos: torch.Tensor) -> torch.Tensor:
        device.queue(len(photos), net.training)
        return head(torch.zeros(len(photos), head.in_features))

    net.forward = forward
    cores.blank = torch.zeros(job.data_config["input_size"], dtype=torch.uint8)
    for loader in [job.train_loader, *job.eval_loaders.values()]:
        loader.dataset.pixel_values = cores.decode
        loader.dataset.network_input = _unchanged  # a GPU would normalise it
    return job


def _unchanged(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values


def simulated(*, flags: list[str], device_ms: float, decode_ms: float, cores: int, num_threads: int) -> dict:
    """Train with the flags of scripts/train.py, with so many milliseconds a photo on the device and a core.

    Returns the seconds of all epochs after the first, with evaluations and what is saved, and those that the
    device and the cores worked meanwhile.
    """
    config, ends = parse_train_config(flags), []
    device, decoding = Device(device_ms / 1000), Cores(cores, decode_ms / 1000)
    build, end_epoch = loop.build, loop.end_epoch

    def end_timed(*arguments: object) -> loop.Evaluation | None:
        evaluation = end_epoch(*arguments)
        ends.append((time.perf_counter(), device.seconds, decoding.seconds))
        return evaluation

    accelerator = launch.build_accelerator("no", num_threads=num_threads)
    with (
        replaced(loop, "build", lambda *arguments: simulate(build(*arguments), device, decoding)),
        replaced(loop, "end_epoch", end_timed),
        replaced(engine, "HostCopy", device.copy),
    ):
        loop.train(config, accelerator, launch.StopSignal())
    first, last = ends[0], ends[-1]
    names = ("seconds", "device_seconds", "core_seconds")
    return {name: after - before for name, before, after in zip(names, first, last, strict=True)}


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Let an object or a module have another attribute inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
