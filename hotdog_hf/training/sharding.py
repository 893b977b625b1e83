"""Sharding a network over the processes (FSDP2), for one that is too large for a single GPU.

Every process holds a shard of each weight, its gradient and its optimizer state, and gathers the rest layer
by layer as it computes. Saved files are not sharded: tensors are gathered and sharded again here.
"""

import os
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast,
    broadcast_object_list,
    fsdp2_prepare_model,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from hotdog_hf.errors import UserError


def broadcast_state(model: torch.nn.Module) -> None:
    """Copy the first process's weights and BatchNorm statistics, which each process updates alone, to all."""
    broadcast([value for value in model.state_dict().values() if not isinstance(value, DTensor)])


CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


def plugin() -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP plugin that the launcher asked for, or None. Raises `UserError` for FSDP 1."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    asked = FullyShardedDataParallelPlugin()
    if asked.fsdp_version != 2:
        raise UserError("the launcher's FSDP is version 1; use fsdp_version: 2, as in configs/fsdp.yaml")
    # Weights stay float32 and autocast computes in bf16, as on one GPU, at the cost of a full bf16 copy from
    # forward to backward. accelerate's own policy would also sum the gradients and run BatchNorm in bf16.
    asked.mixed_precision_policy = MixedPrecisionPolicy()
    return asked


def shard_on_cpu(accelerator: Accelerator, asked: FullyShardedDataParallelPlugin) -> None:
    """Shard over CPU processes too, which accelerate would silently train without sharding.

    For tests: does what GPUs would do, on a machine without any.
    """
    accelerator.state.fsdp_plugin = asked
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP


def block_kinds(model: torch.nn.Module, least: int) -> list[str]:
    """Return the classes of a network's blocks: the modules in containers of more than `least` parameters."""
    kinds = set()
    for module in model.modules():
        if isinstance(module, CONTAINERS) and sum(value.numel() for value in module.parameters()) > least:
            kinds |= {type(child) for child in module.children() if not isinstance(child, CONTAINERS)}
    return sorted(kind.__name__ for kind in kinds)


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Shard model and average in place, block by block, and give the optimizer the shards."""
    asked = accelerator.state.fsdp_plugin
    if asked.auto_wrap_policy is size_based_auto_wrap_policy:
        # It would wrap the containers themselves, which a network may never call.
        asked.transformer_cls_names_to_wrap = block_kinds(model, asked.min_num_params)
        asked.auto_wrap_policy = transformer_auto_wrap_policy
    for whole_net in (model, average):
        if whole_net is not None:
            whole_net.to(memory_format=torch.contiguous_format)  # FSDP supports no other
    model, optimizer = accelerator.prepare(model, optimizer)
    if average is not None:
        fsdp2_prepare_model(accelerator, average.module)
    return model, optimizer


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether the processes hold shards of `model`."""
    return isinstance(model, FSDPModule)


def reshard(model: torch.nn.Module) -> None:
    """Free what an evaluation has gathered: the last layers would stay gathered for a backward pass."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def full_tensors(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Return named tensors, with shards gathered into CPU memory one tensor at a time.

    Must be called by every process; those without `keep` get nothing.
    """
    joined = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            value = value.full_tensor().cpu()
        if keep:
            joined[name] = value
    return joined


def shard_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a full tensor if `target` is sharded, else the tensor."""
    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor, or this process's shard of it, into a module's tensor."""
    if value.shape != target.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} does not fit {tuple(target.shape)}")
    target.copy_(shard_like(value, target))


def broadcast_each(
    accelerator: Accelerator, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the first process's named tensors on every process, one at a time.

    Must be called by every process; the tensors of the others are ignored.
    """
    if accelerator.num_processes == 1:
        yield from tensors.items()
        return
    layout = [(name, value.shape, value.dtype) for name, value in tensors.items()]
    [layout] = broadcast_object_list([layout])
    for name, shape, dtype in layout:
        value = tensors[name] if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
        yield name, broadcast(value.to(accelerator.device))


def local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return this process's part of each tensor, for elementwise arithmetic."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
