"""What a training step keeps beside the weights, in one launch: sums of loss and accuracy, norms of
the update, how many updates were made, and the first one that was not finite.

With L the mean loss of a batch of b samples, c of them classified rightly, and s the partial sums
of ||g||^2 and ||m_t||^2 that the update left:

    loss += b L,   correct += c,   samples += b      over the epoch and over the window, the updates
                                                     since the last row of the log
    ||g||^2, ||m_t||^2 = sum s,   updates += 1,   cursor += taken
    bad update = updates, if it was 0 and L + ||g||^2 + ||m_t||^2 is not finite

All of it lies on the device, and none of it is a number in Python, so that a CUDA graph of a step
may hold the launch. It moves 16 bytes a partial sum, and 200 more.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None


class Sums(NamedTuple):
    """Over samples; views of a State. `for sums in state.window: sums.zero_()` begins anew."""

    loss: Tensor  # 0-d, wide_dtype: the sum over samples, in nats
    seen: Tensor  # int64 [2]: samples classified rightly, samples


class State(NamedTuple):
    """Two tensors on one device, and views of what is in them."""

    # wide_dtype [4]: loss over the epoch, over the window, ||g||^2 and ||m_t||^2 of the last update
    reals: Tensor
    # int64 [6]: correct and samples of the epoch, correct and samples of the window, updates, bad
    # update
    counts: Tensor

    @property
    def epoch(self) -> Sums:
        return Sums(self.reals[0], self.counts[:2])

    @property
    def window(self) -> Sums:
        return Sums(self.reals[1], self.counts[2:4])

    @property
    def squared_norms(self) -> Tensor:
        """||g||^2 and ||m_t||^2 of the last update: wide_dtype [2]."""
        return self.reals[2:]

    @property
    def updates(self) -> Tensor:
        """How many were made: int64, 0-d."""
        return self.counts[4]

    @property
    def bad_update(self) -> Tensor:
        """The first one, from 1, whose loss or norms were not finite, or 0: int64, 0-d."""
        return self.counts[5]


def zeros(device: torch.device) -> State:
    """The state before the first update."""
    return State(
        torch.zeros(4, dtype=backend.wide_dtype(device), device=device),
        torch.zeros(6, dtype=torch.int64, device=device),
    )


def tally_ref(
    norms: Tensor,
    loss: Tensor,
    correct: Tensor,
    state: State,
    count: int,
    cursor: Tensor | None = None,
    taken: int = 0,
) -> None:
    """As `tally`, in plain PyTorch; operators alone, none of which waits for a value."""
    with torch.no_grad():
        losses, sums = state.reals[:2], state.counts[:4]
        losses += loss.to(losses.dtype) * count
        sums[::2] += correct
        sums[1::2] += count
        updates, bad = state.updates.add_(1), state.bad_update
        squares = state.squared_norms.copy_(norms.sum(dim=0))
        fine = torch.isfinite(loss + squares.sum()) | (bad > 0)
        bad.copy_(torch.where(fine, bad, updates))
        if cursor is not None:
            cursor += taken


# Triton

BLOCK = 1024  # partial sums that the one program adds at a time
# without fusion: the product and the sum of losses are each rounded, as everywhere else
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

if triton:
    # a new batch size compiles nothing anew
    @triton.jit(do_not_specialize=["parts", "count", "taken"])
    def _tally_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
        norms,  # float64 [parts, 2]
        loss,  # float32 or float64
        correct,  # int64
        reals,  # float64 [4]
        counts,  # int64 [6]
        cursor,  # int64; not touched without ADVANCED
        parts,
        count,
        taken,
        ADVANCED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # both sums side by side, as they lie in memory: accesses of 128 bits
        both = tl.arange(0, 2 * BLOCK)
        squares = tl.zeros([2 * BLOCK], tl.float64)
        for start in range(0, parts, BLOCK):
            at = 2 * start + both
            squares += tl.load(norms + at, mask=at < 2 * parts, other=0.0)
        g2, m2 = tl.split(tl.reshape(squares, [BLOCK, 2]))
        gg, mm = tl.sum(g2), tl.sum(m2)
        mean = tl.load(loss).to(tl.float64)
        hits = tl.load(correct)
        updates = tl.load(counts + 4) + 1
        bad = tl.load(counts + 5)
        # false for NaN too
        fine = tl.abs(mean + (gg + mm)) < float("inf")
        for sums in tl.static_range(2):
            tl.store(reals + sums, tl.load(reals + sums) + mean * count.to(tl.float64))
            tl.store(counts + 2 * sums, tl.load(counts + 2 * sums) + hits)
            tl.store(counts + 2 * sums + 1, tl.load(counts + 2 * sums + 1) + count)
        tl.store(reals + 2, gg)
        tl.store(reals + 3, mm)
        tl.store(counts + 4, updates)
        tl.store(counts + 5, tl.where(fine | (bad > 0), bad, updates))
        if ADVANCED:
            tl.store(cursor, tl.load(cursor) + taken)


def _tally_triton(
    norms: Tensor,
    loss: Tensor,
    correct: Tensor,
    state: State,
    count: int,
    cursor: Tensor | None = None,
    taken: int = 0,
) -> None:
    with torch.cuda.device_of(norms):  # Triton launches on the current device
        _tally_kernel[(1,)](
            norms, loss, correct, *state,
            correct if cursor is None else cursor,  # an unused pointer is any tensor
            len(norms), count, taken, cursor is not None, BLOCK,
            **OPTIONS,
        )  # fmt: skip


# C++, and the choice


def _tally_native(
    norms: Tensor,
    loss: Tensor,
    correct: Tensor,
    state: State,
    count: int,
    cursor: Tensor | None = None,
    taken: int = 0,
) -> None:
    numbers = ctypes.c_int64(len(norms)), ctypes.c_int64(count), ctypes.c_int64(taken)
    native.function("tally", loss.dtype)(
        *numbers,
        *(ctypes.c_void_p(t.data_ptr()) for t in (norms, loss, correct, *state)),
        ctypes.c_void_p(None if cursor is None else cursor.data_ptr()),
    )


IMPLEMENTATIONS = {"triton": _tally_triton, "native": _tally_native, "reference": tally_ref}


def tally(
    norms: Tensor,
    loss: Tensor,
    correct: Tensor,
    state: State,
    count: int,
    cursor: Tensor | None = None,
    taken: int = 0,
) -> None:
    """Take one more update into the state.

    Args:
        norms: wide_dtype [parts, 2], partial sums of ||g||^2 and ||m_t||^2, at least one of each;
            they are added in an order that depends on `parts` alone.
        loss: float32 or float64, 0-d, the mean loss of the batch in nats.
        correct: int64, 0-d, how many of the batch are classified rightly.
        state: what `zeros` gave; changed in place, and nothing else but the cursor is.
        count: samples of the batch.
        cursor: int64, 0-d, is advanced by `taken`.

    All on one device. Raises ValueError for tensors that do not belong together.
    """
    wide = backend.wide_dtype(norms.device)
    dtype = torch.float64 if loss.dtype == torch.float64 else torch.float32
    backend.check_tensors(
        norms.device,
        ("norms", norms, wide, (max(len(norms), 1), 2)),
        ("loss", loss, dtype, ()),
        ("correct", correct, torch.int64, ()),
        ("state.reals", state.reals, wide, (4,)),
        ("state.counts", state.counts, torch.int64, (6,)),
        ("cursor", cursor, torch.int64, ()),
    )
    run = IMPLEMENTATIONS[backend.choose(norms.device, dtype)]
    run(norms, loss, correct, state, count, cursor, taken)
