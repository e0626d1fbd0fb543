"""What the per-sample norms of one batch say beyond C2: noise by layer, the tests of adaptive
sampling, CABS's batch size, and a signal-to-noise ratio. None costs another pass.

Of a batch of b samples with gradients g_i and mean gradient g, drawn without replacement from n
with mean gradient grad f, the norms give

    S2 = sum_i ||g_i - g||^2 / (b - 1),  C2 = S2 (n - 1) / n,
    p_i = <g_i - g, g> = (||g_i||^2 - ||g_i - g||^2 - ||g||^2) / 2.

The functions are named for what they give, and QUANTITIES has a row a name of --quantities. Errors
are standard errors, the jackknife's over the samples (Efron and Stein 1981), with sqrt(1 - b / n)
of them left (Cochran 1977, 2.9): what another batch would give at the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsmooth.noise import estimators
from fastsmooth.noise.estimators import Estimate, jackknife_error
from fastsmooth.noise.persample import SampleNorms

OVER = "the samples of one batch"
# Bounds of the tests for which a batch size is proposed: those of the norm and the orthogonality
# test are what cockpit quotes from arXiv 1710.11258, where 5.84 is tan 80 degrees; the inner
# product test has the norm test's.
THETA, NU = 0.9, 5.84


@dataclass(frozen=True)
class Norms:
    """Squared gradient norms of a batch of b samples, of all parameters or of one layer's."""

    squares: Tensor  # [b], float64: ||g_i||^2
    noise: Tensor  # [b], float64: ||g_i - g||^2
    grad_square: float  # ||g||^2
    population: int  # n, of which the samples were drawn without replacement

    @property
    def size(self) -> int:
        """b, at least 2."""
        return len(self.noise)

    @property
    def projections(self) -> Tensor:
        """[b], float64: p_i = <g_i - g, g>."""
        return (self.squares - self.noise - self.grad_square) / 2

    @property
    def variance(self) -> float:
        """S2, in the unit of a squared gradient norm."""
        return self.noise.sum().item() / (self.size - 1)

    def without(self) -> tuple[Tensor, Tensor]:
        """(S2, ||g||^2) of the batch without each of its samples in turn, [b] float64 each; b >= 3.

        Without sample j the mean is g - (g_j - g) / (b - 1), and the sum of squared deviations
        falls by ||g_j - g||^2 b / (b - 1).
        """
        rest = self.size - 1
        left = self.noise.sum() - self.noise * self.size / rest
        grad_squares = self.grad_square - 2 * self.projections / rest + self.noise / rest**2
        return left.clamp(min=0) / (rest - 1), grad_squares

    def error(self, values: Tensor) -> float | None:
        """The standard error of an estimate from its values [b] without each sample in turn; None
        where one of them is not finite."""
        if not bool(values.isfinite().all()):
            return None
        left = max(1 - self.size / self.population, 0.0)
        return math.sqrt(left) * jackknife_error(values.tolist())


def norm_test(norms: Norms) -> Estimate | None:
    """sqrt(S2 / (b ||g||^2)): the noise of g over its own norm. The norm test with theta is passed
    where it is at most theta (Byrd, Chin, Nocedal and Wu 2012, eq. 3.9, doi
    10.1007/s10107-012-0572-5; cockpit's NormTest, which gives the same number).

    Without a unit; None where g is 0. ||g||^2 is the batch's, as in the source, and has the noise
    of the batch in it: where noise is all that there is, the value is near 1 for every b. Their
    finite-population factor (n - b) / (n - 1), which they drop, is not in it.
    """
    if not norms.grad_square > 0:
        return None
    scale, error = norms.size, None
    if norms.size > 2:
        variances, grad_squares = norms.without()
        # a batch of the same size b is meant, so b stays as a sample is left out
        error = norms.error((variances / (scale * grad_squares)).sqrt())
    value = math.sqrt(norms.variance / (scale * norms.grad_square))
    return Estimate(value, error, norms.size, OVER)


def inner_product_test(norms: Norms) -> Estimate | None:
    """sqrt(sum_i p_i^2 / ((b - 1) b)) / ||g||^2: how far g's length along itself is uncertain. The
    inner product test with theta is passed where it is at most theta (Bollapragada, Byrd and
    Nocedal 2018, arXiv 1710.11258, eq. 2.6; cockpit's InnerTest, which gives the same number).

    Without a unit; None where g is 0. Without an error: without a sample g points elsewhere, and
    <g_i, g_j>, which would say where, is no norm.
    """
    if not norms.grad_square > 0:
        return None
    b = norms.size
    projected = norms.projections.square().sum().item() / (b - 1)
    return Estimate(math.sqrt(projected / b) / norms.grad_square, None, b, OVER)


def orthogonality_test(norms: Norms) -> Estimate | None:
    """sqrt(sum_i ||g_i - <g_i, g> g / ||g||^2||^2 / ((b - 1) b ||g||^2)): the noise of g across
    itself. The orthogonality test with nu is passed where it is at most nu (arXiv 1710.11258,
    eq. 3.3; cockpit's OrthoTest, which gives the same number).

    Without a unit; None where g is 0. Without an error, for the same reason as that of
    `inner_product_test`. The squares of both add up to that of `norm_test`.
    """
    if not norms.grad_square > 0:
        return None
    b = norms.size
    across = (norms.noise - norms.projections.square() / norms.grad_square).sum().item() / (b - 1)
    value = math.sqrt(max(across, 0.0) / (b * norms.grad_square))
    return Estimate(value, None, b, OVER)


def passing_batch_size(test: Estimate, bound: float) -> float:
    """The batch size at which a test that has this value of b samples would just be passed with
    this bound: b (value / bound)^2, in samples, not rounded (Byrd et al. 2012, eq. 3.12).

    It takes ||g||^2 of the batch for that of every batch, so that a test that fails by noise alone
    proposes too few.
    """
    return test.count * (test.value / bound) ** 2


def cabs_batch_size(c2: float, loss: float, lr: float) -> float | None:
    """lr C2 / loss, in samples, not rounded: the batch size that CABS proposes for plain SGD
    (Balles, Romero and Hennig 2017, arXiv 1612.05086, eq. 22; cockpit's CABS).

    `c2` is of one batch, and `loss` its mean loss, of which the least possible is taken to be 0;
    `lr` the learning rate. None where the loss is not above 0. cockpit divides the deviations by b
    where C2 divides by b - 1, and leaves (n - 1) / n out. Without an error: the loss of each sample
    would be needed.
    """
    return lr * c2 / loss if loss > 0 else None


def total_snr(norms: Norms) -> Estimate | None:
    """||grad f||^2 / C2: the squared norm of the full gradient over the variance of one sample's,
    each summed over the parameters first; the reciprocal of the simple noise scale (McCandlish et
    al. 2018, arXiv 1812.06162), of one batch.

    It is no mean of the ratios that Liu et al. 2020 (arXiv 2001.07384) define for each parameter,
    nor cockpit's MeanGSNR, which is such a mean: norms do not tell parameters apart. Without a
    unit; None where C2 is 0. The numerator is unbiased, ||g||^2 - C2 / b (n - b) / (n - 1), and so
    negative at times; the ratio is biased by what the quotient of two estimates is.
    """
    b, n = norms.size, norms.population
    finite = (n - 1) / n

    def ratio(variance: Any, grad_square: Any, size: int) -> Any:
        return grad_square / (finite * variance) - (n - size) / (size * (n - 1))

    if not norms.variance > 0:
        return None
    error = norms.error(ratio(*norms.without(), b - 1)) if b > 2 else None
    return Estimate(ratio(norms.variance, norms.grad_square, b), error, b, OVER)


# What a row of metrics.jsonl has of them


@dataclass(frozen=True)
class Measured:
    """What the quantities of one measurement are made of."""

    whole: Norms
    layers: list[Norms]  # in the order of `layers_of`
    c2: Estimate
    loss: float  # the mean over the batch
    lr: float


Columns = dict[str, Any]  # numbers, lists of numbers and None
Quantity = Callable[[Measured], Columns]


def valued(name: str, estimate: Estimate | None) -> Columns:
    """The columns of an estimate and its error."""
    return {name: estimate and estimate.value, f"{name}_se": estimate and estimate.error}


def proposed(name: str, test: Estimate | None, bound: float) -> Columns:
    """The columns of a test: its value, and the batch size that would pass it with the bound."""
    size = test and passing_batch_size(test, bound)
    return {name: test and test.value, f"{name}_batch_size": size}


def of_norm_test(measured: Measured) -> Columns:
    """The same of the norm test, which has an error."""
    test = norm_test(measured.whole)
    return valued("norm_test", test) | proposed("norm_test", test, THETA)


def by_layer(measured: Measured) -> Columns:
    """C2 and the signal-to-noise ratio of every layer: its C2 add up to that of all parameters."""
    c2 = [estimators.per_sample(layer.noise, layer.population) for layer in measured.layers]
    ratios = [total_snr(layer) for layer in measured.layers]
    return {
        "layer_c2": [estimate.value for estimate in c2],
        "layer_c2_se": [estimate.error for estimate in c2],
        "layer_snr": [ratio and ratio.value for ratio in ratios],
        "layer_snr_se": [ratio and ratio.error for ratio in ratios],
    }


QUANTITIES: dict[str, Quantity] = {
    "layers": by_layer,
    "norm-test": of_norm_test,
    "inner-product": lambda m: proposed("inner_product_test", inner_product_test(m.whole), THETA),
    "orthogonality": lambda m: proposed("orthogonality_test", orthogonality_test(m.whole), NU),
    "cabs": lambda m: {"cabs_batch_size": cabs_batch_size(m.c2.value, m.loss, m.lr)},
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
    owners = [n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad]
    grad_squares = torch.stack([g.to(found.squares.dtype).square().sum() for g in found.grads])
    names = list(layers_of(model))
    shares = torch.stack([found.layers[name] for name in names]).cpu().double()  # [layers, 2, b]
    square_of = dict.fromkeys(names, 0.0)
    for owner, square in zip(owners, grad_squares.tolist(), strict=True):
        square_of[owner] += square
    layers = [
        Norms(squares, noise, square_of[name], population)
        for name, (squares, noise) in zip(names, shares, strict=True)
    ]
    both = found.squares.cpu().double(), found.noise.cpu().double()
    whole = Norms(*both, found.grad_square.item(), population)
    return Measured(whole, layers, c2, found.loss.item(), lr)
