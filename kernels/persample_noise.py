"""How far each row of per-sample gradients is from their mean, and the update that the mean makes,
in one pass over the rows.

    mean = sum_i G_i / B,   noise_i = ||G_i - mean||^2,   then u = mean + decay p and p, m as in
                            update.py

G is [B, P], a gradient of a sample (or of a micro-batch) a row. Deviations are taken from the mean
where both are at hand, never E[x^2] - E[x]^2, and the mean is two numbers, `near` and the `rest`
that its rounding left over: a noise a millionth of the mean keeps its digits.

A program owns a fixed set of column tiles, [ROWS, COLUMNS] each, and adds into sums of its own,
which a second, small stage adds up: no atomics, the same bits on every run. Up to ROW_LIMIT = 256
rows a tile holds all rows, and G is read once. More rows come in several tiles: once for the mean
and again, out of the L2 cache, for the deviations. Few enough programs run then for all their
columns to lie in L2 together (1,024 rows of 64 float32 columns in each of 128 programs: 32 MiB).
Bytes of a column of G, float32, form shb:

    rows                          8    64   256    1024
    G, p and m, once each        48   272  1040    4112
    read again from L2            0     0     0    4096
    sums of rows, in L1 and L2    0     0     0     512
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native
from fastsmooth.kernels.update import Rule, kind_of, move_ref

try:
    import triton
    import triton.language as tl

    from fastsmooth.kernels.update import move, scalars
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None


class Noise(NamedTuple):
    """What persample_noise returns; float64 on G's device."""

    noise: Tensor  # [B]: ||G_i - mean||^2
    squares: Tensor  # [B]: ||G_i||^2
    sums: Tensor  # [3]: ||mean||^2, ||m_t||^2, <m_t, mean>, with m_t the direction that was applied


def persample_noise_ref(G: Tensor, p: Tensor, m: Tensor | None, rule: Rule, mixed: bool) -> Noise:
    """As `persample_noise`, in plain PyTorch, for G [B, P] and p, m [P]."""
    wide = backend.wide_dtype(G.device)
    rows = G.to(backend.buffer_dtype(p.dtype))
    near = rows.mean(dim=0)
    rest = (rows - near).mean(dim=0)
    mean = near + rest
    noise = (rows - near - rest).to(wide).square().sum(dim=1)
    direction = move_ref(p, mean, m, rule, mixed)
    pairs = [(mean, mean), (direction, direction), (direction, mean)]
    sums = torch.stack([(x.to(wide) * y.to(wide)).sum() for x, y in pairs])
    return Noise(noise, rows.to(wide).square().sum(dim=1), sums)


# Triton

ROW_LIMIT = 256


class Tile(NamedTuple):
    """How a launch cuts G."""

    ROWS: int
    COLUMNS: int
    whole: bool  # all rows are in one tile
    programs: int  # at most
    warps: int

    @property
    def shared(self) -> bool:
        """Whether several threads hold a column."""
        return 32 * self.warps > self.COLUMNS


def tile(rows: int, dtype: torch.dtype, aligned: bool) -> Tile:
    """For B = `rows` gradients of this dtype. A thread reads 16 bytes of a row at a time, `vector`
    values; where rows are not `aligned` to them, one, from an address of its own.

    benchmarks/results/2026-11-26_gpu_tiles.txt has the times of other cuts on an H200.
    """
    if rows > ROW_LIMIT:
        return Tile(128, 64, False, 128, 8)
    vector = 16 // dtype.itemsize
    height = 1 << (rows - 1).bit_length()
    # As many values a thread as its registers hold. Few rows get wide tiles, whose columns are each
    # in one thread; in the others the threads of a column are in few warps, since warps meet in
    # shared memory.
    values = 64 if aligned else 32
    warps = 4 if height * vector <= values else 2
    columns = min(max(32 * warps * values // height, values // 2), 128 * vector)
    warps = max(warps, height * columns // (32 * values))
    return Tile(height, columns, True, 4096 // warps, warps)


if triton:

    @triton.jit
    def _per_thread(  # type: ignore[no-untyped-def]  # compiled by Triton
        x, VECTOR: tl.constexpr
    ):
        """[.., C] -> [.., C / VECTOR]: the sums of VECTOR neighbours, which one thread holds."""
        if len(x.shape) == 1:
            parts = tl.reshape(x, [x.shape[0] // VECTOR, VECTOR])
        else:
            parts = tl.reshape(x, [x.shape[0], x.shape[1] // VECTOR, VECTOR])
        return tl.sum(parts, axis=len(x.shape))

    @triton.jit
    def _persample_noise_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
        G, p, m, lr, beta, alpha, fresh, kept, decay,
        row_sums,  # float64 [programs, 2, B]: of deviation^2, of G^2; zeros
        sums,  # float64 [programs, 3]: of mean^2, direction^2, direction mean
        B, length,  # P / VECTOR: Triton sees then that rows begin at whole vectors
        wide: tl.constexpr, kind: tl.constexpr, VECTOR: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, whole: tl.constexpr, shared: tl.constexpr,
    ):  # fmt: skip
        program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        P = tl.cast(length, tl.int64) * VECTOR  # may pass 2^31
        numbers = scalars(lr, beta, alpha, fresh, kept, decay, wide)
        share = (1.0 / B).to(wide)
        rows = tl.arange(0, ROWS)
        at_rows = row_sums + program * 2 * B + rows
        noise = tl.zeros([ROWS, COLUMNS // VECTOR], wide)
        squares = tl.zeros([ROWS, COLUMNS // VECTOR], wide)
        gg = tl.zeros([COLUMNS // VECTOR], wide)
        mm = tl.zeros([COLUMNS // VECTOR], wide)
        gm = tl.zeros([COLUMNS // VECTOR], wide)
        for number in range(program, tl.cdiv(P, COLUMNS), programs):
            columns = number * COLUMNS + tl.arange(0, COLUMNS)
            inside = columns < P
            if whole:
                mask = (rows < B)[:, None] & inside[None, :]
                g = tl.load(
                    G + rows[:, None].to(tl.int64) * P + columns[None, :], mask=mask, other=0.0
                ).to(wide)
                near = tl.sum(g, axis=0) * share
                centred = tl.where((rows < B)[:, None], g - near[None, :], 0.0)
                rest = tl.sum(centred, axis=0) * share
                # wrong in rows from B on, whose sums nobody stores
                deviation = centred - rest[None, :]
                noise += _per_thread(deviation * deviation, VECTOR)
                squares += _per_thread(g * g, VECTOR)
            else:
                # wide enough to need no second look at the rows
                total = tl.zeros([ROWS, COLUMNS], tl.float64)
                for above in range(0, B, ROWS):
                    some = above + rows
                    mask = (some < B)[:, None] & inside[None, :]
                    g = tl.load(
                        G + some[:, None].to(tl.int64) * P + columns[None, :], mask=mask, other=0.0
                    )
                    total += g.to(tl.float64)
                mean = tl.sum(total, axis=0) / B
                near = mean.to(wide)
                rest = (mean - near.to(tl.float64)).to(wide)
                for above in range(0, B, ROWS):
                    some = above + rows
                    there = some < B
                    mask = there[:, None] & inside[None, :]
                    g = tl.load(
                        G + some[:, None].to(tl.int64) * P + columns[None, :], mask=mask, other=0.0
                    ).to(wide)
                    deviation = g - near[None, :] - rest[None, :]
                    n, s = tl.sum(deviation * deviation, axis=1), tl.sum(g * g, axis=1)
                    to = at_rows + above
                    tl.store(to, tl.load(to, mask=there) + n.to(tl.float64), mask=there)
                    tl.store(to + B, tl.load(to + B, mask=there) + s.to(tl.float64), mask=there)
            mean = near + rest
            x = tl.load(p + columns, mask=inside, other=0.0)
            before = mean
            if kind > 0:
                before = tl.load(m + columns, mask=inside, other=0.0)
            # several threads hold a column: all have loaded before the one that stores it does
            if shared:
                tl.debug_barrier()
            moved, after, direction = move(x.to(wide), mean, before, numbers, kind)
            tl.store(p + columns, moved.to(x.dtype), mask=inside)
            if kind > 0:
                tl.store(m + columns, after, mask=inside)
            gg += _per_thread(mean * mean, VECTOR)
            mm += _per_thread(direction * direction, VECTOR)
            gm += _per_thread(direction * mean, VECTOR)
        if whole:
            tl.store(at_rows, tl.sum(noise.to(tl.float64), axis=1), mask=rows < B)
            tl.store(at_rows + B, tl.sum(squares.to(tl.float64), axis=1), mask=rows < B)
        tl.store(sums + 3 * program, tl.sum(gg.to(tl.float64)))
        tl.store(sums + 3 * program + 1, tl.sum(mm.to(tl.float64)))
        tl.store(sums + 3 * program + 2, tl.sum(gm.to(tl.float64)))


def _persample_noise_triton(
    G: Tensor, p: Tensor, m: Tensor | None, rule: Rule, mixed: bool
) -> Noise:
    B, P = G.shape
    vector = 16 // G.dtype.itemsize
    cut = tile(B, G.dtype, aligned=P % vector == 0)
    if P % vector:
        vector = 1
    programs = min(cut.programs, triton.cdiv(P, cut.COLUMNS))
    row_sums = torch.zeros(programs, 2, B, dtype=torch.float64, device=G.device)
    sums = torch.zeros(programs, 3, dtype=torch.float64, device=G.device)
    if programs:
        wide = tl.float64 if p.dtype == torch.float64 else tl.float32
        _persample_noise_kernel[(programs,)](
            G, p, p if m is None else m, *rule, row_sums, sums, B, P // vector,
            wide, kind_of(m is not None, mixed), vector, cut.ROWS, cut.COLUMNS, cut.whole,
            cut.shared, num_warps=cut.warps,
        )  # fmt: skip
    return Noise(row_sums[:, 0].sum(dim=0), row_sums[:, 1].sum(dim=0), sums.sum(dim=0))


# C++, and the choice


def _persample_noise_native(
    G: Tensor, p: Tensor, m: Tensor | None, rule: Rule, mixed: bool
) -> Noise:
    function = native.function("persample_noise", G.dtype, p.dtype)
    sizes = (len(G), len(G), 3)
    measured = Noise(*(torch.empty(size, dtype=torch.float64) for size in sizes))
    coefficients = [s.to("cpu", torch.float64) for s in rule]
    function(
        ctypes.c_int64(len(G)), ctypes.c_int64(len(p)),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (G, p, m)),
        kind_of(m is not None, mixed),
        native.addresses(coefficients), torch.get_num_threads(),
        *(ctypes.c_void_p(t.data_ptr()) for t in measured),
    )  # fmt: skip
    return measured


IMPLEMENTATIONS = {
    "triton": _persample_noise_triton,
    "native": _persample_noise_native,
    "reference": persample_noise_ref,
}


def _persample_noise(
    G: Tensor, p: Tensor, m: Tensor | None, rule: list[Tensor], mixed: bool
) -> Noise:
    run = IMPLEMENTATIONS[backend.choose(G.device, p.dtype)]
    with torch.cuda.device_of(G):  # Triton launches on the current device
        measured = run(G, p, m, Rule(*rule), mixed)
    torch.autograd.graph.increment_version([p] if m is None else [p, m])
    return measured


def _fake(G: Tensor, p: Tensor, m: Tensor | None, rule: list[Tensor], mixed: bool) -> Noise:
    wide = backend.wide_dtype(G.device)
    return Noise(*(G.new_empty(size, dtype=wide) for size in (len(G), len(G), 3)))


_op = backend.custom_op(
    "persample_noise",
    "(Tensor G, Tensor(a!) p, Tensor(b!)? m, Tensor[] rule, bool mixed) "
    "-> (Tensor, Tensor, Tensor)",
    _persample_noise,
    _fake,
)


def persample_noise(
    G: Tensor, p: Tensor, m: Tensor | None, rule: Rule, mixed: bool = False
) -> Noise:
    """Noise of the rows of G, and one step along their mean, in place on p and m.

    Args:
        G: [B, P] with B at least 2, contiguous, float32 or bfloat16 (float64 with float64 p): a
            gradient a row.
        p: [P], the parameters in one tensor, float32, bfloat16 or float64.
        m: [P], the momentum, float32 (float64 for float64 p); None where the direction is u.
        rule, mixed: as in `update`.

    Returns:
        Noise(noise, squares, sums). Their sum over rows / (B - 1) estimates C^2, the variance of a
        row around the true gradient (E||g - grad f||^2). The same bits on every run.

    Raises:
        ValueError: for fewer than two rows, or tensors of the wrong shape, dtype or memory order.
    """
    kind_of(m is not None, mixed)
    if G.ndim != 2 or len(G) < 2:
        raise ValueError(f"G has shape {list(G.shape)}: noise needs [B, P] with at least two rows")
    vectors = [p] if m is None else [p, m]
    if any(v.shape != G.shape[1:] for v in vectors):
        raise ValueError(f"p and m are [{G.shape[1]}] for this G")
    if not all(t.is_contiguous() for t in (G, *vectors)):
        raise ValueError("G, p and m must be contiguous: call .contiguous() first")
    wanted = backend.buffer_dtype(p.dtype)
    allowed = {p.dtype} if p.dtype == torch.float64 else {torch.float32, torch.bfloat16, p.dtype}
    if G.dtype not in allowed or (m is not None and m.dtype != wanted):
        raise ValueError(
            f"G is {G.dtype}, p {p.dtype}, m {None if m is None else m.dtype}: G must be "
            f"{' or '.join(sorted(map(str, allowed)))} and m {wanted}"
        )
    return Noise(*_op(G, p, m, list(rule), mixed))
