"""The Triton kernels of per-sample shares, in Triton's interpreter where there is no GPU, beside
autograd a sample in float64.

Operands lie amid NaN, and torch.empty gives NaN: what is read beyond them, or forgotten, shows.
"""

import math

import numpy as np
import pytest
import torch
from implementations import DEVICE, needs_triton
from test_conv_noise import exact
from torch.nn import functional as F

from fastsmooth.kernels import backend, conv_noise, conv_tile
from fastsmooth.kernels.aot_shares import LAYERS, layer
from fastsmooth.kernels.row_noise import _row_noise_triton, row_noise_ref

try:
    import triton
    from triton.runtime import interpreter
except ImportError:  # no triton outside Linux: nothing here runs there
    triton = None

EPS = torch.finfo(torch.float32).eps / 2  # what a rounding changes, at most
LOW = torch.finfo(torch.bfloat16).eps / 2

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_memory")]
# B, C, H, W, outputs, kernel, stride, padding, dilation, groups
SHAPES = {
    "first layer": (3, 3, 9, 8, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "uneven, few channels": (5, 3, 9, 8, 18, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "more columns than a tile": (2, 5, 9, 7, 33, (5, 4), (2, 2), (1, 2), (1, 1), 1),
    "uneven": (3, 20, 7, 9, 24, (1, 2), (2, 1), (0, 1), (1, 2), 1),
    "whole tiles": (4, 16, 8, 8, 16, (2, 1), (1, 1), (1, 0), (2, 1), 1),
    "several tiles": (2, 40, 6, 4, 72, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "groups": (3, 32, 5, 5, 40, (1, 3), (1, 1), (0, 1), (1, 1), 2),
    "three groups": (2, 48, 5, 5, 48, (1, 2), (2, 2), (0, 0), (1, 1), 3),
    "one place": (5, 24, 8, 8, 18, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "several blocks": (3, 16, 9, 10, 17, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one pixel": (6, 40, 1, 1, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "four pixels": (3, 17, 4, 4, 20, (3, 2), (2, 2), (1, 0), (1, 1), 1),
    "13 tokens": (3, 24, 13, 1, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one sample": (1, 16, 4, 4, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


SPLITS = conv_tile.splits


@pytest.fixture(autouse=True)
def two_splits(monkeypatch):
    """Few programs: the interpreter takes long to begin one."""

    def splits(layer, cut, samples, mode):
        return max(1, min(2, samples // 2 if mode == conv_tile.SPREAD else samples))

    monkeypatch.setattr(conv_tile, "splits", splits)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """By which precisions tl.dot was asked to multiply. The interpreter multiplies bfloat16 by the
    integers that its bits are: here as what it is."""
    asked = set()
    if DEVICE.type == "cpu":
        builder = interpreter.InterpreterBuilder
        plain = builder.create_dot

        def widened(operand):
            if operand.dtype.scalar != triton.language.bfloat16:
                return operand
            bits = operand.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

        def create_dot(self, a, b, d, precision, most):
            asked.add(precision.name.lower())
            return plain(self, widened(a), widened(b), d, precision, most)

        monkeypatch.setattr(builder, "create_dot", create_dot)
    return asked


def amid_nan(values, dtype):
    """The same [B, ...], channels-last, between NaN."""
    B, C, H, W = values.shape
    memory = torch.full((B + 2, H, W, C), math.nan, dtype=dtype, device=DEVICE)
    memory[1:-1] = values.permute(0, 2, 3, 1).to(DEVICE, dtype)
    return memory[1:-1].permute(0, 3, 1, 2)


def case(name, dtype=torch.float32, spread=None):
    """(x, dy, rule, groups); with `spread`, samples are the first one, with so much noise."""
    B, C, H, W, p, kernel, stride, padding, dilation, groups = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=generator)
    sizes = F.conv2d(x, torch.zeros(p, C // groups, *kernel), None, stride, padding, dilation,
                     groups).shape  # fmt: skip
    dy = torch.randn(sizes, generator=generator)
    if spread is not None:
        x, dy = (t[:1] + spread * torch.randn(t.shape, generator=generator) for t in (x, dy))
    rule = tuple(map(list, (kernel, stride, padding, dilation)))
    return amid_nan(x, dtype), amid_nan(dy, dtype), rule, groups


def rows_of(x, dy, rule, groups):
    """float64 [B, P] on the CPU."""
    return exact(x.cpu(), dy.cpu(), rule, groups)


def distances(rows):
    return (rows - rows.mean(0)).square().sum(1)


def relative(found, expected):
    """The largest error over the largest value."""
    found = found.detach().cpu().double().reshape(expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rounding(x, dy):
    """How far a float32 sum over T pixels may be off, relative to sum |dy| |x|: T roundings."""
    return (dy.shape[2] * dy.shape[3] + 2) * EPS


ways = pytest.mark.parametrize("way", ["norms", "deviations", "rows"])


def shares(way, monkeypatch, x, dy, rule, groups, precision="ieee"):
    monkeypatch.setattr(conv_tile, "ROW_PIXELS", 0 if way == "rows" else 1 << 30)
    return conv_noise._conv_noise_triton(x, dy, *rule, groups, way != "norms", precision)


@ways
@pytest.mark.parametrize("name", SHAPES)
def test_shares_are_those_of_one_sample_at_a_time(way, name, monkeypatch):
    x, dy, rule, groups = case(name)
    rows = rows_of(x, dy, rule, groups)
    found = shares(way, monkeypatch, x, dy, rule, groups)
    assert found.dw.dtype == torch.float32 and found.squares.dtype == torch.float64
    assert found.dw.is_contiguous(memory_format=torch.channels_last) or found.dw.shape[2:] == (1, 1)
    # products of normal numbers with random signs: their sum is not far below sum |dy| |x|
    bound = 4 * rounding(x, dy)
    assert relative(found.dw, rows.sum(0)) <= bound
    assert relative(found.squares, rows.square().sum(1)) <= bound
    if way == "norms":
        assert not found.noise.any()
    elif len(x) == 1:
        assert found.noise[0] <= (bound * rows.norm()) ** 2
    else:
        assert relative(found.noise, distances(rows)) <= bound


@pytest.mark.parametrize("name", SHAPES)
def test_the_spread_is_the_sum_of_all_distances(name):
    x, dy, rule, groups = case(name)
    rows = rows_of(x, dy, rule, groups)
    dw, total = conv_noise._conv_spread_triton(x, dy, *rule, groups)
    bound = 4 * rounding(x, dy)
    assert total.dtype == torch.float64 and total.shape == () and dw.dtype == torch.float32
    assert relative(dw, rows.sum(0)) <= bound
    expected = distances(rows).sum()
    assert abs(total.cpu() - expected) <= bound * (expected + bound * rows.square().sum())
    plain = conv_noise.conv_spread_ref(x, dy, *rule, groups)
    assert relative(plain[0], rows.sum(0)) <= bound
    assert abs(plain[1].cpu() - expected) <= bound * (expected + bound * rows.square().sum())


@pytest.mark.parametrize("way", ["deviations", "rows", "spread"])
@pytest.mark.parametrize("name", ["first layer", "whole tiles", "groups", "13 tokens"])
def test_noise_of_a_thousandth_of_the_mean_keeps_its_digits(way, name, monkeypatch):
    """A share is rounded to T eps of the mean, which moves a distance r of it by T eps / r and the
    square by twice as much; a difference of squares would be off by eps / r^2."""
    x, dy, rule, groups = case(name, spread=5e-4)
    rows = rows_of(x, dy, rule, groups)
    expected = distances(rows)
    r = (expected.mean() / rows.mean(0).square().sum()).sqrt().item()
    assert 1e-4 < r < 2e-3
    bound = 2 * rounding(x, dy) / r
    assert bound < EPS / r**2
    if way == "spread":
        total = conv_noise._conv_spread_triton(x, dy, *rule, groups)[1].cpu()
        assert abs(total - expected.sum()) <= bound * expected.sum()
    else:
        found = shares(way, monkeypatch, x, dy, rule, groups)
        assert relative(found.noise, expected) <= bound
        assert relative(found.squares, rows.square().sum(1)) <= 4 * rounding(x, dy)


@pytest.mark.parametrize(
    "where, value", [("x", math.nan), ("x", -math.inf), ("dy", math.nan), ("dy", math.inf)]
)
@pytest.mark.parametrize("name", ["one pixel", "several blocks"])
def test_a_sample_that_is_not_finite_is_seen(name, where, value, monkeypatch):
    """And the norms of the others are not touched, where no mean is begun from."""
    x, dy, rule, groups = case(name)
    clean = rows_of(x, dy, rule, groups).square().sum(1)
    bad = 1
    operand = x if where == "x" else dy
    operand[bad, -1, -1, -1] = value
    others = [i for i in range(len(x)) if i != bad]
    for way in ("norms", "deviations", "rows"):
        found = shares(way, monkeypatch, x, dy, rule, groups)
        assert not found.squares[bad].isfinite() and not found.dw.isfinite().all()
        if way == "norms":
            assert not found.noise.any()
        else:
            assert not found.noise.isfinite().any()
        if way != "deviations":
            assert relative(found.squares[others], clean[others]) <= 4 * rounding(x, dy)
    dw, total = conv_noise._conv_spread_triton(x, dy, *rule, groups)
    assert not total.isfinite() and not dw.isfinite().all()


@pytest.mark.parametrize("name", ["first layer", "whole tiles", "one place", "one pixel"])
def test_products_of_bfloat16_are_exact(name, monkeypatch):
    x, dy, rule, groups = case(name, torch.bfloat16)
    rows = rows_of(x, dy, rule, groups)
    bound = 4 * rounding(x, dy)
    for way in ("norms", "rows", "deviations"):
        found = shares(way, monkeypatch, x, dy, rule, groups)
        assert found.dw.dtype == torch.float32
        assert relative(found.dw, rows.sum(0)) <= bound
        assert relative(found.squares, rows.square().sum(1)) <= bound
        if way == "rows":
            assert relative(found.noise, distances(rows)) <= bound
    # of deviations: the mean is rounded to bfloat16 twice at the most
    expected = distances(rows)
    assert relative(found.noise.sum(), expected.sum()) <= bound
    rest = 2 * LOW * rows.mean(0).norm()
    assert ((found.noise.cpu() - expected).abs() <= 2 * rest * expected.sqrt()).all()
    dw, total = conv_noise._conv_spread_triton(x, dy, *rule, groups)
    assert dw.dtype == torch.float32
    assert relative(total, expected.sum()) <= bound


def test_a_mean_that_is_a_little_off_changes_no_sum(monkeypatch):
    """As cuDNN's is where it rounds operands otherwise."""
    x, dy, rule, groups = case("whole tiles")
    rows = rows_of(x, dy, rule, groups)
    own = conv_noise.weight_gradient
    monkeypatch.setattr(conv_noise, "weight_gradient", lambda *given: 1.01 * own(*given))
    found = shares("deviations", monkeypatch, x, dy, rule, groups)
    bound = 4 * rounding(x, dy)
    assert relative(found.dw, rows.sum(0)) <= bound
    assert relative(found.squares, rows.square().sum(1)) <= bound
    assert relative(found.noise.sum(), distances(rows).sum()) <= bound


def test_the_same_samples_have_no_noise(monkeypatch):
    x, dy, rule, groups = case("whole tiles", torch.bfloat16, spread=0.0)
    mean = rows_of(x, dy, rule, groups).mean(0).square().sum()
    for way in ("deviations", "rows"):
        found = shares(way, monkeypatch, x, dy, rule, groups)
        assert (found.noise >= 0).all()
        assert (found.noise <= (rounding(x, dy) ** 2 + EPS) * mean).all()
    total = conv_noise._conv_spread_triton(x, dy, *rule, groups)[1]
    assert 0 <= total <= len(x) * rounding(x, dy) ** 2 * mean


def test_operands_in_the_order_of_pytorch_are_taken_too(monkeypatch):
    x, dy, rule, groups = case("groups")
    a, b = (
        shares("norms", monkeypatch, t, s, rule, groups)
        for t, s in ((x, dy), (x.contiguous(), dy.contiguous()))
    )
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a compiled kernel tells nothing")
@pytest.mark.parametrize("precision", conv_tile.PRECISIONS)
def test_the_precision_that_is_asked_for_is_that_of_the_products(precision, products, monkeypatch):
    x, dy, rule, groups = case("one place")
    for way in ("norms", "deviations", "rows"):
        shares(way, monkeypatch, x, dy, rule, groups, precision)
        assert products == {precision}
        products.clear()
    conv_noise._conv_spread_triton(x, dy, *rule, groups, precision)
    assert products == {precision}


@pytest.mark.parametrize("samples", [1, 2, 7, 128, 1000])
@pytest.mark.parametrize("mode", [conv_tile.NORMS, conv_tile.NOISE, conv_tile.SPREAD])
@pytest.mark.parametrize("layer", [*LAYERS.values(), layer(256, 256, 8)])
def test_samples_are_split_as_memory_allows_and_programs_are_enough(layer, mode, samples):
    cut = conv_tile.tile(layer, torch.bfloat16, "ieee", mode)
    found, tiles = SPLITS(layer, cut, samples, mode), cut.count(layer)
    assert 1 <= found <= samples
    if found > 1:
        assert 4 * found * layer.weights <= conv_tile.PARTIAL_BYTES
        assert mode != conv_tile.SPREAD or 2 * found <= samples
        assert tiles * found <= 4 * 264
    most = samples // 2 if mode == conv_tile.SPREAD else samples
    if samples >= 128 and 8 * found * layer.weights <= conv_tile.PARTIAL_BYTES:
        assert tiles * found >= min(100, 0.9 * most)


# Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (2, 65), (33, 7), (64, 130), (100, 64)], ids=str)
def test_rows_have_the_noise_of_float64(size, dtype):
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((size[0] + 2, size[1]), math.nan, dtype=dtype, device=DEVICE)
    mean, noise = (torch.randn(n, generator=generator) for n in ((1, size[1]), size))
    memory[1:-1] = (mean + 1e-3 * noise).to(DEVICE)
    G = memory[1:-1]
    found, expected = _row_noise_triton(G, True), row_noise_ref(G.cpu())
    assert not _row_noise_triton(G, False).noise.any()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        # a deviation of 1e-3 is exact to one rounding; a row has 64 of them a program
        torch.testing.assert_close(ours.cpu(), theirs, rtol=32 * EPS, atol=1e-30)


# The choice


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda device, dtype: "triton")


@pytest.mark.parametrize("noise", [True, False])
def test_the_operator_runs_the_kernel_where_it_fits(as_on_a_gpu, noise, monkeypatch):
    x, dy, rule, groups = case("one place")
    direct = conv_noise._conv_noise_triton(x, dy, *rule, groups, noise)
    monkeypatch.setitem(conv_noise.IMPLEMENTATIONS, "reference", None)
    found = conv_noise.conv_noise(x, dy, *rule, groups, noise, precision="tf32")
    assert (
        all(torch.equal(a, b) for a, b in zip(found, direct, strict=True)) or DEVICE.type != "cpu"
    )
    torch.library.opcheck(
        torch.ops.fastsmooth.conv_noise.default, (x, dy, *rule, groups, noise, "ieee")
    )
    torch.library.opcheck(torch.ops.fastsmooth.conv_spread.default, (x, dy, *rule, groups, "ieee"))


@pytest.mark.parametrize(
    "size, outputs, groups, dtypes, reason",
    [
        ((2, 32, 4, 4), 32, 1, ("float32", "float32"), ""),
        ((2, 3, 4, 4), 5, 1, ("bfloat16", "bfloat16"), ""),
        ((2, 64, 4, 4), 32, 2, ("float32", "float32"), ""),
        ((2, 32, 4, 4), 32, 32, ("float32", "float32"), "fewer than 16 channels a group"),
        ((2, 64, 4, 4), 16, 2, ("float32", "float32"), "fewer than 16 channels a group"),
        ((2, 32, 4, 4), 32, 1, ("float64", "float64"), "float64"),
        ((2, 32, 4, 4), 32, 1, ("float32", "bfloat16"), "operands of two dtypes"),
        ((0, 32, 4, 4), 32, 1, ("float32", "float32"), "no values"),
        ((1, 2**15, 256, 256), 32, 1, ("bfloat16", "bfloat16"), "2^31 values"),
        ((1, 2**16, 1, 1), 2**15, 1, ("float32", "float32"), "2^31 values"),
    ],
)
def test_what_the_kernel_does_not_take_is_said_in_words(
    as_on_a_gpu, size, outputs, groups, dtypes, reason
):
    x, dy = (
        torch.empty(size[0], channels, *size[2:], dtype=getattr(torch, dtype), device="meta")
        for channels, dtype in zip((size[1], outputs), dtypes, strict=True)
    )
    found = conv_noise.unfit(x, dy, [1, 1], groups)
    assert found.startswith(reason) and bool(found) == bool(reason)
    chosen = conv_noise.implementation(x, dy, [1, 1], groups)
    assert chosen == ("reference" if reason else "triton")


def test_an_unknown_precision_is_refused():
    x, dy, rule, groups = case("one pixel")
    for function in (conv_noise.conv_noise, conv_noise.conv_spread):
        with pytest.raises(ValueError, match="'bf16': choose from ieee, tf32, tf32x3"):
            function(x, dy, *rule, groups, precision="bf16")
