"""The update of all parameters in one pass, with the squared norms that a log wants; and, where the
gradient comes in K parts, with the distance of each part from their mean.

One rule, whose coefficients come in:
    u = g + decay p,   m = beta m + alpha u,   p -= lr (fresh u + kept m).
Without m it is p -= lr u; and where the direction is m itself, which is told apart (`mixed`), there
is no product with fresh and kept. With K gradients of a parameter, g is their mean.

A launch covers a list of tensors through a table of their addresses, not one flat buffer: autograd
puts each gradient into memory of its own, and copying them together would cost 8 bytes a parameter
more. A Plan keeps the table of every list of gradients that it saw lately, since the caching
allocator gives those of most steps the addresses of an earlier one. Bytes a parameter in float32:
4 K + 8 for sgd (read the gradients and p, write p), 8 more with momentum (read and write m); norms
and distances cost none.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import chain
from typing import Any, NamedTuple, no_type_check

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


class Table(NamedTuple):
    """Where a launch finds its tensors; on their device."""

    chunks: Tensor | None  # int64 [programs, 2]: tensor, first parameter; for Triton
    rows: Tensor  # int64 [tensors, 3 + K]: parameters, addresses of p, of m and of K gradients
    aligned: bool  # all addresses are divisible by 16


def mean_ref(slopes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(mean, deviations from it) of K tensors [...], all in their dtype."""
    rows = torch.stack(slopes)
    near = rows.mean(dim=0)
    rest = (rows - near).mean(dim=0)
    return near + rest, list(rows - near - rest)


def update_ref(
    params: list[Tensor],
    parts: list[list[Tensor]],
    buffers: list[Tensor],
    rule: Rule,
    mixed: bool,
    table: Table,
    sums: Tensor,
    noises: Tensor | None,
) -> None:
    """A launch, in plain PyTorch, one tensor after the other.

    params, buffers: as in `update`; parts: K lists of gradients; table: of all of these, not read
    here. What is written: sums, float64 [programs, 2], of slope^2 and direction^2, here in one row;
    and with K > 1 noises [programs, 2 K], of the K deviations^2 and the K gradients^2.
    """

    def square(t: Tensor) -> Tensor:
        return t.to(sums.dtype).square().sum()

    sums.zero_()
    if noises is not None:
        noises.zero_()
    for i, (p, *gs) in enumerate(zip(params, *parts, strict=True)):
        slopes = [g.to(backend.buffer_dtype(p.dtype)) for g in gs]
        slope = slopes[0]
        if noises is not None:
            slope, deviations = mean_ref(slopes)
            noises[0] += torch.stack([square(t) for t in (*deviations, *slopes)])
        direction = move_ref(p, slope, buffers[i] if buffers else None, rule, mixed)
        sums[0] += torch.stack([square(slope), square(direction)])


# How many gradients a parameter the kernels take, and how many tables a plan keeps.
MOST_PARTS, TABLES = 8, 32

# Triton

CHUNK = 8192  # parameters of one program
WARPS = 4


def block_of(K: int) -> int:
    """How many parameters are moved at a time: with one gradient 8 a thread, two 128-bit accesses
    in float32; with more than four half of them, for which the registers last."""
    return 1024 if K <= 4 else 512


if triton:
    TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}

    @triton.jit
    @no_type_check
    def _load(at, mask):
        if mask is None:
            values = tl.load(at)
        else:
            values = tl.load(at, mask=mask, other=0.0)
        return values

    @triton.jit
    @no_type_check
    def scalars(lr, beta, alpha, fresh, kept, decay, wide: tl.constexpr):
        """(-lr, beta, alpha, fresh, kept, decay) in the arithmetic's dtype, from float64 in
        memory."""
        minus_lr, decay = (-tl.load(lr)).to(wide), tl.load(decay).to(wide)
        beta, alpha = tl.load(beta).to(wide), tl.load(alpha).to(wide)
        return minus_lr, beta, alpha, tl.load(fresh).to(wide), tl.load(kept).to(wide), decay

    @triton.jit
    @no_type_check
    def move(x, slope, m, scalars, kind: tl.constexpr):
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
    @no_type_check
    def _gradient(row, k: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
        g = tl.load(row + 3 + k).to(tl.pointer_type(dtype))
        if aligned:
            g = tl.multiple_of(g, 16)
        return g

    @triton.jit
    @no_type_check
    def _mean_block(gs, at, mask, K: tl.constexpr, wide: tl.constexpr):
        """(mean, squares of each deviation from it, squares of each gradient) of K gradients. The
        mean is two numbers, `near` and the `rest` that its rounding left over: a noise a millionth
        of the mean keeps its digits."""
        values = ()
        for k in tl.static_range(K):
            values += (_load(gs[k] + at, mask).to(wide),)
        total = values[0]
        for k in tl.static_range(1, K):
            total += values[k]
        # a product could be fused with the subtractions below, and not be the same in all of them
        near = tl.fma(total, 1.0 / K, 0.0)
        rest = values[0] - near
        for k in tl.static_range(1, K):
            rest += values[k] - near
        rest *= 1.0 / K
        noise = ()
        squares = ()
        for k in tl.static_range(K):
            deviation = values[k] - near - rest
            noise += (deviation * deviation,)
            squares += (values[k] * values[k],)
        return near + rest, noise, squares

    @triton.jit
    @no_type_check
    def _update_block(
        p, m, gs, at, mask, scalars, K: tl.constexpr, wide: tl.constexpr, kind: tl.constexpr
    ):
        """(squares of the slope, of the direction, of K deviations, of K gradients)."""
        noise = ()
        squares = ()
        if K == 1:
            slope = _load(gs[0] + at, mask).to(wide)
        else:
            slope, noise, squares = _mean_block(gs, at, mask, K, wide)
        x = _load(p + at, mask)
        before = slope
        if kind > 0:
            before = _load(m + at, mask)
        moved, after, direction = move(x.to(wide), slope, before, scalars, kind)
        tl.store(p + at, moved.to(x.dtype), mask=mask)
        if kind > 0:
            tl.store(m + at, after, mask=mask)
        return slope * slope, direction * direction, noise, squares

    @triton.jit
    @no_type_check
    def _add(xs, ys, K: tl.constexpr):
        sums = ()
        for k in tl.static_range(K):
            sums += (xs[k] + ys[k],)
        return sums

    # One kernel wherever its arguments lie: the six numbers of a rule may be neighbours in memory.
    @triton.jit(do_not_specialize_on_alignment=list(range(10)))
    @no_type_check
    def _update_kernel(
        chunks,  # int64 [programs, 2]: tensor, first parameter
        rows,  # int64 [tensors, 3 + K]: parameters, addresses of p, m and of K gradients
        lr, beta, alpha, fresh, kept, decay,  # float64 scalars
        sums,  # float64 [programs, 2]: of slope^2, of direction^2
        noises,  # float64 [programs, 2 K]: of the K deviations^2, of the K gradients^2; if K > 1
        dtype: tl.constexpr, wide: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row = rows + tl.load(chunks + 2 * program) * (3 + K)
        start = tl.load(chunks + 2 * program + 1)
        size = tl.load(row)
        p = tl.load(row + 1).to(tl.pointer_type(dtype))
        m = tl.load(row + 2).to(tl.pointer_type(wide))
        if aligned:
            p, m, start = tl.multiple_of(p, 16), tl.multiple_of(m, 16), tl.multiple_of(start, 16)
        gs = ()
        for k in tl.static_range(K):
            gs += (_gradient(row, k, dtype, aligned),)
        numbers = scalars(lr, beta, alpha, fresh, kept, decay, wide)
        gg = tl.zeros([BLOCK], wide)
        mm = tl.zeros([BLOCK], wide)
        nn = ()
        ss = ()
        if K > 1:
            for _ in tl.static_range(K):
                nn += (tl.zeros([BLOCK], wide),)
                ss += (tl.zeros([BLOCK], wide),)
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            # whole: without a mask the accesses are 128 bits wide
            if start + (block + 1) * BLOCK <= size:
                g2, m2, n2, s2 = _update_block(p, m, gs, at, None, numbers, K, wide, kind)
            else:
                g2, m2, n2, s2 = _update_block(p, m, gs, at, at < size, numbers, K, wide, kind)
            gg += g2
            mm += m2
            if K > 1:
                nn = _add(nn, n2, K)
                ss = _add(ss, s2, K)
        tl.store(sums + 2 * program, tl.sum(gg.to(tl.float64)))
        tl.store(sums + 2 * program + 1, tl.sum(mm.to(tl.float64)))
        if K > 1:
            to = noises + program * 2 * K
            for k in tl.static_range(K):
                tl.store(to + k, tl.sum(nn[k].to(tl.float64)))
                tl.store(to + K + k, tl.sum(ss[k].to(tl.float64)))


@functools.lru_cache(maxsize=32)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    starts = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, CHUNK)]
    return backend.sent(torch.tensor(starts, dtype=torch.int64).reshape(-1, 2), device)


# What Triton made for (device, dtype, kind, aligned, K): it is launched as Triton itself launches
# it, without being looked up by all arguments again. (The interpreter makes nothing.)
_compiled: dict[tuple[Any, ...], Any] = {}


def _update_triton(
    params: list[Tensor],
    parts: list[list[Tensor]],
    buffers: list[Tensor],
    rule: Rule,
    mixed: bool,
    table: Table,
    sums: Tensor,
    noises: Tensor | None,
) -> None:
    programs, K, dtype, device = len(sums), len(parts), params[0].dtype, sums.device
    if not programs:
        return
    kind, block = kind_of(bool(buffers), mixed), block_of(K)
    types = [TYPES[t] for t in (dtype, backend.buffer_dtype(dtype))]
    arguments = [
        table.chunks, table.rows, *rule, sums, sums if noises is None else noises,
        *types, kind, table.aligned, K, block, CHUNK // block,
    ]  # fmt: skip
    key = device, dtype, kind, table.aligned, K
    compiled = _compiled.get(key)
    with torch.cuda.device_of(sums):  # Triton launches on the current device
        if compiled is None:
            _compiled[key] = _update_kernel[(programs, 1, 1)](*arguments, num_warps=WARPS)
        else:
            compiled[(programs, 1, 1)](*arguments)


# C++, and the choice


def _update_native(
    params: list[Tensor],
    parts: list[list[Tensor]],
    buffers: list[Tensor],
    rule: Rule,
    mixed: bool,
    table: Table,
    sums: Tensor,
    noises: Tensor | None,
) -> None:
    function = native.function("update", params[0].dtype)
    coefficients = [s.to("cpu", torch.float64) for s in rule]
    function(
        ctypes.c_int64(len(params)), len(parts), ctypes.c_void_p(table.rows.data_ptr()),
        kind_of(bool(buffers), mixed),
        native.addresses(coefficients), torch.get_num_threads(),
        ctypes.c_void_p(sums.data_ptr()),
        ctypes.c_void_p(None if noises is None else noises.data_ptr()),
    )  # fmt: skip


# One launch each, asked for by name at every step: the same arguments do the same work again, on
# the same memory.
IMPLEMENTATIONS = {"triton": _update_triton, "native": _update_native, "reference": update_ref}


def ordered_as(p: Tensor, g: Tensor) -> Tensor:
    """g [...] with its values in the order in which p, of the same shape, has them in memory."""
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


def is_dense(t: Tensor) -> bool:
    """Whether the values of t [...] fill the memory from the first to the last, in whatever
    order."""
    if t.is_contiguous():
        return True
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) == t.numel()


def require_lists(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
    """Raises ValueError unless there are as many of one as of the other; buffers may be []."""
    if not params or len(grads) != len(params) or len(buffers) not in (0, len(params)):
        raise ValueError(
            f"{len(params)} parameters, {len(grads)} gradients, {len(buffers)} buffers do not fit "
            "together"
        )


class Plan:
    """The update of given parameters, checked and laid out once: a step is one launch.

    Args:
        params: tensors of any shapes, of one dtype and on one device: float32, bfloat16 or float64
            (others go through plain PyTorch); dense in memory.
        buffers: the momentum, float32 (float64 for float64 parameters), with the parameter's shape
            and strides; [] where the direction is u, and only lr and weight_decay matter.
        mixed: whether fresh and kept matter; else the direction is m.
        implementation: one of IMPLEMENTATIONS; by default what backend.choose says now.

    The tensors must keep their memory: a plan knows them by their addresses. A gradient has its
    parameter's shape, dtype and device. Where its strides are others it is copied into the
    parameter's order; they are looked at when the addresses of a list of gradients are new.

    CUDA graphs: a step may be captured. What the graph reads of the plan is kept as long as the
    plan, but while capturing nothing can be copied: call `settle` between the capture and the first
    replay.

    Raises ValueError for tensors that do not belong together.
    """

    def __init__(
        self,
        params: list[Tensor],
        buffers: list[Tensor],
        mixed: bool,
        implementation: str | None = None,
    ):
        kind_of(bool(buffers), mixed)
        require_lists(params, params, buffers)
        dtype, self._device = params[0].dtype, params[0].device
        wide = backend.buffer_dtype(dtype)
        for p in params:
            if (p.dtype, p.device) != (dtype, self._device):
                raise ValueError(
                    f"parameters of {dtype} on {self._device} and of {p.dtype} on {p.device} have "
                    "plans of their own"
                )
            if p.numel() and not is_dense(p):
                raise ValueError(
                    f"a parameter {list(p.shape)} with strides {p.stride()} is not dense in memory"
                )
        for p, m in zip(params, buffers, strict=False):
            wanted = (p.shape, p.stride(), wide, p.device)
            if (m.shape, m.stride(), m.dtype, m.device) != wanted:
                raise ValueError(
                    f"a momentum {list(m.shape)} of {m.dtype} on {m.device} for a parameter "
                    f"{list(p.shape)} of {p.dtype} on {p.device}: it has the parameter's shape and "
                    f"strides, in {wide}"
                )
        self.params, self.buffers, self.mixed = list(params), list(buffers), mixed
        self._implementation = implementation or backend.choose(self._device, dtype)
        sizes = tuple(p.numel() for p in params)
        self._chunks = _chunks(sizes, self._device) if self._implementation == "triton" else None
        programs = 1 if self._chunks is None else len(self._chunks)
        # ||g||^2 and ||m_t||^2 of the last step, in parts, one of each program: float64 [parts, 2],
        # or a part of a larger tensor that was put in its place before the first step
        self.sums = torch.empty(
            programs, 2, dtype=backend.wide_dtype(self._device), device=self._device
        )
        self._noises: dict[int, Tensor] = {}  # by K, float64 [programs, 2 K]
        self._moved = [*params, *buffers]
        # without m an address that is never used
        places = zip(sizes, params, buffers or params, strict=True)
        self._held = [t.data_ptr() for t in self._moved]
        self._fixed = torch.tensor([(n, p.data_ptr(), m.data_ptr()) for n, p, m in places])
        self._tables: dict[tuple[int, ...], Table] = {}
        self._captured: list[Table] = []
        # by K: memory for the table of a step that is captured, made before, since what is made
        # within a capture is memory that the graph itself writes over
        self._spare: dict[int, Tensor] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []  # rows, and what belongs there

    def __call__(self, grads: list[Tensor], rule: Rule) -> Tensor:
        """A step along one gradient a parameter. Returns `sums`, which the next step overwrites:
        float64 [parts, 2], whose sum over the parts is [||g||^2 without weight decay, ||m_t||^2 of
        the direction that was applied]. The same bits on every run."""
        self._launch([grads], grads, rule, None)
        return self.sums

    def along_mean(self, parts: list[list[Tensor]], rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        """A step along the mean of K gradients a parameter, 2 to 8.

        `parts` has K lists of one gradient a parameter, each the mean over as many samples as the
        others. Returns (sums, noise, squares): `sums` as for one gradient, here of the mean;
        ||g_k - mean||^2 and ||g_k||^2, float64 [K] each, over all parameters. The same bits on
        every run. Raises ValueError for another K.
        """
        K = len(parts)
        if not 2 <= K <= MOST_PARTS:
            raise ValueError(f"{K} gradients a parameter: along_mean takes 2 to {MOST_PARTS}")
        noises = self._noises.get(K)
        if noises is None:
            noises = self._noises[K] = self.sums.new_empty(len(self.sums), 2 * K)
        self._launch(parts, list(chain.from_iterable(parts)), rule, noises)
        noise, squares = noises.sum(dim=0).view(2, K).unbind()
        return self.sums, noise, squares

    def settle(self) -> None:
        """Copy to the device what could not be copied while a graph was captured."""
        for rows, host in self._pending:
            rows.copy_(host)
        self._pending.clear()

    @property
    def captured(self) -> bool:
        """Whether a graph reads this plan's memory."""
        return bool(self._captured)

    def _launch(
        self, parts: list[list[Tensor]], grads: list[Tensor], rule: Rule, noises: Tensor | None
    ) -> None:
        """`grads`: those of all parts in one list."""
        addresses = tuple(map(Tensor.data_ptr, grads))
        capturing = backend.capturing(self._device)
        table = self._tables.get(addresses)
        if table is None:
            table, parts = self._enter(addresses, parts, capturing)
        if capturing:
            self._captured.append(table)
        elif len(parts) not in self._spare:
            self._spare[len(parts)] = torch.empty_like(table.rows)
        IMPLEMENTATIONS[self._implementation](
            self.params, parts, self.buffers, rule, self.mixed, table, self.sums, noises
        )
        torch.autograd.graph.increment_version(self._moved)

    def _enter(
        self, addresses: tuple[int, ...], parts: list[list[Tensor]], capturing: bool
    ) -> tuple[Table, list[list[Tensor]]]:
        """A table for gradients at new addresses, and these gradients in the parameters' order."""
        for part in parts:
            require_lists(self.params, part, self.buffers)
            for p, g in zip(self.params, part, strict=True):
                if (g.shape, g.dtype, g.device) != (p.shape, p.dtype, p.device):
                    raise ValueError(
                        f"a gradient {list(g.shape)} of {g.dtype} on {g.device} for a parameter "
                        f"{list(p.shape)} of {p.dtype} on {p.device}"
                    )
        parts = [
            [ordered_as(p, g) for p, g in zip(self.params, part, strict=True)] for part in parts
        ]
        found = tuple(g.data_ptr() for part in parts for g in part)
        columns = torch.tensor(found, dtype=torch.int64).view(len(parts), len(self.params))
        host = torch.cat([self._fixed, columns.t()], dim=1)
        if capturing:
            if len(parts) not in self._spare:
                raise RuntimeError("a step like it has to come before the one that is captured")
            rows = self._spare.pop(len(parts))
            self._pending.append((rows, host))
        else:
            rows = backend.sent(host, self._device)
        aligned = not any(address % 16 for address in (*self._held, *found))
        table = Table(self._chunks, rows, aligned)
        # what was copied has another address at the next step, and a gradient in another order may
        # come to lie there
        if found == addresses and not capturing:
            if len(self._tables) == TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[addresses] = table
        return table, parts


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
        ms = [buffers[i] for i in some] if buffers else []
        plan = Plan([params[i] for i in some], ms, mixed)
        squares += plan([grads[i] for i in some], Rule(*rule)).sum(dim=0)
    return squares


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
    require_lists(params, grads, buffers)
    return _op(params, grads, buffers, list(rule), mixed)
