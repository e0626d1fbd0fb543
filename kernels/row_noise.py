"""How far each of the rows of a matrix is from their mean, with their sum and norms.

    total = sum_i G_i,   noise_i = ||G_i - total / B||^2,   squares_i = ||G_i||^2

G is [B, P], the shares of samples in the gradient of one layer: those of a bias, or of a weight as
conv_tile.py stores them. It is persample_noise.py without a step: those rows are gradients of all
parameters, these of one layer, which come out of a cache and are few enough to be read twice. Sums
over rows are in float64, and so is what programs add up; there are no atomics.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None


class RowNoise(NamedTuple):
    """What row_noise returns."""

    total: Tensor  # [P], in G's dtype
    squares: Tensor  # [B], wide
    noise: Tensor  # [B], wide; zeros where it was not asked for


def row_noise_ref(G: Tensor, noise: bool = True) -> RowNoise:
    """As `row_noise`, in plain PyTorch, for G [B, P]."""
    wide = G.to(backend.wide_dtype(G.device))
    squares = wide.square().sum(1)
    away = (wide - wide.mean(0)).square().sum(1) if noise else torch.zeros_like(squares)
    return RowNoise(wide.sum(0).to(G.dtype), squares, away)


# How many rows and columns a program takes at a time: 16 bytes a thread.
ROWS, COLUMNS, WARPS = 32, 64, 4

if triton:

    @triton.jit(do_not_specialize=["B"])
    @no_type_check
    def _row_noise_kernel(
        G,
        total,  # [P], as G
        sums,  # float64 [2, programs, B]: of G^2, of deviation^2
        B, P,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        program, programs = tl.program_id(0), tl.num_programs(0)
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        inside = (columns < P)[None, :]
        added = tl.zeros([ROWS, COLUMNS], tl.float64)
        for above in range(0, B, ROWS):
            rows = above + tl.arange(0, ROWS)
            at = G + rows[:, None].to(tl.int64) * P + columns[None, :]
            added += tl.load(at, mask=(rows < B)[:, None] & inside, other=0.0).to(tl.float64)
        whole = tl.sum(added, axis=0)
        tl.store(total + columns, whole.to(total.dtype.element_ty), mask=columns < P)
        mean = whole / B
        # two numbers: a noise a millionth of the mean keeps its digits
        near = mean.to(total.dtype.element_ty)
        rest = (mean - near.to(tl.float64)).to(total.dtype.element_ty)
        to = sums + program.to(tl.int64) * B
        for above in range(0, B, ROWS):
            rows = above + tl.arange(0, ROWS)
            at = G + rows[:, None].to(tl.int64) * P + columns[None, :]
            g = tl.load(at, mask=(rows < B)[:, None] & inside, other=0.0)
            away = g - near[None, :] - rest[None, :]
            squares, noise = tl.sum(g * g, axis=1), tl.sum(away * away, axis=1)
            tl.store(to + rows, squares.to(tl.float64), mask=rows < B)
            to_noise = to + programs.to(tl.int64) * B + rows
            tl.store(to_noise, noise.to(tl.float64), mask=rows < B)


def _row_noise_triton(G: Tensor, noise: bool) -> RowNoise:
    B, P = G.shape
    programs = -(-P // COLUMNS)
    total = torch.empty(P, dtype=G.dtype, device=G.device)
    sums = torch.empty(2, programs, B, dtype=torch.float64, device=G.device)
    with torch.cuda.device_of(G):  # Triton launches on the current device
        _row_noise_kernel[(programs,)](G, total, sums, B, P, ROWS, COLUMNS, num_warps=WARPS)
    squares, away = (t.sum(0) for t in sums)  # an operator's outputs share no memory
    return RowNoise(total, squares, away if noise else torch.zeros_like(away))


def _row_noise_native(G: Tensor, noise: bool) -> RowNoise:
    total = G.new_empty(G.shape[1])
    squares, away = (torch.empty(len(G), dtype=torch.float64) for _ in range(2))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (G, total, squares, away)]
    sizes = map(ctypes.c_int64, G.shape)
    native.function("row_noise", G.dtype)(*sizes, noise, *pointers)
    return RowNoise(total, squares, away)


IMPLEMENTATIONS = {
    "triton": _row_noise_triton,
    "native": _row_noise_native,
    "reference": row_noise_ref,
}


def _dispatch(G: Tensor, noise: bool) -> RowNoise:
    known = G.dtype != torch.bfloat16 and G.numel() > 0
    chosen = backend.choose(G.device, G.dtype) if known else "reference"
    return IMPLEMENTATIONS[chosen](G.contiguous(), noise)


def _fake(G: Tensor, noise: bool) -> RowNoise:
    wide = backend.wide_dtype(G.device)
    squares, away = (G.new_empty(len(G), dtype=wide) for _ in range(2))
    return RowNoise(G.new_empty(G.shape[1]), squares, away)


_OP = backend.custom_op(
    "row_noise", "(Tensor G, bool noise) -> (Tensor, Tensor, Tensor)", _dispatch, _fake
)


def row_noise(G: Tensor, noise: bool = True) -> RowNoise:
    """For G [B, P], float32 or float64, the sum of its rows, their squared norms and, with `noise`,
    their squared distances from the mean. The same bits on every run."""
    return RowNoise(*_OP(G, noise))
