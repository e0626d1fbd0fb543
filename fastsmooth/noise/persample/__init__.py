"""The squared gradient norm of every sample of a batch, and its distance from the mean, out of one
backward pass.

Inside a pass (passes.py) each call of a layer that has a rule (rules.py) is an autograd function
(layers.py) that reports to a probe of zeros, [2, B]: the probe's gradient is the layer's share of
[||g_i||^2, ||g_i - g||^2], with g_i the gradient of sample i and g that of the mean loss. No hooks,
no change of the model, nothing of size B x parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.kernels.conv_noise import check_precision
from fastsmooth.names import about_value
from fastsmooth.noise import hosts
from fastsmooth.noise.losses import Loss, NotCovered, is_cross_entropy, mean_loss, other_size
from fastsmooth.noise.persample.alone import alone_norms
from fastsmooth.noise.persample.passes import (
    Batched,
    Lifted,
    Names,
    OtherSize,
    Plan,
    Probes,
    Survey,
    WithoutParameters,
    caches_aside,
    keeps_tensors,
)
from fastsmooth.noise.persample.rules import Wanted

__all__ = [
    "BN", "NotCovered", "SampleNorms", "Unused", "sample_norms", "training_norms", "unchanged",
]  # fmt: skip

BN = ("batch", "frozen")
LIFTED_BYTES = 1 << 30  # of parameters that are one a sample; beyond, a few samples at a time


@dataclass(frozen=True)
class SampleNorms:
    """Of a batch of B samples and its mean loss; wide is float64, or float32 on MPS."""

    loss: Tensor  # 0-d
    grads: list[Tensor]  # g, one tensor a trainable parameter
    # for each module that owns trainable parameters, by its name and in their order, its share of
    # the next two: [2, B], wide; the second zeros where the noise was not asked for
    layers: dict[str, Tensor]
    squares: Tensor  # [B], wide: ||g_i||^2
    noise: Tensor | None  # [B], wide: ||g_i - g||^2; None where it was not asked for
    grad_square: Tensor  # 0-d, wide: ||g||^2
    how: str  # in words, where the gradients of samples were written out, and why

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
    precision: str = "tf32x3",
) -> SampleNorms:
    """The squared gradient norm of every sample's loss at the model's parameters, and its squared
    distance from the mean gradient.

    Any model whose samples do not mix. Out of one backward pass over the batch come the shares of
    convolutions, linear layers, normalisations and embeddings; other parameters that are small, as
    position tokens, are one a sample in that pass. Where that cannot be, the gradient of every
    sample is written out, a few samples at a time, and `how` says so.

    Args:
        model: in the mode in which it is to be measured; its output is a tensor [B, ...].
        x: [B, ...], y: [B, ...]: a batch of two or more. Under autocast to bfloat16 the model
            computes in its dtype (under autocast to float16, whose gradients vanish without a
            scaled loss, in that of its parameters), in which the operands are of which norms are
            made; their sums are in float32 or wider. In bfloat16 norms and distances are as far
            from those of float64 as plain PyTorch's are, some 1e-2; a noise below a thousandth of
            ||g||^2 is lost in its rounding.
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
        precision: of the products of float32 that norms are made of, on a GPU: ieee; tf32, whose 10
            bits lose a noise below a thousandth of ||g||^2 as bfloat16 does; or tf32x3, products
            of two TF32 parts of each operand. Everywhere else they are ieee.

    Raises ValueError for a precision that there is not; NotCovered, a ValueError, for fewer than
    two samples, parameters in float16, BatchNorm in training mode without `bn`, a model that mixes
    the samples in another way or whose output does not begin with them, parameters that take no
    part, a loss that is no mean over samples, and cross-entropy of one class, which is 0. Leaves
    .grad and the buffers alone.

    Under gradient checkpointing (torch.utils.checkpoint.checkpoint) a batch that goes by layers is
    computed again part by part, as in training; where parameters are one a sample or torch.vmap
    makes the rows, all that the pass computes is kept, as without checkpointing.
    """
    if not isinstance(x, Tensor):
        raise NotCovered(
            f"the input is a {type(x).__name__}, not a tensor [B, ...]: wrap the model in one that "
            "makes what it takes from one, as sequences that are filled up to one length"
        )
    if len(y) < 2:
        raise NotCovered("a batch of fewer than two samples has no noise: use two or more")
    if bn not in (None, *BN):
        raise ValueError(f"bn {bn!r}: {about_value('--bn', str(bn), BN)}")
    check_precision(precision)
    if len(x) != len(y):
        raise NotCovered(
            f"the input {list(x.shape)} does not begin with the {len(y)} samples of the batch"
        )
    names = trainable_names(model)
    wanted = Wanted(noise, bn, precision)

    def mean_of(output: Tensor) -> Tensor:
        return loss_of(names, loss, output, y)

    with unchanged(list(model.buffers())), beside_training(x.device):
        way = way_for(model, names, x, bn)
        if way.written_out:
            return written_out(model, names, x, y, loss, noise, way)
        try:
            return measured(model, names, x, mean_of, wanted, way)[0]
        except OtherSize as error:
            way = way_for(model, names, x, bn, str(error))
            if way.written_out:
                return written_out(model, names, x, y, loss, noise, way)
            return measured(model, names, x, mean_of, wanted, way)[0]


def training_norms(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    bn: str | None = None,
    precision: str = "tf32x3",
) -> tuple[SampleNorms, Tensor]:
    """As sample_norms of the mean loss, 0-d, with its noise, by a pass that trains: (norms, output
    [B, classes]).

    Buffers move, BatchNorm's running statistics among them, and random numbers are drawn as in an
    ordinary pass over x [B, ...] and y [B], int64; with bn None or batch the gradient is that
    pass's too. Once the kind of x is known to sample_norms or to this, the host reads no value of
    the device, so that a CUDA graph can hold the pass, unless the gradients are written out.

    Raises NotCovered for what sample_norms does not cover, but does not look at the loss.
    """
    names = trainable_names(model)
    wanted = Wanted(True, bn, precision, trains=True)

    def mean_of(output: Tensor) -> Tensor:
        return loss(output.float(), y)

    with beside_training(x.device):
        way = way_for(model, names, x, bn)
        if not way.written_out:
            return measured(model, names, x, mean_of, wanted, way)
    raise NotCovered(f"the gradients of samples are written out: {way.written_out}")


def trainable_names(model: nn.Module) -> Names:
    """Raises NotCovered for parameters in float16."""
    hosts.check_precision(model)
    return {p: n for n, p in model.named_parameters() if p.requires_grad}


def measured(
    model: nn.Module,
    names: Names,
    x: Tensor,
    mean_of: Callable[[Tensor], Tensor],
    wanted: Wanted,
    way: Way,
) -> tuple[SampleNorms, Tensor]:
    """The norms of mean_of(output), the mean loss of the batch, and the output [B, ...]."""
    with forward(model, names, x, wanted, way) as (output, probes):
        with torch.enable_grad():
            mean = mean_of(output)
        inputs = [*names, *probes.by_module.values()]
        slopes = backward(mean, inputs)
    layers = dict(zip(probes.by_module, slopes[len(names) :], strict=True))
    found = gathered(mean, slopes[: len(names)], layers, wanted.noise, "")
    return found, output.detach()


def backward(mean: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The gradients of `mean`, 0-d, by `inputs`, [...] each: zeros of those that play no part, as a
    weight that is made of parameters of several modules reports to the first of them."""
    # as in training: autocast, where it is on, has chosen the dtypes in the forward pass
    with torch.autocast(mean.device.type, enabled=False):
        return list(torch.autograd.grad(mean, inputs, allow_unused=True, materialize_grads=True))


@contextmanager
def beside_training(device: torch.device) -> Iterator[None]:
    """Around passes under autocast and gradient checkpointing of a training loop, both of which are
    left as they were.

    Raises NotCovered for checkpoints of a kind that cannot be measured.
    """
    with hosts.precise(device), hosts.differentiable() as cut:
        try:
            yield
        except Unused as error:
            raise Unused(f"{error}{cut.words}") from None
        except CheckpointError:
            raise NotCovered(hosts.OTHERWISE) from None


@contextmanager
def unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """Afterwards the buffers, [...] of any shapes and dtypes, hold what they held before.

    In a forward pass BatchNorm counts its calls, and may move its running statistics.
    """
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)


@contextmanager
def forward(
    model: nn.Module, names: Names, x: Tensor, wanted: Wanted, way: Way
) -> Iterator[tuple[Tensor, Probes]]:
    """The output [B, ...] of a model for x [B, ...], with its graph, and its probes; the backward
    pass is to be inside too."""
    if way.plan is not None:
        lifted = Lifted(names, len(x), x.device, wanted, way.plan)
        with torch.enable_grad():
            output = lifted(uncompiled(model), x)
        yield output, lifted.probes
        return
    layers = Batched(names, len(x), x.device, wanted)
    with hosts.recomputed(layers.again):
        with torch.enable_grad(), layers, caches_aside(model):
            output = model(x)
        yield output, layers.probes


def gathered(
    mean: Tensor, grads: list[Tensor], layers: dict[str, Tensor], noise: bool, how: str
) -> SampleNorms:
    wide = wide_dtype(mean.device)
    total = torch.stack(list(layers.values())).sum(0)
    zero = torch.zeros((), dtype=wide, device=mean.device)
    square = sum((g.to(wide).square().sum() for g in grads), zero)
    return SampleNorms(
        mean.detach(), grads, layers, total[0], total[1] if noise else None, square, how
    )


def loss_of(names: Names, loss: Loss, output: Tensor, y: Tensor) -> Tensor:
    """The mean loss, 0-d, of an output [B, ...] for y [B, ...]. Raises NotCovered."""
    with WithoutParameters(names):
        mean = mean_loss(loss, output, y)
    if is_cross_entropy(loss) and output.ndim > 1 and output.shape[1] < 2:
        raise NotCovered(
            f"the model's output {list(output.shape)} is of one class, whose cross-entropy is "
            "always 0"
        )
    return mean


def uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


# Which way a model goes


@dataclass(frozen=True)
class Way:
    """Batched without a plan, Lifted with one; or, for a reason, the gradients are written out."""

    plan: Plan | None = None
    written_out: str = ""
    by_vmap: bool = True


# Of models that were seen, by the shapes of the input and the modes that they were seen in.
SEEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Way]] = weakref.WeakKeyDictionary()


def way_for(model: nn.Module, names: Names, x: Tensor, bn: str | None, why: str = "") -> Way:
    """The way of a model for batches like x [B, ...], whose trainable parameters are `names`.

    why: what kept this batch from going in one, though the few samples had: in them another
    dimension had their number by chance.

    A few samples go through it once for each shape of the input. They are another number than the
    batch has: where the first dimension is the batch, it has that number in every layer, and in a
    batch another dimension may have its size by chance. Raises NotCovered where there is none.
    """
    model = uncompiled(model)  # the shapes are the same
    few = other_size(len(x))
    modes = tuple(module.training for module in model.modules())
    # parameters may be replaced by others of the same names; what a way holds of them is not freed,
    # so that an id is not given to another
    kind = (x.shape[1:], x.dtype, few, bn, modes, tuple(names.values()), tuple(map(id, names)))
    ways = SEEN.setdefault(model, {})
    if kind not in ways or why:
        devices = [x.device] if x.device.type == "cuda" else []
        samples = x[torch.arange(few, device=x.device) % len(x)]
        with torch.random.fork_rng(devices=devices), unchanged(list(model.buffers())):
            ways[kind] = find_way(model, names, samples, bn, why)
    way = ways[kind]
    if way.plan and len(x) * bytes_of(way.plan.lifted) > LIFTED_BYTES:
        large = max(way.plan.lifted, key=Tensor.numel)
        return Way(written_out=f"{names[large]} is too large to be there once a sample")
    return way


def bytes_of(params: set[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in params)


def find_way(model: nn.Module, names: Names, x: Tensor, bn: str | None, why: str) -> Way:
    """As way_for, for a few samples x [few, ...]."""
    random = bn is not None or is_random(model, x)
    with torch.enable_grad(), hosts.kept():
        if not why:
            try:
                output, used = batched_output(model, names, x, bn)
                check_use(model, names, used, output)
            except Unused:
                raise
            except NotCovered as error:
                why = str(error)
            else:
                if not isinstance(output, Tensor):
                    return Way()  # mean_loss says so
                check_apart(model, x, random)
                if random or same_norms(model, names, x, Way()):
                    return Way()
                why = OTHERWISE
        way = lifted_way(model, names, x, bn, why)
        check_apart(model, x, random)
        if way.plan and not random and not same_norms(model, names, x, way):
            way = alone_way(model, names, x, bn, f"{why}; {OTHERWISE}")
        return way


# of a use that no TorchFunctionMode sees, or of samples in another order inside
OTHERWISE = "its parameters are used in a way that the pass does not see"


@torch.no_grad()
def is_random(model: nn.Module, x: Tensor) -> bool:
    """Whether a model gives x [few, ...] another output the second time."""
    with caches_aside(model):
        first, second = model(x), model(x)
    return isinstance(first, Tensor) and not torch.equal(first, second)


def batched_output(
    model: nn.Module, names: Names, x: Tensor, bn: str | None
) -> tuple[Tensor, set[Tensor]]:
    """(output, the parameters that were used) of a Batched pass over x [few, ...]."""
    wanted = Wanted(False, bn)
    with Batched(names, len(x), x.device, wanted) as layers, caches_aside(model):
        output = model(x)
    if isinstance(output, Tensor) and (output.ndim == 0 or len(output) != len(x)):
        raise NotCovered(
            f"the output for {len(x)} samples is {list(output.shape)}, not [{len(x)}, ...]"
        )
    return output, layers.used


class Unused(NotCovered):
    """A parameter takes no part in the output."""


class Unseen(NotCovered):
    """A parameter does, though no function that a TorchFunctionMode sees takes it."""


def check_use(model: nn.Module, names: Names, used: set[Tensor], output: Tensor) -> None:
    """Raises Unused or Unseen where a parameter was not used in a pass."""
    for p in names:
        if p in used:
            continue
        slope = None
        if isinstance(output, Tensor) and output.requires_grad:
            (slope,) = torch.autograd.grad(output.sum(), p, allow_unused=True, retain_graph=True)
        if slope is None:
            remedy = "freeze it with requires_grad_(False)"
            if keeps_tensors(model):
                remedy += (
                    ", or, where a module keeps what it made of it in an earlier call, call "
                    "model.train() and model.eval() first"
                )
            raise Unused(f"{names[p]} takes no part in the forward pass: {remedy}")
        raise Unseen(f"{names[p]} is used, but not as it is")


def lifted_way(model: nn.Module, names: Names, x: Tensor, bn: str | None, why: str) -> Way:
    """That of a model which `why` keeps from going as a batch: sample by sample, or else written
    out."""
    try:
        survey = Survey()
        Lifted(names, len(x), x.device, Wanted(False, bn), Plan(), survey)(model, x)
        with caches_aside(model):
            check_use(model, names, survey.met, model(x))
        way = Way(survey.plan())
        with forward(model, names, x, Wanted(True, bn), way) as (output, probes):
            inputs = [*names, *probes.by_module.values()]
            torch.autograd.grad(output.sum(), inputs, allow_unused=True)
        return way
    except Unseen as error:
        why = f"{why}; {error}"
    except (NotCovered, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever vmap or autograd cannot do with this model
        why = f"{why}; {first_line(error)}"
    return alone_way(model, names, x, bn, why)


def alone_way(model: nn.Module, names: Names, x: Tensor, bn: str | None, why: str) -> Way:
    """That of a model whose gradients are to be written out, because of `why`."""
    if bn is not None:
        raise NotCovered(f"{why}: with --bn {bn} no other way to the gradients of samples is known")
    params = {name: p for p, name in names.items()}
    for by_vmap in (True, False):
        try:
            alone_norms(model, params, x, x, lambda output, _: output.sum(), None, by_vmap)
            return Way(written_out=why, by_vmap=by_vmap)
        except Exception as error:
            why = f"{why}; {first_line(error)}"
    raise NotCovered(why)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@torch.no_grad()
def check_apart(model: nn.Module, x: Tensor, random: bool) -> None:
    """Raises NotCovered for a model that gives one of x [few, ...] another output alone than among
    the others. What --bn covers, or is `random`, is left out: then it is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    with caches_aside(model):
        try:
            for module in modes if random else ():
                module.training = False  # model.eval() would call what a model does in its place
            whole = model(x)
            try:
                alone = torch.cat([model(sample) for sample in x.split(1)])
            except Exception as error:
                raise NotCovered(f"the model fails for one sample: {first_line(error)}") from None
        finally:
            for module, training in modes.items():
                module.training = training
    if not whole.numel():
        raise NotCovered(f"the output {list(whole.shape)} has no values")
    close = torch.finfo(whole.dtype).eps ** 0.5
    size = whole.abs().max().item()
    if alone.shape != whole.shape or not torch.allclose(
        alone, whole, rtol=close, atol=close * size, equal_nan=True
    ):
        raise NotCovered(
            "the model gives a sample another output in another batch: its samples mix, so that "
            "no gradient belongs to one of them"
        )


def same_norms(model: nn.Module, names: Names, x: Tensor, way: Way) -> bool:
    """Whether the norms of x [few, ...] by `way`, under a loss of weighted sums of the output, are
    those of one backward pass a sample; the passes share a forward pass, and so its rounding.

    It bounds what rounding can do in float32 to a network of ReLUs, and finds uses that are not
    reported, or reported twice, or for another sample.
    """

    def values(output: Tensor) -> Tensor:  # [few]
        rows = output.reshape(len(output), -1)
        return rows @ torch.arange(1, rows.shape[1] + 1, device=rows.device).cos().to(rows.dtype)

    with forward(model, names, x, Wanted(False), way) as (output, probes):
        found = torch.autograd.grad(
            values(output).mean(), list(probes.by_module.values()), allow_unused=True
        )
    with caches_aside(model):
        losses = values(model(x))
    exact = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(names), allow_unused=True, retain_graph=True)
        squares = [g.to(wide_dtype(x.device)).square().sum() for g in grads if g is not None]
        exact.append(torch.stack(squares).sum())
    total, expected = torch.stack([s for s in found if s is not None]).sum(0)[0], torch.stack(exact)
    close = min(32 * torch.finfo(output.dtype).eps ** 0.5, 0.5)
    return torch.allclose(total, expected, rtol=close, atol=close * expected.max().item())


def written_out(
    model: nn.Module, names: Names, x: Tensor, y: Tensor, loss: Loss, noise: bool, way: Way
) -> SampleNorms:
    """sample_norms from the gradients of the samples."""
    model = uncompiled(model)
    with torch.enable_grad():
        output = model(x)
        mean = loss_of(names, loss, output, y)
        grads = list(torch.autograd.grad(mean, list(names)))
        params = {name: p for p, name in names.items()}
        found = alone_norms(model, params, x, y, loss, grads if noise else None, way.by_vmap)
    layers: dict[str, Tensor] = {}
    for name, own in zip(params, found.unbind(1), strict=True):
        module = name.rpartition(".")[0]
        layers[module] = layers[module] + own if module in layers else own
    return gathered(mean, grads, layers, noise, way.written_out)
