"""Which sample comes when: every random number of the data is a counter-based function of (seed,
epoch, sample index).

So the loader, the batch size, the number of workers and an interruption cannot change what a sample
looks like or when it comes. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Streams keep numbers that serve different ends apart; RandomResizedCrop and random erasing take
# one more stream an attempt, RandAugment one an operation.
ORDER, AUGMENT, DRAW, HISTORY, CROP_ATTEMPT = 0, 1, 2, 3, 16
RANDAUGMENT, ERASE, ERASE_ATTEMPT = 32, 48, 64


def philox(seed: int, epoch: int, index: Tensor, stream: int | Tensor = ORDER) -> Tensor:
    """Four 32-bit random words a sample: int64 [4, n] in [0, 2^32) for int64 `index` [n], on the
    index's device.

    Streams [k, 1] give [4, k, n].
    """
    return philox_rounds(
        [index & MASK, epoch & MASK, stream, index >> 32], [seed & MASK, seed >> 32]
    )


def philox_rounds(counter: list[Tensor | int], key: list[int]) -> Tensor:
    """Philox4x32-10: int64 [4, ...] in [0, 2^32) of four counter words, int64 tensors that
    broadcast to [...], and two key words. The product of two words may wrap, its upper half is
    masked back."""
    shape = torch.broadcast_shapes(*(c.shape for c in counter if isinstance(c, Tensor)))
    like = next(c for c in counter if isinstance(c, Tensor))
    a, b, c, d = (x if isinstance(x, Tensor) else like.new_full(shape, x) for x in counter)
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) & MASK, (key[1] + r * 0xBB67AE85) & MASK
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((y >> 32) & MASK) ^ b ^ k0, y & MASK, ((x >> 32) & MASK) ^ d ^ k1, x & MASK
    return torch.stack([a, b, c, d])


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of epoch `epoch`: int64 [n], uniform but for ties of its 62-bit keys."""
    words = philox(seed, epoch, torch.arange(n), ORDER)
    return sorted_by(words)


def sorted_by(words: Tensor) -> Tensor:
    """Indices, int64 [n], that sort 62-bit keys of words[0] and words[1], int64 [n] each."""
    return torch.argsort((words[0] << 30) ^ words[1], stable=True)


def in_order(n: int, batch_size: int, device: str = "cpu") -> Iterator[Tensor]:
    """All n samples once, by index: int64 [batch_size], the last one shorter."""
    for at in range(0, n, batch_size):
        yield torch.arange(at, min(at + batch_size, n), device=device)


def subset(seed: int, step: int, draw: int, n: int, batch_size: int, device: str = "cpu") -> Tensor:
    """A uniform draw without replacement, by (seed, step, draw) alone: int64 [batch_size]."""
    words = philox(seed, step, torch.arange(n, device=device) + (draw << 32), DRAW)
    return sorted_by(words)[:batch_size]


def reordered(order: Tensor, start: int, seed: int, step: int, history: int, later: int) -> Tensor:
    """The order of an epoch from place `start` on as another history of training has it; history 0
    is the order itself.

    The history leaves the run at update `step`, `later` epochs before this one. int64 [n], uniform
    over what may come.
    """
    if history == 0:
        return order
    rest = order[start:]
    words = philox(seed, step, torch.arange(len(rest)) + (((history << 16) + later) << 32), HISTORY)
    return torch.cat([order[:start], rest[sorted_by(words)]])
