"""How far each of the rows of a matrix is from their mean, with their sum and norms.

    total = sum_i G_i,   noise_i = ||G_i - total / B||^2,   squares_i = ||G_i||^2

G is [B, P], the shares of samples in the gradient of one layer, as conv_tile.py stores them. It is
persample_noise.py without a step: those rows are gradients of all parameters, these of one layer,
which come out of the L2 cache and are few enough to be read twice. Sums over rows are in float64,
and so is what programs add up; there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: nobody calls it there
    triton = None


class RowNoise(NamedTuple):
    """What row_noise returns."""

    total: Tensor  # float32 [P]
    squares: Tensor  # float64 [B]
    noise: Tensor  # float64 [B]


def row_noise_ref(G: Tensor) -> RowNoise:
    """As `row_noise`, in plain PyTorch, for G [B, P]."""
    wide = G.double()
    noise = (wide - wide.mean(0)).square().sum(1)
    return RowNoise(wide.sum(0).float(), wide.square().sum(1), noise)


# How many rows and columns a program takes at a time: 16 bytes a thread.
ROWS, COLUMNS, WARPS = 32, 64, 4

if triton:

    @triton.jit(do_not_specialize=["B"])
    @no_type_check
    def _row_noise_kernel(
        G,
        total,  # float32 [P]
        sums,  # float64 [2, programs, B]: of G^2, of deviation^2
        B,
        P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
        tl.store(total + columns, whole.to(tl.float32), mask=columns < P)
        mean = whole / B
        # two numbers: a noise a millionth of the mean keeps its digits
        near = mean.to(tl.float32)
        rest = (mean - near.to(tl.float64)).to(tl.float32)
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


def row_noise(G: Tensor) -> RowNoise:
    """For G [B, P], float32 and contiguous, on a GPU. The same bits on every run."""
    B, P = G.shape
    programs = -(-P // COLUMNS)
    total = torch.empty(P, dtype=torch.float32, device=G.device)
    sums = torch.empty(2, programs, B, dtype=torch.float64, device=G.device)
    with torch.cuda.device_of(G):  # Triton launches on the current device
        _row_noise_kernel[(programs,)](G, total, sums, B, P, ROWS, COLUMNS, num_warps=WARPS)
    squares, noise = sums.sum(dim=1)
    return RowNoise(total, squares, noise)
