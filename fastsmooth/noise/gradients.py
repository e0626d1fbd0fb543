"""Gradient noise by plain autograd: the full gradient, the mini-batch gradient, and the
search-direction noise at one point.

Everything is measured at one x_t, and parameters, buffers, gradients, optimizer state and random
state are bit for bit afterwards what they were before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.foreign import Driven
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.noise import hosts
from fastsmooth.noise.aside import same_draws, without_hooks
from fastsmooth.noise.estimators import Estimate, sampled
from fastsmooth.noise.losses import Loss, mean_loss
from fastsmooth.noise.persample import unchanged

# The number of the draw by whose order the chunks of the full gradient are cut: higher than that of
# any direction's mini-batch.
FULL_GRADIENT_DRAW = 2**20


@contextmanager
def undisturbed(model: nn.Module, bn: str) -> Iterator[None]:
    """Measure with BatchNorm's running statistics (`eval`) or those of the batch (anything else),
    leaving no trace: hooks of the parameters, as loggers have them, see nothing of it.

    `eval` is the whole model's evaluation mode; else it is in training mode, so dropout is on; a
    model that is in it already keeps the modes of its modules, some of which may be frozen.
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if bn == "eval" or not model.training:
        model.train(bn != "eval")
    try:
        with torch.random.fork_rng(devices=list(devices)), same_draws(), without_hooks(model):
            yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training


@contextmanager
def unmoved(model: nn.Module, optimizer: Driven) -> Iterator[None]:
    """Train inside, and have the parameters, their gradients and the optimizer back as they were,
    in the same memory."""
    params = list(model.parameters())
    values, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    slopes = [None if grad is None else grad.clone() for grad in grads]
    try:
        with optimizer.kept():
            yield
    finally:
        with torch.no_grad():
            for p, value, grad, slope in zip(params, values, grads, slopes, strict=True):
                p.copy_(value)
                p.grad = grad
                if grad is not None and slope is not None:
                    grad.copy_(slope)  # several processes have each gradient in the same place


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require a gradient, [...] each, in the order of model.parameters()."""
    return [p for p in model.parameters() if p.requires_grad]


def directions(
    optimizer: Driven, grads: list[Tensor], params: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """optimizer.directions(grads) for gradients in the order of the trainable `params`, and in that
    order, whatever that of the optimizer's groups is; without `params` in the latter.

    Each is [...] in the shape of its parameter, and so are the new tensors that are returned.
    """
    if params is None:
        return optimizer.directions(grads)
    places = {p: place for place, p in enumerate(params)}
    groups = [group["params"] for group in optimizer.param_groups]
    order = [places[p] for group in groups for p in group if p.requires_grad]
    found = dict(zip(order, optimizer.directions([grads[i] for i in order]), strict=True))
    return [found[i] for i in range(len(grads))]


# objective(x, y): the mean loss of a model over the batch x [B, ...], y [B, ...], 0-d, with its
# graph.
Objective = Callable[[Tensor, Tensor], Tensor]


def objective_of(model: nn.Module, loss: Loss) -> Objective:
    """The mean loss of `model` over a batch (losses.mean_loss), as an objective."""
    return lambda x, y: mean_loss(loss, model(x), y)


def batch_gradient(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective | None = None, share: float = 1.0
) -> list[Tensor]:
    """`share` times grad f_S at the model's parameters for the batch S = (x [B, ...], y [B, ...]).

    A tensor a trainable parameter, in its shape and dtype and the order of `trainable`. Without an
    objective f_S is the mean cross-entropy, with y int64 [B]. Raises NotCovered for a loss that is
    no mean over samples, and RuntimeError for a trainable parameter that plays no part in the loss.
    """
    with hosts.differentiable():
        value = (objective or objective_of(model, F.cross_entropy))(x, y)
        return list(torch.autograd.grad(value * share, trainable(model)))


def full_gradient(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Loss = F.cross_entropy,
    n: int | None = None,
    sizes: Iterable[int] | None = None,
    objective: Objective | None = None,
) -> list[Tensor]:
    """The gradient of the mean loss over all samples of `batches`, each batch weighted by its true
    share of them.

    Args:
        model: in the mode in which it is to be measured. With BatchNorm in eval mode the result is
            the gradient of a fixed finite sum, whatever the batches; in train mode it is the
            expectation of the mini-batch gradient at the batches' size.
        batches: (x [B, ...], y [B, ...]) of any sizes.
        loss: loss(output, target), a mean over samples (losses.mean_loss).
        n: how many samples all have together, where some of the batches are elsewhere.
        sizes: of the batches that `batches` are parts of, one for each.
        objective: a way of its own to the mean loss of a batch, in the place of `loss`.

    Returns a tensor a trainable parameter, in the order of model.parameters(), summed in float64
    (float32 on MPS). Raises NotCovered, a ValueError, for a loss that is no mean over samples, and
    ValueError where there are no batches. Leaves .grad and the buffers alone.
    """
    wide = wide_dtype(next(model.parameters()).device)
    objective = objective or objective_of(model, loss)
    total = [torch.zeros_like(p, dtype=wide) for p in trainable(model)]
    known = itertools.repeat(None) if sizes is None else iter(sizes)
    seen = 0
    with unchanged(list(model.buffers())):
        for (x, y), size in zip(batches, known, strict=False):
            size = size or len(y)
            seen += size
            # into float64 in place, so that only rounding within a batch is that of float32
            grads = batch_gradient(model, x, y, objective, len(y) / size)
            torch._foreach_add_(total, grads, alpha=size / n if n else size)
    if n is None:
        if not seen:
            raise ValueError("a full gradient needs one batch or more")
        torch._foreach_div_(total, seen)
    return total


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all coordinates of a list of tensors [...] of any shapes: 0-d."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


@dataclass(frozen=True)
class DirectionNoise:
    """||m_t - grad f(x_t)|| over independent draws, and what follows from it; each list has a
    number a draw."""

    noise_norms: list[float]  # ||m - G||
    grad_noise_norms: list[float]  # ||g - G||; the same numbers for sgd without weight decay
    full_grad_norms: list[float]  # ||G||
    batch_size: int
    n: int
    over: str  # what varies from draw to draw

    def noise_norm(self) -> Estimate:
        return Estimate.mean(self.noise_norms, self.over)

    def full_grad_norm(self) -> Estimate:
        return Estimate.mean(self.full_grad_norms, self.over)

    def grad_variance(self) -> Estimate:
        return sampled([w**2 for w in self.grad_noise_norms], self.batch_size, self.n, self.over)


def direction_noise(
    optimizer: Driven,
    gradient: Callable[[int], list[Tensor]],
    batch_size: int,
    at: Callable[[int], AbstractContextManager[list[Tensor]]],
    draws: int,
    n: int,
    keep: Callable[[int, list[Tensor]], None] = lambda draw, omega: None,
    over: str = "mini-batches drawn at one point",
    done: list[Tensor] | None = None,
    params: Sequence[Tensor] | None = None,
) -> DirectionNoise:
    """Compare the direction m_t with the full gradient at the same parameters, `draws` times.

    at(draw) goes to the point of a draw, with its momentum buffers, and gives the full gradient
    there: the same point for all draws, or each time the end of another history. gradient(draw) is
    that of a mini-batch of `batch_size` out of n, drawn there. Each noise vector omega = m_t - grad
    f(x_t), in float64, goes through `keep` before it is forgotten. The norms stay on the device
    until all draws are done. `done` has those of the draws that were made before, [3] each, and
    grows by one a draw. `params`: the trainable parameters in the order of these gradients, where
    that of the optimizer's groups may be another. Call it inside `undisturbed`.
    """
    norms = [] if done is None else done
    for draw in range(len(norms), draws):
        with at(draw) as full:
            grads = gradient(draw)
            omega = list(torch._foreach_sub(directions(optimizer, grads, params), full))
            norms.append(
                torch.stack([norm(omega), norm(torch._foreach_sub(grads, full)), norm(full)])
            )
            keep(draw, omega)
    noise, grad_noise, full_norms = torch.stack(norms, dim=1).tolist()
    return DirectionNoise(noise, grad_noise, full_norms, batch_size, n, over)
