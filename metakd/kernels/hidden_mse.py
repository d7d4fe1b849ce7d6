"""Triton kernels of hidden_mse: the mean squared difference of hidden states over real tokens.

Launchers: ``hidden_mse_fwd``, ``hidden_mse_bwd``, with the names and signatures of
``metakd.ops.SCHEMAS``. Imports torch, triton and ``metakd.kernels.shared``.

An example's row is f = sum over real tokens and features of (s - t)^2 / (tokens H), tokens its
number of real ones, at least 1; so df/ds = 2 (s - t) / (tokens H).

All layers go in one launch. A program has ROWS tokens of an example; its part of the forward's sum
is added to the others' in a fixed order by a second small kernel.

Bytes moved (b per element, N = n B L tokens): forward 2NHb, backward 3NHb, and B L of the mask for
each program of an example, from the L2.

Legend: n layers, B batch, L length, H hidden size; ``_s`` student, ``_t`` teacher, ``d`` gradient
of. Strides are passed in units of ALIGN elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakd.kernels.shared import (
    COMPILE,
    alignment,
    count_real,
    hand_over,
    in_rows,
    is_real,
    like,
    load_rows,
    narrow,
    pick,
    places,
    refuse_doubles,
    runs,
    stride_of,
    sum_parts,
)

# Strides of student, teacher and mask: nothing is compiled anew for another value.
SIZES = ["B", "L", "s_b", "s_l", "t_b", "t_l", "m_b"]


@triton.jit(do_not_specialize=SIZES)
def _hidden_mse_kernel(
    student, teacher, mask, parts, B, L, s_b, s_l, t_b, t_l, m_b,
    H: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """parts [blocks of tokens, n B]."""
    blocks = tl.cdiv(L, ROWS)
    row = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    layer, b = row // B, row % B
    student = pick(student, layer) + b * s_b * ALIGN_S
    teacher = pick(teacher, layer) + b * t_b * ALIGN_T
    if mask is not None:
        mask += b * m_b
    place = block * ROWS + tl.arange(0, ROWS)
    real = is_real(mask, place, L)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = load_rows(student, place, s_l, real, column, H, ALIGN_S).to(tl.float32)
        t = load_rows(teacher, place, t_l, real, column, H, ALIGN_T).to(tl.float32)
        total += (s - t) * (s - t)
    rows = tl.num_programs(0).to(tl.int64) // blocks
    part = tl.sum(tl.sum(total, 1), 0) / (count_real(mask, L, STEP) * H)
    tl.store(parts + block * rows + row, part)


@triton.jit(do_not_specialize=[*SIZES, "dr_n", "dr_b", "d_b", "d_l"])
def _hidden_mse_bwd_kernel(
    drows, student, teacher, mask, dstudent,
    B, L, dr_n, dr_b, d_b, d_l, s_b, s_l, t_b, t_l, m_b,
    H: tl.constexpr, ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, ROWS)
    row = tl.program_id(0).to(tl.int64) // blocks
    layer, b = row // B, row % B
    student = pick(student, layer) + b * s_b * ALIGN_S
    teacher = pick(teacher, layer) + b * t_b * ALIGN_T
    dstudent = pick(dstudent, layer) + b * d_b * ALIGN_S
    if mask is not None:
        mask += b * m_b
    place = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    real = is_real(mask, place, L)
    weight = tl.load(drows + layer * dr_n + b * dr_b)
    weight = 2 * weight / (count_real(mask, L, STEP) * H)
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = load_rows(student, place, s_l, real, column, H, ALIGN_S).to(tl.float32)
        t = load_rows(teacher, place, t_l, real, column, H, ALIGN_T).to(tl.float32)
        slope = narrow(tl.where(real[:, None], weight * (s - t), 0.0), dstudent.dtype.element_ty)
        write = (place < L)[:, None] & (column < H)[None, :]
        tl.store(dstudent + places(place, d_l, column, ALIGN_S), slope, mask=write)


def hidden_shape(H: int, itemsize: int) -> dict[str, int]:
    """Rows of a program and columns at a time, by hidden size and bytes of the wider dtype: a
    thread has 16 bytes of two tokens in half precision, of four in float32."""
    block = min(triton.next_power_of_2(H), 512 // itemsize)
    warps = 4 if block < 128 else 8
    return {"ROWS": 16, "BLOCK": block, "STEP": 1024, "num_warps": warps, "maxnreg": 64}


def _launches(student, teacher, mask, gradients=None):
    """For each run of layers: which they are, the grid, and the kernels' arguments by name."""
    refuse_doubles(student=student[0], teacher=teacher[0])
    B, L, H = student[0].shape
    if B * L * H == 0:
        return
    mask = None if mask is None else in_rows(mask)
    roles = [[in_rows(x) for x in side] for side in (student, teacher)]
    if gradients is not None:
        roles.append(gradients)
    shape = hidden_shape(H, max(student[0].itemsize, teacher[0].itemsize))
    for run in runs(*roles):
        of_run = [tuple(role[run]) for role in roles]
        s, t, *d = (layers[0] for layers in of_run)
        unit_s, unit_t = alignment(s, *d), alignment(t)
        args = dict(zip(("student", "teacher", "dstudent"), of_run))
        for name, x, unit in zip("std", (s, t, *d), (unit_s, unit_t, unit_s)):
            args |= {f"{name}_{axis}": size // unit for axis, size in zip("bl", x.stride())}
        args |= {
            "mask": mask,
            "m_b": stride_of(mask),
            "B": B,
            "L": L,
            "H": H,
            "ALIGN_S": unit_s,
            "ALIGN_T": unit_t,
        }
        blocks = triton.cdiv(L, shape["ROWS"])
        with torch.cuda.device_of(s):
            yield run, (len(of_run[0]) * B * blocks,), args | shape | COMPILE


def hidden_mse_fwd(student: list[Tensor], teacher: list[Tensor], mask: Tensor | None) -> Tensor:
    """See ``metakd.ops.SCHEMAS``."""
    n, (B, L, _) = len(student), student[0].shape
    rows = student[0].new_zeros(n, B, dtype=torch.float32)
    for run, grid, args in _launches(student, teacher, mask):
        parts = rows.new_empty(triton.cdiv(L, args["ROWS"]), *rows[run].shape)
        _hidden_mse_kernel[grid](parts=parts, **args)
        sum_parts(parts, None, rows[run])
    return rows


def hidden_mse_bwd(
    drows: Tensor, student: list[Tensor], teacher: list[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """See ``metakd.ops.SCHEMAS``."""
    results, written = like(student)
    for run, grid, args in _launches(student, teacher, mask, written):
        _hidden_mse_bwd_kernel[grid](drows[run], dr_n=drows.stride(0), dr_b=drows.stride(1), **args)
    return hand_over(results, written)
