"""What the per-sample norms of one batch say beyond C2: noise by layer, the tests of adaptive
sampling, CABS's batch size, and a signal-to-noise ratio. None costs another pass.

Of a batch of b samples with gradients g_i and mean gradient g, drawn without replacement from n
with mean gradient grad f, the norms give

    S2 = sum_i ||g_i - g||^2 / (b - 1),  C2 = S2 (n - 1) / n,
    p_i = <g_i - g, g> = (||g_i||^2 - ||g_i - g||^2 - ||g||^2) / 2.

The functions are named for what they give, and QUANTITIES has a row a name of --quantities. Errors
are standard errors, the jackknife's over the samples (Efron and Stein 1981), with sqrt(1 - b / n)
of them left (Cochran 1977, 2.9): what another batch would give at the same parameters. What is not
defined is NaN, and None in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsmooth.noise.estimators import Estimate
from fastsmooth.noise.persample import SampleNorms

# Bounds of the tests for which a batch size is proposed: those of the norm and the orthogonality
# test are what cockpit quotes from arXiv 1710.11258, where 5.84 is tan 80 degrees; the inner
# product test has the norm test's.
THETA, NU = 0.9, 5.84


@dataclass(frozen=True)
class Norms:
    """Squared gradient norms of a batch of b >= 2 samples: of all parameters, or of the parameters
    of several layers, by which "..." runs then. float64, on the CPU."""

    squares: Tensor  # [..., b]: ||g_i||^2
    noise: Tensor  # [..., b]: ||g_i - g||^2
    grad_square: Tensor  # [...]: ||g||^2
    population: int  # n, of which the samples were drawn without replacement

    @property
    def size(self) -> int:
        """b."""
        return self.noise.shape[-1]

    @property
    def projections(self) -> Tensor:
        """[..., b]: p_i = <g_i - g, g>."""
        return (self.squares - self.noise - self.grad_square[..., None]) / 2

    @property
    def variance(self) -> Tensor:
        """[...]: S2, in the unit of a squared gradient norm."""
        return self.noise.sum(-1) / (self.size - 1)

    def without(self) -> tuple[Tensor, Tensor]:
        """(S2, ||g||^2) of the batch without each of its samples in turn, [..., b] each; NaN for a
        batch of two.

        Without sample j the mean is g - (g_j - g) / (b - 1), and the sum of squared deviations
        falls by ||g_j - g||^2 b / (b - 1).
        """
        rest = self.size - 1
        left = self.noise.sum(-1, keepdim=True) - self.noise * self.size / rest
        change = (self.noise / rest - 2 * self.projections) / rest
        variances = left.clamp(min=0) / (rest - 1 or math.nan)
        return variances, self.grad_square[..., None] + change

    def error(self, values: Tensor) -> Tensor:
        """[...]: the standard error of an estimate from its values [..., b] without each sample in
        turn, as estimators.jackknife_error has it of a list; NaN where one of them is not finite.
        """
        left = max(1 - self.size / self.population, 0.0)
        return (left * (self.size - 1) * values.var(-1, correction=0)).sqrt()


class Estimated(NamedTuple):
    """Values, NaN where they are not defined, and their errors, NaN where the samples are too few
    to tell."""

    value: Tensor  # [...], float64
    error: Tensor  # [...], float64


def gradient_variance(norms: Norms) -> Estimated:
    """C2, in the unit of a squared gradient norm: estimators.per_sample of `norms.noise`."""
    finite = (norms.population - 1) / norms.population
    return Estimated(finite * norms.variance, norms.error(finite * norms.without()[0]))


def norm_test(norms: Norms) -> Estimated:
    """sqrt(S2 / (b ||g||^2)): the noise of g over its own norm. The norm test with theta is passed
    where it is at most theta (Byrd, Chin, Nocedal and Wu 2012, eq. 3.9, doi
    10.1007/s10107-012-0572-5; cockpit's NormTest, which gives the same number).

    Without a unit; NaN where g is 0. ||g||^2 is the batch's, as in the source, and has the noise of
    the batch in it: where noise is all that there is, the value is near 1 for every b. Their
    finite-population factor (n - b) / (n - 1), which they drop, is not in it.
    """
    # a batch of the same size b is meant, so b stays as a sample is left out
    variances, grad_squares = norms.without()
    error = norms.error((variances / (norms.size * grad_squares)).sqrt())
    value = (norms.variance / (norms.size * norms.grad_square)).sqrt()
    return Estimated(defined(value, norms.grad_square), error)


def inner_product_test(norms: Norms) -> Tensor:
    """[...]: sqrt(sum_i p_i^2 / ((b - 1) b)) / ||g||^2, how far g's length along itself is
    uncertain. The inner product test with theta is passed where it is at most theta (Bollapragada,
    Byrd and Nocedal 2018, arXiv 1710.11258, eq. 2.6; cockpit's InnerTest, which gives the same
    number).

    Without a unit; NaN where g is 0. Without an error: without a sample g points elsewhere, and
    <g_i, g_j>, which would say where, is no norm.
    """
    b = norms.size
    projected = norms.projections.square().sum(-1) / ((b - 1) * b)
    return defined(projected.sqrt() / norms.grad_square, norms.grad_square)


def orthogonality_test(norms: Norms) -> Tensor:
    """[...]: sqrt(sum_i ||g_i - <g_i, g> g / ||g||^2||^2 / ((b - 1) b ||g||^2)), the noise of g
    across itself. The orthogonality test with nu is passed where it is at most nu (arXiv
    1710.11258, eq. 3.3; cockpit's OrthoTest, which gives the same number).

    Without a unit; NaN where g is 0. Without an error, for the same reason as
    `inner_product_test`. The squares of both add up to that of `norm_test`.
    """
    b, square = norms.size, norms.grad_square
    across = (norms.noise - norms.projections.square() / square[..., None]).sum(-1).clamp(min=0)
    return defined((across / ((b - 1) * b * square)).sqrt(), square)


def passing_batch_size(value: Tensor, size: int, bound: float) -> Tensor:
    """[...]: the batch size at which a test that has these values [...] of `size` samples would
    just be passed with this bound: size (value / bound)^2, in samples, not rounded (Byrd et al.
    2012, eq. 3.12).

    It takes ||g||^2 of the batch for that of every batch, so that a test that fails by noise alone
    proposes too few.
    """
    return size * (value / bound).square()


def cabs_batch_size(c2: float, loss: float, lr: float) -> float:
    """lr C2 / loss, in samples, not rounded: the batch size that CABS proposes for plain SGD
    (Balles, Romero and Hennig 2017, arXiv 1612.05086, eq. 22; cockpit's CABS).

    `c2` is of one batch, and `loss` its mean loss, of which the least possible is taken to be 0;
    `lr` the learning rate. NaN where the loss is not above 0. cockpit divides the squared
    deviations by b where C2 divides by b - 1, and leaves (n - 1) / n out. Without an error: the
    loss of each sample would be needed.
    """
    return lr * c2 / loss if loss > 0 else math.nan


def total_snr(norms: Norms) -> Estimated:
    """||grad f||^2 / C2: the squared norm of the full gradient over the variance of one sample's,
    each summed over the parameters first; the reciprocal of the simple noise scale (McCandlish et
    al. 2018, arXiv 1812.06162), of one batch.

    It is no mean of the ratios that Liu et al. 2020 (arXiv 2001.07384) define for each parameter,
    nor cockpit's MeanGSNR, which is such a mean: norms do not tell parameters apart. Without a
    unit; NaN where C2 is 0. The numerator is unbiased, ||g||^2 - C2 / b (n - b) / (n - 1), and so
    negative at times; the ratio is biased as a quotient of two estimates is.
    """
    b, n = norms.size, norms.population

    def ratio(variance: Tensor, grad_square: Tensor, size: int) -> Tensor:
        noise_of_mean = (n - size) / (size * (n - 1))
        return grad_square / ((n - 1) / n * variance) - noise_of_mean

    value = ratio(norms.variance, norms.grad_square, b)
    error = norms.error(ratio(*norms.without(), b - 1))
    return Estimated(defined(value, norms.variance), error)


def defined(values: Tensor, divisor: Tensor) -> Tensor:
    """The values [...], NaN where what they were divided by is not above 0."""
    return torch.where(divisor > 0, values, math.nan)


# What a row of metrics.jsonl has of them


@dataclass(frozen=True)
class Measured:
    """What the quantities of one measurement are made of."""

    whole: Norms  # of all parameters, [b]
    layers: Norms  # [layers, b], in the order of `layers_of`
    c2: float  # of the batch
    loss: float  # the mean over the batch
    lr: float


Columns = dict[str, Any]  # numbers, lists of numbers and None
Quantity = Callable[[Measured], Columns]


def plain(value: Any) -> Any:
    """A number, or a list of numbers, with None for what is not finite."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value if math.isfinite(value) else None


def valued(name: str, estimated: Estimated) -> Columns:
    """The columns of an estimate and its error."""
    return {name: plain(estimated.value.tolist()), f"{name}_se": plain(estimated.error.tolist())}


def tested(name: str, value: Tensor, size: int, bound: float) -> Columns:
    """The columns of a test of `size` samples: its value, and the batch size that would pass it."""
    proposed = passing_batch_size(value, size, bound)
    return {name: plain(value.item()), f"{name}_batch_size": plain(proposed.item())}


def of_norm_test(m: Measured) -> Columns:
    """The same of the norm test, which has an error."""
    found = norm_test(m.whole)
    return valued("norm_test", found) | tested("norm_test", found.value, m.whole.size, THETA)


def of_inner_product_test(m: Measured) -> Columns:
    return tested("inner_product_test", inner_product_test(m.whole), m.whole.size, THETA)


def of_orthogonality_test(m: Measured) -> Columns:
    return tested("orthogonality_test", orthogonality_test(m.whole), m.whole.size, NU)


def of_layers(m: Measured) -> Columns:
    """C2 and the signal-to-noise ratio of every layer: its C2 add up to that of all parameters."""
    return valued("layer_c2", gradient_variance(m.layers)) | valued(
        "layer_snr", total_snr(m.layers)
    )


QUANTITIES: dict[str, Quantity] = {
    "layers": of_layers,
    "norm-test": of_norm_test,
    "inner-product": of_inner_product_test,
    "orthogonality": of_orthogonality_test,
    "cabs": lambda m: {"cabs_batch_size": plain(cabs_batch_size(m.c2, m.loss, m.lr))},
    "snr": lambda m: valued("total_snr", total_snr(m.whole)),
}
PLAIN_SGD = {"cabs"}  # quantities of the theory of SGD without momentum


def layers_of(model: nn.Module) -> dict[str, int]:
    """The modules that own trainable parameters, by name ("" for the model itself), in the order of
    these, and how many numbers are in the parameters of each."""
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            owner = name.rpartition(".")[0]
            counts[owner] = counts.get(owner, 0) + p.numel()
    return counts


def measured_of(
    found: SampleNorms, model: nn.Module, population: int, c2: Estimate, lr: float
) -> Measured:
    """What the quantities need of `found`, the norms of a batch with their noise; it waits for the
    device.

    population: n, the samples of the training set. c2: of this batch. lr: in force for it.
    """
    assert found.noise is not None  # it was asked for
    names = list(layers_of(model))
    owners = [n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad]
    own = torch.stack([g.to(found.squares.dtype).square().sum() for g in found.grads])
    grad_squares = torch.zeros(len(names), dtype=torch.float64).index_add(
        0, torch.tensor([names.index(owner) for owner in owners]), own.cpu().double()
    )
    shares = torch.stack([found.layers[name] for name in names], 1).cpu().double()
    whole = [t.cpu().double() for t in (found.squares, found.noise, found.grad_square)]
    return Measured(
        Norms(whole[0], whole[1], whole[2], population),
        Norms(shares[0], shares[1], grad_squares, population),
        c2.value,
        found.loss.item(),
        lr,
    )
