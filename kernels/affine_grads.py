"""The gradients of a normalisation's scale and shift, sample by sample, in one pass over its input
and its slopes.

    dw_ic = sum_t dy_ict (x_ict - mean) rstd,   db_ic = sum_t dy_ict

for y = (x - mean) rstd w + b: BatchNorm with its running statistics or with those of the batch
(mean and rstd [1, C]), GroupNorm (mean and rstd [B, groups]), and LayerNorm over the channels,
where every pixel, or token, has its own (mean and rstd [B, 1, T]).

On a GPU a program owns some channels of a sample and up to SPAN of its pixels, whatever the order
of memory is, and writes sums of its own, in float64: no atomics, the same bits on every run.
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


def affine_grads_ref(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """As `affine_grads`, in plain PyTorch: (dw, db), each [B, C] and wide."""
    B, C = x.shape[:2]
    center, scale = mean, rstd
    if mean.ndim == 2:
        each = C // mean.shape[1]
        center, scale = (t.repeat_interleave(each, 1).view(-1, C, 1) for t in (mean, rstd))
    pixels, slopes = x.reshape(B, C, -1), dy.reshape(B, C, -1)
    wide = backend.wide_dtype(x.device)
    return (slopes * ((pixels - center) * scale)).sum(2, dtype=wide), slopes.sum(2, dtype=wide)


# Triton

SPAN = 1024  # pixels of one program, so that few samples of many pixels still fill a GPU
WARPS = 4


class Tile(NamedTuple):
    """Pixels and channels that a program takes at a time."""

    BT: int
    BC: int


def tile(pixels: int, channels: int, channels_last: bool) -> Tile:
    """2,048 values, 16 a thread, with 64 of them in a row where there are as many."""
    along, across = (channels, pixels) if channels_last else (pixels, channels)
    long = min(max(1 << (along - 1).bit_length(), 16), 64)
    short = min(max(1 << (across - 1).bit_length(), 1), 2048 // long)
    return Tile(short, long) if channels_last else Tile(long, short)


if triton:

    @triton.jit
    @no_type_check
    def _affine_grads_kernel(
        x, dy,  # [B, T, C] where `channels_last`, else [B, C, T]
        mean, rstd,  # float32 [1, G], [B, G] with of_samples, [B, 1, T] with of_pixels
        sums,  # float64 [2, parts, B, C]: of dy (x - mean) rstd, of dy
        T, C, G,
        of_samples: tl.constexpr, of_pixels: tl.constexpr, channels_last: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, SPAN: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64)
        part, parts, samples = tl.program_id(2), tl.num_programs(2), tl.num_programs(0)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        inside = c < C
        at = c // (C // G)
        if of_samples:
            at += i * G
        if not of_pixels:
            center = tl.load(mean + at, mask=inside, other=0.0)[None, :]
        x += i * T * C
        dy += i * T * C
        scale = tl.zeros([BT, BC], tl.float32)
        shift = tl.zeros([BT, BC], tl.float32)
        begin = part * SPAN
        for start in range(begin, tl.minimum(begin + SPAN, T), BT):
            t = start + tl.arange(0, BT)
            mask = (t < T)[:, None] & inside[None, :]
            if channels_last:
                offset = t[:, None] * C + c[None, :]
            else:
                offset = c[None, :] * T + t[:, None]
            value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            slope = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
            if of_pixels:
                center = tl.load(mean + i * T + t, mask=t < T, other=0.0)[:, None]
                over = tl.load(rstd + i * T + t, mask=t < T, other=0.0)[:, None]
                scale += slope * ((value - center) * over)
            else:
                scale += slope * (value - center)
            shift += slope
        total = tl.sum(scale.to(tl.float64), axis=0)
        if not of_pixels:
            total *= tl.load(rstd + at, mask=inside, other=0.0).to(tl.float64)
        to = sums + (part * samples + i) * C + c
        tl.store(to, total, mask=inside)
        half = i * 0 + parts
        tl.store(to + half * samples * C, tl.sum(shift.to(tl.float64), axis=0), mask=inside)


def _affine_grads_triton(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    (B, C), T, G = x.shape[:2], x.shape[2:].numel(), mean.shape[1]
    channels_last = x.movedim(1, -1).is_contiguous()
    x, dy = ((t.movedim(1, -1) if channels_last else t).contiguous() for t in (x, dy))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    cut, parts = tile(T, C, channels_last), -(-T // SPAN)
    sums = torch.empty(2, parts, B, C, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _affine_grads_kernel[(B, -(-C // cut.BC), parts)](
            x, dy, mean, rstd, sums, T, C, G, len(mean) > 1, mean.ndim == 3, channels_last, *cut,
            SPAN, num_warps=WARPS,
        )  # fmt: skip
    dw, db = (t.sum(0) for t in sums)  # an operator's outputs share no memory
    return dw, db


# C++, and the choice


def _affine_grads_native(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    B, C = x.shape[:2]
    x, dy = (t.movedim(1, -1).contiguous() for t in (x, dy))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dw, db = torch.empty(B, C, dtype=torch.float64), torch.empty(B, C, dtype=torch.float64)
    pixels, step = x[0].numel() // C, mean[0].numel() if len(mean) > 1 else 0
    each = 0 if mean.ndim == 3 else C // mean.shape[1]
    sizes = [B, pixels, C, each, step]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, dy, mean, rstd, dw, db)]
    threads = torch.get_num_threads()
    native.function("affine_grads", x.dtype)(
        *map(ctypes.c_int64, sizes), *pointers[:4], threads, *pointers[4:]
    )
    return dw, db


IMPLEMENTATIONS = {
    "triton": _affine_grads_triton,
    "native": _affine_grads_native,
    "reference": affine_grads_ref,
}


def fits(implementation: str, x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> bool:
    """Whether it takes x and dy [B, C, ...] and mean and rstd as `affine_grads`: one dtype of the
    first two and one of the others, and for Triton offsets within a sample of 32 bits."""
    if x.dtype != dy.dtype or mean.dtype != rstd.dtype:
        return False
    if implementation == "triton":
        dtypes = x.dtype in (torch.float32, torch.bfloat16) and mean.dtype == torch.float32
        return dtypes and 0 < x.numel() < 2**31 * len(x)
    return x.dtype == mean.dtype != torch.bfloat16


def _dispatch(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    chosen = backend.choose(x.device, x.dtype)
    run = IMPLEMENTATIONS[chosen if fits(chosen, x, dy, mean, rstd) else "reference"]
    return run(x, dy, mean, rstd)


def _fake(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dw, db = (x.new_empty(x.shape[:2], dtype=backend.wide_dtype(x.device)) for _ in range(2))
    return dw, db


_OP = backend.custom_op(
    "affine_grads",
    "(Tensor x, Tensor dy, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _dispatch,
    _fake,
)


def affine_grads(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of scale and shift, sample by sample.

    Args:
        x: [B, C, ...], what was normalised: float32, float64 or bfloat16.
        dy: [B, C, ...], the gradient of the layer's output.
        mean, rstd: [1 or B, groups of equal size], or [B, 1, T], by which x was normalised. In
            float32 with x and dy in float32 or bfloat16 they go through Triton on a GPU; of one
            dtype with x and dy, float32 or float64, through C++ on a CPU; else through plain
            PyTorch.

    Returns:
        (dw, db): each [B, C], float64 (float32 where the device has no wider).
    """
    return _OP(x, dy, mean, rstd)
