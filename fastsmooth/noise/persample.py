"""The squared gradient norm of every sample of a batch, and its distance from the mean, out of one
backward pass.

Inside `PerSample` each call of a trainable layer is an autograd function with one more input,
`probe` [2, B] of zeros, and returns, as the gradient of the probe, its share of [||g_i||^2, ||g_i -
g||^2], with g_i the gradient of sample i and g that of the mean loss; autograd adds the layers up.
No hooks, no change of the model, nothing of size B x parameters.

Deviations are taken from the mean, layer by layer: from ||g_i||^2 - 2 <g_i, g> + ||g||^2 a noise of
a thousandth of the mean would come out of float32 without a correct digit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastsmooth.kernels.affine_grads import affine_grads
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.kernels.conv_noise import conv_noise
from fastsmooth.names import about_value
from fastsmooth.noise.losses import Loss, NotCovered, is_cross_entropy, mean_loss, other_size

BN = ("batch", "frozen")
# Models that were seen to keep the samples in the first dimension, with the input shapes and the
# modes they were seen in.
SEEN: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class SampleNorms:
    """Of a batch of B samples and its mean loss; wide is float64, or float32 on MPS."""

    loss: Tensor  # 0-d
    grads: list[Tensor]  # g, one tensor a trainable parameter
    squares: Tensor  # [B], wide: ||g_i||^2
    noise: Tensor | None  # [B], wide: ||g_i - g||^2; None where it was not asked for
    grad_square: Tensor  # 0-d, wide: ||g||^2

    @property
    def inner(self) -> Tensor:
        """[B], wide: <g_i, g>. Raises ValueError where the noise was not asked for."""
        if self.noise is None:
            raise ValueError("<g_i, g> needs the noise: call sample_norms with noise=True")
        return (self.squares + self.grad_square - self.noise) / 2


def sample_norms(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    noise: bool = True,
    bn: str | None = None,
) -> SampleNorms:
    """The squared gradient norm of every sample's loss at the model's parameters, and its squared
    distance from the mean gradient, out of one backward pass over the batch.

    Args:
        model: in the mode in which it is to be measured; its output is a tensor [B, ...].
        x: [B, ...], y: [B, ...]: a batch of two or more.
        loss: loss(output, target) as training calls it: F.cross_entropy (also with label_smoothing
            or class probabilities), F.mse_loss, a module like nn.CrossEntropyLoss(), or any that
            is the mean over the samples of a value each, or gives these values (losses.mean_loss).
        noise: whether the distances are wanted too.
        bn: BatchNorm in training mode mixes the samples, so that no gradient belongs to one of
            them; this says what to take:
            batch    the share of the batch's gradient that flows through sample i, times B: the
                     mean is that gradient
            frozen   the gradient of sample i with the batch's mean and variance as constants, and
                     the mean of those

    Raises NotCovered, a ValueError, for a batch of one, BatchNorm in training mode without `bn`,
    parameters outside of Conv2d, Linear, BatchNorm, GroupNorm and LayerNorm or used twice, a layer
    in which the samples are not the first dimension, a loss that is no mean over samples, and
    cross-entropy of one class, which is 0. Leaves .grad and the buffers alone.
    """
    if len(y) < 2:
        raise NotCovered("a batch of one sample has no noise: use two or more")
    if bn not in (None, *BN):
        raise ValueError(f"bn {bn!r}: {about_value('--bn', str(bn), BN)}")
    if len(x) != len(y):
        raise NotCovered(
            f"the input {list(x.shape)} does not begin with the {len(y)} samples of the batch"
        )
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters() if p.requires_grad}
    with unchanged(list(model.buffers())):
        check_layout(model, names, x, bn)
        with torch.enable_grad(), PerSample(names, len(y), x.device, noise, bn) as layers:
            output = model(x)
            mean = mean_loss(loss, output, y)
        if is_cross_entropy(loss) and output.ndim > 1 and output.shape[1] < 2:
            raise NotCovered(
                f"the model's output {list(output.shape)} is of one class, whose cross-entropy is "
                "always 0"
            )
        missed = [p for p in names if p not in layers.used]
        if missed:
            raise NotCovered(why_missed(names[missed[0]], missed[0], mean))
        *grads, total = torch.autograd.grad(mean, [*names, layers.probe])
    wide = wide_dtype(x.device)
    zero = torch.zeros((), dtype=wide, device=x.device)
    square = sum((g.to(wide).square().sum() for g in grads), zero)
    return SampleNorms(mean.detach(), grads, total[0], total[1] if noise else None, square)


@contextmanager
def unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """Afterwards the buffers, [...] of any shapes and dtypes, hold what they held before.

    In a forward pass BatchNorm counts its calls; without trainable weights, where PerSample leaves
    it alone, it moves its running statistics too.
    """
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)


def check_layout(model: nn.Module, names: dict[Tensor, str], x: Tensor, bn: str | None) -> None:
    """Raises NotCovered where a layer or the output lacks the samples in its first dimension.

    x [B, ...] is the batch, `names` the name of each trainable parameter. In a batch another
    dimension may have the batch's size by chance. So a few samples, of another number, go through
    the model once for each shape of the input: where the first dimension is the batch, it has that
    number in every layer.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: the shapes are the same
    few = other_size(len(x))
    kind = (x.shape[1:], few, bn, model.training)
    if kind in SEEN.setdefault(model, set()):
        return
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.enable_grad(),
        PerSample(names, few, x.device, False, bn),
    ):
        output = model(x[torch.arange(few, device=x.device) % len(x)])
    if isinstance(output, Tensor) and (output.ndim == 0 or len(output) != few):
        raise NotCovered(f"the output for {few} samples is {list(output.shape)}, not [{few}, ...]")
    SEEN[model].add(kind)


def why_missed(name: str, p: Tensor, loss: Tensor) -> str:
    """Why no layer has reported the share of p [...], the parameter `name`, in `loss`, 0-d."""
    (slope,) = torch.autograd.grad(loss, p, allow_unused=True) if loss.requires_grad else (None,)
    if slope is None:
        return f"{name} takes no part in the forward pass: freeze it with requires_grad_(False)"
    return (
        f"{name} is used, but not as it is by {', '.join(sorted(f.__name__ for f in LAYERS))}, "
        "which alone give per-sample norms"
    )


def parameters(values: Iterable[Any]) -> Iterator[nn.Parameter]:
    """Those among the arguments of a function, and in lists of them."""
    for value in values:
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, list | tuple):
            yield from parameters(value)


class PerSample(TorchFunctionMode):
    """Has each layer with a parameter of `names` report to `probe`; refuses other uses of one."""

    def __init__(
        self,
        names: dict[Tensor, str],
        batch: int,
        device: torch.device,
        noise: bool,
        bn: str | None,
    ):
        super().__init__()
        self.names, self.batch, self.noise, self.bn = names, batch, noise, bn
        self.probe = torch.zeros(
            2, batch, dtype=wide_dtype(device), device=device, requires_grad=True
        )
        self.used: set[Tensor] = set()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        held = [p for p in parameters((*args, *kwargs.values())) if p in self.names]
        # without a gradient: compiled code, whose layers reported when it was traced; __get__ asks
        # for a shape, a dtype
        if (
            not held
            or not torch.is_grad_enabled()
            or getattr(function, "__name__", "") == "__get__"
        ):
            return function(*args, **kwargs)
        layer = LAYERS.get(function)
        if layer is None:
            result = function(*args, **kwargs)
            if not any(
                isinstance(part, Tensor)
                for part in (result if isinstance(result, tuple | list) else [result])
            ):
                return result  # a fact about the parameter: a tracing compiler asks for some
            raise NotCovered(
                f"{self.names[held[0]]} is used by {function.__name__}, which gives no per-sample "
                "norms"
            )
        for p in held:
            if p in self.used:
                raise NotCovered(
                    f"{self.names[p]} is used more than once: its per-sample gradients would mix"
                )
            self.used.add(p)
        try:
            return layer(self, *args, **kwargs)
        except NotCovered as error:
            raise NotCovered(f"{self.names[held[0]]}: {error}") from None

    def check(self, x: Tensor) -> None:
        """Raises NotCovered unless the input x of a layer is [B, ...], with B the batch."""
        if x.shape[0] != self.batch:
            raise NotCovered(
                f"its input {list(x.shape)} for {self.batch} samples does not have them in its "
                "first dimension: only layers with the batch first (batch_first=True) give "
                "per-sample norms"
            )


def shares(g: Tensor, noise: bool, dtype: torch.dtype) -> Tensor:
    """[2, B]: ||g_i||^2 and ||g_i - g||^2 from the rows g [B, ...] of a mean loss's gradient, each
    g_i / B."""
    rows = g.flatten(1).to(dtype)
    squares = rows.square().sum(1)
    deviations = (rows - rows.mean(0)).square().sum(1) if noise else torch.zeros_like(squares)
    return torch.stack([squares, deviations]) * len(g) ** 2


def weight_shares(
    x: Tensor, dy: Tensor, weight: Tensor, rule: Rule, noise: bool
) -> tuple[Tensor, Tensor]:
    """(the weight's gradient, in its shape and dtype, [2, B] as in `shares`) of a convolution.

    x [B, C, H, W], dy [B, outputs, H', W'], weight [outputs, C / groups, kh, kw].
    """
    stride, padding, dilation, groups = rule
    found = conv_noise(x, dy, list(weight.shape[2:]), stride, padding, dilation, groups, noise)
    return found.dw.to(weight.dtype), torch.stack([found.squares, found.noise]) * len(x) ** 2


# stride, padding, dilation and groups of a convolution
Rule = tuple[list[int], list[int], list[int], int]


class Convolution(torch.autograd.Function):
    """F.conv2d over x [B, C, H, W]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        noise: bool,
        rule: Rule,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.rule, ctx.wide = noise, rule, probe.dtype
        return F.conv2d(x, weight, bias, *rule)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.rule
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        total = dy.new_zeros(2, len(x), dtype=ctx.wide)
        if need_x:
            rule = (stride, padding, dilation, False, [0, 0], groups)
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, *rule, (True, False, False)
            )[0]
        if need_weight:
            dw, found = weight_shares(x, dy, weight, ctx.rule, ctx.noise)
            total += found
        if need_bias:
            g = dy.sum(dim=(2, 3))
            db = g.sum(0)
            total += shares(g, ctx.noise, ctx.wide)
        return dx, dw, db, total, None, None


class Linear(torch.autograd.Function):
    """F.linear over x [B, ..., inputs]: a convolution over the tokens, its kernel of one place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor, noise: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.wide = noise, probe.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        slopes = dy.reshape(len(x), -1, dy.shape[-1])
        dw = db = None
        total = dy.new_zeros(2, len(x), dtype=ctx.wide)
        if need_weight:
            tokens = x.reshape(len(x), -1, x.shape[-1])
            image, slope_image, kernel = (
                tokens.mT[..., None],
                slopes.mT[..., None],
                weight[..., None, None],
            )
            dw, found = weight_shares(
                image, slope_image, kernel, ([1, 1], [0, 0], [1, 1], 1), ctx.noise
            )
            dw = dw.reshape(weight.shape)
            total += found
        if need_bias:
            g = slopes.sum(1)
            db = g.sum(0)
            total += shares(g, ctx.noise, ctx.wide)
        return dy @ weight if need_x else None, dw, db, total, None


class GroupNorm(torch.autograd.Function):
    """F.group_norm over x [B, C, ...]."""

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
        samples, channels, pixels = len(x), x.shape[1], x[0].numel() // x.shape[1]
        ctx.sizes = samples, channels, pixels, groups
        # PyTorch 2.11's native functions misread memory that is not contiguous in this order
        in_order = (
            x.device.type == "cpu"
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        ctx.order = torch.channels_last if in_order else torch.contiguous_format
        x = x.contiguous(memory_format=ctx.order)
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, samples, channels, pixels, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.noise, ctx.wide = noise, probe.dtype
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
    """F.batch_norm over x [B, C, ...]; with no mean and variance given, with those of the batch.

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
        ctx.noise, ctx.wide, ctx.eps = noise, probe.dtype, eps
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

    x and dy are [B, C, ...], mean and rstd [1, C] or [B, groups], in whose dtype the first two are.
    """
    total = dy.new_zeros(2, len(x), dtype=ctx.wide)
    found: list[Tensor | None] = []
    for g, needed in zip(affine_grads(x, dy, mean, rstd), ctx.needs_input_grad[1:3], strict=True):
        found.append(g.sum(0).to(mean.dtype) if needed else None)
        if needed:
            total += shares(g, ctx.noise, ctx.wide)
    weight, bias = found
    return weight, bias, total


class Affine(torch.autograd.Function):
    """x * weight + bias, both broadcast over the leading dimensions of x [B, ...]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, probe: Tensor, noise: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise, ctx.wide = noise, probe.dtype
        y = x if weight is None else x * weight
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        shared = list(range(1, x.ndim - (weight.ndim if weight is not None else 1)))
        total = dy.new_zeros(2, len(x), dtype=ctx.wide)
        found: list[Tensor | None] = []
        for needed, product in zip(
            ctx.needs_input_grad[1:3], (lambda: dy * x, lambda: dy), strict=True
        ):
            g = None
            if needed:
                g = product().sum(shared) if shared else product()
                total += shares(g, ctx.noise, ctx.wide)
            found.append(None if g is None else g.sum(0))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy if weight is None else dy * weight
        return dx, *found, total, None


def pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv2d(
    mode: PerSample,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d of an input [B, C, H, W]; what is not batched raises NotCovered."""
    mode.check(input)
    if isinstance(padding, str):
        sizes = [0, 0]
        if padding == "same":
            sizes = [
                step * (k - 1) for step, k in zip(pair(dilation), weight.shape[2:], strict=True)
            ]
        if any(s % 2 for s in sizes):
            input = F.pad(
                input,
                [sizes[1] // 2, sizes[1] - sizes[1] // 2, sizes[0] // 2, sizes[0] - sizes[0] // 2],
            )
            sizes = [0, 0]
        padding = [s // 2 for s in sizes]
    rule = (pair(stride), pair(padding), pair(dilation), groups)
    return Convolution.apply(input, weight, bias, mode.probe, mode.noise, rule)


def linear(mode: PerSample, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of an input [B, ..., inputs]; one without the samples first raises NotCovered."""
    mode.check(input)
    if input.ndim < 2:
        raise NotCovered("a linear layer needs an input [B, ..., inputs]")
    return Linear.apply(input, weight, bias, mode.probe, mode.noise)


def batch_norm(
    mode: PerSample,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm of an input [B, C, ...]; the running statistics do not move.

    Raises NotCovered in training mode where no bn is chosen.
    """
    mode.check(input)
    if training and mode.bn is None:
        raise NotCovered(
            "BatchNorm with batch statistics mixes the samples: choose bn batch, frozen or eval, "
            "or GroupNorm"
        )
    given = (None, None) if training else (running_mean, running_var)
    return BatchNorm.apply(
        input, weight, bias, mode.probe, mode.noise, *given, eps, mode.bn == "frozen"
    )


def group_norm(
    mode: PerSample,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.group_norm of an input [B, C, ...]; one without the samples first raises NotCovered."""
    mode.check(input)
    return GroupNorm.apply(input, weight, bias, mode.probe, mode.noise, num_groups, eps)


def layer_norm(
    mode: PerSample,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm of an input [B, ..., *normalized_shape].

    Raises NotCovered where the normalised dimensions include the batch.
    """
    mode.check(input)
    if input.ndim == len(normalized_shape):
        raise NotCovered("LayerNorm over the batch dimension mixes the samples")
    normal = F.layer_norm(input, normalized_shape, None, None, eps)
    return Affine.apply(normal, weight, bias, mode.probe, mode.noise)


LAYERS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
}
