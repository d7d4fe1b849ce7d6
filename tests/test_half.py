"""A step in parts against DeepSpeed's own."""

import math

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from metakd.training import half
from metakd.training.half import StepInParts
from metakd.training.world import join_world

SHAPES = ((40, 30), (30,), (7, 3, 2), ())
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def optimizers(monkeypatch):
    """``optimizers(dtype, clip)``: DeepSpeed's and one that steps in parts, of the same weights."""
    join_world()
    monkeypatch.setattr(half, "PART", 64)

    def build(dtype: torch.dtype, clip: float) -> list[FP16_UnfusedOptimizer]:
        both = []
        for _ in range(2):
            torch.manual_seed(0)
            weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]
            inner = torch.optim.AdamW(
                [
                    {"params": weights[:1], "weight_decay": 0.1},
                    {"params": weights[1:], "weight_decay": 0.0},
                ],
                lr=0.01,
                fused=True,
            )
            scaling = LossScaleConfig(
                low_precision_dtype=dtype,
                dynamic_loss_scale=dtype == torch.float16,
                static_loss_scale=1.0,
                dynamic_loss_args={
                    "init_scale": 16,
                    "scale_window": 2,
                    "min_scale": 1,
                    "delayed_shift": 1,
                    "consecutive_hysteresis": False,
                },
                profile=LossScaleProfile.UNFUSED,
            )
            both.append(
                FP16_UnfusedOptimizer(
                    inner, loss_scale_config=scaling, low_precision_dtype=dtype, clip_grad=clip
                )
            )
            inner.state.clear()
        assert StepInParts.fits(both[1])
        both[1].step = StepInParts(both[1])
        return both

    return build


def step(optimizer: FP16_UnfusedOptimizer, seed: int, scale: float = 1.0) -> bool:
    torch.manual_seed(seed)
    for group in optimizer.fp16_groups:
        for weight in group:
            weight.grad = (scale * torch.randn(weight.shape)).to(weight.dtype)
    left_out = optimizer.step()
    optimizer.zero_grad()
    return bool(left_out)


def weights(optimizer: FP16_UnfusedOptimizer) -> list[torch.Tensor]:
    groups = (*optimizer.fp16_groups, *optimizer.fp32_groups)
    state = [value for of in optimizer.optimizer.state.values() for value in of.values()]
    return [weight.detach() for group in groups for weight in group] + state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_the_same_weights_and_state(optimizers, dtype, clip):
    own, parts = optimizers(dtype, clip)
    for seed in range(5):
        assert not step(own, seed) and not step(parts, seed)
        assert parts._global_grad_norm == pytest.approx(own._global_grad_norm, rel=1e-6)
        assert parts.loss_scale == own.loss_scale
    if dtype == torch.float16:
        assert parts.loss_scale > 16
    for value, wanted in zip(weights(parts), weights(own), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_left_out(optimizers, dtype, wrong):
    own, parts = optimizers(dtype, 1.0)
    for optimizer in (own, parts):
        step(optimizer, 0)
        before = [value.clone() for value in weights(optimizer)]
        assert step(optimizer, 1, scale=wrong) and optimizer.overflow
        for value, wanted in zip(weights(optimizer), before, strict=True):
            assert torch.equal(value, wanted)
        assert not step(optimizer, 2) and not optimizer.overflow
    assert parts.loss_scale == own.loss_scale


def test_a_weight_without_a_gradient_decays_alone(optimizers):
    own, parts = optimizers(torch.bfloat16, 1.0)
    for optimizer in (own, parts):
        optimizer.fp16_groups[1][0].grad = torch.ones(30, dtype=torch.bfloat16)
        optimizer.step()
    for value, wanted in zip(weights(parts), weights(own), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)


def test_weights_that_lie_in_pieces_are_left_to_deepspeed(optimizers):
    _, parts = optimizers(torch.bfloat16, 1.0)
    parts.fp16_groups[0][0].data = parts.fp16_groups[0][0].data.t()
    assert not StepInParts.fits(parts)
