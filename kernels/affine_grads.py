"""The gradients of a normalisation's scale and shift, sample by sample, in one pass over its input
and its slopes.

    dw_ic = sum_t dy_ict (x_ict - mean) rstd,   db_ic = sum_t dy_ict

for y = (x - mean) rstd w + b: BatchNorm with its running statistics or with those of the batch
(mean and rstd [1, C]), and GroupNorm (mean and rstd [B, groups]).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native


def affine_grads_ref(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """As `affine_grads`, in plain PyTorch: (dw, db), each [B, C] and wide."""
    B, C = x.shape[:2]
    each = C // mean.shape[1]
    center, scale = (t.repeat_interleave(each, 1).view(-1, C, 1) for t in (mean, rstd))
    pixels, slopes = x.reshape(B, C, -1), dy.reshape(B, C, -1)
    wide = backend.wide_dtype(x.device)
    return (slopes * ((pixels - center) * scale)).sum(2, dtype=wide), slopes.sum(2, dtype=wide)


def _affine_grads_native(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    B, C = x.shape[:2]
    x, dy = (t.movedim(1, -1).contiguous() for t in (x, dy))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dw, db = torch.empty(B, C, dtype=torch.float64), torch.empty(B, C, dtype=torch.float64)
    sizes = [B, x[0].numel() // C, C, C // mean.shape[1], mean.shape[1] if len(mean) > 1 else 0]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, dy, mean, rstd, dw, db)]
    threads = torch.get_num_threads()
    native.function("affine_grads", x.dtype)(
        *map(ctypes.c_int64, sizes), *pointers[:4], threads, *pointers[4:]
    )
    return dw, db


def _dispatch(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    alike = len({t.dtype for t in (x, dy, mean, rstd)}) == 1 and x.dtype != torch.bfloat16
    native_here = alike and backend.choose(x.device, x.dtype) == "native"
    return (_affine_grads_native if native_here else affine_grads_ref)(x, dy, mean, rstd)


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
        mean, rstd: [1 or B, groups of equal size], by which x was normalised. Of one dtype with x
            and dy, float32 or float64, they go through C++ on a CPU.

    Returns:
        (dw, db): each [B, C], float64 (float32 where the device has no wider).
    """
    return _OP(x, dy, mean, rstd)
