"""Linear layers made fit for int8: SmoothQuant (Xiao et al. 2023, equation 4).

int8 gives all activations of a layer one scale, and in encoders a few channels are tens of times
larger than the rest, which then have next to no levels left. Channel j of a layer's input is
divided by

    s_j = max|X_j|^a / max|W_j|^(1 - a)

and column j of its weight multiplied by it: the same product, with the range of the activations
moved into the weights. They have a scale for each output, and bear it better. A layer whose input
stays too wide even so is better left as it is.

Sizes: I inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

STRENGTH = 0.7
"""The exponent a. Of 0.5 and 0.7 the latter changed fewer labels of review texts."""

WIDEST = 35.0
"""Largest input over root mean square, smoothed, from which on a layer is not quantised. In
students of MiniLM the first feed-forward output reaches 42, the second 30, all others under 11."""


@dataclass
class _Seen:
    """What a group of layers that read the same tensor has read."""

    layers: list[str]
    peak: Tensor  # [I], largest magnitude
    squares: Tensor  # [I], sum
    count: int


class _Smoothed(nn.Module):
    def __init__(self, linear: nn.Linear, scale: Tensor):
        super().__init__()
        self.register_buffer("inverse", 1 / scale)
        self.weight = nn.Parameter(linear.weight.detach() * scale)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs * self.inverse, self.weight, self.bias)


def smoothed(
    model: Model, run: Callable[[Model], object]
) -> tuple[Model, list[tuple[tuple[int, int], bool]]]:
    """A copy of a model whose linear layers are smoothed.

    Args:
        model: in eval mode.
        run: runs a model on texts like those it will serve.

    Returns:
        The copy; and for each linear layer, in the order in which they run, the shape of its weight
        (outputs, inputs) and whether it bears int8.
    """
    model = copy.deepcopy(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    plan = []
    for seen in _watch(layers, lambda: run(model)):
        weights = torch.stack([layers[name].weight.detach().abs().amax(0) for name in seen.layers])
        weight = weights.amax(0).clamp(min=1e-5)
        scale = seen.peak.clamp(min=1e-5) ** STRENGTH / weight ** (1 - STRENGTH)
        rms = (seen.squares / scale**2).mean().div(seen.count).sqrt()
        bears_int8 = bool((seen.peak / scale).max() < WIDEST * rms)
        for name in seen.layers:
            plan.append((tuple(layers[name].weight.shape), bears_int8))
            if bears_int8:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, _Smoothed(layers[name], scale))
    return model, plan


def _watch(layers: dict[str, nn.Linear], run: Callable[[], object]) -> list[_Seen]:
    """What the layers read while the model runs; those that read the same tensor together."""
    groups: dict[str, _Seen] = {}  # by the first layer that reads it
    last: list = [None, ""]  # the tensor that was read last, and its group

    def note(name: str, inputs: Tensor) -> None:
        if inputs is last[0]:
            if name not in groups[last[1]].layers:
                groups[last[1]].layers.append(name)
            return
        last[:] = inputs, name
        rows = inputs.detach().flatten(0, -2)
        seen = groups.setdefault(name, _Seen([name], rows.new_zeros(()), rows.new_zeros(()), 0))
        seen.peak = torch.maximum(seen.peak, rows.abs().amax(0))
        seen.squares = seen.squares + rows.square().sum(0)
        seen.count += len(rows)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(groups.values())
