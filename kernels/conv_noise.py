"""The weight gradient of a convolution, with the squared norm of every sample's share and its
distance from the mean.

    g_i = sum_t dy_it (x) x_i(t),   dw = sum_i g_i
    squares_i = ||g_i||^2,          noise_i = ||g_i - dw / B||^2

x_i(t) are the d = C k^2 inputs of output pixel t, of which there are T. The shares of a few output
channels, so few that those of all samples stay in the cache, are computed, added to dw, squared and
compared with their mean before the next (cpu.cpp): the work of a weight gradient and a few
operations a value of g. Nothing of size B x parameters is stored.

The reference does the same in blocks of samples. Where norms alone are asked for and pixels are
few, it takes them from the Gram matrices of pixels instead, ||g_i||^2 = sum_st (dy_s . dy_t)(x(s) .
x(t)) (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv 1912.06015).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth.kernels import backend, native

BLOCK_BYTES = 64 << 20  # of the shares or the unfolded inputs that the reference holds at a time


class Shares(NamedTuple):
    """What conv_noise returns."""

    dw: Tensor  # [p, C / groups, kh, kw], in x's dtype
    squares: Tensor  # [B], wide: ||g_i||^2
    noise: Tensor  # [B], wide: ||g_i - dw / B||^2; zeros where it was not asked for


def conv_noise_ref(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
) -> Shares:
    """As `conv_noise`, in plain PyTorch, for x [B, C, H, W] and dy [B, p, OH, OW]."""
    B, C, p, T = len(x), x.shape[1] // groups, dy.shape[1] // groups, dy.shape[2] * dy.shape[3]
    d = C * kernel[0] * kernel[1]
    wide = backend.wide_dtype(x.device)
    weight = x.new_empty(p * groups, C, *kernel)
    rule = (stride, padding, dilation, False, [0, 0], groups)
    dw = torch.ops.aten.convolution_backward(dy, x, weight, None, *rule, (False, True, False))[1]
    mean = (dw.to(wide) / B).to(x.dtype).reshape(groups, p, d) if noise else None
    gram = not noise and T * (d + p) < d * p
    size = max(1, BLOCK_BYTES // (x.element_size() * groups * max(d * T, T * T if gram else d * p)))
    window = (tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    norms, deviations = [], []  # of each block: wide [samples]
    for xs, dys in zip(x.split(size), dy.split(size), strict=True):
        columns = F.unfold(xs, *window).view(len(xs), groups, d, T)
        slopes = dys.reshape(len(xs), groups, p, T)
        if gram:
            pairs = (columns.mT @ columns) * (slopes.mT @ slopes)
            norms.append(pairs.flatten(1).to(wide).sum(1))
            continue
        g = slopes @ columns.mT
        norms.append(torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide).square())
        if mean is not None:
            away = (g - mean).flatten(1)
            deviations.append(torch.linalg.vector_norm(away, dim=1, dtype=wide).square())
    squares = torch.cat(norms)
    # as cpu.cpp has it, and as compilers are told
    dw = dw.contiguous(memory_format=torch.channels_last)
    return Shares(dw, squares, torch.cat(deviations) if noise else torch.zeros_like(squares))


def _conv_noise_native(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
) -> Shares:
    B, C, H, W = x.shape
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    sizes = [B, H, W, C // groups, dy.shape[2], dy.shape[3], dy.shape[1] // groups, groups]
    rule = (ctypes.c_int64 * 16)(*sizes, *kernel, *stride, *padding, *dilation)
    dw = x.new_empty(dy.shape[1], *kernel, C // groups)
    squares, deviations = torch.empty(B, dtype=torch.float64), torch.empty(B, dtype=torch.float64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, dy, dw, squares, deviations)]
    native.function("conv_noise", x.dtype)(
        rule, *pointers[:2], noise, torch.get_num_threads(), *pointers[2:]
    )
    return Shares(dw.permute(0, 3, 1, 2), squares, deviations)


def fits(x: Tensor, dy: Tensor) -> bool:
    """Whether cpu.cpp takes x [B, C, H, W] and dy [B, p, OH, OW]: one dtype, float32 or float64,
    and offsets within a sample of 32 bits."""
    alike = x.dtype == dy.dtype and x.dtype != torch.bfloat16
    return alike and max(x[0].numel(), dy[0].numel()) < 2**31


def _dispatch(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
) -> Shares:
    native_here = backend.choose(x.device, x.dtype) == "native" and fits(x, dy)
    implementation = _conv_noise_native if native_here else conv_noise_ref
    return implementation(x, dy, kernel, stride, padding, dilation, groups, noise)


def _fake(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
) -> Shares:
    squares, deviations = (
        x.new_empty(len(x), dtype=backend.wide_dtype(x.device)) for _ in range(2)
    )
    dw = x.new_empty(dy.shape[1], *kernel, x.shape[1] // groups)
    return Shares(dw.permute(0, 3, 1, 2), squares, deviations)


_OP = backend.custom_op(
    "conv_noise",
    "(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool noise) -> (Tensor, Tensor, Tensor)",
    _dispatch,
    _fake,
)


def conv_noise(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    noise: bool = True,
) -> Shares:
    """For x [B, C, H, W] and the gradient dy [B, p, OH, OW] of the output of conv2d(x, weight,
    None, ...), zero-padded.

    kernel, stride, padding and dilation are [height, width]. Without `noise` the deviations are not
    computed. x and dy have one dtype: float32, float64 or bfloat16. Shares has dw [p, C / groups,
    kh, kw] in that dtype, squares and noise [B] in float64 (float32 where the device has no wider).
    """
    return Shares(*_OP(x, dy, kernel, stride, padding, dilation, groups, noise))
