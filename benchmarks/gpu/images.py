"""Images for the cells: random ones, CIFAR-100 out of the archives beside the checkout, and
photographs."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.originals import CIFAR100_MEAN, CIFAR100_STD
from fastsmooth.data.files import Paths
from fastsmooth.data.images import ImageSet, Split
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD

AT_ONCE = 500  # images that a thread decodes
DRAWN = 20_000  # random images at the most, repeated where more are wanted


def random_images(count: int, tests: int = 1000, size: int = 32, classes: int = 100) -> ImageSet:
    """`count` training images of random pixels, none of which has a value of 255."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 255, (min(count, DRAWN), size, size, 3), dtype=np.uint8)
    pixels = np.resize(drawn, (count, size, size, 3))
    labels = rng.integers(0, classes, count)
    test = Split(labels[:tests].copy(), pixels[:tests].copy())
    return cifar_like(Split(labels, pixels), test, tuple(map(str, range(classes))))


def cifar_like(train: Split, test: Split, classes: tuple[str, ...]) -> ImageSet:
    return ImageSet(train, test, classes, CIFAR100_MEAN, CIFAR100_STD)


def decoded(files: Iterable[tuple[str, bytes]]) -> ImageSet:
    """Out of (.../train or test/CLASS/IMAGE, its bytes)."""
    files = sorted(files)
    parts = [files[at : at + AT_ONCE] for at in range(0, len(files), AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        pixels = list(chain.from_iterable(pool.map(pixels_of, parts)))
    places = [Path(name).parts[-3:-1] for name, _ in files]
    classes = tuple(sorted({label for _, label in places}))
    splits = []
    for part in ("train", "test"):
        inside = [i for i, place in enumerate(places) if place[0] == part]
        labels = np.array([classes.index(places[i][1]) for i in inside])
        splits.append(Split(labels, np.stack([pixels[i] for i in inside])))
    return cifar_like(*splits, classes)


def pixels_of(files: list[tuple[str, bytes]]) -> list[np.ndarray]:
    found = []
    for _, content in files:
        # named, since asking every decoder takes longer than decoding
        with Image.open(io.BytesIO(content), formats=("WEBP", "PNG", "JPEG")) as image:
            found.append(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))
    return found


def whole_cifar(data: Path) -> ImageSet | None:
    """CIFAR-100 whole, from DATA/cifar100-full; None where that is not there."""
    folder = data / "cifar100-full"
    if not folder.is_dir():
        return None
    blob = b"".join((folder / f"part{k}.bin").read_bytes() for k in (1, 2))
    files, at = [], 0
    for line in gzip.decompress((folder / "index.tsv.gz").read_bytes()).decode().splitlines():
        name, length = line.split("\t")
        files.append((name, blob[at : at + int(length)]))
        at += int(length)
    return decoded(files)


def part_of_cifar(data: Path) -> ImageSet | None:
    """10,000 training and 2,000 test images of CIFAR-100, from DATA/cifar100-12k.tar."""
    archive = data / "cifar100-12k.tar"
    if not archive.is_file():
        return None
    with tarfile.open(archive) as tar:
        return decoded([(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()])


def photographs(data: Path, scratch: Path, count: int) -> ImageSet | None:
    """The paths of ImageNet's photographs in DATA/imagenet-128.tar, repeated until there are
    `count`."""
    archive = data / "imagenet-128.tar"
    if not archive.is_file():
        return None
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    root = scratch / "imagenet-128"
    splits = []
    for part, wanted in (("train", count), ("val", 1)):
        paths = sorted(str(path) for path in (root / part).rglob("*.JPEG"))
        paths = (paths * -(-wanted // len(paths)))[: max(wanted, len(paths))]
        splits.append(Split(np.zeros(len(paths), dtype=np.int64), files=Paths(paths)))
    return ImageSet(*splits, tuple(map(str, range(1000))), IMAGENET_MEAN, IMAGENET_STD)
