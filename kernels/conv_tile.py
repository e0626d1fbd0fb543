"""Every sample's share of a convolution's weight gradient, tile by tile: what conv_noise.py runs on
a GPU.

    g_i = sum_t dy_it (x) x_i(t),   [p, d],   d = kh kw C

A program owns a tile [BP, BD] of the weight, BD channels of one tap of the kernel, and a range of
the samples. It runs over the pixels of a sample with tl.dot, does with the share what the mode
says, and begins the next one. What it stores, by mode:

    NORMS   ||g_i||^2 of each row of the tile, and sum_i g_i over its samples
    NOISE   with a mean m that is given, where the accumulator begins at -m: ||g_i - m||^2 and
            <g_i - m, m> of each row, and sum_i (g_i - m)
    ROWS    g_i
    SPREAD  c = g_first, from which the others are counted: c, E = sum_i (g_i - c) and
            Q = sum_i ||g_i - c||^2 of each row

Where there are fewer than 16 channels a tile holds columns (tap, channel) of any taps; where there
are fewer than 16 pixels a share is a sum of outer products, without tl.dot. Sums are in float32,
whatever the operands are. There are no atomics: how samples and tiles are shared out follows from
the sizes alone, and what programs store is added in float64, in a fixed order.

All sizes but the number of samples are constants of the compiled code, a kernel a layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None

NORMS, NOISE, ROWS, SPREAD = range(4)
OLDEST = (8, 0)  # compute capability
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of products of float32, by tl.dot's names

JOINED = 256  # weights of a program that joins what splits have summed
LEAST = 16  # channels of a tap, or pixels, for which tl.dot is worth its padding
# Of an H100. A device is not asked for its own number, by which sums would differ between devices.
MULTIPROCESSORS = 132
WAVES = 4  # how many times all of them are filled, at most
ROW_PIXELS, ROW_BYTES = 512, 64 << 20
PARTIAL_BYTES = 10 << 20  # of sums over samples, of all programs together


class Layer(NamedTuple):
    """A convolution's sizes; those of channels are of one group."""

    C: int
    p: int
    groups: int
    H: int
    W: int
    OH: int
    OW: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def T(self) -> int:
        return self.OH * self.OW

    @property
    def d(self) -> int:
        return self.C * self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        return self.groups * self.p * self.d


def stores_rows(layer: Layer, samples: int) -> bool:
    """Whether deviations are taken from stored shares: where pixels are many and weights few, a
    share costs more to compute a second time than to read."""
    return layer.T >= ROW_PIXELS and 4 * samples * layer.weights <= ROW_BYTES


def layer_of(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Layer:
    """Of x [B, C, H, W] and dy [B, p, OH, OW]."""
    channels = x.shape[1] // groups, dy.shape[1] // groups, groups
    pairs = [(high, wide) for high, wide in (kernel, stride, padding, dilation)]
    return Layer(*channels, *x.shape[2:], *dy.shape[2:], *pairs)


def unfit(x: Tensor, dy: Tensor, kernel: list[int], groups: int) -> str:
    """Why x [B, C, H, W] and dy [B, p, OH, OW] are not for this kernel, in a few words; empty where
    they are. Tensors on the device meta will do."""
    channels = min(x.shape[1], dy.shape[1]) // groups
    weights = x.shape[1] // groups * dy.shape[1] * kernel[0] * kernel[1]
    if x.dtype != dy.dtype:
        return "operands of two dtypes"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return str(x.dtype).removeprefix("torch.")
    if groups > 1 and channels < LEAST:
        return f"fewer than {LEAST} channels a group"
    if not x.numel() or not dy.numel():
        return "no values"
    if max(x[0].numel(), dy[0].numel(), weights) >= 2**31:
        return "2^31 values of a sample or weights"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < OLDEST:
        return "a GPU without bfloat16 and TF32"
    return ""


class Tile(NamedTuple):
    """How a launch cuts the weight, and the pixels of a sample."""

    BP: int
    BD: int
    BK: int
    decoded: bool  # columns are of any taps
    many: int  # samples a trip, where each is one block of pixels
    warps: int
    stages: int

    def columns(self, layer: Layer) -> int:
        """How many tiles are side by side."""
        taps = layer.kernel[0] * layer.kernel[1]
        if self.decoded:
            return -(-layer.d // self.BD)
        return taps * -(-layer.C // self.BD)

    def count(self, layer: Layer) -> int:
        """How many tiles a group has."""
        return -(-layer.p // self.BP) * self.columns(layer)


def power_of_two(size: int, most: int) -> int:
    """The least that is not below the size, from 16 on; at most `most`."""
    return min(max(1 << (size - 1).bit_length(), 16), most)


def width(size: int, most: int) -> int:
    """The largest tile side of which at most a third more than the size is covered."""
    sides = [side for side in (128, 64, 32, 16) if side <= most]
    return next((side for side in sides if 3 * (-(-size // side) * side) <= 4 * size), 16)


def tile(layer: Layer, dtype: torch.dtype, precision: str, mode: int) -> Tile:
    """For operands of this dtype. In registers together are an accumulator, what it begins at and
    the sum over samples, with 8 warps 32 values a thread of each where a tile is 64 x 128; NORMS,
    which begins at zero, has room for 128 x 128. Columns of any taps each have an address of their
    own."""
    low, T = dtype == torch.bfloat16, layer.T
    plain = T < LEAST or (not low and precision == "ieee")  # no tensor cores
    decoded = layer.C < LEAST
    side = 128 if not plain and (low or precision == "tf32") else 64
    # three products of TF32 have both parts of their operands in registers
    few = not low and precision == "tf32x3" and mode in (NOISE, SPREAD)
    BK = power_of_two(T, 64 if low else 16 if few else 32)
    BD = power_of_two(layer.d, 32) if decoded else width(layer.C, side)
    large = mode == NORMS and BD == 128 and BK >= 32
    BP = width(layer.p, 128) if large else power_of_two(layer.p, 64)
    many = 2 if low and BK == T == 16 and mode != SPREAD else 1
    warps = 8 if plain or BP * BD > 64 * 64 else 4
    stages = 2 if plain or decoded else 4 if T == BK == 16 else 3
    return Tile(BP, BD, BK, decoded, many, warps, stages)


def splits(layer: Layer, cut: Tile, samples: int, mode: int) -> int:
    """Into how many ranges a launch divides the samples: the fewest with which multiprocessors are
    hardly ever without a program, of the large tiles one at a time, of the others two."""
    tiles = cut.count(layer) * layer.groups
    places = MULTIPROCESSORS * (1 if cut.BP * cut.BD > 64 * 64 else 2)
    # of two samples at least, one is what the other is counted from
    most = samples // 2 if mode == SPREAD else samples
    if mode != ROWS:
        most = min(most, PARTIAL_BYTES // (4 * layer.weights))
    most = max(1, min(most, WAVES * places // tiles))
    times = {parts: -(-tiles * parts // places) / parts for parts in range(1, most + 1)}
    return next(parts for parts, time in times.items() if time <= 1.05 * min(times.values()))


if triton:

    @triton.jit
    @no_type_check
    def _add_block(
        acc, x, dy, k, p, c, kh, kw, p_in, d_in,
        H: tl.constexpr, W: tl.constexpr, OW: tl.constexpr, T: tl.constexpr,
        CT: tl.constexpr, PT: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
        BK: tl.constexpr, whole: tl.constexpr, precision: tl.constexpr,
    ):  # fmt: skip
        """acc + what pixels k BK and on add to a sample's share. kh and kw are where a tap's first
        pixel lies: of the tile, or of each column."""
        if T < 16:
            for t in tl.static_range(T):
                h, w = t // OW * SH + kh, t % OW * SW + kw
                ok = ((h >= 0) & (h < H) & (w >= 0) & (w < W)) & d_in[None, :]
                xs = tl.load(x + (h * W + w) * CT + c[None, :], mask=ok, other=0.0)
                ys = tl.load(dy + t * PT + p, mask=p_in, other=0.0)
                acc += ys.to(tl.float32)[:, None] * xs.to(tl.float32)
        else:
            t = k * BK + tl.arange(0, BK)
            h, w = (t // OW * SH)[:, None] + kh, (t % OW * SW)[:, None] + kw
            ok = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = dy + t[:, None] * PT + p[None, :]
            if whole:
                ys = tl.load(at)
            else:
                ok = ok & (t < T)[:, None] & d_in[None, :]
                ys = tl.load(at, mask=(t < T)[:, None] & p_in[None, :], other=0.0)
            xs = tl.load(x + (h * W + w) * CT + c[None, :], mask=ok, other=0.0)
            acc = tl.dot(tl.trans(ys), xs, acc, input_precision=precision)
        return acc

    @triton.jit
    @no_type_check
    def _keep(acc, origin, total, q, rows, inside, sums, other, mode: tl.constexpr):
        """(total, q) after a share, of which rows or sums of rows are stored."""
        if mode == 2:  # ROWS
            tl.store(rows, acc, mask=inside)
        else:
            total += acc
            squares = tl.sum(acc * acc, axis=1)
            if mode == 3:  # SPREAD
                q += squares
            else:
                tl.store(sums, squares)
            if mode == 1:  # NOISE
                tl.store(other, -tl.sum(acc * origin, axis=1))
        return total, q

    @triton.jit(do_not_specialize=["B"])
    @no_type_check
    def _conv_tile_kernel(
        x,  # [B, H, W, GROUPS C]
        dy,  # [B, OH, OW, GROUPS P]
        start,  # float32 [GROUPS, P, D], the mean of NOISE; [splits, ...], c of SPREAD, written
        out,  # float32 [splits, GROUPS, P, D], sums over samples; [B, ...], g_i of ROWS
        # float32 [GROUPS, tiles, B or splits, BP]; and once more for the products of NOISE
        sums,
        B,
        C: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr,
        H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
        KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
        PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
        mode: tl.constexpr, precision: tl.constexpr,
        BP: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, decoded: tl.constexpr,
        many: tl.constexpr, stages: tl.constexpr,
    ):  # fmt: skip
        CT: tl.constexpr = GROUPS * C
        PT: tl.constexpr = GROUPS * P
        D: tl.constexpr = KH * KW * C
        T: tl.constexpr = OH * OW
        BLOCKS: tl.constexpr = (T + BK - 1) // BK
        PER_TAP: tl.constexpr = (C + BD - 1) // BD
        COLUMNS: tl.constexpr = (D + BD - 1) // BD if decoded else KH * KW * PER_TAP
        whole: tl.constexpr = T % BK == 0 and P % BP == 0 and (D if decoded else C) % BD == 0
        tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        tiles, parts = tl.num_programs(0), tl.num_programs(1)
        # offsets may pass 2^31; the interpreter's loops count in Python's numbers, which have no
        # method `to`
        zero = tile.to(tl.int64) * 0
        p = tile // COLUMNS * BP + tl.arange(0, BP)
        p_in = p < P
        column = tile % COLUMNS
        if decoded:
            d = column * BD + tl.arange(0, BD)
            d_in = d < D
            c = d % C
            kh, kw = (d // C // KW * DH - PH)[None, :], (d // C % KW * DW - PW)[None, :]
        else:
            tap = column // PER_TAP
            c = column % PER_TAP * BD + tl.arange(0, BD)
            d_in = c < C
            d = tap * C + c
            kh, kw = tap // KW * DH - PH, tap % KW * DW - PW
        inside = p_in[:, None] & d_in[None, :]
        at = (zero + group) * P * D + p[:, None] * D + d[None, :]
        x += group * C
        dy += group * P
        begin, end = B * split // parts, B * (split + 1) // parts

        # what an accumulator begins at: less what the shares are counted from
        origin = tl.zeros([BP, BD], tl.float32)
        if mode == 1:  # NOISE
            origin = -tl.load(start + at, mask=inside, other=0.0)
        if mode == 3:  # SPREAD
            i = zero + begin
            c0 = origin
            for k in tl.range(0, BLOCKS, num_stages=stages):
                c0 = _add_block(
                    c0, x + i * H * W * CT, dy + i * T * PT, k, p, c, kh, kw, p_in, d_in,
                    H, W, OW, T, CT, PT, SH, SW, BK, whole, precision,
                )  # fmt: skip
            tl.store(start + (zero + split) * GROUPS * P * D + at, c0, mask=inside)
            origin = -c0
            begin += 1
        total = tl.zeros([BP, BD], tl.float32)
        q = tl.zeros([BP], tl.float32)
        first = sums + (zero + group * tiles + tile) * B * BP + tl.arange(0, BP)
        half = (zero + GROUPS) * tiles * B * BP
        if BLOCKS == 1:
            groups_end = begin + (end - begin) // many * many
            for trip in tl.range(begin, groups_end, many, num_stages=stages):
                for j in tl.static_range(many):
                    i = zero + trip + j
                    acc = _add_block(
                        origin, x + i * H * W * CT, dy + i * T * PT, 0, p, c, kh, kw, p_in, d_in,
                        H, W, OW, T, CT, PT, SH, SW, BK, whole, precision,
                    )  # fmt: skip
                    total, q = _keep(acc, origin, total, q, out + i * GROUPS * P * D + at, inside,
                                     first + i * BP, first + half + i * BP, mode)  # fmt: skip
            for trip in range(groups_end, end):
                i = zero + trip
                acc = _add_block(
                    origin, x + i * H * W * CT, dy + i * T * PT, 0, p, c, kh, kw, p_in, d_in,
                    H, W, OW, T, CT, PT, SH, SW, BK, whole, precision,
                )  # fmt: skip
                total, q = _keep(acc, origin, total, q, out + i * GROUPS * P * D + at, inside,
                                 first + i * BP, first + half + i * BP, mode)  # fmt: skip
        else:
            # one loop over the blocks of all samples: loads run ahead into the next sample
            acc = origin
            i = zero + begin
            k = 0
            for _ in tl.range(0, (end - begin) * BLOCKS, num_stages=stages):
                acc = _add_block(
                    acc, x + i * H * W * CT, dy + i * T * PT, k, p, c, kh, kw, p_in, d_in,
                    H, W, OW, T, CT, PT, SH, SW, BK, whole, precision,
                )  # fmt: skip
                k += 1
                if k == BLOCKS:
                    total, q = _keep(acc, origin, total, q, out + i * GROUPS * P * D + at, inside,
                                     first + i * BP, first + half + i * BP, mode)  # fmt: skip
                    acc = origin
                    k = 0
                    i += 1
        if mode != 2:  # ROWS
            tl.store(out + (zero + split) * GROUPS * P * D + at, total, mask=inside)
        if mode == 3:  # SPREAD
            part = (zero + group * tiles + tile) * parts + split
            tl.store(sums + part * BP + tl.arange(0, BP), q)

    @triton.jit(do_not_specialize=["B", "parts"])
    @no_type_check
    def _conv_join_kernel(
        c,  # float32 [parts, N]
        E,  # float32 [parts, N]
        dw,  # float32 [N]
        away,  # float64 [programs]
        B, parts,
        N: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """dw = sum_s n_s m_s with m_s = c_s + E_s / n_s, and what the sum over s of
        n_s ||m_s - dw / B||^2 - ||E_s||^2 / n_s is of these columns."""
        program = tl.program_id(0)
        at = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = at < N
        total = tl.zeros([COLUMNS], tl.float64)
        for s in range(0, parts):
            n = B * (s + 1) // parts - B * s // parts
            from_c = tl.load(E + s * N + at, mask=inside, other=0.0).to(tl.float64)
            total += n * tl.load(c + s * N + at, mask=inside, other=0.0).to(tl.float64) + from_c
        tl.store(dw + at, total.to(tl.float32), mask=inside)
        mean = total / B
        spread = tl.zeros([COLUMNS], tl.float64)
        for s in range(0, parts):
            n = B * (s + 1) // parts - B * s // parts
            from_c = tl.load(E + s * N + at, mask=inside, other=0.0).to(tl.float64)
            from_mean = tl.load(c + s * N + at, mask=inside, other=0.0).to(tl.float64) - mean
            # n (c + E / n - mean)^2 - E^2 / n, of which E^2 / n falls out
            spread += from_mean * (n * from_mean + 2 * from_c)
        tl.store(away + program, tl.sum(spread))


def launch(
    x: Tensor, dy: Tensor, layer: Layer, mode: int, precision: str, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(start, out, sums) as the kernel has them, for x [B, C, H, W] and dy [B, p, OH, OW]."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    samples, cut = len(x), tile(layer, x.dtype, precision, mode)
    tiles, parts = cut.count(layer), splits(layer, cut, samples, mode)
    shape = (layer.groups, layer.p, layer.d)
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    out = empty((samples if mode == ROWS else parts, *shape))
    if start is None:
        start = empty((parts if mode == SPREAD else 0, *shape))
    kinds = {NORMS: 1, NOISE: 2, ROWS: 0, SPREAD: 1}[mode]
    each = parts if mode == SPREAD else samples
    sums = empty((kinds, layer.groups, tiles, each, cut.BP))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _conv_tile_kernel[(tiles, parts, layer.groups)](
            x, dy, start, out, sums, samples, *constants(layer, cut, mode, precision).values(),
            num_warps=cut.warps,
        )  # fmt: skip
    return start, out, sums


def constants(layer: Layer, cut: Tile, mode: int, precision: str) -> dict[str, Any]:
    """Of the kernel, by name."""
    names = ("C", "P", "GROUPS", "H", "W", "OH", "OW")
    found: dict[str, Any] = dict(zip(names, layer[:7], strict=True))
    pairs = {"K": layer.kernel, "S": layer.stride, "P": layer.padding, "D": layer.dilation}
    found |= {
        name + axis: n for name, pair in pairs.items() for axis, n in zip("HW", pair, strict=True)
    }
    found |= {"mode": mode, "precision": precision, "BP": cut.BP, "BD": cut.BD, "BK": cut.BK}
    return found | {"decoded": cut.decoded, "many": cut.many, "stages": cut.stages}


def norms(x: Tensor, dy: Tensor, layer: Layer, precision: str) -> tuple[Tensor, Tensor]:
    """(dw [p, kh, kw, C], float64 [B]: ||g_i||^2)."""
    _, out, sums = launch(x, dy, layer, NORMS, precision)
    return weight(out.sum(0, dtype=torch.float64), layer), added(sums)[0]


def deviations(
    x: Tensor, dy: Tensor, layer: Layer, mean: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dw [p, kh, kw, C], float64 [B]: ||g_i||^2, float64 [B]: ||g_i - dw / B||^2), for a `mean`
    [p, kh, kw, C] that may be a little off: rounded to bfloat16, or of operands that were rounded
    otherwise than here.

    With e = dw / B - mean, ||g_i - dw / B||^2 = ||g_i - mean||^2 - ||e||^2 - 2 <g_i - dw / B, e>.
    The last, whose sum over samples is zero, is left out: 2 ||e|| / ||g_i - dw / B|| of the
    distance, times the cosine between the two, which for an e of rounding is 1 / sqrt(p d) or so.
    """
    near = mean.to(torch.float32).contiguous()
    _, out, sums = launch(x, dy, layer, NOISE, precision, near)
    away, products = added(sums)
    rest, wide = out.sum(0, dtype=torch.float64), near.double()
    dw = weight(rest + len(x) * wide.view_as(rest), layer)
    noise = (away - (rest / len(x)).square().sum()).clamp(min=0)
    return dw, away + 2 * products + wide.square().sum(), noise


def rows(x: Tensor, dy: Tensor, layer: Layer, precision: str) -> Tensor:
    """float32 [B, p kh kw C]: the shares."""
    return launch(x, dy, layer, ROWS, precision)[1].flatten(1)


def spread(x: Tensor, dy: Tensor, layer: Layer, precision: str) -> tuple[Tensor, Tensor]:
    """(dw [p, kh, kw, C], float64, 0-d: sum_i ||g_i - dw / B||^2), each share computed once."""
    c, E, sums = launch(x, dy, layer, SPREAD, precision)
    dw = torch.empty(layer.weights, dtype=torch.float32, device=x.device)
    programs = -(-layer.weights // JOINED)
    away = torch.empty(programs, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _conv_join_kernel[(programs,)](c, E, dw, away, len(x), len(c), layer.weights, JOINED)
    total = sums.sum(dtype=torch.float64) + away.sum()
    return weight(dw, layer), total.clamp(min=0)


def weight(wide: Tensor, layer: Layer) -> Tensor:
    """float32 [p, kh, kw, C] out of [groups, p / groups, d]."""
    return wide.float().view(layer.groups * layer.p, *layer.kernel, layer.C)


def added(sums: Tensor) -> Tensor:
    """float64 [kinds, B] out of [kinds, groups, tiles, B, BP]."""
    return sums.sum(dim=(1, 2, 4), dtype=torch.float64)
