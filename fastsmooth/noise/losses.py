"""The loss of a batch as the mean over its samples, which alone has gradients of single samples.

A loss is what a training loop calls, loss(output, target). Whatever it is, its values for the
single samples are looked at beside it: that is what makes it certain that the gradient of the mean
is the mean of the gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.noise.aside import instead

# loss(output [B, ...], target [B, ...]): the mean over the batch, 0-d, or a value a sample, [B] or
# [B, ...]
Loss = Callable[..., Tensor]
# units of rounding that two ways to the same loss may be apart; of half precision, whose units are
# large, only so many that class weights are still seen
ROUNDING, ROUNDING_IN_HALF = 64, 4


class NotCovered(ValueError):
    """What was asked for cannot be had from this model or this loss; the message says why."""


def mean_loss(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The mean over the samples of a batch of their losses, 0-d, with its graph.

    Args: loss, as a training loop calls it, loss(output, target); output [B, ...] of the model;
    target [B, ...]. Where a sample has several values, as under nn.MSELoss with outputs [B, k],
    its loss is their mean, so that the mean over the samples is what reduction="mean" gives.

    A loss that gives a value a sample is taken as it is. One that gives a single number is asked a
    second time with reduction="none", as an argument, or as the attribute of a module, which gets
    its own back.

    Raises NotCovered where the loss has no values of single samples: it has no reduction and gives
    one number; its values do not come with the samples first; they depend on the rest of the batch;
    or what it gives is no mean of them (a sum, class weights, ignore_index).
    """
    if not isinstance(output, Tensor):
        raise NotCovered(
            f"the model gives a {type(output).__name__}, not a tensor [B, ...]: wrap it in one "
            "that returns the tensor alone"
        )
    value = loss(output, target)
    if not isinstance(value, Tensor):
        raise NotCovered(f"{name_of(loss)} gives a {type(value).__name__}, not a tensor")
    with torch.no_grad():
        values = value.detach() if value.ndim else unreduced(loss, output, target)
        check_values(loss, values, output, target)
        if not value.ndim:
            check_mean(loss, value.detach(), values)
    return value.mean() if value.ndim else value


def unreduced(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The values of a loss that gives a single number, as reduction="none" has them: [B] or [B,
    ...] for output [B, ...] and target [B, ...], in the loss's dtype.

    Raises NotCovered for a loss without a reduction.
    """
    if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
        with instead(loss, "reduction", "none"):
            return loss(output, target)
    if not isinstance(loss, nn.Module) and takes_reduction(loss):
        return loss(output, target, reduction="none")
    raise NotCovered(
        f"{name_of(loss)} gives one number for the whole batch and has no reduction: give it an "
        'argument reduction="none", or have it return a value a sample'
    )


def takes_reduction(loss: Loss) -> bool:
    try:
        found = inspect.signature(loss).parameters
    except (TypeError, ValueError):  # of code that is not Python's
        return False
    return "reduction" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())


def check_values(loss: Loss, values: Tensor, output: Tensor, target: Tensor) -> None:
    """Raises NotCovered unless `values` holds one value a sample, [B], or one row a sample, [B,
    ...], that depends on that sample alone.

    output [B, ...] and target [B, ...] are what the loss was called with. A few of the samples go
    through the loss by themselves, and must get the same values again.
    """
    size = len(output)
    if values.ndim == 0 or len(values) != size:
        raise NotCovered(
            f"{name_of(loss)} gives {list(values.shape)} for {size} samples, not [{size}] or "
            f"[{size}, ...]: have it return a value a sample, in their order"
        )
    index = torch.arange(other_size(size), device=output.device) % size
    few, their_target = output[index], target[index.to(target.device)]
    alone = loss(few, their_target)
    alone = alone if alone.ndim else unreduced(loss, few, their_target)
    if alone.shape != values[index].shape or apart(alone, values[index], values):
        raise NotCovered(
            f"{name_of(loss)} gives a sample another value in another batch, so that no gradient "
            "belongs to one sample: use a loss that treats every sample by itself, with target and "
            "output of one shape where it subtracts them"
        )


def check_mean(loss: Loss, value: Tensor, values: Tensor) -> None:
    """Raises NotCovered unless `value`, 0-d, is the mean of `values`, [B] or [B, ...]."""
    mean = values.to(wide_dtype(values.device)).mean()
    if apart(value.to(mean.dtype), mean, values):
        raise NotCovered(
            f"{name_of(loss)} gives {value.item():.6g} where the mean of its values over the batch "
            f"is {mean.item():.6g}: a sum, or a mean weighted by class weights or ignore_index, is "
            'not the mean over the samples: use reduction="mean" without weights, or have it '
            "return a value a sample"
        )


def apart(a: Tensor, b: Tensor, values: Tensor) -> bool:
    """Whether a and b, of one shape, differ by more than rounding in the dtype of `values`.

    The tolerance is so many units of rounding at the mean of |values|, [B] or [B, ...], plus |b|.
    Values that are not finite do not count as apart.
    """
    usual = values.abs().to(wide_dtype(values.device)).mean()
    units = ROUNDING_IN_HALF if values.element_size() == 2 else ROUNDING
    tolerance = units * torch.finfo(values.dtype).eps * (usual + b.abs())
    return bool(((a - b).abs() > tolerance).any())


def other_size(size: int) -> int:
    """A few samples, another number of them than a batch of this size has."""
    return 2 if size > 2 else 3


def is_cross_entropy(loss: Loss) -> bool:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def name_of(loss: Loss) -> str:
    """In words, for a message."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return f"the loss {getattr(loss, '__name__', type(loss).__name__)}"
