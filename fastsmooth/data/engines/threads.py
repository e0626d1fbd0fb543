"""JPEG by torchvision's decoder, the rest by PIL, in a pool of threads: ImageNet without DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

from fastsmooth.data.augment import View
from fastsmooth.data.chunks import Chunk, Chunks, Job
from fastsmooth.data.encoded import JPEG
from fastsmooth.data.source import Source

AT_ONCE = 2  # chunks in the pool's hands: one being made, one for the threads that are done with it


class ThreadsEngine:
    """Chunks in host memory, pinned for a GPU; the buffers are used again."""

    ahead = True

    def __init__(self, source: Source, threads: int, pinned: bool):
        self.source, self.pinned = source, pinned
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="fastsmooth decode")
        self.free: deque[torch.Tensor] = deque()

    def chunks(self, jobs: Iterator[Job]) -> Chunks:
        started: deque[tuple[Chunk, list[Future[None]]]] = deque()
        try:
            for job in jobs:
                started.append(self._start(job))
                if len(started) == AT_ONCE:
                    yield self._finish(*started.popleft())
            while started:
                yield self._finish(*started.popleft())
        finally:
            for _, futures in started:
                for future in futures:
                    future.cancel()

    def _start(self, job: Job) -> tuple[Chunk, list[Future[None]]]:
        source = self.source
        drawn = source.drawn(job)
        if source.split.pixels is not None:
            kept = torch.from_numpy(source.split.pixels[job.index.numpy()])
            return Chunk(job, kept, source.moves(job, drawn)), []
        size = source.size_in(job.epoch)
        buffer = self._buffer(len(job.index), size)
        views = source.views(job, drawn).each(size)
        pixels = buffer[: len(job.index)]
        futures = [
            self.pool.submit(self._decode, i, view, pixels[k].numpy())
            for k, (i, view) in enumerate(zip(job.index.tolist(), views, strict=True))
        ]
        moves = source.moves(job, drawn)
        return Chunk(job, pixels, moves, lambda: self.free.append(buffer)), futures

    def _finish(self, chunk: Chunk, futures: list[Future[None]]) -> Chunk:
        for future in futures:
            future.result()
        return chunk

    def _buffer(self, count: int, size: int) -> torch.Tensor:
        while self.free:
            buffer = self.free.popleft()
            if len(buffer) >= count and buffer.shape[1] == size:
                return buffer
        return torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=self.pinned)

    def _decode(self, i: int, view: View, to: np.ndarray) -> None:
        """Write the view of sample i into `to`, uint8 [size, size, 3]."""
        pixels = self.source.given(i, view)
        if pixels is None:
            pixels = self._fast(i, view)
        to[...] = self.source.by_pil(i, view) if pixels is None else pixels

    def _fast(self, i: int, view: View) -> np.ndarray | None:
        """The view of sample i by torchvision's decoder; None where it is not to read the file: PIL
        does, or finds the words."""
        (top, left, height, width), scaled, (down, right), size = view
        try:
            encoded = self.source.files.read(i)
            # a damaged PNG would end the process (torchvision 0.29.1)
            if encoded[: len(JPEG)].tobytes() != JPEG:
                return None
            image = decode_image(torch.from_numpy(encoded), ImageReadMode.RGB)
        except (RuntimeError, OSError):
            return None
        if tuple(image.shape[1:]) != (self.source.index.height[i], self.source.index.width[i]):
            return None
        image = image[None, :, top : top + height, left : left + width]
        image = F.interpolate(image, scaled, mode="bilinear", antialias=True)[0]
        pixels = image.numpy().transpose(1, 2, 0)
        return pixels[down : down + size, right : right + size]
