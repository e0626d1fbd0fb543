"""The gradient of every sample, written out: for models of which no other way is known.

Rows [c, ...] of every parameter are made for a few samples at a time: by torch.func.vmap, or, where
that cannot batch the model, by a backward pass a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastsmooth.noise import hosts
from fastsmooth.noise.losses import Loss
from fastsmooth.noise.persample.layers import norms

ROWS_BYTES = 256 << 20  # of the rows that are held at a time


def alone_norms(
    model: nn.Module,
    params: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    mean: list[Tensor] | None,
    batched: bool,
) -> Tensor:
    """[2, parameters, B], wide: ||g_i||^2 and ||g_i - g||^2 of every trainable parameter in
    `params`, by name, for the samples x [B, ...], y [B, ...].

    mean: g, a tensor a parameter; None where the distances are not wanted, which are zeros then.
    batched: by torch.func.vmap.
    """
    found = []
    for rows in (by_vmap if batched else one_by_one)(model, params, x, y, loss):
        squares = [norms(g) for g in rows]
        away = [torch.zeros_like(s) for s in squares]
        if mean is not None:
            away = [norms(g - m) for g, m in zip(rows, mean, strict=True)]
        found.append(torch.stack([torch.stack(squares), torch.stack(away)]))
    return torch.cat(found, dim=2)


def by_vmap(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, loss: Loss
) -> Iterator[list[Tensor]]:
    values = {name: p.detach() for name, p in params.items()}

    def of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (x[None],))
        return loss(output, y[None]).mean()

    gradients = torch.func.vmap(
        torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different"
    )
    size = sum(p.numel() * p.element_size() for p in values.values())
    count = max(1, ROWS_BYTES // max(size, 1))
    for xs, ys in zip(x.split(count), y.split(count), strict=True):
        with hosts.kept():
            rows = gradients(values, xs, ys)
        yield list(rows.values())


def one_by_one(
    model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, loss: Loss
) -> Iterator[list[Tensor]]:
    for xs, ys in zip(x.split(1), y.split(1), strict=True):
        with PairedBatchNorm():
            output = model(xs)
        value = loss(output, ys).mean()
        grads = torch.autograd.grad(value, list(params.values()))
        yield [g[None] for g in grads]


class PairedBatchNorm(TorchFunctionMode):
    """Has F.batch_norm take a sample alone twice, on a CPU: of a batch of one the backward pass of
    PyTorch 2.14 takes the layout of the slopes for that of the input, and is wrong where they are
    transposed."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if function is F.batch_norm:
            x, *others = args or (given.pop("input"),)
            if len(x) == 1 and x.device.type == "cpu":
                return function(torch.cat([x, x]), *others, **given)[:1]
            args = (x, *others)
        return function(*args, **given)
