"""The weight gradient of a convolution, with the squared norm of every sample's share and its
distance from the mean.

    g_i = sum_t dy_it (x) x_i(t),   dw = sum_i g_i
    squares_i = ||g_i||^2,          noise_i = ||g_i - dw / B||^2

x_i(t) are the d = C k^2 inputs of output pixel t, of which there are T.

On a GPU (conv_tile.py) a share is a few tiles in registers, squared and added to dw before the next
sample begins. Deviations are from a mean that a plain weight gradient gives beforehand, or, where
pixels are many and weights few, of stored shares. `conv_spread` gives sum_i noise_i alone, with
each share computed once: what the gradient's variance over samples, C^2, takes.

On a CPU (cpu.cpp) the shares of a few output channels, so few that those of all samples stay in the
cache, are computed, added to dw, squared and compared with their mean before the next: the work of
a weight gradient and a few operations a value of g. Nothing of size B x parameters is stored.

The reference does the same in blocks of samples. Where norms alone are asked for and pixels are
few, it takes them from the Gram matrices of pixels instead, ||g_i||^2 = sum_st (dy_s . dy_t)(x(s) .
x(t)) (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv 1912.06015).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth.kernels import backend, conv_tile, native
from fastsmooth.kernels.row_noise import row_noise

BLOCK_BYTES = 64 << 20  # of the shares or the unfolded inputs that the reference holds at a time


class Shares(NamedTuple):
    """What conv_noise returns."""

    dw: Tensor  # [p, C / groups, kh, kw], float32, or float64 for float64 operands
    squares: Tensor  # [B], wide: ||g_i||^2
    noise: Tensor  # [B], wide: ||g_i - dw / B||^2; zeros where it was not asked for


def widened(operand: Tensor) -> Tensor:
    """[...]: in float32 what is in bfloat16, by which no product changes and no sum is rounded."""
    return operand.to(backend.buffer_dtype(operand.dtype))


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """PyTorch's own, [p, C / groups, kh, kw], in the operands' dtype."""
    weight = x.new_empty(dy.shape[1], x.shape[1] // groups, *kernel)
    rule = (stride, padding, dilation, False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *rule, (False, True, False))[1]


def unfolded(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    held: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A few samples at a time (the inputs of each output pixel, [b, groups, d, T], its slopes, [b,
    groups, p / groups, T]): the gradients of a sample's weight are slopes @ columns.mT.

    `held`: values that will be held of a sample and group, by which BLOCK_BYTES are kept to.
    """
    size = max(1, BLOCK_BYTES // (x.element_size() * groups * held))
    window = (tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    for xs, dys in zip(x.split(size), dy.split(size), strict=True):
        columns = F.unfold(xs, *window).unflatten(1, (groups, -1))
        yield columns, dys.reshape(len(xs), groups, -1, columns.shape[-1])


def conv_noise_ref(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
    precision: str = "ieee",
) -> Shares:
    """As `conv_noise`, in plain PyTorch, for x [B, C, H, W] and dy [B, p, OH, OW]."""
    x, dy = widened(x), widened(dy)
    B, C, p, T = len(x), x.shape[1] // groups, dy.shape[1] // groups, dy.shape[2] * dy.shape[3]
    d = C * kernel[0] * kernel[1]
    wide = backend.wide_dtype(x.device)
    dw = weight_gradient(x, dy, kernel, stride, padding, dilation, groups)
    mean = (dw.to(wide) / B).to(x.dtype).reshape(groups, p, d) if noise else None
    gram = not noise and T * (d + p) < d * p
    held = max(d * T, T * T if gram else d * p)  # values of a sample and group
    norms, deviations = [], []  # of each block: wide [samples]
    for columns, slopes in unfolded(x, dy, kernel, stride, padding, dilation, groups, held):
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


def _conv_noise_triton(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
    precision: str = "ieee",
) -> Shares:
    layer = conv_tile.layer_of(x, dy, kernel, stride, padding, dilation, groups)
    if not noise:
        dw, squares = conv_tile.norms(x, dy, layer, precision)
        return Shares(dw.permute(0, 3, 1, 2), squares, torch.zeros_like(squares))
    if conv_tile.stores_rows(layer, len(x)):
        total, squares, deviations = row_noise(conv_tile.rows(x, dy, layer, precision))
        return Shares(conv_tile.weight(total, layer).permute(0, 3, 1, 2), squares, deviations)
    mean = weight_gradient(x, dy, kernel, stride, padding, dilation, groups).float() / len(x)
    found = conv_tile.deviations(x, dy, layer, mean.permute(0, 2, 3, 1), precision)
    return Shares(found[0].permute(0, 3, 1, 2), *found[1:])


def _conv_noise_native(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
    precision: str = "ieee",
) -> Shares:
    B, C, H, W = x.shape
    x, dy = (widened(t).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    sizes = [B, H, W, C // groups, dy.shape[2], dy.shape[3], dy.shape[1] // groups, groups]
    rule = (ctypes.c_int64 * 16)(*sizes, *kernel, *stride, *padding, *dilation)
    dw = x.new_empty(dy.shape[1], *kernel, C // groups)
    squares, deviations = torch.empty(B, dtype=torch.float64), torch.empty(B, dtype=torch.float64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, dy, dw, squares, deviations)]
    native.function("conv_noise", x.dtype)(
        rule, *pointers[:2], noise, torch.get_num_threads(), *pointers[2:]
    )
    return Shares(dw.permute(0, 3, 1, 2), squares, deviations)


IMPLEMENTATIONS = {
    "triton": _conv_noise_triton,
    "native": _conv_noise_native,
    "reference": conv_noise_ref,
}


def unfit(x: Tensor, dy: Tensor, kernel: list[int], groups: int) -> str:
    """Why the reference takes x [B, C, H, W] and dy [B, p, OH, OW] although there is a faster
    implementation for their device, in a few words; empty where it does not. On a CPU, where
    bfloat16 is widened: one dtype, and offsets within a sample of 32 bits."""
    if backend.choose(x.device, x.dtype) == "triton":
        return conv_tile.unfit(x, dy, kernel, groups)
    if x.dtype != dy.dtype:
        return "operands of two dtypes"
    return (
        "2^31 values of a sample" if max(x.shape[1:].numel(), dy.shape[1:].numel()) >= 2**31 else ""
    )


def implementation(x: Tensor, dy: Tensor, kernel: list[int], groups: int) -> str:
    """The one that takes these operands."""
    return "reference" if unfit(x, dy, kernel, groups) else backend.choose(x.device, x.dtype)


def _dispatch(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
    precision: str,
) -> Shares:
    run = IMPLEMENTATIONS[implementation(x, dy, kernel, groups)]
    return run(x, dy, kernel, stride, padding, dilation, groups, noise, precision)


def _fake(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise: bool,
    precision: str,
) -> Shares:
    wide = backend.wide_dtype(x.device)
    squares, deviations = (x.new_empty(len(x), dtype=wide) for _ in range(2))
    return Shares(_fake_weight(x, dy, kernel, groups), squares, deviations)


def _fake_weight(x: Tensor, dy: Tensor, kernel: list[int], groups: int) -> Tensor:
    dtype = backend.buffer_dtype(x.dtype)
    dw = x.new_empty(dy.shape[1], *kernel, x.shape[1] // groups, dtype=dtype)
    return dw.permute(0, 3, 1, 2)


_OP = backend.custom_op(
    "conv_noise",
    "(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool noise, str precision) -> (Tensor, Tensor, Tensor)",
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
    precision: str = "ieee",
) -> Shares:
    """The weight gradient and every sample's share of it.

    Args:
        x: [B, C, H, W], the input of conv2d(x, weight, None, ...), zero-padded: float32, float64 or
            bfloat16.
        dy: [B, p, OH, OW], the gradient of its output, in x's dtype.
        kernel, stride, padding, dilation: [height, width].
        groups: of channels, each with a convolution of its own.
        noise: without it the deviations are not computed.
        precision: of products of float32 on a GPU: ieee, tf32 (10 bits of each operand) or tf32x3
            (three products of such parts). Those of bfloat16 are exact; sums are in float32. Other
            implementations multiply as PyTorch is told to.

    Returns:
        Shares(dw, squares, noise): dw [p, C / groups, kh, kw] in float32 (float64 for float64
        operands), squares and noise [B] in float64 (float32 where the device has no wider). On a
        GPU a sample that is not finite makes all deviations not finite, and all squares where
        deviations are asked for; without, only its own.

    Raises:
        ValueError: for another precision.
    """
    check_precision(precision)
    return Shares(*_OP(x, dy, kernel, stride, padding, dilation, groups, noise, precision))


def check_precision(precision: str) -> None:
    """Raises ValueError for one that is not known."""
    if precision not in conv_tile.PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose from {', '.join(conv_tile.PRECISIONS)}")


# The sum of deviations alone


def conv_spread_ref(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """As `conv_spread`, in plain PyTorch, for x [B, C, H, W] and dy [B, p, OH, OW]."""
    found = conv_noise_ref(x, dy, kernel, stride, padding, dilation, groups, True)
    return found.dw, found.noise.sum()


def _conv_spread_triton(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    layer = conv_tile.layer_of(x, dy, kernel, stride, padding, dilation, groups)
    dw, total = conv_tile.spread(x, dy, layer, precision)
    return dw.permute(0, 3, 1, 2), total


def _dispatch_spread(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    rule = (kernel, stride, padding, dilation, groups)
    if implementation(x, dy, kernel, groups) == "triton":
        return _conv_spread_triton(x, dy, *rule, precision)
    found = _dispatch(x, dy, *rule, True, precision)
    return found.dw, found.noise.sum()


def _fake_spread(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    total = x.new_empty((), dtype=backend.wide_dtype(x.device))
    return _fake_weight(x, dy, kernel, groups), total


_SPREAD = backend.custom_op(
    "conv_spread",
    "(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "str precision) -> (Tensor, Tensor)",
    _dispatch_spread,
    _fake_spread,
)


def conv_spread(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """The weight gradient, and how far all samples' shares are from their mean together.

    On a GPU each share is computed once: the samples' splits s, of n_s each, count from their first
    share c_s and keep E_s = sum (g_i - c_s) and Q_s = sum ||g_i - c_s||^2. With m_s = c_s + E_s /
    n_s (Chan, Golub, LeVeque 1983, equations 1.5 and 2.1),

        sum_i ||g_i - dw / B||^2 = sum_s (Q_s - ||E_s||^2 / n_s) + sum_s n_s ||m_s - dw / B||^2.

    Args:
        As in `conv_noise`.

    Returns:
        (dw, total): dw [p, C / groups, kh, kw] as there; total = sum_i noise_i, 0-d, float64
        (float32 where the device has no wider).

    Raises:
        ValueError: for another precision.
    """
    check_precision(precision)
    return _SPREAD(x, dy, kernel, stride, padding, dilation, groups, precision)
