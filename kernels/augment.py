"""A batch of images out of stored pixels in one pass: cropped, flipped, rotated and normalised.

Each output pixel comes from one stored pixel or is black, so the three movements collapse into one
look-up. Its place follows PIL's nearest affine transform, in 16.16 fixed point, then the flip, then
the crop of an image with a black border:

    u = (x0 + x cos + y sin) >> 16,   v = (y0 - x sin + y cos) >> 16,   u = S - 1 - u if flipped,
                                      (v + down, u + right)

and the value v of channel c becomes table[c, v], which is whatever normalisation the table was made
with, bit for bit. There are three channels or one.

A launch needs no number from the host: which images it takes, it reads from an order and a cursor
on the device, and their labels come with them. So a CUDA graph may hold it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastsmooth.kernels import backend, native

try:
    import triton
    import triton.language as tl
except ImportError:  # no triton outside Linux: backend.choose never names it there
    triton = None

# of a row of `moves`: x0, y0, cos, sin, minus sin (16.16 fixed point), down, right (pixels), flip
# (0 or 1)
COLUMNS = 8
CHANNELS = (1, 3)


def sources_ref(moves: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the output pixels of images with these `moves` come from: (int64 [B, S * S] index, bool
    [B, S * S] inside)."""
    x0, y0, cos, sin, minus_sin, down, right, flip = moves.long().T[:, :, None, None]
    pixels = torch.arange(size, device=moves.device)
    y, x = pixels[:, None], pixels[None, :]
    u = (x0 + x * cos + y * sin) >> 16
    v = (y0 + x * minus_sin + y * cos) >> 16
    inside = (u >= 0) & (u < size) & (v >= 0) & (v < size)
    u, v = torch.where(flip != 0, size - 1 - u, u) + right, v + down
    inside &= (u >= 0) & (u < size) & (v >= 0) & (v < size)
    return (v * size + u).flatten(1), inside.flatten(1)


def augment_ref(
    pixels: Tensor,
    rows: Tensor | None,
    moves: Tensor | None,
    table: Tensor,
    out: Tensor,
    cursor: Tensor | None = None,
    labels: Tensor | None = None,
    out_labels: Tensor | None = None,
) -> Tensor:
    """As `augment`, in plain PyTorch, into `out` [B, S, S, C] and `out_labels`; operators alone,
    none of which waits for a value."""
    count, size, _, channels = out.shape
    if rows is not None:
        if cursor is not None:
            rows = rows.index_select(0, cursor + torch.arange(count, device=rows.device))
        pixels = pixels.index_select(0, rows)
        moves = None if moves is None else moves.index_select(0, rows)
    if labels is not None and out_labels is not None:
        out_labels.copy_(labels if rows is None else labels.index_select(0, rows))
    values = pixels.reshape(count, size * size, channels)
    if moves is not None:
        index, inside = sources_ref(moves, size)
        index = torch.where(inside, index, 0)[..., None].expand(-1, -1, channels)
        values = values.gather(1, index) * inside[..., None]
    places = values.long() + 256 * torch.arange(channels, device=values.device)
    return out.copy_(table.flatten()[places].view_as(out))


# Triton

BLOCK = 1024  # output values of one program: neighbours in memory, so that the stores are whole

if triton:

    @triton.jit
    def _augment_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
        pixels,  # uint8 [N, S, S, CHANNELS]
        rows,  # int64 [n]: which of the N; not read without INDEXED
        moves,  # int32 [N, 8]; not read without MOVED
        table,  # float32 or bfloat16 [CHANNELS, 256]
        out,  # as the table [B, S, S, CHANNELS]
        cursor,  # int64: where in rows the B begin; not read without SHIFTED
        labels,  # int64 [N]; not read without LABELLED
        out_labels,  # int64 [B]
        size,
        INDEXED: tl.constexpr,
        MOVED: tl.constexpr,
        SHIFTED: tl.constexpr,
        LABELLED: tl.constexpr,
        CHANNELS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        values = size * size * CHANNELS
        blocks = tl.cdiv(values, BLOCK)
        image = (tl.program_id(0) // blocks).to(tl.int64)
        block = tl.program_id(0) % blocks
        stored = image
        if INDEXED:
            if SHIFTED:
                rows += tl.load(cursor)
            stored = tl.load(rows + image)
        if LABELLED:
            tl.store(out_labels + image, tl.load(labels + stored), mask=block == 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < values
        channel, pixel = at % CHANNELS, at // CHANNELS
        inside = mask
        if MOVED:
            row = moves + stored * 8
            x, y = pixel % size, pixel // size
            cos = tl.load(row + 2)
            u = (tl.load(row) + x * cos + y * tl.load(row + 3)) >> 16
            v = (tl.load(row + 1) + x * tl.load(row + 4) + y * cos) >> 16
            inside &= (u >= 0) & (u < size) & (v >= 0) & (v < size)
            u = tl.where(tl.load(row + 7) != 0, size - 1 - u, u) + tl.load(row + 6)
            v += tl.load(row + 5)
            inside &= (u >= 0) & (u < size) & (v >= 0) & (v < size)
            pixel = v * size + u
        place = stored * values + pixel * CHANNELS + channel
        value = tl.load(pixels + place, mask=inside, other=0)
        tl.store(
            out + image * values + at,
            tl.load(table + channel * 256 + value.to(tl.int32), mask=mask),
            mask=mask,
        )


def _augment_triton(
    pixels: Tensor,
    rows: Tensor | None,
    moves: Tensor | None,
    table: Tensor,
    out: Tensor,
    cursor: Tensor | None = None,
    labels: Tensor | None = None,
    out_labels: Tensor | None = None,
) -> Tensor:
    count, size, _, channels = out.shape
    given = [t is not None for t in (rows, moves, cursor, labels)]
    # an unused pointer is any tensor
    rows, moves, cursor, labels, out_labels = (
        table if t is None else t for t in (rows, moves, cursor, labels, out_labels)
    )
    # along one axis: the others end at 65,535
    grid = (count * triton.cdiv(size * size * channels, BLOCK),)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _augment_kernel[grid](
            pixels,
            rows,
            moves,
            table,
            out,
            cursor,
            labels,
            out_labels,
            size,
            *given,
            channels,
            BLOCK,
        )
    return out


# C++, and the choice

PER_THREAD = 16  # images of 32 x 32 pixels, below which another thread costs more than it gives


def _augment_native(
    pixels: Tensor,
    rows: Tensor | None,
    moves: Tensor | None,
    table: Tensor,
    out: Tensor,
    cursor: Tensor | None = None,
    labels: Tensor | None = None,
    out_labels: Tensor | None = None,
) -> Tensor:
    count, size, _, channels = out.shape
    threads = max(1, min(torch.get_num_threads(), count * size * size // (PER_THREAD * 1024)))
    addresses = (
        ctypes.c_void_p(None if t is None else t.data_ptr())
        for t in (pixels, rows, moves, table, cursor, labels, out, out_labels)
    )
    sizes = (ctypes.c_int64(n) for n in (count, size, channels))
    native.function("augment", table.dtype)(*sizes, threads, *addresses)
    return out


IMPLEMENTATIONS = {"triton": _augment_triton, "native": _augment_native, "reference": augment_ref}


def augment(
    pixels: Tensor,
    rows: Tensor | None,
    moves: Tensor | None,
    table: Tensor,
    out: Tensor | None = None,
    cursor: Tensor | None = None,
    labels: Tensor | None = None,
    out_labels: Tensor | None = None,
) -> Tensor:
    """The images `rows` of `pixels`, moved and normalised: [B, S, S, C] of the table's dtype.

    Args:
        pixels: uint8 [N, S, S, C], S at most 1024, C 1 or 3.
        rows: int64 [B], which of the N images; None for all in order. With a cursor int64 [n], n at
            least B, which is the length of `out` then.
        moves: int32 [N, 8], a row a stored image as COLUMNS says; None leaves the images as stored.
        table: float32 or bfloat16 [C, 256], what a channel's value becomes.
        out: [B, S, S, C] of the table's dtype, contiguous, written and returned; None for a new
            tensor.
        cursor: int64, 0-d: the images are rows[cursor : cursor + B]. Its value is read on the
            device, when the kernel runs. Needs `rows` and `out`.
        labels: int64 [N], a number of each stored image.
        out_labels: int64 [B], to which the numbers of the B images are written. Given with
            `labels`, or not at all.

    All on one device. Raises ValueError for tensors that do not belong together; indices and the
    cursor's value are not checked.
    """
    if cursor is not None and (rows is None or out is None):
        raise ValueError("a cursor needs rows and out")
    if (labels is None) != (out_labels is None):
        raise ValueError("labels and out_labels are given together")
    size = pixels.shape[1] if pixels.ndim == 4 else 0
    available = count = len(pixels) if rows is None else len(rows)
    if cursor is not None and out is not None:
        count = len(out)
        available = max(available, count)
    channels = len(table) if table.ndim == 2 and len(table) in CHANNELS else CHANNELS[-1]
    dtype = torch.bfloat16 if table.dtype == torch.bfloat16 else torch.float32
    backend.check_tensors(
        pixels.device,
        ("pixels", pixels, torch.uint8, (len(pixels), size, size, channels)),
        ("table", table, dtype, (channels, 256)),
        ("out", out, dtype, (count, size, size, channels)),
        ("rows", rows, torch.int64, (available,)),
        ("moves", moves, torch.int32, (len(pixels), COLUMNS)),
        ("cursor", cursor, torch.int64, ()),
        ("labels", labels, torch.int64, (len(pixels),)),
        ("out_labels", out_labels, torch.int64, (count,)),
    )
    if out is None:
        out = torch.empty(count, size, size, channels, dtype=dtype, device=pixels.device)
    if not out.numel():
        return out
    return IMPLEMENTATIONS[backend.choose(pixels.device, dtype)](
        pixels, rows, moves, table, out, cursor, labels, out_labels
    )
