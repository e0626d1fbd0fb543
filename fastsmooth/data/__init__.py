"""Images in, batches out: open_data reads a data set and puts one of the loaders in front of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastsmooth.data import augment
from fastsmooth.data.chunks import ChunkedLoader, Loader
from fastsmooth.data.engines import dali
from fastsmooth.data.engines.dali import DaliEngine, Decoder
from fastsmooth.data.engines.resident import ResidentLoader
from fastsmooth.data.engines.threads import ThreadsEngine
from fastsmooth.data.engines.torchloader import TorchEngine
from fastsmooth.data.images import DataError, ImageSet, Split, decode_all
from fastsmooth.data.index import THREADS, in_threads, load_formats, read_index
from fastsmooth.data.index import header as header_of
from fastsmooth.data.sets import READERS
from fastsmooth.data.source import BadImages, Source
from fastsmooth.data.stream import Stream
from fastsmooth.messages import note
from fastsmooth.processors import processors

MEMORY_SHARE = 0.4  # of the free memory, at most, for the images of a resident set
# elsewhere 512: as fast (benchmarks/bench_loader.py), in less memory
CHUNK_OF_PIXELS = {"cuda": 2048}
# the fastest on an H100 (benchmarks/gpu_decode.py); elsewhere 64, which is soon there
CHUNK_OF_FILES = {"cuda": 128}

SAMPLE = 256  # image headers that say what size the others have

__all__ = ["Data", "DataError", "Stream", "open_data", "read_set", "usual_side"]


@dataclass(frozen=True)
class Data:
    """A training and a test loader with the facts that the rest of a run needs."""

    train: Loader
    test: Loader
    classes: int
    size: int
    fingerprint: str
    loader: str
    choice: str  # one line: which loader was picked and why
    bad: BadImages


def open_data(
    config,
    device: torch.device,
    say: Callable[[str], None] = note,
    sharing: int = 1,
    images: ImageSet | None = None,
) -> Data:
    """The data set of `config` (a resolved fastsmooth.cli.config.Config) behind its loader. Raises
    DataError.

    `say` gets a line where reading takes long, what may not be meant as it is (a class that is
    never tested), and one for each image that cannot be read but may be black. `sharing`: processes
    of this run on this machine, which share its processors and its memory. `images`: what read_set
    gave.
    """
    if config.loader == "dali":
        dali.require()
    images = images or read_set(config)
    for line in images.remarks:
        say(line)
    bad = BadImages(config.on_bad_image, say)
    name, why = choose(config, images, device, sharing)
    threads = max(processors() // sharing, 1) if config.workers is None else config.workers
    if name != "torch":  # where 0 processes are this one
        threads = max(threads, 1)
    loaders, chunk = [], 0
    for split in (images.train, images.test):
        if name == "resident":
            kept = decode(split, config, bad)
            loader = ResidentLoader(
                kept, config.augment, config.seed, images.mean, images.std, device
            )
        else:
            source = Source(
                split, indexed(split, bad, say), config.augment, config.image_size, config.seed, bad
            )
            chunk = config.chunk or chunk_size(split, device)
            engine = make_engine(name, source, chunk, threads, device, config)
            loader = ChunkedLoader(
                engine, split.labels, config.image_size, chunk, images.mean, images.std, device
            )
        loaders.append(loader)
    choice = f"loader {name}: {why}"
    if name != "resident":
        choice += (
            f", {threads} {'process' if name == 'torch' else 'thread'}{'s' * (threads != 1)}, "
            f"chunks of {chunk}"
        )
    return Data(
        *loaders, len(images.classes), config.image_size, images.fingerprint(), name, choice, bad
    )


def read_set(config) -> ImageSet:
    """The data set of `config` (a resolved fastsmooth.cli.config.Config). Raises DataError."""
    try:
        return READERS[config.dataset](config)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"--data-dir {config.data_dir}: {error.strerror or error}{where}: repair that, or give "
            "another --data-dir"
        ) from None


def usual_side(images: ImageSet) -> int:
    """The median of the shorter sides of the training images, in pixels, from the headers of SAMPLE
    of them. Raises DataError."""
    paths = images.train.paths[:: max(1, len(images.train) // SAMPLE)]
    load_formats()
    found = [
        header for _, part in in_threads(header_of, paths, "", None, THREADS, 1) for header in part
    ]
    sides = sorted(min(width, height) for width, height, _, wrong in found if not wrong)
    if not sides:
        raise DataError(found[0][-1])
    return sides[len(sides) // 2]


def choose(config, images: ImageSet, device: torch.device, sharing: int) -> tuple[str, str]:
    """The loader's name, and why it was picked."""
    if config.loader != "auto":
        return config.loader, "as before" if config.resume else "as asked"
    resident, why = fits(config, images, device, sharing)
    if resident:
        return "resident", why
    if images.train.pixels is None and dali.available():
        return "dali", f"{why}, and DALI is installed"
    return (
        "threads",
        f"{why}; pip install 'fastsmooth[dali]' decodes faster"
        if images.train.pixels is None
        else why,
    )


def fits(config, images: ImageSet, device: torch.device, sharing: int) -> tuple[bool, str]:
    """Whether the images can be resident, and why."""
    if config.augment == "resized-crop-flip":
        return False, "random resized crops need the whole images"
    needed = 3 * config.image_size**2 * (len(images.train) + len(images.test))
    free = free_memory(device) / (sharing if device.type == "cpu" else 1)
    return (
        needed <= MEMORY_SHARE * free,
        f"{needed / 1e6:,.0f} MB of images, {free / 1e9:.1f} GB free",
    )


def make_engine(name: str, source: Source, chunk: int, threads: int, device: torch.device, config):
    pinned = device.type == "cuda"
    if name == "torch":
        return TorchEngine(source, threads, pinned)
    if name == "threads":
        return ThreadsEngine(source, threads, pinned)
    decoder = Decoder(
        hw_load=config.hw_decoder_load,
        device_padding=config.decoder_device_memory << 20,
        host_padding=config.decoder_host_memory << 20,
    )
    return DaliEngine(source, chunk, threads, device, decoder)


def chunk_size(split: Split, device: torch.device) -> int:
    of_files = split.pixels is None
    return (
        CHUNK_OF_FILES.get(device.type, 64) if of_files else CHUNK_OF_PIXELS.get(device.type, 512)
    )


def indexed(split: Split, bad: BadImages, say: Callable[[str], None]):
    """The index of a split of files; its bad headers are reported now."""
    if split.pixels is not None:
        return None
    index = read_index(
        split.paths, os.path.commonpath([os.path.dirname(path) for path in split.paths]), say
    )
    for count, (i, reason) in enumerate(index.bad.items()):
        more = len(index.bad) - 1 - count
        if bad.policy == "raise" and more:
            reason = f"{reason} ({more} more cannot be read)"
        bad.report(split.paths[i], reason)
    return index


def decode(split: Split, config, bad: BadImages) -> Split:
    return decode_all(
        split,
        config.image_size,
        lambda image: augment.evaluation_view(image, config.augment, config.image_size),
        bad.report,
    )


def free_memory(device: torch.device) -> float:
    """Bytes free on the device; unlimited where the system does not say (macOS, Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf
