"""Layers whose backward pass knows the gradient of every sample: autograd functions with one more
input, `probe`.

A probe is [2, B] of zeros, and its gradient the layer's share of [||g_i||^2, ||g_i - g||^2] of the
mean loss's gradients, g_i that of sample i; autograd adds up what has the same probe. Every layer
sees its samples as `rows` of its input, one or more in a row each: [B rows, ...].

Deviations are taken from the mean, layer by layer: from ||g_i||^2 - 2 <g_i, g> + ||g||^2 a noise of
a thousandth of the mean would come out of float32 without a correct digit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth.kernels.affine_grads import affine_grads
from fastsmooth.kernels.backend import buffer_dtype, wide_dtype
from fastsmooth.kernels.conv_noise import conv_noise, unfolded, weight_gradient
from fastsmooth.kernels.row_noise import row_noise


def shares(g: Tensor, noise: bool) -> tuple[Tensor, Tensor]:
    """(sum, [2, B]: ||g_i||^2 and ||g_i - g||^2) of the rows g [B, ...] of a mean loss's gradient,
    each g_i / B."""
    found = row_noise(g.flatten(1), noise)
    total = found.total.view(g.shape[1:])
    return total, torch.stack([found.squares, found.noise]) * len(g) ** 2


def norms(rows: Tensor) -> Tensor:
    """[c], wide: the squared norms of rows [c, ...]."""
    wide = wide_dtype(rows.device)
    return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=wide).square()


def bias_shares(dy: Tensor, samples: int, noise: bool) -> tuple[Tensor, Tensor]:
    """As `shares`, of a bias, for the slopes dy [B rows, p, ...] of an output."""
    g = dy.sum(dim=tuple(range(2, dy.ndim)), dtype=buffer_dtype(dy.dtype))
    return shares(by_sample(g, samples), noise)


def input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """That of a convolution, as x [B, C, ...]."""
    rule = (stride, padding, dilation, False, [0] * len(stride), groups)
    slopes = torch.ops.aten.convolution_backward
    return slopes(dy, x, weight.to(x.dtype), None, *rule, (True, False, False))[0]


def by_sample(g: Tensor, samples: int) -> Tensor:
    """The sums [B, ...] of g [B rows, ...] over the rows of each of the B samples."""
    return g if len(g) == samples else g.unflatten(0, (samples, -1)).sum(1)


class Lift(torch.autograd.Function):
    """A parameter p [...] as one a sample, [B, ...], whatever these are used for."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, probe: Tensor, noise: bool) -> Tensor:
        ctx.noise = noise
        return p.expand(probe.shape[1], *p.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *shares(g, ctx.noise), None


# Convolutions and linear layers


class Rule(NamedTuple):
    """How a convolution of images [B, C, H, W] moves, [height, width] each."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


ONE = [1, 1]


class Made(NamedTuple):
    """A weight that is computed from parameters alone, with its graph: value = f(parents)."""

    value: Tensor
    parents: list[Tensor]


def weight_shares(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    rule: Rule,
    noise: bool,
    made: Made | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(the weight's gradient, [p, C / groups, kh, kw], [2, B] as in `shares`) of a convolution of
    x [B, C, H, W] with output slopes dy [B, p, H', W']. With `made` the shares are those of the
    parameters that the weight is made of. `precision` is that of products of float32."""
    if made is not None:
        return made_shares(x, dy, kernel, rule, noise, made)
    shape = [dy.shape[1], x.shape[1] // rule.groups, *kernel]
    if kernel != ONE and rule == Rule(kernel, [0, 0], ONE, 1):
        x, dy, kernel, rule = patches(x, dy, kernel)
    found = conv_noise(x, dy, kernel, *rule, noise, precision)
    return found.dw.reshape(shape), torch.stack([found.squares, found.noise]) * len(x) ** 2


def patches(x: Tensor, dy: Tensor, kernel: list[int]) -> tuple[Tensor, Tensor, list[int], Rule]:
    """A convolution whose windows lie side by side, as a linear layer over the windows."""
    (kh, kw), (batch, _, height, width) = kernel, dy.shape
    x = x[:, :, : height * kh, : width * kw].unflatten(3, (width, kw)).unflatten(2, (height, kh))
    tokens = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width, -1)
    slopes = dy.flatten(2)[..., None]
    return tokens.mT[..., None], slopes, ONE, Rule(ONE, [0, 0], ONE, 1)


def made_shares(
    x: Tensor, dy: Tensor, kernel: list[int], rule: Rule, noise: bool, made: Made
) -> tuple[Tensor, Tensor]:
    """As weight_shares. The weight's gradients are taken back to the parents block by block, each
    sample by itself: the way there is linear, so deviations stay deviations."""
    dw = weight_gradient(x, dy, kernel, *rule)
    means = [g / len(x) for g in pulled(made, dw[None])]
    d, pixels = dw[0].numel(), dy.shape[2] * dy.shape[3]
    held = max(d * pixels, d * dy.shape[1] // rule.groups)
    found = []
    for columns, slopes in unfolded(x, dy, kernel, *rule, held):
        grads = pulled(made, slopes @ columns.mT)
        squares = torch.stack([norms(g) for g in grads]).sum(0)
        deviations = torch.zeros_like(squares)
        if noise:
            away = [norms(g - m) for g, m in zip(grads, means, strict=True)]
            deviations = torch.stack(away).sum(0)
        found.append(torch.stack([squares, deviations]))
    return dw, torch.cat(found, dim=1) * len(x) ** 2


def pulled(made: Made, rows: Tensor) -> tuple[Tensor, ...]:
    """The gradients [c, ...] of the parents for c gradients of the weight, rows [c, ...]."""
    rows = rows.to(made.value.dtype).reshape(len(rows), *made.value.shape)
    return torch.autograd.grad(
        made.value, made.parents, rows, is_grads_batched=True, retain_graph=True
    )


def stacked(
    x: Tensor, dy: Tensor, samples: int, kernel: list[int], rule: Rule
) -> tuple[Tensor, Tensor, Rule]:
    """The same convolution with one tall image a sample in the place of its `rows`, one under the
    other: x [B rows, C, H, W] and dy [B rows, p, H', W'] become [B, ...]. Between the outputs of
    two images there are some that belong to neither, whose slopes are 0."""
    if len(x) == samples:
        return x, dy, rule
    (step, across), (top, side), dilation, groups = rule
    height = -(-(x.shape[2] + 2 * top) // step) * step
    x = F.pad(x, (0, 0, top, height - x.shape[2] - top))
    dy = F.pad(dy, (0, 0, 0, height // step - dy.shape[2]))
    x, dy = (t.unflatten(0, (samples, -1)).movedim(1, 2).flatten(2, 3) for t in (x, dy))
    outputs = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // step + 1
    return x, dy[:, :, :outputs], Rule([step, across], [0, side], dilation, groups)


class Convolution(torch.autograd.Function):
    """F.conv2d over x [B rows, C, H, W]; under autocast x comes in its dtype, and the weight in its
    own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        rule: Rule,
        made: Made | None,
        precision: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.rule, ctx.made, ctx.like = noise, rule, made, probe
        ctx.precision = precision
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, *rule)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rule, samples = ctx.rule, ctx.like.shape[1]
        dx = dw = db = None
        total = torch.zeros_like(ctx.like)
        if need_x:
            dx = input_gradient(dy, x, weight, *rule)
        if need_weight:
            kernel = list(weight.shape[2:])
            images, slopes, tall = stacked(x, dy, samples, kernel, rule)
            how = ctx.noise, ctx.made, ctx.precision
            dw, found = weight_shares(images, slopes, kernel, tall, *how)
            dw = dw.to(weight.dtype)
            total += found
        if need_bias:
            db, found = bias_shares(dy, samples, ctx.noise)
            total += found
        return dx, dw, db, total, None, None, None, None


class Convolution3d(torch.autograd.Function):
    """F.conv3d over x [B rows, C, D, H, W]: for each tap along the depth a convolution of its
    slices, which are rows of one sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        precision: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.rule, ctx.like = noise, (stride, padding, dilation, groups), probe
        ctx.precision = precision
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv3d(x, weight.to(x.dtype), bias, *ctx.rule)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        stride, padding, dilation, groups = ctx.rule
        samples = ctx.like.shape[1]
        dx = dw = db = None
        total = torch.zeros_like(ctx.like)
        if need_x:
            dx = input_gradient(dy, x, weight, *ctx.rule)
        if need_weight:
            kernel = list(weight.shape[3:])
            rule = Rule(stride[1:], padding[1:], dilation[1:], groups)
            deep = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
            slopes = dy.movedim(2, 1).flatten(0, 1)
            taps = []
            for tap in range(weight.shape[2]):
                first = tap * dilation[0]
                slices = deep[:, :, first : first + (dy.shape[2] - 1) * stride[0] + 1 : stride[0]]
                images = slices.movedim(2, 1).flatten(0, 1)
                tall = stacked(images, slopes, samples, kernel, rule)
                found, shared = weight_shares(
                    *tall[:2], kernel, tall[2], ctx.noise, None, ctx.precision
                )
                taps.append(found)
                total += shared
            dw = torch.stack(taps, dim=2).to(weight.dtype)
        if need_bias:
            db, found = bias_shares(dy, samples, ctx.noise)
            total += found
        return dx, dw, db, total, None, None, None, None, None, None


class Linear(torch.autograd.Function):
    """F.linear over x [B, ..., inputs]: a convolution over the tokens, its kernel of one place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        made: Made | None,
        precision: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.made, ctx.like, ctx.precision = noise, made, probe, precision
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        slopes = dy.reshape(len(x), -1, dy.shape[-1])
        dw = db = None
        total = torch.zeros_like(ctx.like)
        if need_weight:
            tokens = x.reshape(len(x), -1, x.shape[-1])
            image, slope_image = tokens.mT[..., None], slopes.mT[..., None]
            how = ctx.noise, ctx.made, ctx.precision
            rule = Rule(ONE, [0, 0], ONE, 1)
            dw, found = weight_shares(image, slope_image, ONE, rule, *how)
            dw = dw.reshape(weight.shape).to(weight.dtype)
            total += found
        if need_bias:
            db, found = shares(slopes.sum(1, dtype=buffer_dtype(slopes.dtype)), ctx.noise)
            total += found
        return dy @ weight.to(dy.dtype) if need_x else None, dw, db, total, None, None, None


# Normalisations


class GroupNorm(torch.autograd.Function):
    """F.group_norm over x [B rows, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        groups: int,
        eps: float,
    ) -> Tensor:
        count, channels, pixels = len(x), x.shape[1], x[0].numel() // x.shape[1]
        ctx.sizes = count, channels, pixels, groups
        # PyTorch 2.11's native functions misread memory that is not contiguous in this order
        in_order = (
            x.device.type == "cpu"
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        ctx.order = torch.channels_last if in_order else torch.contiguous_format
        x = x.contiguous(memory_format=ctx.order)
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, count, channels, pixels, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.noise, ctx.like = noise, probe
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            slopes = torch.ops.aten.native_group_norm_backward
            dx = slopes(
                dy.contiguous(memory_format=ctx.order),
                x,
                mean,
                rstd,
                weight,
                *ctx.sizes,
                (True, False, False),
            )[0]
        return dx, *affine_shares(ctx, x, dy, mean, rstd), None, None, None


class BatchNorm(torch.autograd.Function):
    """F.batch_norm over x [B rows, C, ...]; with no mean and variance given, with those of the
    batch.

    These are functions of x, through which the gradient goes, or with `frozen` constants as the
    given ones are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        frozen: bool,
    ) -> Tensor:
        y, center, rstd = torch.native_batch_norm(
            x, weight, bias, mean, variance, mean is None, 0.0, eps
        )
        if mean is not None and variance is not None:
            center, rstd = mean, (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, center, rstd)
        ctx.noise, ctx.like, ctx.eps = noise, probe, eps
        ctx.through = mean is None and not frozen
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, center, rstd = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            slopes = torch.ops.aten.native_batch_norm_backward
            constants = (None, None) if ctx.through else (center, rstd**-2 - ctx.eps)
            # CUDA wants mean and rstd in any case
            dx = slopes(
                dy, x, weight, *constants, center, rstd, ctx.through, ctx.eps, (True, False, False)
            )[0]
        return (
            dx,
            *affine_shares(ctx, x, dy, center[None], rstd[None]),
            None,
            None,
            None,
            None,
            None,
        )


def affine_shares(
    ctx: Any, x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of a normalisation's weight [C] and bias [C], None where not needed, and of the
    probe [2, B], wide.

    x and dy are [B rows, C, ...], mean and rstd [1, C], [B rows, groups] or [B, 1, T], in whose
    dtype the first two are.
    """
    total = torch.zeros_like(ctx.like)
    found: list[Tensor | None] = []
    for g, needed in zip(affine_grads(x, dy, mean, rstd), ctx.needs_input_grad[1:3], strict=True):
        if not needed:
            found.append(None)
            continue
        all_of_it, share = shares(by_sample(g, total.shape[1]), ctx.noise)
        found.append(all_of_it.to(mean.dtype))
        total += share
    weight, bias = found
    return weight, bias, total


class LayerNorm(torch.autograd.Function):
    """F.layer_norm over x [B, ..., *shape]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        shape: list[int],
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.noise, ctx.like, ctx.shape = noise, probe, shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            backward = torch.ops.aten.native_layer_norm_backward
            dx = backward(dy, x, ctx.shape, mean, rstd, weight, bias, (True, False, False))[0]
        # channels are what is normalised over, and tokens the rest
        tokens = mean.view(len(x), 1, -1)
        slopes, inputs = (t.reshape(len(x), tokens.shape[2], -1).mT for t in (dy, x))
        weight_grad, bias_grad, total = affine_shares(
            ctx, inputs, slopes, tokens, rstd.view_as(tokens)
        )
        shaped = [None if g is None else g.view(ctx.shape) for g in (weight_grad, bias_grad)]
        return dx, *shaped, total, None, None, None


class Scale(torch.autograd.Function):
    """x * weight, broadcast over the leading dimensions of x [B, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, probe: Tensor, noise: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise = noise
        return x * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = (dy * x).reshape(len(x), -1, weight.numel()).sum(1, dtype=buffer_dtype(dy.dtype))
        dw, total = shares(g, ctx.noise)
        return dy * weight.to(dy.dtype), dw.view_as(weight), total, None


# Embeddings


class Embedding(torch.autograd.Function):
    """F.embedding of index [B, ...] int64 in weight [V, D]. A sample's gradient has rows for its
    own tokens alone, and those are all that is computed of it."""

    @staticmethod
    def forward(
        ctx: Any, index: Tensor, weight: Tensor, probe: Tensor, noise: bool, padding: int
    ) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.noise, ctx.like, ctx.padding = noise, probe, padding
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, weight = ctx.saved_tensors
        batch, (words, width), wide = len(index), weight.shape, ctx.like.dtype
        index, dy = index.reshape(batch, -1), dy.reshape(-1, width).to(buffer_dtype(dy.dtype))
        dy = dy.masked_fill((index == ctx.padding).reshape(-1, 1), 0)
        of_sample = torch.arange(batch, device=index.device)[:, None] * words
        pairs, place = torch.unique(index + of_sample, return_inverse=True)
        g = dy.new_zeros(len(pairs), width).index_add_(0, place.flatten(), dy)
        owner, word = pairs // words, pairs % words
        dw = dy.new_zeros(words, width).index_add_(0, word, g)

        def of_samples(values: Tensor) -> Tensor:
            return torch.zeros_like(ctx.like[0]).index_add_(0, owner, values.to(wide))

        squares = of_samples(norms(g))
        noise = torch.zeros_like(squares)
        if ctx.noise:
            mean = dw.to(wide) / batch
            square = norms(mean)
            # of the words that are not among the sample's the deviation is the mean itself
            others = (square.sum() - of_samples(square[word])).clamp(min=0)
            noise = of_samples(norms(g.to(wide) - mean[word])) + others
        total = torch.stack([squares, noise]) * batch**2
        return None, dw.to(weight.dtype), total, None, None
