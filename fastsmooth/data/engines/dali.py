"""NVIDIA DALI as a decode and geometry engine, on the CPU or a GPU.

DALI draws no number, reads no file and knows no batch size here: every chunk is fed to it, bytes,
crop boxes, flips and angles. Its readers repeat samples, and its random operators depend on the
batch size.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsmooth.data.augment import View, padding
from fastsmooth.data.chunks import Chunk, Chunks, Job
from fastsmooth.data.encoded import plain_size
from fastsmooth.data.images import DataError
from fastsmooth.data.source import Source

AT_ONCE = 2  # chunks that DALI works on


def available() -> bool:
    # PyTorch's CUDA wheels have a package `nvidia` too
    return (
        importlib.util.find_spec("nvidia") is not None
        and importlib.util.find_spec("nvidia.dali") is not None
    )


def require() -> None:
    """Raises DataError, with the line that installs DALI, where it is missing."""
    if available():
        return
    if sys.platform != "linux":
        raise DataError(
            "--loader dali needs NVIDIA DALI, which runs on Linux alone: use --loader threads"
        )
    cuda = "120" if (torch.version.cuda or "13").startswith("12") else "130"
    package = f"nvidia-dali-cuda{cuda}"
    raise DataError(
        f"--loader dali needs NVIDIA DALI: pip install {package}, or use --loader threads"
    )


@dataclass(frozen=True)
class Decoder:
    """How a GPU decodes; DALI's own defaults."""

    sliced: bool = False  # decode the crop box alone
    hw_load: float = 0.65  # share of a chunk for the hardware JPEG decoder, where there is one
    device_padding: int = 16 << 20  # bytes a decoder's device buffers begin with
    host_padding: int = 8 << 20


@dataclass
class Prepared:
    """A job with what DALI is fed, and the samples of which it is fed a stand-in."""

    job: Job
    feeds: dict[str, Any]
    moves: Tensor | None = None
    views: list[View] = field(default_factory=list)  # of files
    # place in the chunk: pixels from elsewhere
    given: dict[int, np.ndarray] = field(default_factory=dict)


class DaliEngine:
    """Chunks in host memory, or with a CUDA device on that device."""

    ahead = True

    def __init__(
        self, source: Source, chunk: int, threads: int, device: torch.device, decoder: Decoder
    ):
        require()
        self.source, self.chunk, self.threads = source, chunk, threads
        self.device, self.decoder = device, decoder
        self.gpu = device.type == "cuda"
        # on which a chunk is there, while the host goes on
        self.stream = torch.cuda.Stream(device) if self.gpu else None
        pixels = source.split.pixels
        self.pixels: Tensor | None = None  # uint8 [n, size, size, C]; None: files
        if pixels is not None:
            self.pixels = torch.from_numpy(pixels).to(device if self.gpu else "cpu")
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="fastsmooth read")
        self.idle: list[Any] = []  # pipelines

    def chunks(self, jobs: Iterator[Job]) -> Chunks:
        pipe = self.idle.pop() if self.idle else self._pipeline(self.chunk)
        waiting: deque[Prepared] = deque()
        try:
            for job in jobs:
                waiting.append(self._prepare(job))
                pipe = self._schedule(pipe, waiting[-1])
                if len(waiting) == AT_ONCE:
                    pipe, chunk = self._collect(pipe, waiting)
                    yield chunk
            while waiting:
                pipe, chunk = self._collect(pipe, waiting)
                yield chunk
        except DataError:
            pipe = None  # it has failed, or may have
            raise
        finally:  # DALI reads what `waiting` holds
            if pipe is not None:
                with contextlib.suppress(RuntimeError):
                    for _ in waiting:
                        result(pipe, self.stream)
                    self.idle.append(pipe)

    def _schedule(self, pipe: Any, prepared: Prepared) -> Any:
        """The pipeline, or None where it has failed."""
        try:
            if pipe is not None:
                run(pipe, prepared.feeds)
            return pipe
        except RuntimeError:
            return None

    def _collect(self, pipe: Any, waiting: deque[Prepared]) -> tuple[Any, Chunk]:
        """The pipeline, and the chunk that has waited longest. A chunk that DALI fails on is made
        sample by sample."""
        prepared = waiting.popleft()
        with torch.cuda.stream(self.stream):  # where there is none, this does nothing
            try:
                if pipe is None:
                    raise RuntimeError("it failed before")
                pixels = result(pipe, self.stream)
            except RuntimeError as error:
                if self.pixels is not None:
                    raise DataError(f"DALI: {reason(error)}: use --loader resident") from None
                pixels = self._one_by_one(prepared)
                pipe = self._pipeline(self.chunk)  # one that has failed is of no use
                for later in waiting:
                    pipe = self._schedule(pipe, later)
            for k, given in prepared.given.items():
                pixels[k] = torch.from_numpy(given)
        ready = self.stream.record_event() if self.stream else None
        # with what DALI was fed, which it may still read on a GPU
        return pipe, Chunk(prepared.job, pixels, prepared.moves, prepared.feeds.clear, ready)

    def _one_by_one(self, prepared: Prepared) -> Tensor:
        pixels, pipe = [], None
        for k, i in enumerate(prepared.job.index.tolist()):
            pipe = pipe or self._pipeline(1)
            try:
                run(pipe, {name: value[k : k + 1] for name, value in prepared.feeds.items()})
                pixels.append(result(pipe))  # which waits: this happens seldom
            except RuntimeError as error:
                if "CUDA" in str(error) or "alloc" in str(error):
                    raise DataError(
                        f"DALI: {reason(error)}: lower --chunk, or use --loader threads"
                    ) from None
                pipe = None
                *_, size = view = prepared.views[k]
                pixels.append(torch.zeros(1, size, size, 3, dtype=torch.uint8))
                prepared.given[k] = self.source.by_pil(i, view)
        return torch.cat([p.to(self.device if self.gpu else "cpu") for p in pixels])

    # What is fed

    def _prepare(self, job: Job) -> Prepared:
        if self.pixels is None:
            return self._prepare_files(job)
        return self._prepare_pixels(job, self.pixels)

    def _prepare_files(self, job: Job) -> Prepared:
        source = self.source
        size, drawn = source.size_in(job.epoch), source.drawn(job)
        views = source.views(job, drawn)
        prepared = Prepared(job, {}, source.moves(job, drawn), views=views.each(size))
        encoded = list(self.pool.map(self._read, job.index.tolist(), prepared.views))
        box, scaled, corner = (v.numpy().astype(np.int32) for v in views)
        for k, read in enumerate(encoded):
            if read.ndim > 1:  # pixels
                prepared.given[k], encoded[k] = read, STAND_IN
                box[k], scaled[k], corner[k] = (0, 0, 1, 1), size, 0
        prepared.feeds = {"encoded": encoded, "start": np.ascontiguousarray(box[:, :2])}
        prepared.feeds |= {
            "shape": np.ascontiguousarray(box[:, 2:]),
            "scaled": scaled.astype(np.float32),
            "corner": corner,
            "kept": np.full_like(corner, size),
        }
        return prepared

    def _read(self, i: int, view: View) -> np.ndarray:
        """Sample i's bytes; its pixels, uint8 [size, size, 3], if DALI is not to decode it."""
        pixels = self.source.given(i, view)
        if pixels is not None:
            return pixels
        with contextlib.suppress(OSError):
            encoded = self.source.files.read(i)
            index = self.source.index
            if plain_size(encoded.data) == (index.width[i], index.height[i]):
                return encoded
        return self.source.by_pil(i, view)  # or finds the words

    def _prepare_pixels(self, job: Job, pixels: Tensor) -> Prepared:
        source, m = self.source, len(job.index)
        drawn = source.drawn(job)
        images = pixels.index_select(0, job.index.to(pixels.device))
        start, flip, angle = np.zeros((m, 2)), np.zeros(m), np.zeros(m)
        if drawn is not None:
            start = drawn[:, :2].numpy() - padding(source.size)
            flip, angle = drawn[:, 2].numpy(), drawn[:, 3].numpy()
        feeds = {
            # on the CPU no tensor: DALI would ask PyTorch for its CUDA stream
            "images": images if self.gpu else images.numpy(),
            "start": start.astype(np.int32),
            "flip": flip.astype(np.int32),
            "angle": angle.astype(np.float32),
        }
        return Prepared(job, feeds)

    # The pipelines

    def _pipeline(self, most: int) -> Any:
        """A pipeline for chunks of up to `most` samples."""
        from nvidia.dali import Pipeline, fn, types  # an extra

        device_id = (self.device.index or 0) if self.gpu else None
        # one in the queue: run() puts AT_ONCE in DALI's hands itself
        pipe = Pipeline(most, self.threads, device_id, prefetch_queue_depth=1)
        graph = self._files_graph if self.pixels is None else self._pixels_graph
        with pipe:
            pipe.set_outputs(graph(fn, types))
        pipe.build()
        return pipe

    def _files_graph(self, fn: ModuleType, types: ModuleType) -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start, shape, corner, kept = (
            fn.external_source(name=name, dtype=types.INT32, ndim=1)
            for name in ("start", "shape", "corner", "kept")
        )
        scaled = fn.external_source(name="scaled", dtype=types.FLOAT, ndim=1)
        # as PIL and torchvision leave it
        options = {"output_type": types.RGB, "adjust_orientation": False}
        if self.gpu:
            options |= {
                "device": "mixed",
                "hw_decoder_load": self.decoder.hw_load,
                "device_memory_padding": self.decoder.device_padding,
                "host_memory_padding": self.decoder.host_padding,
            }
        if self.gpu and not self.decoder.sliced:
            images = fn.slice(
                fn.decoders.image(encoded, **options), start=start, shape=shape, axes=(0, 1)
            )
        else:
            images = fn.decoders.image_slice(
                encoded, start=start, shape=shape, axes=(0, 1), **options
            )
        images = fn.resize(images, size=scaled, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.slice(images, start=corner, shape=kept, axes=(0, 1))

    def _pixels_graph(self, fn: ModuleType, types: ModuleType) -> Any:
        size, device = self.source.size, "gpu" if self.gpu else "cpu"
        images = fn.external_source(
            name="images", device=device, dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
        )
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        angle = fn.external_source(name="angle", dtype=types.FLOAT, ndim=0)
        border = {"out_of_bounds_policy": "pad", "fill_values": 0}
        images = fn.slice(images, start=start, shape=[size, size], axes=(0, 1), **border)
        images = fn.flip(images, horizontal=flip)
        return fn.rotate(
            images, angle=angle, interp_type=types.INTERP_NN, keep_size=True, fill_value=0
        )


def stand_in() -> np.ndarray:
    """The bytes of a JPEG of one pixel."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


STAND_IN = stand_in()


def run(pipe: Any, feeds: dict[str, Any]) -> None:
    """Put a chunk into the pipeline's hands."""
    for name, value in feeds.items():
        pipe.feed_input(name, value)
    pipe.schedule_run()


def result(pipe: Any, stream: torch.cuda.Stream | None = None) -> Tensor:
    """uint8 [m, size, size, C] of the chunk put in first, in DALI memory that it alone uses; there
    for the work of `stream` that comes after, and for anyone where it is None."""
    (images,) = pipe.outputs(cuda_stream=stream)
    return torch.from_dlpack(images.as_tensor())


def reason(error: Exception) -> str:
    """The telling line of what DALI raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if line.startswith(("Error", "Assert"))),
        lines[0] if lines else "failed",
    )
