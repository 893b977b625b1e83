"""Named learning-rate groups, the optimizer over them, and a schedule that keeps their ratios."""

import collections
import math

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hotdog_hf.model.network import depths
from hotdog_hf.training import sharding


def parameter_groups(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    head_lr_mult: float,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = True,
) -> list[dict]:
    """Split a timm model's parameters into named groups by depth (stem, layer1, ..., head), for torch.optim.

    The depth comes from timm's `group_matcher`; the head is the classifier. The head's rate is
    `learning_rate` x `head_lr_mult`; the last body group's is `learning_rate`, and each group below has
    `layer_decay` times the rate of the one above. Without `decay_norm_and_bias`, vectors and scalars get a
    separate "<name> (no decay)" group. Every trainable parameter is in exactly one group.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = {names[id(parameter)] for parameter in model.get_classifier().parameters()}
    depth_of = depths(model)
    last_body_depth = max(depth for name, depth in depth_of.items() if name not in head)

    groups: dict[str, dict] = {}
    group_names: dict[int, str] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: depth_of[item[0]]):
        if not parameter.requires_grad:
            continue
        if name in head:
            group_name, rate = "head", learning_rate * head_lr_mult
        else:
            depth = depth_of[name]
            if depth not in group_names:
                group_names[depth] = _depth_name(name, depth, taken=group_names.values())
            group_name, rate = group_names[depth], learning_rate * layer_decay ** (last_body_depth - depth)
        decayed = decay_norm_and_bias or parameter.ndim > 1
        if not decayed:
            group_name += " (no decay)"
        group = groups.setdefault(
            group_name,
            {"name": group_name, "params": [], "lr": rate, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)

    covered = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(covered) == len(set(covered)) and set(covered) == trained, (
        "groups must be disjoint and complete"
    )
    return list(groups.values())


def _depth_name(parameter_name: str, depth: int, taken: object) -> str:
    """Name a group after its first parameter: `layer1.0.conv1` -> layer1, `blocks.3.norm` -> blocks.3."""
    if depth == 0:
        return "stem"
    first, second = parameter_name.split(".")[:2]
    name = (
        f"{first}.{second}"
        if second.isdigit() and first in ("blocks", "stages", "layers", "features")
        else first
    )
    return f"{name}@{depth}" if name in taken or name == "head" else name


def describe_groups(groups: list[dict], net: torch.nn.Module) -> str:
    """Return a table of the groups: name, number of parameters, learning rate, weight decay."""
    lines = [f"{'group':<24} {'parameters':>12} {'lr':>10} {'weight decay':>13}"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"{group['name']:<24} {count:>12,} {group['lr']:>10.3g} {group['weight_decay']:>13.3g}")
    frozen = sum(parameter.numel() for parameter in net.parameters() if not parameter.requires_grad)
    return "\n".join([*lines, *([f"{'frozen':<24} {frozen:>12,}"] if frozen else [])])


def use_fused(accelerator: Accelerator) -> bool:
    """Return whether the optimizer of a run steps in one fused kernel: on a GPU.

    Not with a gradient scaler (fp16), and not on shards of weights (FSDP).
    """
    return accelerator.device.type == "cuda" and not accelerator.scaler and not accelerator.is_fsdp2


def build_optimizer(
    groups: list[dict], optimizer: str, momentum: float = 0.0, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Return SGD (with Nesterov momentum if `momentum` is not 0) or AdamW over named groups.

    `fused` does a step in one kernel, which is faster on a GPU; results may differ in the last digit.
    Otherwise torch chooses, on a GPU a few kernels for all weights together (foreach).
    """
    # False would mean "neither fused nor foreach": separate kernels for every weight.
    fused = fused or None
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


class WeightAverage(AveragedModel):
    """An exponential moving average of weights and BatchNorm statistics.

    The first step copies the weights; each later one sets it to decay x average + (1 - decay) x weights.
    Floating-point numbers are equal to those of torch's own to the bit, whose update would copy a counter to
    the GPU each time, and wait for it. Whole numbers are copied: torch's rounds their average down, and the
    indices of a Swin's relative positions, which never change, would come to point elsewhere.
    """

    def __init__(self, net: torch.nn.Module, decay: float):
        super().__init__(net, use_buffers=True)
        self.blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Update the average with the weights and statistics of `model` after an optimizer step."""
        tensors = [[*net.parameters(), *net.buffers()] for net in (self.module, model)]
        tensors, blended = map(sharding.local, tensors), collections.defaultdict(list)
        for average, value in zip(*tensors, strict=True):  # of shards, this process's own
            if self.n_averaged == 0 or not average.is_floating_point():
                average.copy_(value)
            else:
                blended[average.dtype].append((average, value))
        for pairs in blended.values():
            self.blend(*map(list, zip(*pairs, strict=True)), self.n_averaged)
        self.n_averaged += 1


def build_average(net: torch.nn.Module, decay: float) -> WeightAverage | None:
    """Return the moving average of a network, or None if `decay` is 0."""
    return WeightAverage(net, decay) if decay else None


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: str, total_steps: int, warmup_fraction: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that scales all groups' rates by one factor; call `step` once per optimizer step.

    The rates rise linearly over the first `warmup_fraction` of the steps, then stay ("constant") or fall to 0
    at `total_steps` along half a cosine or a line.
    """
    warmup_steps = round(warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        # A stream may have a few more steps if its processes have different numbers of photos.
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}[
            schedule
        ]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
