"""The Triton kernel of a normalisation's scale and shift, in Triton's interpreter where there is no
GPU, beside float64. test_conv_noise.py has the other implementations.

Operands lie amid NaN, and torch.empty gives NaN: what is read beyond them, or forgotten, shows.
"""

import math

import pytest
import torch
from implementations import DEVICE, needs_triton

from fastsmooth.kernels import affine_grads as kernel
from fastsmooth.kernels import backend

EPS = torch.finfo(torch.float32).eps / 2
SIZES = [(3, 4), (2, 12, 5, 6), (2, 4, 300, 3), (2, 6, 1, 1), (3, 70, 33), (2, 3, 40, 41)]

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_memory")]


def amid_nan(values, dtype, channels_last):
    """The same [B, C, ...], in this order of memory, between NaN."""
    moved = values.movedim(1, -1) if channels_last else values
    memory = torch.full((len(moved) + 2, *moved.shape[1:]), math.nan, dtype=dtype, device=DEVICE)
    memory[1:-1] = moved.to(DEVICE, dtype)
    return memory[1:-1].movedim(-1, 1) if channels_last else memory[1:-1]


def case(size, of_samples, dtype=torch.float32, orders=(True, True)):
    """(x, dy, mean, rstd)."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *size, generator=generator)
    shape = (size[0], 2 if size[1] % 2 == 0 else 1) if of_samples else (1, size[1])
    mean, rstd = torch.rand(2, *shape, generator=generator)
    operands = [amid_nan(t, dtype, o) for t, o in zip((x + 3, dy), orders, strict=True)]
    return *operands, mean.to(DEVICE), rstd.to(DEVICE)


def expected(x, dy, mean, rstd):
    """(dw, db, of each the sum of the absolute values of what is added) in float64, on the CPU."""
    x, dy, mean, rstd = (t.cpu().double() for t in (x, dy, mean, rstd))
    B, C = x.shape[:2]
    center, scale = (t.repeat_interleave(C // t.shape[1], 1).view(-1, C, 1) for t in (mean, rstd))
    slopes = dy.reshape(B, C, -1)
    products = slopes * (x.reshape(B, C, -1) - center) * scale
    sums = products.sum(2), slopes.sum(2)
    return *sums, products.abs().sum(2), slopes.abs().sum(2)


def assert_right(found, given):
    """A value is rounded three times before it is added, and a thread adds up to 16 of those that
    a program has at a time, SPAN / 16 times."""
    dw, db, of_dw, of_db = expected(*given)
    for ours, exact, size in zip(found, (dw, db), (of_dw, of_db), strict=True):
        assert ours.dtype == torch.float64 and ours.shape == exact.shape
        assert ((ours.cpu() - exact).abs() <= 16 * EPS * size).all()


@pytest.mark.parametrize("orders", [(True, True), (False, False), (True, False)], ids=str)
@pytest.mark.parametrize("of_samples", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scale_and_shift_have_the_gradients_of_float64(size, dtype, of_samples, orders):
    given = case(size, of_samples, dtype, orders)
    assert_right(kernel._affine_grads_triton(*given), given)


@pytest.mark.parametrize("channels_last", [True, False])
def test_many_pixels_are_shared_by_programs(channels_last, monkeypatch):
    monkeypatch.setattr(kernel, "SPAN", 64)
    given = case((2, 20, 15, 13), True, orders=(channels_last, channels_last))
    found = kernel._affine_grads_triton(*given)
    assert_right(found, given)
    again = kernel._affine_grads_triton(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 12, 30), (3, 70, 33), (2, 5, 1), (2, 3, 1500)], ids=str)
def test_tokens_may_have_statistics_of_their_own(size, dtype, channels_last):
    """As LayerNorm's."""
    x, dy, *_ = case(size, True, dtype, (channels_last, channels_last))
    generator = torch.Generator().manual_seed(1)
    mean, rstd = torch.rand(2, size[0], 1, size[2], generator=generator).to(DEVICE)
    found = kernel._affine_grads_triton(x, dy, mean, rstd)
    wide = [t.cpu().double() for t in (x, dy, mean, rstd)]
    products = wide[1] * (wide[0] - wide[2]) * wide[3]
    for ours, terms in zip(found, (products, wide[1]), strict=True):
        assert ((ours.cpu() - terms.sum(2)).abs() <= 16 * EPS * terms.abs().sum(2)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_seen_in_its_sample_and_channel(value):
    given = case((3, 6, 5, 4), False)
    x, dy, *_ = given
    x[1, 2, -1, -1], dy[2, 3, 0, 0] = value, value
    dw, db = (~t.isfinite() for t in kernel._affine_grads_triton(*given))
    assert dw.nonzero().tolist() == [[1, 2], [2, 3]] and db.nonzero().tolist() == [[2, 3]]


def test_the_operator_runs_the_kernel_where_it_fits(monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda device, dtype: "triton")
    given = case((2, 4, 3, 3), True)
    direct = kernel._affine_grads_triton(*given)
    with monkeypatch.context() as only:
        only.setitem(kernel.IMPLEMENTATIONS, "reference", None)
        found = kernel.affine_grads(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))
    wide = [t.double() for t in given]
    for found, exact in zip(kernel.affine_grads(*wide), expected(*given), strict=False):
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-12, atol=1e-12)
    assert not kernel.fits("triton", *given[:2], *wide[2:])
    assert not kernel.fits("triton", given[0].bfloat16(), *given[1:])
    assert not kernel.fits("triton", *(t[:0] for t in given))
