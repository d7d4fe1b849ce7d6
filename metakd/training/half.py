"""AdamW on half-precision weights of a CPU, in one pass over memory.

DeepSpeed's step at ZeRO 0 makes an fp32 copy of every gradient for its norm, another for AdamW, and
scales it, each in a pass of its own over memory that has just been allocated. Here a part of the
gradient that fits a cache is made fp32, used and forgotten: of every weight 28 bytes move, and the
gradient's two once more for its norm.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

PART = 2**18  # weights: a megabyte of fp32 gradient, beside three of what AdamW moves with it


class StepInParts:
    """Takes the place of ``FP16_UnfusedOptimizer.step``: the same update of the same weights and
    state, and the same answer to a gradient that is not finite.

    Args:
        wrapped: DeepSpeed's optimizer around ``torch.optim.AdamW``, on a CPU.
    """

    def __init__(self, wrapped: FP16_UnfusedOptimizer):
        self._wrapped = wrapped
        self._buffer = torch.empty(PART)

    @classmethod
    def fits(cls, wrapped: FP16_UnfusedOptimizer) -> bool:
        """Are the weights on a CPU, each in one piece?"""
        weights = chain.from_iterable(wrapped.fp16_groups)
        return all(weight.device.type == "cpu" and weight.is_contiguous() for weight in weights)

    def __call__(self, closure=None) -> bool:
        """One step; was it left out?"""
        wrapped = self._wrapped
        wrapped.overflow = False
        pairs = list(zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True))
        norm = self._norm([weight.grad for weights, _ in pairs for weight in weights])
        if not math.isfinite(norm):
            return wrapped._skip_invalid_grad_norm()
        wrapped._global_grad_norm = norm
        wrapped._update_scale(False)
        scale = 1.0 / wrapped.unscale_and_clip_grads(norm, apply_scale=False)
        for group, (weights, masters) in zip(wrapped.optimizer.param_groups, pairs, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                self._update(group, weight, master, scale)
        # Of the schedule, which warns where its optimizer has taken no step of its own.
        wrapped.optimizer._opt_called = True
        return False

    def _norm(self, gradients: list[Tensor | None]) -> float:
        total = 0.0
        for gradient in gradients:
            if gradient is None:
                continue
            for part in gradient.reshape(-1).split(PART):
                whole = self._buffer[: len(part)].copy_(part)
                total += float(torch.dot(whole, whole))
        return math.sqrt(total)

    def _update(self, group: dict, weight: Tensor, master: Tensor, scale: float) -> None:
        state = self._wrapped.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        state["step"] += 1
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        (first, second), step = group["betas"], state["step"]
        rows = (gradient, weight.data, master.data, state["exp_avg"], state["exp_avg_sq"])
        for part, half, full, mean, square in zip(*(row.reshape(-1).split(PART) for row in rows)):
            whole = self._buffer[: len(part)].copy_(part)
            if scale != 1.0:
                whole.mul_(scale)
            torch._fused_adamw_(
                [full],
                [whole],
                [mean],
                [square],
                [],
                [step],
                lr=group["lr"],
                beta1=first,
                beta2=second,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            half.copy_(full)
