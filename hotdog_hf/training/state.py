"""What training changes: the state that a checkpoint holds."""

from dataclasses import dataclass, field

import torch
from torch.optim.swa_utils import AveragedModel


@dataclass
class Progress:
    """How far a run has come."""

    # The epoch in training, from 1, and the optimizer steps done in it and in all.
    epoch: int = 1
    step: int = 0
    total_steps: int = 0
    # The head's learning rate at the start of this epoch, the seconds spent on its steps, and those of them
    # that were spent waiting for photos.
    learning_rate: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    # Sums over the photos seen in this epoch by each process: loss, correct, photos.
    totals: list[list[float]] = field(default_factory=list)
    # One row of metrics for every finished epoch, and the best among them, as `metrics.quality` says it.
    rows: list[dict] = field(default_factory=list)
    best: list[float] = field(default_factory=lambda: [-1.0, 0.0])


@dataclass
class TrainState:
    """All that training changes, on one process."""

    # What is trained, as the accelerator prepared it.
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    # The running average of the weights, if there is one.
    average: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)
    # Sums over the photos that this process has seen in the epoch [3]: loss, correct, photos.
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
