"""Images in, batches out: open_data reads a data set and puts one of the loaders in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image

from fastsmooth.data import augment, reduced, sets
from fastsmooth.data.changes import Changes, changes_of
from fastsmooth.data.chunks import ChunkedLoader, Engine, Loader
from fastsmooth.data.engines import dali
from fastsmooth.data.engines.dali import DaliEngine, Decoder
from fastsmooth.data.engines.resident import ResidentLoader
from fastsmooth.data.engines.threads import ThreadsEngine
from fastsmooth.data.engines.torchloader import TorchEngine
from fastsmooth.data.images import (
    DataConfig,
    DataError,
    ImageSet,
    Later,
    Sizes,
    Split,
    decode_all,
    size_in,
)
from fastsmooth.data.index import NO_FILES, THREADS, Index, in_threads, load_formats, read_index
from fastsmooth.data.index import header as header_of
from fastsmooth.data.memory import MEMORY_SHARE, free_memory
from fastsmooth.data.sets import READERS
from fastsmooth.data.source import BadImages, Source
from fastsmooth.data.stream import Stream
from fastsmooth.data.view import TestedView
from fastsmooth.messages import note
from fastsmooth.processors import processors

# elsewhere 512: as fast (benchmarks/bench_loader.py), in less memory
CHUNK_OF_PIXELS = {"cuda": 2048}
# the fastest on an H100 (benchmarks/gpu_decode.py); elsewhere 64, which is soon there
CHUNK_OF_FILES = {"cuda": 128}

SAMPLE = 256  # image headers that say what size the others have

__all__ = [
    "READERS", "Data", "DataError", "Stream", "TestedView", "open_data", "read_set", "usual_side",
]  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A training and a test loader with the facts that the rest of a run needs."""

    train: Loader
    test: Loader
    classes: int
    size: int  # pixels a side of images as they are tested
    channels: int  # of x
    fingerprint: str
    loader: str
    choice: str  # one line: which loader was picked and why
    # one line: in which form the images were found, and what the model made necessary; "" where
    # there is nothing to say
    about: str
    class_ids: tuple[str, ...]  # as the data set calls the classes, in the order of their numbers
    class_names: tuple[str, ...]  # as people call them
    view: TestedView  # what is made of an image that is tested
    bad: BadImages


def open_data(
    config: DataConfig,
    device: torch.device,
    say: Callable[[str], None] = note,
    sharing: int = 1,
    images: ImageSet | None = None,
    first_epoch: int = 0,
) -> Data:
    """The data set of `config`, a run's resolved Config, behind its loader. Raises DataError.

    `say` gets a line where reading takes long, what may not be meant as it is (a class that is
    never tested), and one for each image that cannot be read but may be black. `sharing`: processes
    of this run on this machine, which share its processors and its memory. `images`: what read_set
    gave. `first_epoch`: the number of the first epoch that will be asked for.
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
    kind, size, seed = config.augment, config.sizes.values[-1], config.seed
    changing = Later(config.sizes, first_epoch) if len(config.sizes.values) > 1 else None
    channels = channels_of(config, images)
    times = channels // len(images.mean)
    mean, std = images.mean * times, images.std * times
    smaller = config.decode == "reduced"
    chunk = 0

    def decoded(split: Split, size: int) -> Split:
        """The split in pixels of this size and as many channels as the model takes."""
        split = decode(split, kind, bad, smaller, size)
        if split.pixels is None or times == 1:
            return split
        return replace(split, pixels=split.pixels.repeat(times, axis=-1))

    def loader_of(split: Split, part: str, sizes: Sizes | None, changes: Changes | None) -> Loader:
        nonlocal chunk
        if name == "resident":
            first = decoded(split, size_in(0, size, sizes))
            again = partial(decoded, split)
            return ResidentLoader(first, kind, seed, mean, std, device, sizes, again, changes)
        if split.pixels is not None:
            if sizes:
                raise DataError(
                    f"--loader {name} keeps arrays at one size, and --image-size "
                    f"{config.image_size} has several: use --loader resident"
                )
            split = decoded(split, size)
        index = indexed(split, bad, say, part)
        source = Source(split, index, kind, size, seed, bad, smaller, sizes)
        chunk = config.chunk or chunk_size(split, device)
        engine = ENGINES[name](EngineParts(source, chunk, threads, device, config))
        return ChunkedLoader(engine, split.labels, size, chunk, mean, std, device, changes)

    train = loader_of(images.train, "train", changing, changes_of(config))
    test = loader_of(images.test, "test", None, None)
    choice = f"loader {name}: {why}"
    if name != "resident":
        one, many = ("process", "processes") if name == "torch" else ("thread", "threads")
        choice += f", {threads} {one if threads == 1 else many}, chunks of {chunk}"
    if config.decode == "reduced":
        choice += "; JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where no more is wanted"
    about = [images.about] * bool(images.about)
    mode = "L" if len(images.mean) == 1 else "RGB"
    if times > 1:
        about.append(f"one channel, repeated as the {channels} that {config.model} takes")
    return Data(
        train,
        test,
        len(images.classes),
        size,
        channels,
        images.fingerprint(),
        name,
        choice,
        "; ".join(about),
        images.classes,
        images.names or images.classes,
        TestedView(mode, augment.short_side(kind, size), size, channels, tuple(mean), tuple(std)),
        bad,
    )


def read_set(config: DataConfig) -> ImageSet:
    """The data set of `config`, a run's resolved Config. Raises DataError."""
    try:
        return sets.read(config)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"--data-dir {config.data_dir}: {error.strerror or error}{where}: repair that, or give "
            "another --data-dir"
        ) from None


def channels_of(config: DataConfig, images: ImageSet) -> int:
    """Of what the model is given: those of the images, but 3 for torchvision's networks, which
    take no others."""
    return 3 if config.model.startswith("torchvision/") else len(images.mean)


def usual_side(images: ImageSet) -> int:
    """The median of the shorter sides of the training images, in pixels, of files from the headers
    of SAMPLE of them. Raises DataError."""
    files, pixels = images.train.files, images.train.pixels
    if files is None:
        return 0 if pixels is None else min(pixels.shape[1:3])
    some = range(0, len(files), max(1, len(files) // SAMPLE))
    load_formats()
    parts = in_threads(partial(header_of, files), some, "", None, THREADS, 1)
    headers = [header for _, part in parts for header in part]
    sides = sorted(min(width, height) for width, height, _, wrong in headers if not wrong)
    if not sides:
        raise DataError(headers[0][-1])
    return sides[len(sides) // 2]


def choose(
    config: DataConfig, images: ImageSet, device: torch.device, sharing: int
) -> tuple[str, str]:
    """The loader's name, and why it was picked."""
    if config.loader != "auto":
        return config.loader, "as before" if config.resume or config.extend else "as asked"
    resident, why = fits(config, images, device, sharing)
    if resident:
        return "resident", why
    if config.decode == "reduced":
        return "threads", f"{why}, and DALI decodes in full only"
    if images.train.pixels is None and dali.available():
        return "dali", f"{why}, and DALI is installed"
    if images.train.pixels is None:
        why += "; pip install 'fastsmooth[dali]' decodes faster"
    return "threads", why


def fits(
    config: DataConfig, images: ImageSet, device: torch.device, sharing: int
) -> tuple[bool, str]:
    """Whether the images can be resident, and why."""
    if config.augment == "resized-crop-flip":
        return False, "random resized crops need the whole images"
    sides = config.sizes.values  # of which one is held at a time
    pixels = max(sides) ** 2 * len(images.train) + sides[-1] ** 2 * len(images.test)
    needed = channels_of(config, images) * pixels
    free = free_memory(device) / (sharing if device.type == "cpu" else 1)
    often = ", decoded anew for each size" * (len(set(sides)) > 1)
    why = f"{needed / 1e6:,.0f} MB of images{often}, {free / 1e9:.1f} GB free"
    return needed <= MEMORY_SHARE * free, why


class EngineParts(NamedTuple):
    """What an engine is made of."""

    source: Source
    chunk: int  # samples decoded together
    threads: int
    device: torch.device
    config: DataConfig

    @property
    def pinned(self) -> bool:
        return self.device.type == "cuda"


def make_dali(parts: EngineParts) -> Engine:
    c = parts.config
    decoder = Decoder(
        hw_load=c.hw_decoder_load,
        device_padding=c.decoder_device_memory << 20,
        host_padding=c.decoder_host_memory << 20,
    )
    return DaliEngine(parts.source, parts.chunk, parts.threads, parts.device, decoder)


# What makes chunks of samples out of a source, by --loader; resident needs none.
ENGINES: dict[str, Callable[[EngineParts], Engine]] = {
    "dali": make_dali,
    "threads": lambda parts: ThreadsEngine(parts.source, parts.threads, parts.pinned),
    "torch": lambda parts: TorchEngine(parts.source, parts.threads, parts.pinned),
}


def chunk_size(split: Split, device: torch.device) -> int:
    """Samples that are decoded together."""
    if split.pixels is None:
        return CHUNK_OF_FILES.get(device.type, 64)
    return CHUNK_OF_PIXELS.get(device.type, 512)


def indexed(split: Split, bad: BadImages, say: Callable[[str], None], part: str) -> Index:
    """The index of a split of files, `part` of what lies there; its bad headers are reported
    now."""
    if split.files is None:
        return NO_FILES
    index = read_index(split.files, say, part)
    for count, (i, reason) in enumerate(index.bad.items()):
        more = len(index.bad) - 1 - count
        if bad.policy == "raise" and more:
            reason = f"{reason} ({more} more cannot be read)"
        bad.report(split.files.names[i], reason)
    return index


def decode(split: Split, kind: str, bad: BadImages, smaller: bool, size: int) -> Split:
    """The split as pixels of the view that is tested, [n, size, size, C]; `smaller`: of JPEGs
    decoded at a smaller scale where that does."""

    def measured(width: int, height: int) -> augment.View:
        sides = (torch.tensor([side]) for side in (width, height))
        return augment.views(kind, size, None, *sides).each(size)[0]

    def view(split: Split, i: int) -> Image.Image:
        if split.files is not None and smaller:
            image = reduced.decoded(split.files, i, measured)
            if image is not None:
                return image
        return augment.evaluation_view(split.image(i), kind, size)

    return decode_all(split, size, view, bad.report)
