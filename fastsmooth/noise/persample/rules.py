"""Which functions of PyTorch give per-sample norms, a row each, and how each is called.

A rule takes the arguments of its function, but its input has one more dimension in front: the
samples, [B, *what a call for one sample takes]; and so has what it gives back. So samples may be
first in a call, or in groups of rows, or not among its dimensions at all.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth.noise.losses import NotCovered
from fastsmooth.noise.persample.layers import (
    BatchNorm,
    Convolution,
    Convolution3d,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    Made,
    Rule,
    Scale,
)


class Wanted(NamedTuple):
    """What a pass measures, and how."""

    noise: bool  # the distances from the mean too
    bn: str | None = None  # of BatchNorm in training mode: batch or frozen
    precision: str = "tf32x3"  # of products of float32 on a GPU: ieee, tf32 or tf32x3
    trains: bool = False  # BatchNorm's running statistics move, as in a pass of training


class Report(NamedTuple):
    """What a rule reports to, and how."""

    probe: Tensor  # [2, B], wide: of the module whose parameters are used
    wanted: Wanted
    made: Made | None = None  # where the weight is computed from parameters


def split_as(y: Tensor, x: Tensor) -> Tensor:
    """y [B rows, ...] as [B, rows, ...], as x is."""
    return y.unflatten(0, x.shape[:2])


def autocast(x: Tensor, single: bool = False) -> Tensor:
    """x in the dtype that autocast, where it is on, gives the input of a matrix product; with
    `single` that of a function which it keeps in float32 on a GPU."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point():
        return x
    if single:
        return x.float() if kind == "cuda" else x
    return x.to(torch.get_autocast_dtype(kind)) if x.dtype != torch.float64 else x


Size = int | str | Sequence[int]


def moves(
    x: Tensor, weight: Tensor, stride: Size, padding: Size, dilation: Size
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """(x, stride, padding, dilation) of a convolution of x [B, C, ...], a number a dimension; for
    padding "same", where it is not the same on both sides, x is padded."""
    kernel = weight.shape[2:]

    def each(value: Any) -> list[int]:
        return [value] * len(kernel) if isinstance(value, int) else list(value)

    sizes = [0] * len(kernel)
    if padding == "same":
        sizes = [step * (k - 1) for step, k in zip(each(dilation), kernel, strict=True)]
        if any(s % 2 for s in sizes):
            x = F.pad(x, [side for s in reversed(sizes) for side in (s // 2, s - s // 2)])
            sizes = [0] * len(kernel)
    left = [s // 2 for s in sizes] if isinstance(padding, str) else each(padding)
    return x, each(stride), left, each(dilation)


def conv2d(
    report: Report,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if input.ndim == 4:  # of one image, as it is in a call without a batch
        one = conv2d(report, input[:, None], weight, bias, stride, padding, dilation, groups)
        return one[:, 0]
    x, *sizes = moves(autocast(input).flatten(0, 1), weight, stride, padding, dilation)
    rule = Rule(sizes[0], sizes[1], sizes[2], groups)
    how = report.wanted.noise, rule, report.made, report.wanted.precision
    y = Convolution.apply(x, weight, bias, report.probe, *how)
    return split_as(y, input)


def conv1d(
    report: Report,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """As the convolution of images of one line."""

    def flat(value: int | str | Sequence[int], other: int) -> Any:
        if isinstance(value, str):
            return value
        return [other, value if isinstance(value, int) else value[0]]

    sizes = flat(stride, 1), flat(padding, 0), flat(dilation, 1), groups
    return conv2d(report, input.unsqueeze(-2), weight.unsqueeze(-2), bias, *sizes).squeeze(-2)


def conv3d(
    report: Report,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if input.ndim == 5:
        one = conv3d(report, input[:, None], weight, bias, stride, padding, dilation, groups)
        return one[:, 0]
    x, *sizes = moves(autocast(input).flatten(0, 1), weight, stride, padding, dilation)
    how = report.wanted.noise, *sizes, groups, report.wanted.precision
    y = Convolution3d.apply(x, weight, bias, report.probe, *how)
    return split_as(y, input)


def linear(report: Report, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    how = report.wanted.noise, report.made, report.wanted.precision
    return Linear.apply(autocast(input), weight, bias, report.probe, *how)


def batch_norm(
    report: Report,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The running statistics move in a pass of training alone. Raises NotCovered in training mode
    where no bn is chosen."""
    if training and report.wanted.bn is None:
        raise NotCovered(
            "BatchNorm with batch statistics mixes the samples: choose bn batch, frozen or eval, "
            "or GroupNorm"
        )
    given = (None, None) if training else (running_mean, running_var)
    x = input.flatten(0, 1)
    if training and report.wanted.trains and running_mean is not None:
        with torch.no_grad():
            torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
    how = (report.probe, report.wanted.noise, *given, eps, report.wanted.bn == "frozen")
    return split_as(BatchNorm.apply(x, weight, bias, *how), input)


def group_norm(
    report: Report,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    x = autocast(input, single=True).flatten(0, 1)
    y = GroupNorm.apply(x, weight, bias, report.probe, report.wanted.noise, num_groups, eps)
    return split_as(y, input)


def instance_norm(
    report: Report,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As GroupNorm with a group a channel, or as BatchNorm with its running statistics."""
    if use_input_stats:
        return group_norm(report, input, input.shape[2], weight, bias, eps)
    return batch_norm(report, input, running_mean, running_var, weight, bias, False, 0.0, eps)


def layer_norm(
    report: Report,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    x = autocast(input, single=True)
    how = report.probe, report.wanted.noise, list(normalized_shape), eps
    return LayerNorm.apply(x, weight, bias, *how)


def rms_norm(
    report: Report,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    normal = F.rms_norm(autocast(input, single=True), list(normalized_shape), None, eps)
    if weight is None:
        return normal
    return Scale.apply(normal, weight, report.probe, report.wanted.noise)


def embedding(
    report: Report,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:
        raise NotCovered("embeddings with max_norm or scale_grad_by_freq mix the samples")
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    return Embedding.apply(input, weight, report.probe, report.wanted.noise, padding)


class Covered(NamedTuple):
    """A function that has a rule."""

    rule: Callable[..., Tensor]
    # where the parameters may be computed from others, the weight
    made: bool = False
    # dimensions of the output behind the one that the bias belongs to; None where a bias that is
    # not a parameter by itself cannot be added afterwards
    behind_bias: int | None = None


RULES: dict[Callable[..., Any], Covered] = {
    F.linear: Covered(linear, True, 0),
    F.conv1d: Covered(conv1d, True, 1),
    F.conv2d: Covered(conv2d, True, 2),
    F.conv3d: Covered(conv3d, False, 3),
    F.batch_norm: Covered(batch_norm),
    F.group_norm: Covered(group_norm),
    F.instance_norm: Covered(instance_norm),
    F.layer_norm: Covered(layer_norm),
    F.rms_norm: Covered(rms_norm),
    F.embedding: Covered(embedding),
}


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn.functional written in Python that no longer asks whether somebody
    takes its place: so that one who has done so sees the functions that it is made of."""
    assert isinstance(function, types.FunctionType)
    names = function.__globals__ | {"has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Functions that are made of others, of which some have rules.
COMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: opened(F.multi_head_attention_forward)
}
