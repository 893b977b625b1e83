"""Train one epoch with the project's loop on fixed data, for any number of processes; save the weights.

    accelerate launch ... tests/book_loop.py OUT [loss_reduction] [accumulation_steps] [train|eval]

`plain_loop` is the chapter's own training loop in plain PyTorch, for comparison.
"""

import sys

import safetensors.torch
import timm
import torch
from torch import nn

from hotdog_hf.config import OptimConfig
from hotdog_hf.data import loaders
from hotdog_hf.data.transforms import MEMORY_FORMAT
from hotdog_hf.training import engine, launch, optim, records
from hotdog_hf.training.state import TrainState

COUNT, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, EPOCHS = 21, 8, 1e-3, 0.001, 2


class FixedImages(torch.utils.data.Dataset):
    """Random images that answer `PhotoDataset`'s keys."""

    seed = 5

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(COUNT, 3, 32, 32, generator=generator)
        self.labels = torch.randint(2, (COUNT,), generator=generator)

    def __len__(self):
        return COUNT

    def __getitem__(self, key):
        _, index = key
        padding = index == loaders.PhotoDataset.PADDING
        label = loaders.IGNORED_LABEL if padding else self.labels[index]
        return {"pixel_values": self.images[max(index, 0)], "labels": label, "index": max(index, 0)}

    def network_input(self, pixel_values):
        return pixel_values.to(memory_format=MEMORY_FORMAT)


def network(batch_norm: str) -> nn.Module:
    """Return the same small ResNet each time; with "eval", training leaves BatchNorm statistics alone."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=2)
    if batch_norm == "eval":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module
    return net


def plain_loop(batch_norm: str) -> nn.Module:
    """Fine-tune as Dive into Deep Learning 14.2 does: summed loss, SGD, ten times the rate for the head."""
    net, images = network(batch_norm).train(), FixedImages()
    loss = nn.CrossEntropyLoss(reduction="none")
    params_1x = [param for name, param in net.named_parameters() if name not in ["fc.weight", "fc.bias"]]
    trainer = torch.optim.SGD(
        [{"params": params_1x}, {"params": net.fc.parameters(), "lr": LEARNING_RATE * 10}],
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    sampler = loaders.StepSampler(COUNT, BATCH_SIZE, images.seed)
    for epoch in range(1, EPOCHS + 1):
        sampler.seek(epoch)
        for batch in sampler:
            indices = [index for _, index in batch]
            trainer.zero_grad()
            loss(net(images.images[indices]), images.labels[indices]).sum().backward()
            trainer.step()
    return net


def main(
    out: str, loss_reduction: str = "sum", accumulation_steps: str = "1", batch_norm: str = "train"
) -> None:
    """Train with the project's loop and let the main process save the weights."""
    accelerator = launch.build_accelerator("no", num_threads=1)
    net, dataset = network(batch_norm), FixedImages()
    groups = optim.parameter_groups(
        net, learning_rate=LEARNING_RATE, head_lr_mult=10, weight_decay=WEIGHT_DECAY
    )
    optimizer = optim.build_optimizer(groups, "sgd")
    schedule = optim.build_schedule(optimizer, "constant", 1)
    loader = loaders.train_loader(
        dataset, BATCH_SIZE, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    net, optimizer = accelerator.prepare(net, optimizer)
    config = OptimConfig(loss_reduction=loss_reduction, gradient_accumulation_steps=int(accumulation_steps))
    for epoch in range(1, EPOCHS + 1):
        loader.batch_sampler.seek(epoch)
        state = TrainState(net, optimizer, schedule, totals=torch.zeros(3, device=accelerator.device))
        for _ in engine.train_steps(accelerator, state, loader, config):
            pass
        row = records.epoch_row(accelerator, state.totals, seconds=1.0)
    accelerator.print(accelerator.num_processes, row["train_loss"], row["train_accuracy"])
    if accelerator.is_main_process:
        weights = accelerator.unwrap_model(net).state_dict()
        safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, out)
    del state
    net, optimizer = launch.finish(accelerator, net, optimizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
