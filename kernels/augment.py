"""A batch of images out of stored pixels in one pass: cropped, flipped, rotated and normalised.

Each output pixel comes from one stored pixel or is black, so the three movements collapse into one
look-up. Its place follows PIL's nearest affine transform, in 16.16 fixed point, then the flip, then
the crop of an image with a black border:

    u = (x0 + x cos + y sin) >> 16,   v = (y0 - x sin + y cos) >> 16,   u = S - 1 - u if flipped,
                                      (v + down, u + right)

and the value v of channel c becomes table[c, v], which is whatever normalisation the table was made
with, bit for bit.
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
    pixels: Tensor, rows: Tensor | None, moves: Tensor | None, table: Tensor, out: Tensor
) -> Tensor:
    """As `augment`, in plain PyTorch, into `out` [B, S, S, 3]."""
    count, size = out.shape[:2]
    if rows is not None:
        pixels = pixels.index_select(0, rows)
        moves = None if moves is None else moves.index_select(0, rows)
    values = pixels.reshape(count, size * size, 3)
    if moves is not None:
        index, inside = sources_ref(moves, size)
        index = torch.where(inside, index, 0)[..., None].expand(-1, -1, 3)
        values = values.gather(1, index) * inside[..., None]
    places = values.long() + 256 * torch.arange(3, device=values.device)
    return out.copy_(table.flatten()[places].view_as(out))


# Triton

BLOCK = 1024  # output values of one program: neighbours in memory, so that the stores are whole

if triton:

    @triton.jit
    def _augment_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
        pixels,  # uint8 [N, S, S, 3]
        rows,  # int64 [B]: which of the N; not read without INDEXED
        moves,  # int32 [N, 8]; not read without MOVED
        table,  # float32 [3, 256]
        out,  # float32 [B, S, S, 3]
        size,
        INDEXED: tl.constexpr,
        MOVED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        image = tl.program_id(1).to(tl.int64)
        stored = image
        if INDEXED:
            stored = tl.load(rows + image)
        values = size * size * 3
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < values
        channel, pixel = at % 3, at // 3
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
        value = tl.load(pixels + stored * values + pixel * 3 + channel, mask=inside, other=0)
        tl.store(
            out + image * values + at,
            tl.load(table + channel * 256 + value.to(tl.int32), mask=mask),
            mask=mask,
        )


def _augment_triton(
    pixels: Tensor, rows: Tensor | None, moves: Tensor | None, table: Tensor, out: Tensor
) -> Tensor:
    count, size = out.shape[:2]
    with torch.cuda.device_of(out):  # Triton launches on the current device
        # an unused pointer is any tensor
        _augment_kernel[(triton.cdiv(size * size * 3, BLOCK), count)](
            pixels, table if rows is None else rows, table if moves is None else moves, table, out,
            size,
            rows is not None, moves is not None, BLOCK,
        )  # fmt: skip
    return out


# C++, and the choice

PER_THREAD = 16  # images of 32 x 32 pixels, below which another thread costs more than it gives


def _augment_native(
    pixels: Tensor, rows: Tensor | None, moves: Tensor | None, table: Tensor, out: Tensor
) -> Tensor:
    count, size = out.shape[:2]
    threads = max(1, min(torch.get_num_threads(), count * size * size // (PER_THREAD * 1024)))
    pixels_at, rows_at, moves_at, table_at, out_at = (
        ctypes.c_void_p(None if t is None else t.data_ptr())
        for t in (pixels, rows, moves, table, out)
    )
    sizes = ctypes.c_int64(count), ctypes.c_int64(size)
    native.function("augment")(*sizes, pixels_at, rows_at, moves_at, table_at, threads, out_at)
    return out


IMPLEMENTATIONS = {"triton": _augment_triton, "native": _augment_native, "reference": augment_ref}


def augment(
    pixels: Tensor,
    rows: Tensor | None,
    moves: Tensor | None,
    table: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The images `rows` of `pixels`, moved and normalised: float32 [B, S, S, 3].

    Args:
        pixels: uint8 [N, S, S, 3], S at most 1024.
        rows: int64 [B], which of the N images; None for all in order.
        moves: int32 [N, 8], a row a stored image as COLUMNS says; None leaves the images as stored.
        table: float32 [3, 256], what a channel's value becomes.
        out: float32 [B, S, S, 3], contiguous, written and returned; None for a new tensor.

    All on one device. Raises ValueError for tensors that do not belong together; indices are not
    checked.
    """
    size = pixels.shape[1] if pixels.ndim == 4 else 0
    count = len(pixels) if rows is None else len(rows)
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("pixels", pixels, torch.uint8, (len(pixels), size, size, 3)),
        ("rows", rows, torch.int64, (count,)),
        ("moves", moves, torch.int32, (len(pixels), COLUMNS)),
        ("table", table, torch.float32, (3, 256)),
        ("out", out, torch.float32, (count, size, size, 3)),
    ]
    for name, tensor, dtype, shape in expected:
        if tensor is None:
            continue
        kind = (tensor.dtype, tensor.shape, tensor.device)
        if kind != (dtype, shape, pixels.device) or not tensor.is_contiguous():
            strides = "" if tensor.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"{name} {list(tensor.shape)} of {tensor.dtype} on {tensor.device}{strides}: "
                f"wanted contiguous {list(shape)} of {dtype} on {pixels.device}"
            )
    if out is None:
        out = torch.empty(count, size, size, 3, device=pixels.device)
    if not out.numel():
        return out
    return IMPLEMENTATIONS[backend.choose(pixels.device, torch.float32)](
        pixels, rows, moves, table, out
    )
