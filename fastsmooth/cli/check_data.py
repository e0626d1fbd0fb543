"""Every image of a data set decoded once, so that a bad one is found before a run meets it:
--check-data"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import note, one_line, printable_path, show, warn
from fastsmooth.processors import processors

if TYPE_CHECKING:
    import numpy as np

    from fastsmooth.data.files import Files

# files that a thread takes at a time: few, so that progress is seen and Ctrl-C soon heeded
CHUNK = 16


def check(c: Config) -> None:
    """List the bad images of `c`'s data set on stdout, then count all. Raises ConfigError where
    some are bad."""
    try:
        from fastsmooth import data  # with PyTorch: it takes seconds
    except Exception as error:  # of a broken installation, which may raise anything
        raise ConfigError(
            f"no image can be read ({one_line(error)}): --doctor says what is missing"
        ) from None
    started = time.perf_counter()
    try:
        images = data.read_set(c)
    except data.DataError as error:
        raise ConfigError(str(error)) from None
    for line in images.remarks:
        warn(line)
    splits = {"train": images.train, "test": images.test}
    total, bad = sum(map(len, splits.values())), 0
    sizes: set[tuple[int, int]] = set()  # width, height
    for name, split in splits.items():
        if split.files is None:
            sizes.update([split.pixels.shape[2:0:-1]] if split.pixels is not None else [])
            continue
        for path, width, height, wrong in looked_at(name, split.files, c.workers or processors()):
            if wrong:
                bad += 1
                show(f"{printable_path(path)}: {wrong}")
            else:
                sizes.add((width, height))
    if images.about:
        show(images.about)
    classes = len(images.classes)
    counted = [f"{len(split):,} {name}" for name, split in splits.items()]
    by_class = [f"{name} {spread(split.labels, classes)}" for name, split in splits.items()]
    show(
        f"{images.layout}: {' and '.join(counted)} images, {classes} classes, {bad:,} bad; "
        f"{extent(sizes)}; images a class: {', '.join(by_class)}; "
        f"{time.perf_counter() - started:.1f} s"
    )
    if bad:
        raise ConfigError(
            f"{bad:,} of {total:,} images {'is' if bad == 1 else 'are'} bad: remove them, "
            "or train with --on-bad-image zeros, which serves them black"
        )


def looked_at(name: str, files: Files, threads: int) -> Iterator[tuple[str, int, int, str]]:
    """(path, width, height, what is wrong) of each file, as they are stored; says on stderr how far
    it is."""
    import numpy as np

    from fastsmooth.data.index import in_threads, load_formats  # as in check

    load_formats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about images that it reads all the same
        # what is stored together is read together
        every = files.by_place(np.arange(len(files))).tolist()
        work = partial(look, files)
        for part, seen in in_threads(work, every, f"decoding {name}", note, threads, CHUNK):
            for i, (width, height, wrong) in zip(every[part], seen, strict=True):
                yield files.names[i], width, height, wrong


def look(files: Files, i: int) -> tuple[int, int, str]:
    """Width and height of image i in pixels, and what is wrong with it, in words: nothing, or why
    it cannot be read."""
    from fastsmooth.data.images import DataError, open_image  # as in check

    try:
        return *open_image(files, i).size, ""
    except DataError as error:
        return 0, 0, error.reason


def extent(sizes: set[tuple[int, int]]) -> str:
    """The smallest and the largest image, by their pixels."""
    if not sizes:
        return "none could be read"
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    smallest, largest = (f"{width}x{height}" for width, height in (ordered[0], ordered[-1]))
    return f"all {smallest} pixels" if len(sizes) == 1 else f"{smallest} to {largest} pixels"


def spread(labels: np.ndarray, classes: int) -> str:
    """The fewest and the most images of a class, of labels int64 [n]."""
    counts = Counter(labels.tolist())
    fewest, most = (choose(counts[label] for label in range(classes)) for choose in (min, max))
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
