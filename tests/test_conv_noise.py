"""Per-sample shares of a weight gradient, and of a normalisation's scale and shift, beside autograd
a sample in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastsmooth.kernels import backend
from fastsmooth.kernels import conv_noise as module
from fastsmooth.kernels.affine_grads import _affine_grads_native, affine_grads, affine_grads_ref
from fastsmooth.kernels.conv_noise import (
    _conv_noise_native,
    conv_noise,
    conv_noise_ref,
    conv_spread,
    conv_spread_ref,
)
from fastsmooth.kernels.row_noise import _row_noise_native, row_noise, row_noise_ref

native = pytest.mark.skipif(
    backend.choose(torch.device("cpu"), torch.float32) != "native",
    reason="there is no C++ compiler",
)
IMPLEMENTATIONS = [
    pytest.param(_conv_noise_native, id="native", marks=native),
    pytest.param(conv_noise_ref, id="reference"),
]
# B, C, H, W, outputs, kernel, stride, padding, dilation, groups
SHAPES = {
    "first layer": (3, 3, 9, 8, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "uneven": (5, 3, 9, 8, 7, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "one tile": (4, 16, 6, 6, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "overlapping tiles": (4, 43, 5, 5, 33, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "several pieces": (3, 96, 4, 4, 40, (5, 4), (1, 1), (2, 1), (1, 1), 1),
    "packed, several pieces": (3, 7, 14, 14, 19, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "one place": (3, 51, 5, 5, 13, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "groups": (3, 64, 5, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (3, 6, 5, 5, 12, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "padding beyond the image": (2, 16, 2, 2, 4, (3, 3), (1, 1), (4, 4), (1, 1), 1),
    "tokens": (3, 50, 7, 1, 11, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "few pixels": (3, 64, 2, 2, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def case(shape, dtype, channels_last=True):
    B, C, H, W, p, kernel, stride, padding, dilation, groups = shape
    torch.manual_seed(0)
    x, w = torch.randn(B, C, H, W, dtype=dtype), torch.randn(p, C // groups, *kernel, dtype=dtype)
    dy = torch.randn_like(F.conv2d(x, w, None, stride, padding, dilation, groups))
    if channels_last:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    return x, dy, tuple(map(list, (kernel, stride, padding, dilation))), groups


def exact(x, dy, rule, groups):
    """[B, P] in float64: autograd of one sample at a time."""
    kernel, *rest = rule
    weight = torch.zeros(
        dy.shape[1], x.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True
    )
    rows = []
    for xi, dyi in zip(x.double().split(1), dy.double().split(1), strict=True):
        rows.append(
            torch.autograd.grad(F.conv2d(xi, weight, None, *rest, groups), weight, dyi)[0].flatten()
        )
    return torch.stack(rows)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_shares_are_those_of_one_sample_at_a_time(implementation, shape, dtype, channels_last):
    x, dy, rule, groups = case(SHAPES[shape], dtype, channels_last)
    rows = exact(x, dy, rule, groups)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for noise in (True, False):
        found = implementation(x, dy, *rule, groups, noise)
        assert found.dw.dtype == dtype
        dw = rows.sum(0)
        assert (found.dw.double().flatten() - dw).norm() <= tolerance * dw.norm()
        assert torch.allclose(found.squares, rows.square().sum(1), rtol=tolerance)
        deviations = (
            (rows - rows.mean(0)).square().sum(1)
            if noise
            else torch.zeros(len(x), dtype=torch.float64)
        )
        assert torch.allclose(found.noise, deviations, rtol=tolerance)


@pytest.mark.parametrize("shape", ["several pieces", "first layer", "tokens"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_noise_of_a_thousandth_of_the_mean_keeps_its_digits(implementation, shape):
    """As ||g_i||^2 - ||mean||^2 it would have none in float32, where the rounding of a square is a
    tenth of it."""
    x, dy, rule, groups = case(SHAPES[shape], torch.float32)
    x = x[:1] * (1 + 1e-3 * torch.randn(len(x), 1, 1, 1))
    dy = dy[:1].expand_as(dy).clone()
    rows = exact(x, dy, rule, groups)
    deviations = (rows - rows.mean(0)).square().sum(1)
    assert (deviations < 1e-5 * rows.square().sum(1)).all()
    assert torch.allclose(implementation(x, dy, *rule, groups, True).noise, deviations, rtol=2e-3)


@native
def test_threads_change_no_bit():
    x, dy, rule, groups = case(SHAPES["several pieces"], torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(conv_noise(x, dy, *rule, groups))
    torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("noise", [True, False])
def test_the_reference_in_blocks_of_one_sample_is_the_same(monkeypatch, noise):
    x, dy, rule, groups = case(SHAPES["few pixels"], torch.float64)
    whole = conv_noise_ref(x, dy, *rule, groups, noise)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    for a, b in zip(whole, conv_noise_ref(x, dy, *rule, groups, noise), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_of_bfloat16_are_exact_and_their_sums_not_rounded_to_it(implementation):
    x, dy, rule, groups = case(SHAPES["groups"], torch.bfloat16)
    found, rows = implementation(x, dy, *rule, groups, True), exact(x, dy, rule, groups)
    assert found.dw.dtype == torch.float32
    dw = rows.sum(0)
    assert (found.dw.double().flatten() - dw).norm() <= 1e-6 * dw.norm()
    assert torch.allclose(found.squares, rows.square().sum(1), rtol=1e-6)
    assert torch.allclose(found.noise, (rows - rows.mean(0)).square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("shape", ["groups", "few pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_spread_is_the_sum_of_the_deviations(dtype, shape):
    x, dy, rule, groups = case(SHAPES[shape], dtype)
    rows = exact(x, dy, rule, groups)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for function in (conv_spread, conv_spread_ref):
        dw, total = function(x, dy, *rule, groups)
        assert dw.dtype == backend.buffer_dtype(dtype) and total.shape == ()
        assert (dw.double().flatten() - rows.sum(0)).norm() <= tolerance * rows.sum(0).norm()
        assert torch.allclose(total, (rows - rows.mean(0)).square().sum(), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["groups", "few pixels"])
def test_the_operator_is_registered_as_it_behaves(shape, dtype):
    x, dy, rule, groups = case(SHAPES[shape], dtype)
    given = (x, dy, *rule, groups)
    torch.library.opcheck(torch.ops.fastsmooth.conv_noise.default, (*given, True, "ieee"))
    torch.library.opcheck(torch.ops.fastsmooth.conv_spread.default, (*given, "ieee"))


# affine_grads

AFFINE = [
    pytest.param(_affine_grads_native, id="native", marks=native),
    pytest.param(affine_grads_ref, id="reference"),
]


@pytest.mark.parametrize("size", [(3, 4), (2, 12, 5, 6), (2, 4, 300, 3), (2, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("of_samples", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", AFFINE)
def test_scale_and_shift_have_the_gradients_of_autograd(implementation, dtype, of_samples, size):
    torch.manual_seed(0)
    x, dy = torch.randn(size, dtype=dtype) + 3, torch.randn(size, dtype=dtype)
    if len(size) == 4:
        x = x.to(memory_format=torch.channels_last)
    B, C = size[:2]
    mean, rstd = (
        torch.rand(B, 2, dtype=dtype) if of_samples else torch.rand(1, C, dtype=dtype)
        for _ in range(2)
    )
    weight = torch.ones(B, C, *[1] * (len(size) - 2), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros_like(weight, requires_grad=True)
    each = C // mean.shape[1]
    center, scale = (
        t.double().repeat_interleave(each, 1).view(-1, *weight.shape[1:]) for t in (mean, rstd)
    )
    y = (x.double() - center) * scale * weight + bias
    expected = torch.autograd.grad(y, (weight, bias), dy.double())
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    )
    for found, value in zip(implementation(x, dy, mean, rstd), expected, strict=True):
        assert found.dtype == torch.float64
        assert torch.allclose(found, value.view(B, C), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", AFFINE)
def test_scale_and_shift_of_layer_norm_have_the_gradients_of_autograd(implementation, dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 3, 5, 7, dtype=torch.float64).add_(3).to(dtype).unbind()
    _, mean, rstd = torch.native_layer_norm(x, [7], None, None, 1e-5)
    weight, bias = (torch.ones(3, 1, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = F.layer_norm(x.double(), [7]) * weight + bias
    expected = torch.autograd.grad(y, (weight, bias), dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for found, value in zip(implementation(x.mT, dy.mT, mean.mT, rstd.mT), expected, strict=True):
        torch.testing.assert_close(found, value.view(3, 7), rtol=tolerance, atol=tolerance)


# row_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 1), (5, 300), (33, 7), (64, 1030)], ids=str)
@pytest.mark.parametrize(
    "implementation",
    [pytest.param(_row_noise_native, id="native", marks=native), pytest.param(row_noise_ref)],
)
def test_rows_have_sum_squares_and_noise_of_float64(implementation, size, dtype):
    """Of a noise that is a thousandth of the mean."""
    torch.manual_seed(0)
    G = (torch.randn(size[1]) + 1e-3 * torch.randn(size)).to(dtype)
    total, squares, noise = implementation(G, True)
    wide = G.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total, wide.sum(0).to(dtype), rtol=2 * eps, atol=0)
    torch.testing.assert_close(squares, wide.square().sum(1), rtol=64 * eps, atol=0)
    away = (wide - wide.mean(0)).square().sum(1)
    torch.testing.assert_close(noise, away, rtol=64 * eps, atol=1e-30)
    assert not implementation(G, False).noise.any()


def test_the_operator_of_rows_is_registered_as_it_behaves():
    torch.library.opcheck(torch.ops.fastsmooth.row_noise.default, (torch.randn(4, 9), True))
    found = row_noise(torch.randn(9, 4).mT)  # in another order of memory
    assert found.total.shape == (9,) and found.noise.shape == (4,)
    assert row_noise(torch.ones(3, 0)).squares.tolist() == [0, 0, 0]


def test_the_operator_of_scale_and_shift_is_registered_as_it_behaves():
    x, dy, mean, rstd = (
        torch.randn(2, 4, 3, 3),
        torch.randn(2, 4, 3, 3),
        torch.rand(2, 2),
        torch.rand(2, 2),
    )
    torch.library.opcheck(torch.ops.fastsmooth.affine_grads.default, (x, dy, mean, rstd))
    low = affine_grads(x.bfloat16(), dy.bfloat16(), mean, rstd)[0]
    assert torch.allclose(low, affine_grads(x, dy, mean, rstd)[0], rtol=0.1, atol=0.1)
