"""Weights of a module, whole or spread over the processes by ZeRO-3: to shards, out of them, back.

Every function works alike on a module that is not sharded, and is collective on one that is.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from metakd.training.world import World


def shard(module: nn.Module, settings: dict, dtype: torch.dtype, world: World) -> None:
    """Spread the weights over the processes one by one: the whole may not fit one device.

    Args:
        module: whole, on the CPU.
        settings: DeepSpeed's.
        dtype: of the weights under training.
        world: the processes that share them.
    """
    module.to(dtype)
    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    for part in module.modules():
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else value.to(world.device)


def own_part(parameter: nn.Parameter, rank: int) -> Tensor:
    """What this rank holds of a parameter, without the padding of the last shard."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    part = parameter.ds_tensor
    return part.flatten()[: max(0, parameter.ds_numel - rank * part.numel())]


def _gathered(parameters: list[nn.Parameter], modified_on: int | None = None):
    """A context in which sharded parameters are whole; nothing for others.

    Args:
        parameters: of any kind.
        modified_on: rank whose changes count; None for reading.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=modified_on, enabled=bool(sharded)
    )


def whole_weights(module: nn.Module, world: World) -> dict[str, Tensor] | None:
    """A copy of every weight and buffer on the CPU of the first rank, None on the others."""
    kept = {}
    buffers = (
        module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
    )
    for name, parameter in module.named_parameters(remove_duplicate=False):
        world.progress.beat("gathering weights")
        with _gathered([parameter]):  # one at a time: the whole may not fit
            if world.is_main:
                kept[name] = parameter.detach().to("cpu", copy=True)
    state = module.state_dict()
    kept |= {name: state[name].detach().to("cpu", copy=True) for name in buffers}
    return kept if world.is_main else None


def put_weights(module: nn.Module, weights: dict[str, Tensor] | None, world: World) -> None:
    """Load the first rank's ``whole_weights`` on every rank, which may hold them in shards."""
    sharded = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        world.progress.beat("spreading weights")
        if hasattr(parameter, "ds_id"):
            sharded[name] = parameter
            with _gathered([parameter], modified_on=0):
                if world.is_main:
                    parameter.data.copy_(weights[name])
    for name, value in module.state_dict().items():
        if name in sharded:
            continue
        if world.is_main:
            value.copy_(weights[name])
        if world.size > 1:
            dist.broadcast(value, group_src=0)


def retire(engine) -> None:
    """End an engine and leave its module as plain torch: whole weights, no hooks; what was sharded
    is in host memory."""
    module = engine.module
    engine.destroy()
    # Left on the module, the hooks would keep engine and moments alive through the next run.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    plain: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        held = dict(part._parameters.items())
        for name, parameter in held.items():
            if parameter is None or not hasattr(parameter, "ds_id"):
                continue
            if id(parameter) not in plain:
                with _gathered([parameter]):
                    whole = parameter.detach().to("cpu", copy=True)
                plain[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
            held[name] = plain[id(parameter)]
        part._parameters = held  # DeepSpeed's own kind of dict gathers on access
    if plain:
        module.cpu()  # buffers and what was too small to shard
