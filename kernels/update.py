"""The update of all parameters in one pass, with the squared norms that a log wants.

One rule, whose coefficients come in:
    u = g + decay p,   m = beta m + alpha u,   p -= lr (fresh u + kept m).
Without m it is p -= lr u; and where the direction is m itself, which is told apart (`mixed`), there
is no product with fresh and kept.

A launch covers a list of tensors through a table of their addresses, not one flat buffer: autograd
puts each gradient into memory of its own, and copying them together would cost 8 bytes a parameter
more. Bytes a parameter in float32: 12 for sgd (read g and p, write p), 20 with momentum (read and
write m too); the norms cost none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None


class Rule(NamedTuple):
    """The coefficients, 0-d float64 tensors (backend.scalar), so that a new value compiles nothing
    anew."""

    lr: Tensor
    beta: Tensor
    alpha: Tensor
    fresh: Tensor
    kept: Tensor
    weight_decay: Tensor


# What is compiled for itself: without a buffer, along the buffer, along a mixture of gradient and
# buffer.
PLAIN, BUFFER, MIXED = range(3)


def kind_of(has_buffer: bool, mixed: bool) -> int:
    """Raises ValueError for a mixture with a buffer that is not there."""
    if mixed and not has_buffer:
        raise ValueError("a mixed direction needs buffers")
    return MIXED if mixed else BUFFER if has_buffer else PLAIN


def direction_ref(
    x: Tensor,
    slope: Tensor,
    m: Tensor | None,
    beta: float,
    alpha: float,
    fresh: float,
    kept: float,
    decay: float,
    mixed: bool,
) -> Tensor:
    """The direction m_t for one tensor x and its gradient `slope`; moves m alone.

    x, slope, m and the result have one shape, [...], and one dtype.
    """
    direction = u = slope.add(x, alpha=decay) if decay else slope
    if m is not None:
        direction = m.mul_(beta).add_(u, alpha=alpha)
    if mixed:
        direction = (u * fresh).add_(direction, alpha=kept)
    return direction


def move_ref(p: Tensor, slope: Tensor, m: Tensor | None, rule: Rule, mixed: bool) -> Tensor:
    """Move p [...], of any dtype, and m along the direction, which is returned in the dtype of
    `slope`. slope and m have the shape of p, and one dtype."""
    lr, beta, alpha, fresh, kept, decay = (s.item() for s in rule)
    x = p.to(slope.dtype)
    direction = direction_ref(x, slope, m, beta, alpha, fresh, kept, decay, mixed)
    p.copy_(x.add(direction, alpha=-lr))
    return direction


def update_ref(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule, mixed: bool
) -> Tensor:
    """As `update`, in plain PyTorch, one tensor after the other: wide [2]."""
    wide = backend.wide_dtype(params[0].device)
    squares = torch.zeros(2, dtype=wide, device=params[0].device)
    ms: Sequence[Tensor | None] = buffers or [None] * len(params)
    for p, g, m in zip(params, grads, ms, strict=True):
        slope = g.to(backend.buffer_dtype(p.dtype))
        direction = move_ref(p, slope, m, rule, mixed)
        squares += torch.stack([slope.to(wide).square().sum(), direction.to(wide).square().sum()])
    return squares


# Triton

BLOCK = 1024  # parameters moved at a time: 8 a thread, two 128-bit accesses in float32
BLOCKS = 8  # of one program
WARPS = 4

if triton:

    @triton.jit
    def _load(at, mask):  # type: ignore[no-untyped-def]  # compiled by Triton
        if mask is None:
            values = tl.load(at)
        else:
            values = tl.load(at, mask=mask, other=0.0)
        return values

    @triton.jit
    def scalars(  # type: ignore[no-untyped-def]  # compiled by Triton
        lr, beta, alpha, fresh, kept, decay, wide: tl.constexpr
    ):
        """(-lr, beta, alpha, fresh, kept, decay) in the arithmetic's dtype, from float64 in
        memory."""
        minus_lr, decay = (-tl.load(lr)).to(wide), tl.load(decay).to(wide)
        beta, alpha = tl.load(beta).to(wide), tl.load(alpha).to(wide)
        return minus_lr, beta, alpha, tl.load(fresh).to(wide), tl.load(kept).to(wide), decay

    @triton.jit
    def move(  # type: ignore[no-untyped-def]  # compiled by Triton
        x, slope, m, scalars, kind: tl.constexpr
    ):
        """(x and m after the update, direction); without a buffer m is given back as it is."""
        minus_lr, beta, alpha, fresh, kept, decay = scalars
        u = slope + decay * x
        direction = u
        if kind > 0:  # PLAIN
            m = m * beta + u * alpha
            direction = m
            if kind > 1:  # BUFFER
                direction = u * fresh + m * kept
        return x + minus_lr * direction, m, direction

    @triton.jit
    def _update_block(  # type: ignore[no-untyped-def]  # compiled by Triton
        p_at, g_at, m_at, mask, scalars, wide: tl.constexpr, kind: tl.constexpr
    ):
        slope = _load(g_at, mask).to(wide)
        x = _load(p_at, mask)
        m = slope
        if kind > 0:
            m = _load(m_at, mask)
        moved, m, direction = move(x.to(wide), slope, m, scalars, kind)
        tl.store(p_at, moved.to(x.dtype), mask=mask)
        if kind > 0:
            tl.store(m_at, m, mask=mask)
        return slope * slope, direction * direction

    @triton.jit
    def _update_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
        chunks,  # int64 [programs, 2]: tensor, first parameter
        tensors,  # int64 [tensors, 4]: parameters, addresses of p, g and m
        lr, beta, alpha, fresh, kept, decay,  # float64 scalars
        sums,  # float64 [programs, 2]: of gradient^2, of direction^2
        dtype: tl.constexpr, wide: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr,
        BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row = tensors + tl.load(chunks + 2 * program) * 4
        start = tl.load(chunks + 2 * program + 1)
        size = tl.load(row)
        p = tl.load(row + 1).to(tl.pointer_type(dtype))
        g = tl.load(row + 2).to(tl.pointer_type(dtype))
        m = tl.load(row + 3).to(tl.pointer_type(wide))
        if aligned:
            p, g, m = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16)
            start = tl.multiple_of(start, 16)
        numbers = scalars(lr, beta, alpha, fresh, kept, decay, wide)
        gg = tl.zeros([BLOCK], wide)
        mm = tl.zeros([BLOCK], wide)
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            # whole: without a mask the accesses are 128 bits wide
            if start + (block + 1) * BLOCK <= size:
                g2, m2 = _update_block(p + at, g + at, m + at, None, numbers, wide, kind)
            else:
                g2, m2 = _update_block(p + at, g + at, m + at, at < size, numbers, wide, kind)
            gg += g2
            mm += m2
        tl.store(sums + 2 * program, tl.sum(gg.to(tl.float64)))
        tl.store(sums + 2 * program + 1, tl.sum(mm.to(tl.float64)))


@functools.lru_cache(maxsize=32)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    chunk = BLOCK * BLOCKS
    starts = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, chunk)]
    return torch.tensor(starts, dtype=torch.int64).reshape(-1, 2).to(device)


@functools.lru_cache(maxsize=32)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Kept, since the caching allocator gives the gradients of most steps the addresses of an
    earlier one."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _update_triton(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule, mixed: bool
) -> Tensor:
    device, dtype = params[0].device, params[0].dtype
    chunks = _chunks(tuple(p.numel() for p in params), device)
    places = [params, grads, buffers or params]  # without m an address that is never used
    rows = tuple((p.numel(), *(ts[i].data_ptr() for ts in places)) for i, p in enumerate(params))
    aligned = not any(address % 16 for row in rows for address in row[1:])
    sums = torch.zeros(len(chunks), 2, dtype=torch.float64, device=device)
    if len(chunks):
        dtypes = (dtype, backend.buffer_dtype(dtype))
        types = [getattr(tl, str(t).removeprefix("torch.")) for t in dtypes]
        _update_kernel[(len(chunks),)](
            chunks, _table(rows, device), *rule, sums, *types, kind_of(bool(buffers), mixed),
            aligned, BLOCK, BLOCKS,
            num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(dim=0)


# C++, and the choice


def _update_native(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], rule: Rule, mixed: bool
) -> Tensor:
    function = native.function("update", params[0].dtype)
    sizes = (ctypes.c_int64 * len(params))(*[p.numel() for p in params])
    coefficients = [s.to("cpu", torch.float64) for s in rule]
    squares = torch.empty(2, dtype=torch.float64)
    function(
        ctypes.c_int64(len(params)), sizes, *map(native.addresses, (params, grads, buffers)),
        kind_of(bool(buffers), mixed),
        native.addresses(coefficients), torch.get_num_threads(),
        ctypes.c_void_p(squares.data_ptr()),
    )  # fmt: skip
    return squares


IMPLEMENTATIONS = {"triton": _update_triton, "native": _update_native, "reference": update_ref}


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    rule: list[Tensor],
    mixed: bool,
) -> Tensor:
    device = params[0].device
    squares = torch.zeros(2, dtype=backend.wide_dtype(device), device=device)
    for dtype in dict.fromkeys(p.dtype for p in params):
        some = [i for i, p in enumerate(params) if p.dtype == dtype]
        slopes = [ordered_as(params[i], grads[i]) for i in some]
        ms = [buffers[i] for i in some] if buffers else []
        run = IMPLEMENTATIONS[backend.choose(device, dtype)]
        with torch.cuda.device_of(params[0]):  # Triton launches on the current device
            squares += run([params[i] for i in some], slopes, ms, Rule(*rule), mixed)
    torch.autograd.graph.increment_version([*params, *buffers])
    return squares


def ordered_as(p: Tensor, g: Tensor) -> Tensor:
    """g [...] with its values in the order in which p, of the same shape, has them in memory."""
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


def is_dense(t: Tensor) -> bool:
    """Whether the values of t [...] fill the memory from the first to the last, in whatever
    order."""
    if t.is_contiguous():
        return True
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) == t.numel()


_op = backend.custom_op(
    "update",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor[] rule, bool mixed) "
    "-> Tensor",
    _update,
    lambda params, *others: params[0].new_empty(2, dtype=backend.wide_dtype(params[0].device)),
)


def update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    rule: Rule,
    mixed: bool = False,
) -> Tensor:
    """One step in place on params and buffers: m = beta m + alpha u, p -= lr (fresh u + kept m),
    with u = g + decay p.

    Args:
        params, grads: tensors of any shape, as many of one as of the other, a gradient with its
            parameter's shape and dtype: float32, bfloat16 or float64 (others go through plain
            PyTorch). Parameters are dense in memory.
        buffers: the momentum, float32 (float64 for float64 parameters), with the parameter's shape
            and strides; [] where the direction is u, and only lr and weight_decay matter.
        rule: the coefficients.
        mixed: whether fresh and kept matter; else the direction is m.

    Returns:
        float64 [2] on the parameters' device: the squared norm of the gradient (without weight
        decay) and that of the direction m_t which was applied. The same bits on every run.

    Raises:
        ValueError: for tensors that do not belong together.
    """
    kind_of(len(buffers) > 0, mixed)  # bool of a list is not traced by PyTorch 2.10
    if not params or len(grads) != len(params) or len(buffers) not in (0, len(params)):
        raise ValueError(
            f"{len(params)} parameters, {len(grads)} gradients, {len(buffers)} buffers do not fit "
            "together"
        )
    for p, g in zip(params, grads, strict=True):
        if g.shape != p.shape or g.dtype != p.dtype:
            raise ValueError(
                f"a gradient {list(g.shape)} of {g.dtype} for a parameter {list(p.shape)} of "
                f"{p.dtype}"
            )
        if p.numel() and not is_dense(p):
            raise ValueError(
                f"a parameter {list(p.shape)} with strides {p.stride()} is not dense in memory"
            )
    for p, m in zip(params, buffers, strict=False):
        wanted = (p.shape, p.stride(), backend.buffer_dtype(p.dtype))
        if (m.shape, m.stride(), m.dtype) != wanted:
            raise ValueError(
                f"a momentum {list(m.shape)} of {m.dtype} for a parameter {list(p.shape)} of "
                f"{p.dtype}: it has the parameter's shape and strides, in "
                f"{backend.buffer_dtype(p.dtype)}"
            )
    return _op(params, grads, buffers, list(rule), mixed)
