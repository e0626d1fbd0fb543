"""The squared gradient norm of every sample of a batch, out of one ordinary backward pass.

Inside `PerSample` each call of a trainable layer is an autograd function with one more input, `probe` [2, B] of zeros,
and returns, as the gradient of the probe, its share of [||g_i||^2, <g_i, g>], with g_i the gradient of sample i and g
that of the mean loss; autograd adds the layers up. No hooks, no change of the model, nothing of size B x parameters.

A convolution, T output pixels, d = C k^2 inputs a pixel and p outputs, takes the cheaper of two ways:

    blocks   the weight gradients of the samples, one after the other: their squares, and their sum for g
    ghost    ||g_i||^2 from two [T, T] Gram matrices a sample (Goodfellow 2015; Rochette et al. 2019), g as always, and
             <g_i, g> = <dy_i, conv(x_i, g)>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastsmooth.kernels.backend import wide_dtype

BLOCK_BYTES = 16 << 20  # of the unfolded inputs and the Gram matrices that are held at a time


class NotCovered(ValueError):
    """The gradient norms of samples cannot be had from this model; the message names the parameter and why."""


@dataclass(frozen=True)
class SampleNorms:
    """Of a batch of B samples and its mean loss."""

    loss: Tensor  # 0-d
    grads: list[Tensor]  # g, one tensor a trainable parameter
    squares: Tensor  # [B], wide: ||g_i||^2
    inner: Tensor  # [B], wide: <g_i, g>
    grad_square: Tensor  # 0-d, wide: ||g||^2

    def noise(self) -> Tensor:
        """[B]: ||g_i - g||^2. Each norm is right to float32's rounding: a noise below 1e-6 ||g||^2 is lost in it."""
        return self.squares - 2 * self.inner + self.grad_square


def sample_norms(model: nn.Module, x: Tensor, y: Tensor) -> SampleNorms:
    """Per-sample gradient norms of the mean cross-entropy at the model's parameters, for x [B, ...] and y [B].

    Raises NotCovered for a batch of one, BatchNorm with batch statistics, and parameters outside of Conv2d, Linear,
    BatchNorm, GroupNorm and LayerNorm or used twice. Leaves .grad alone.
    """
    if len(y) < 2:
        raise NotCovered("a batch of one sample has no noise: use two or more")
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    wide = wide_dtype(x.device)
    with torch.enable_grad(), PerSample(names, len(y), x.device) as layers:
        loss = F.cross_entropy(model(x), y)
    missed = [name for p, name in names.items() if p not in layers.used]
    if missed:
        raise NotCovered(f"{missed[0]} takes no part in the forward pass: freeze it with requires_grad_(False)")
    *grads, total = torch.autograd.grad(loss, [*names, layers.probe])
    square = sum(g.to(wide).square().sum() for g in grads)
    return SampleNorms(loss.detach(), grads, total[0], total[1], square)


class PerSample(TorchFunctionMode):
    """Lets each layer that holds a parameter of `names` report to `probe`; refuses what it does not know."""

    def __init__(self, names: dict[Tensor, str], batch: int, device: torch.device):
        super().__init__()
        self.names, self.batch = names, batch
        self.probe = torch.zeros(2, batch, dtype=wide_dtype(device), device=device, requires_grad=True)
        self.used: set[Tensor] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        held = [a for a in (*args, *kwargs.values()) if isinstance(a, nn.Parameter) and a in self.names]
        if not held or getattr(function, "__name__", "") == "__get__":  # the latter asks for a shape, a dtype
            return function(*args, **kwargs)
        layer = LAYERS.get(function)
        if layer is None:
            raise NotCovered(f"{self.names[held[0]]} is used by {function.__name__}, which gives no per-sample norms")
        for p in held:
            if p in self.used:
                raise NotCovered(f"{self.names[p]} is used more than once: its per-sample gradients would mix")
            self.used.add(p)
        try:
            return layer(self, *args, **kwargs)
        except NotCovered as error:
            raise NotCovered(f"{self.names[held[0]]}: {error}") from None

    def check(self, x: Tensor) -> None:
        if x.shape[0] != self.batch:
            raise NotCovered(f"its input {list(x.shape)} does not begin with the {self.batch} samples of the batch")


def shares(g: Tensor, mean: Tensor, probe: Tensor) -> Tensor:
    """[2, B] from gradients of the mean loss g [B, ...], each 1 / B of its sample's, and their sum `mean`."""
    B = len(g)
    rows = g.flatten(1).to(probe.dtype)
    return torch.stack([rows.square().sum(1) * B**2, rows @ mean.flatten().to(probe.dtype) * B])


def gram_squares(rows: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """[B]: ||sum_t slopes_t rows_t^T||^2 of every sample, summed over groups, from [B, ..., T, d] and [B, ..., T, p]."""
    both = (rows @ rows.mT) * (slopes @ slopes.mT)
    return both.flatten(1).to(dtype).sum(1)


class Affine(torch.autograd.Function):
    """x * weight + bias with both broadcast from `shape`, which has a one for every dimension that they lack."""

    @staticmethod
    def forward(ctx, x, weight, bias, probe, shape):
        ctx.save_for_backward(x, weight, probe)
        ctx.shape = shape
        y = x * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, probe = ctx.saved_tensors
        over = [d for d, size in enumerate(ctx.shape) if size == 1 and d > 0]
        reduce = (lambda t: t.sum(over)) if over else (lambda t: t)
        dx = dw = db = None
        total = torch.zeros_like(probe)
        if ctx.needs_input_grad[0]:
            dx = dy * weight.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            g = reduce(dy * x)
            dw = g.sum(0)
            total += shares(g, dw, probe)
        if ctx.needs_input_grad[2]:
            g = reduce(dy)
            db = g.sum(0)
            total += shares(g, db, probe)
        return dx, dw, db, total, None


class Convolution(torch.autograd.Function):
    """F.conv2d over x [B, C, H, W]."""

    @staticmethod
    def forward(ctx, x, weight, bias, probe, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight, probe)
        ctx.rule = stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, *ctx.rule)

    @staticmethod
    def backward(ctx, dy):
        x, weight, probe = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.rule
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        B, T = len(x), dy.shape[2] * dy.shape[3]
        p, d = weight.shape[0] // groups, weight[0].numel()
        ghost = 2 * T * (d + p) < d * p  # its products are cheaper than those of the blocks, although g comes on top

        def slopes_of(x: Tensor, dy: Tensor, *wanted: bool) -> tuple[Tensor | None, ...]:
            rule = (stride, padding, dilation, False, [0, 0], groups)
            return torch.ops.aten.convolution_backward(dy, x, weight, None, *rule, wanted)

        dx, dw, _ = slopes_of(x, dy, need_x, need_weight and ghost, False)
        total = torch.zeros_like(probe)
        squares = []
        if need_weight and ghost:
            unfold = {"kernel_size": weight.shape[2:], "dilation": dilation, "padding": padding, "stride": stride}
            size = max(1, BLOCK_BYTES // (weight.element_size() * max(d * T, T * T) * groups))
            for xs, dys in zip(x.split(size), dy.split(size), strict=True):
                columns = F.unfold(xs, **unfold).view(len(xs), groups, d, T)
                squares.append(gram_squares(columns.mT, dys.reshape(len(xs), groups, p, T).mT, probe.dtype))
        elif need_weight:
            for xs, dys in zip(x.split(1), dy.split(1), strict=True):
                g = slopes_of(xs, dys, False, True, False)[1]
                squares.append(torch.linalg.vector_norm(g, dtype=probe.dtype).square().view(1))
                dw = g if dw is None else dw.add_(g)
        if need_weight:
            total[0] = torch.cat(squares) * B**2
            total[1] = (F.conv2d(x, dw, None, *ctx.rule) * dy).flatten(1).to(probe.dtype).sum(1) * B
        db = None
        if need_bias:
            g = dy.sum(dim=(2, 3))
            db = g.sum(0)
            total += shares(g, db, probe)
        return dx, dw, db, total, None, None, None, None


class Linear(torch.autograd.Function):
    """F.linear over x [B, ..., inputs]."""

    @staticmethod
    def forward(ctx, x, weight, bias, probe):
        ctx.save_for_backward(x, weight, probe)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, probe = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        B = len(x)
        rows, slopes = x.reshape(B, -1, x.shape[-1]), dy.reshape(B, -1, dy.shape[-1])
        T = rows.shape[1]
        total = torch.zeros_like(probe)
        dw = db = None
        if need_weight:
            dw = slopes.flatten(0, 1).T @ rows.flatten(0, 1)
            if T * sum(weight.shape) < weight.numel() or T == 1:
                total[0] = gram_squares(rows, slopes, probe.dtype) * B**2
            else:
                each = [(s.T @ r).to(probe.dtype).square().sum() for s, r in zip(slopes, rows, strict=True)]
                total[0] = torch.stack(each) * B**2
            total[1] = ((rows @ dw.T) * slopes).flatten(1).to(probe.dtype).sum(1) * B
        if need_bias:
            g = slopes.sum(1)
            db = g.sum(0)
            total += shares(g, db, probe)
        return dy @ weight if need_x else None, dw, db, total


# How PyTorch's functions are called ----------------------------------------------------------------------------------


def pair(value) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv2d(mode, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    mode.check(input)
    if isinstance(padding, str):
        sizes = [0, 0]
        if padding == "same":
            sizes = [step * (k - 1) for step, k in zip(pair(dilation), weight.shape[2:], strict=True)]
        if any(s % 2 for s in sizes):
            input = F.pad(input, [sizes[1] // 2, sizes[1] - sizes[1] // 2, sizes[0] // 2, sizes[0] - sizes[0] // 2])
            sizes = [0, 0]
        padding = [s // 2 for s in sizes]
    return Convolution.apply(input, weight, bias, mode.probe, pair(stride), pair(padding), pair(dilation), groups)


def linear(mode, input, weight, bias=None):
    mode.check(input)
    if input.ndim < 2:
        raise NotCovered("a linear layer needs an input [B, ..., inputs]")
    return Linear.apply(input, weight, bias, mode.probe)


def scaled(mode, x, weight, bias, shape):
    mode.check(x)
    if weight is None:
        raise NotCovered("a normalisation with a bias and no weight gives no per-sample norms")
    return Affine.apply(x, weight, bias, mode.probe, shape)


def batch_norm(mode, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise NotCovered("BatchNorm with batch statistics mixes the samples: use evaluation mode or --norm group")
    normal = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return scaled(mode, normal, weight, bias, [1, -1] + [1] * (input.ndim - 2))


def group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5):
    normal = F.group_norm(input, num_groups, None, None, eps)
    return scaled(mode, normal, weight, bias, [1, -1] + [1] * (input.ndim - 2))


def layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    normal = F.layer_norm(input, normalized_shape, None, None, eps)
    return scaled(mode, normal, weight, bias, [1] * (input.ndim - len(normalized_shape)) + list(normalized_shape))


LAYERS = {
    F.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
}
