"""The state of a training run, as a checkpoint holds it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.optim.swa_utils import AveragedModel


@dataclass
class Progress:
    """The progress of a run."""

    # The current epoch, from 1, and the optimizer steps done in it and in total.
    epoch: int = 1
    step: int = 0
    total_steps: int = 0
    # The head's learning rate at the start of this epoch, the seconds spent on its steps, and how many
    # of them were spent waiting for data.
    learning_rate: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    # The run's seconds over all its starts, each up to its last checkpoint.
    run_seconds: float = 0.0
    # Each process's sums over its photos in this epoch: loss, correct predictions, photos.
    totals: list[list[float]] = field(default_factory=list)
    # One row of metrics per finished epoch, and the `metrics.quality` of the best of them.
    rows: list[dict] = field(default_factory=list)
    best: list[float] = field(default_factory=lambda: [-1.0, 0.0])


@dataclass
class TrainState:
    """Everything that training changes, on one process."""

    # The module being trained, prepared by the accelerator.
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    # The running average of the weights, if there is one.
    average: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)
    # Sums over this process's photos in the epoch [3]: loss, correct predictions, photos.
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    # When the run would have started if it had never been interrupted, by `time.perf_counter`.
    started: float = field(default_factory=time.perf_counter)
    # Set by the loop over steps: raises if the last step's loss, or a tensor it is told of, is not finite.
    check_finite: Callable[..., None] | None = None
    # The weight of each class in the loss [classes]; None: all the same. It follows from the training photos.
    class_weights: torch.Tensor | None = None
