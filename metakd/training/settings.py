"""What DeepSpeed is told of a training run."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.config.deepspeed import AUTO, resolve_deepspeed
from metakd.errors import UnsupportedError


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """fp32, bf16 or fp16.

    Raises:
        UnsupportedError: DeepSpeed has no fp16 on this device.
    """
    if config.fp16 and not deepspeed.get_accelerator().is_fp16_supported():
        raise UnsupportedError(
            f"fp16: true is not supported on {device}", "use bf16: true, or neither"
        )
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def deepspeed_config(
    config: RunConfig, sharding: Sharding, training: TrainingConfig | None, **facts
) -> dict:
    """What DeepSpeed is told of one run: the user's own configuration, completed.

    Args:
        config: precision, and the user's ``deepspeed`` block.
        sharding: ZeRO stage and offloading.
        training: None for a model that is not trained.
        facts: what else is known, by DeepSpeed's names, see ``resolve_deepspeed``.

    Raises:
        ConfigError: the user's block contradicts the other settings.
    """
    raw = config.deepspeed or {}
    values = config.deepspeed_values(training or TrainingConfig(), sharding)
    if training is None:
        raw = {key: value for key, value in raw.items() if key == "zero_optimization"}
        lasting = ("zero_optimization.", "bf16.", "fp16.")
        values = {key: value for key, value in values.items() if key.startswith(lasting)}
    values |= facts
    for name, used in {
        "offload_optimizer": sharding.offload and training is not None,
        "offload_param": sharding.offload and sharding.zero == 3,
    }.items():
        declared = raw.get("zero_optimization", {}).get(name, {}).get("device")
        if used or declared == AUTO:
            values[f"zero_optimization.{name}.device"] = "cpu" if used else "none"
    settings = resolve_deepspeed(raw, values)
    settings.setdefault("steps_per_print", 2**31)
    # torch's AdamW wherever its states are, so that results do not depend on offloading.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return settings


def hidden_size(module: nn.Module) -> dict[str, int]:
    """H of the first part of a module that says what its H is."""
    configs = (getattr(part, "config", None) for part in module.modules())
    widths = (getattr(found, "hidden_size", None) for found in configs)
    width = next(filter(None, widths), None)
    return {} if width is None else {"hidden_size": width}


def recompute_activations(model: PreTrainedModel, phases: list[TrainingConfig]) -> None:
    """Set up ``model`` for the last of these phases, after those before it."""
    before = len(phases) > 1 and phases[-2].gradient_checkpointing
    if phases[-1].gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif before:
        model.gradient_checkpointing_disable()
