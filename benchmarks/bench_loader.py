"""Images a second that our loaders serve, beside the published DataLoader: python -m
benchmarks.bench_loader [--quick]

Every variant gives what a trainer gets, float32 normalised images and labels on the CPU, and
nothing is done with them.

    originals   torchvision's per-sample PIL transforms in the two worker processes of a DataLoader.
                The workers are kept from epoch to epoch, as the published code does not, so that
                their start is no part of these cases
    resident    ours, all images in memory (CIFAR alone)
    dali        ours, NVIDIA DALI; left out where it is not installed
    threads     ours, torchvision's decoders in two threads
    torch       ours, our transforms in two worker processes: the reference that the tests compare
                the others with

    tar, parquet, arrow    ours, `threads`, on these forms of the same images
    prepared    the same on class folders of images whose shorter side was brought to 256 pixels
    webdataset, datasets    what these libraries have for tars and for parquet, in two processes

Case cifar/b<batch> crops, flips and rotates 32x32 images, imagenet/b<batch> decodes JPEG files and
cuts random crops of 224x224 out of them, and forms/b<batch> does that with the last two rows beside
class folders; a form holds each image as often as an epoch lists it. A window begins when nothing
is left of what was made ahead of time while others ran, and goes on over the ends of epochs. Beside
images a second: CPU seconds of the process and its workers, and the peak memory of the process
without its workers, which favours the originals and torch.

Case resize/<set> changes the batch size in the middle of an epoch, and looks at the first batch
after that: it must have the new size, and median_s is its time, extra_s what it takes beyond the
next batches of that size. Before each of these the benchmark waits until the loader has nothing
left to do, as it has while a trainer computes. The originals change the size as the published code
does, with a new DataLoader.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import bench_train, forms, originals, timing
from benchmarks.timing import Measured, Variant
from fastsmooth import data
from fastsmooth.cli import config as configs
from fastsmooth.cli import flags as flag_types
from fastsmooth.cli import parse as parsing
from fastsmooth.data.engines import dali
from fastsmooth.data.files import Paths
from fastsmooth.data.images import DataError, ImageSet, Split
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD
from fastsmooth.training.step import keep_freed_memory

WORKERS = 2  # of every variant: processes or threads
EPOCHS = 1_000_000  # of a stream: more than any window reaches
CIFAR_IMAGES, TEST_IMAGES = 50_000, 1_000
# of the JPEG files made: how many, width and height, how good
FILES, PIXELS, QUALITY = 128, (500, 375), 90
# JPEG files in an epoch at the least: the same ones are listed as often as that takes
LISTED = 2048
VARIANTS = {
    "cifar": ("originals", "resident", "dali", "threads", "torch"),
    "imagenet": ("originals", "dali", "threads", "torch"),
    "forms": ("originals", "threads", *forms.OURS, *forms.PEERS),
}
SIZES = {"cifar": 32, "imagenet": 224, "forms": 224}
# Steps of a window where not those of its case: whole epochs of the fast, and of torch, whose
# chunks come in pairs
STEPS = {
    ("cifar", "resident"): 25,
    ("cifar", "threads"): 10,
    ("cifar", "dali"): 5,
    ("cifar", "torch"): 5,
}
TESTS = ("test_augment.py", "test_loaders.py", "test_kernels_augment.py")

# What is aimed at, over the originals
FASTER = {
    ("cifar/b32", "resident"): 20,
    ("cifar/b128", "resident"): 30,
    ("cifar/b1024", "resident"): 30,
    **{(f"cifar/b{batch}", "dali"): 7 for batch in (32, 128, 1024)},
    ("imagenet/b64", "dali"): 1.7,
    ("imagenet/b64", "threads"): 1.6,
}
LESS_CPU = {
    **{(f"cifar/b{batch}", "resident"): 15 for batch in (32, 128, 1024)},
    ("imagenet/b64", "dali"): 1.7,
    ("imagenet/b64", "threads"): 1.7,
}
MORE_MB, EXTRA_MS = 250, 0.5


@dataclass(frozen=True)
class Images:
    """Where the images of a set are: a file of bench_train.write_images, or a tree, its files
    listed `copies` times."""

    path: str
    cache: str  # a folder for what is kept of them
    copies: int = 1


@dataclass(frozen=True)
class ServeCase:
    """Batches of one size. A step is as many whole batches as are needed, all steps together, for
    `images` each."""

    set: str
    batch_size: int
    images: int
    lead: int
    rounds: int = 6
    budget: float = 200.0  # seconds for all rounds
    steps: int = 1  # of a window, but for STEPS
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"{self.set}/b{self.batch_size}"

    def variants(self, names: Iterable[str], images: Images) -> list[Variant]:
        fast = {} if self.tiny else STEPS
        kept = [name for name in VARIANTS[self.set] if name in names]
        return [
            Variant(name, serve, (self, name, images), fast.get((self.set, name))) for name in kept
        ]


@dataclass(frozen=True)
class ResizeCase:
    """A step is a change of the batch size from `batch_size` to twice that and back; a window is
    one step."""

    set: str
    batch_size: int
    rounds: int = 20
    budget: float = 150.0
    steps: int = 1
    lead: int = 0
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"resize/{self.set}"

    def variants(self, names: Iterable[str], images: Images) -> list[Variant]:
        kept = [name for name in VARIANTS[self.set] if name in names]
        return [Variant(name, change, (self, name, images)) for name in kept]


# What is made ahead of time is up to six chunks, of 512 images or 64 files: the lead is longer.
CASES = (
    *(ServeCase("cifar", batch, images=10_000, lead=2) for batch in (32, 128)),
    # of ten batches, which two workers end two at a time
    ServeCase("cifar", 1024, images=10_000, lead=2, steps=2),
    ServeCase("imagenet", 64, images=640, lead=1),
    ServeCase("forms", 64, images=640, lead=1, budget=400.0),
    ResizeCase("cifar", 128),
    ResizeCase("imagenet", 8),
)
QUICK = (
    ServeCase("cifar", 32, images=100, lead=1, rounds=2, budget=0.0, tiny=True),
    ServeCase("imagenet", 4, images=8, lead=1, rounds=2, budget=0.0, tiny=True),
    ServeCase("forms", 4, images=8, lead=1, rounds=2, budget=0.0, tiny=True),
    ResizeCase("cifar", 16, rounds=2, budget=0.0, tiny=True),
    ResizeCase("imagenet", 2, rounds=2, budget=0.0, tiny=True),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = timing.arguments(
        "Images a second that our loaders serve, beside the DataLoader of the published code."
    )
    p.add_argument(
        "--data-dir",
        metavar="DIR",
        help="CIFAR: DIR/train/CLASS/*.png of 100 classes, not random pixels",
    )
    p.add_argument(
        "--imagenet-dir",
        metavar="DIR",
        help="ImageNet: DIR/train and DIR/val, not JPEG files made here",
    )
    timing.add_selection(
        p, (case.name for case in CASES), (name for names in VARIANTS.values() for name in names)
    )
    args = p.parse_args(argv)
    # for the variants' processes, as fastsmooth.train has it
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    report = timing.Report("bench_loader", argv, args.json, args.out)
    names = {"originals", *args.variants}
    report.header["about"]["dali"] = version_of_dali()
    report.header["about"] |= {"forms": forms.versions()} if forms.available() else {}
    if report.header["about"]["dali"] is None:
        names.discard("dali")
        report.say("not measured: dali: NVIDIA DALI is not installed")
    if not forms.available():
        names -= {*forms.OURS, *forms.PEERS}
        report.say("not measured: forms: they need pyarrow, datasets and webdataset")
    with tempfile.TemporaryDirectory() as scratch:

        def bench_one(case: ServeCase | ResizeCase) -> None:
            if case.set == "cifar":
                count = 400 if case.tiny else CIFAR_IMAGES
                images = Images(
                    bench_train.write_images(Path(scratch), count, args.data_dir, report), scratch
                )
            else:
                images = find_files(Path(scratch), args.imagenet_dir, case.tiny, report)
                if case.set == "forms":
                    sizes = forms.write(Path(images.path), Path(scratch, "forms"), images.copies)
                    report.say(f"  MB: {', '.join(f'{k} {v:,}' for k, v in sizes.items())}")
            bench(case, images, names, report)

        cases = timing.selected(p, args, CASES, QUICK)
        return timing.run_cases(
            report, args.quick, TESTS, cases, bench_one, (DataError, flag_types.ConfigError)
        )


def version_of_dali() -> str | None:
    return importlib.import_module("nvidia.dali").__version__ if dali.available() else None


def bench(
    case: ServeCase | ResizeCase, images: Images, names: set[str], report: timing.Report
) -> None:
    report.say(case.name)
    about: dict[str, Any] = {"not_measured": []}

    def leave_out(line: str) -> None:
        about["not_measured"].append(line)
        report.say(f"  {line}")

    found = timing.measure(
        case.variants(names, images), case.steps, case.rounds, case.lead, case.budget, leave_out
    )
    timing.require_measured(case.name, found, {"originals"})
    summary = served if isinstance(case, ServeCase) else changed
    found, result, lines = summary(case, found, about)
    for line in [*timing.table(result, "images", found), *lines]:
        report.say(line)
    report.add(case.name, result, about)


# The images


def find_files(
    scratch: Path, imagenet_dir: str | None, tiny: bool, report: timing.Report
) -> Images:
    """The tree of --imagenet-dir, or one that is made; its training images are listed often enough
    for an epoch."""
    root = Path(imagenet_dir or scratch / "imagenet")
    if imagenet_dir is None and not root.exists():
        make_files(root, FILES // 8 if tiny else FILES)
    images = Images(str(root), str(scratch))
    count = len(data.READERS["imagenet"](config_of("threads", images, "imagenet")).train)
    copies = -(-(64 if tiny else LISTED) // count)
    width, height = PIXELS
    what = f"JPEG files made of smooth colours, {width}x{height}, quality {QUALITY}"
    source = (
        f"{count:,} {what if imagenet_dir is None else 'files of --imagenet-dir'}, each {copies} "
        "times in an epoch"
    )
    if report.header["about"].get("imagenet") != source:
        report.header["about"]["imagenet"] = source
        report.say(source)
    return replace(images, copies=copies)


def make_files(root: Path, count: int) -> None:
    """root/train with `count` files in 8 classes, and root/val with one a class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        few = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(few).resize(PIXELS, Image.Resampling.BICUBIC).save(
            encoded, "JPEG", quality=QUALITY
        )
        for split in ("train", "val") if i < 8 else ("train",):
            path = root / split / f"class{i % 8}" / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.getvalue())


def image_set(
    images: Images, config: configs.Config, reader: Callable[[configs.Config], ImageSet]
) -> ImageSet:
    """What stands in for `reader`: the images of the file for CIFAR-100, its own files `copies`
    times for ImageNet."""
    if config.dataset == "cifar100":
        split = bench_train.load_images(images.path)
        test = Split(split.labels[:TEST_IMAGES], split.pixels[:TEST_IMAGES])
        classes = tuple(map(str, range(bench_train.CLASSES)))
        return ImageSet(split, test, classes, originals.CIFAR100_MEAN, originals.CIFAR100_STD)
    files = reader(config)
    if images.copies == 1:
        return files
    train = Split(
        np.tile(files.train.labels, images.copies),
        files=Paths(tuple(files.train.files.names) * images.copies),
    )
    return replace(files, train=train)


def config_of(loader: str, images: Images, name: str) -> configs.Config:
    flags = [
        "--dataset",
        "cifar100" if name == "cifar" else "imagenet",
        "--loader",
        loader,
        "--device",
        "cpu",
    ]
    if name != "cifar":
        flags += ["--data-dir", images.path]
    if loader != "resident":
        flags += ["--workers", str(WORKERS)]
    return configs.resolve(parsing.parse(flags).given)


def config_of_form(name: str, images: Images) -> configs.Config:
    """Of a form in which forms.write stored the images."""
    folder = os.path.join(images.cache, "forms", name)
    flags = ["--dataset", forms.OURS[name], "--data-dir", folder, "--device", "cpu"]
    flags += ["--image-size", str(SIZES["forms"]), "--augment", "resized-crop-flip"]
    flags += ["--loader", "threads", "--workers", str(WORKERS)]
    return configs.resolve(parsing.parse(flags).given)


# The variants: each is made in a process of its own


class Ours:
    """The loader that fastsmooth.train opens, and its stream of batches. One call is a batch."""

    def __init__(self, loader: str, images: Images, name: str):
        keep_freed_memory()  # as fastsmooth.train does it
        if loader in forms.OURS:  # which hold each image as often as others list it
            config, images = config_of_form(loader, images), replace(images, copies=1)
        else:
            config = config_of(loader, images, name)
        reader = data.READERS[config.dataset]
        stand_in = {config.dataset: lambda config: image_set(images, config, reader)}
        cache = {"XDG_CACHE_HOME": images.cache}  # where open_data keeps what it knows of files
        with patch.dict(data.READERS, stand_in), patch.dict(os.environ, cache):
            opened = data.open_data(config, torch.device("cpu"))
        self.epoch_images = len(opened.train)
        self.stream = data.Stream(opened.train, config.seed, EPOCHS, opened.fingerprint)
        self._batches = (batch for _ in range(EPOCHS) for batch in self.stream.rest_of_epoch())

    def __call__(self) -> tuple[Tensor, Tensor]:
        return next(self._batches)

    def has(self, images: int) -> bool:
        """Whether as many are left of the epoch."""
        return images <= self.epoch_images - self.stream.cursor

    def end_epoch(self) -> None:
        """The size may change in the middle of one."""

    def resize(self, batch_size: int) -> None:
        self.stream.batch_size = batch_size

    def close(self) -> None:
        self.stream.close()
        self._batches.close()


class Originals:
    """The published code's DataLoader. One call is a batch."""

    def __init__(self, images: Images, name: str):
        self.dataset = cifar(images) if name == "cifar" else imagenet(images)
        self._batches: Iterator | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        return next(self._batches)

    def has(self, images: int) -> bool:
        return True  # a new DataLoader begins a new epoch

    def end_epoch(self) -> None:
        """The workers end with it."""
        self._batches = None

    def resize(self, batch_size: int) -> None:
        options = {"shuffle": True, "num_workers": WORKERS, "persistent_workers": True}
        self._batches = endless(DataLoader(self.dataset, batch_size, **options))

    def close(self) -> None:
        self.end_epoch()


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def cifar(images: Images) -> Dataset:
    split = bench_train.load_images(images.path)
    return originals.Images(split.pixels, split.labels)


def imagenet(images: Images) -> Dataset:
    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    dataset = ImageFolder(os.path.join(images.path, "train"), transforms.Compose(steps))
    dataset.samples *= images.copies
    return dataset


Source = Ours | Originals | forms.Peer


def open_source(variant: str, images: Images, name: str) -> Source:
    if variant in forms.PEERS:
        return forms.Peer(variant, Path(images.cache, "forms"), SIZES[name], WORKERS)
    return Originals(images, name) if variant == "originals" else Ours(variant, images, name)


def serve(case: ServeCase, variant: str, images: Images) -> Serve:
    fork_workers()
    return Serve(case, open_source(variant, images, case.set))


def change(case: ResizeCase, variant: str, images: Images) -> Change:
    fork_workers()
    return Change(case, open_source(variant, images, case.set))


def fork_workers() -> None:
    """As a script's are, though this process was spawned."""
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)


class Serve:
    """One call is a step of a ServeCase. `laps` counts images and this process's own CPU
    seconds."""

    def __init__(self, case: ServeCase, source: Source):
        self.case, self.source = case, source
        self.laps = {"images": 0, "cpu": 0.0}
        self._due = 0
        source.resize(case.batch_size)

    def __call__(self) -> None:
        self._due += self.case.images
        while self.laps["images"] < self._due:
            self.batch = self.source()
            self.laps["images"] += len(self.batch[1])
        self.laps["cpu"] = time.process_time()

    def check(self) -> None:
        check(self.batch, self.case.set)

    def close(self) -> None:
        self.source.close()


class Change:
    """One call is a step of a ResizeCase. `laps` sums the seconds of the first batch and of one of
    the next."""

    NEXT = 3  # batches of the new size, after the first

    def __init__(self, case: ResizeCase, source: Ours | Originals):
        self.case, self.source = case, source
        self.laps = {"first": 0.0, "next": 0.0}
        source.resize(case.batch_size)

    def __call__(self) -> None:
        small, large = self.case.batch_size, 2 * self.case.batch_size
        self.source.end_epoch()
        self.source.resize(small)
        while not self.source.has(small + (1 + self.NEXT) * large):
            self.source()
        self._timed(small, lambda: None)
        self.source.end_epoch()
        self.laps["first"] += self._timed(large, lambda: self.source.resize(large))
        self.laps["next"] += median(self._timed(large, lambda: None) for _ in range(self.NEXT))

    def _timed(self, size: int, before: Callable[[], None]) -> float:
        timing.wait_until_idle()
        began = time.perf_counter()
        before()
        self.batch = self.source()
        took = time.perf_counter() - began
        if len(self.batch[1]) != size:
            raise ValueError(f"a batch of {len(self.batch[1])} images where {size} were asked for")
        return took

    def check(self) -> None:
        check(self.batch, self.case.set)

    def close(self) -> None:
        self.source.close()


def check(batch: tuple[Tensor, Tensor], name: str) -> None:
    """Raises ValueError where the batch is not what a trainer gets."""
    x, y = batch
    wanted = (len(y), 3, SIZES[name], SIZES[name])
    if (x.shape, x.dtype, x.device.type, y.dtype) != (wanted, torch.float32, "cpu", torch.int64):
        raise ValueError(
            f"{list(x.shape)} of {x.dtype} on {x.device}, labels of {y.dtype}: no batch for a "
            "trainer"
        )
    if not x.isfinite().all() or x.std() < 0.1:
        raise ValueError("the images are not finite, or all of one colour")


# What was found

Summary = tuple[dict[str, Measured], list[dict[str, Any]], list[str]]


def timed(
    found: dict[str, Measured], seconds: Callable[[timing.Window], float]
) -> dict[str, Measured]:
    return {
        name: Measured(m.first_step, [replace(w, seconds=seconds(w)) for w in m.windows])
        for name, m in found.items()
    }


def served(case: ServeCase, found: dict[str, Measured], about: dict[str, Any]) -> Summary:
    """Measured and rows a batch, the rows with CPU seconds and memory beside them, and the lines
    below their table."""
    found = timed(found, lambda w: w.seconds / w.laps["images"] * case.batch_size)
    result = timing.rows("bench_loader", case.name, found, "originals", case.batch_size)
    about["variants"] = {name: first_and_peak(m) for name, m in found.items()}
    base = about["variants"]["originals"]["peak_mb"]
    lines = []
    for row in result:
        name = row["variant"]
        peak = about["variants"][name]["peak_mb"]
        row["cpu_s_per_1000"] = cpu_per_1000(found[name])
        row["over_originals_mb"] = None if peak is None else peak - base
        lines.append(f"  {name}: {', '.join(facts(row, result[0]))}")
    return found, result, lines


def cpu_per_1000(m: Measured) -> float | None:
    known = [
        1000 * (w.laps["cpu"] + w.helpers_cpu) / w.laps["images"]
        for w in m.counted
        if w.helpers_cpu is not None
    ]
    return rounded(median(known)) if known else None


def facts(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    key = (row["case"], row["variant"])
    cpu, more = row["cpu_s_per_1000"], row["over_originals_mb"]
    words = []
    if row is not base:
        words.append(
            f"{1 / row['ratio']:.3g} times the originals' images a second{aim(FASTER, key, '{:g}')}"
        )
    if cpu is not None:
        words.append(f"CPU {cpu:.3g} s per 1,000 images")
    if cpu and row is not base:
        words[-1] += (
            f", 1/{base['cpu_s_per_1000'] / cpu:.3g} of theirs{aim(LESS_CPU, key, '1/{:g}')}"
        )
    if more is not None and row is not base:
        words.append(f"peak memory {more:+,} MB (target: under +{MORE_MB})")
    return words


def aim(targets: dict[tuple[str, str], float], key: tuple[str, str], form: str) -> str:
    return f" (target: {form.format(targets[key])})" if key in targets else ""


def changed(case: ResizeCase, found: dict[str, Measured], about: dict[str, Any]) -> Summary:
    """As `served`, of the first batch after the change."""
    about["variants"] = {name: first_and_peak(m) for name, m in found.items()}
    about["sizes"] = [case.batch_size, 2 * case.batch_size]
    found = timed(found, lambda w: w.laps["first"])
    result = timing.rows("bench_loader", case.name, found, "originals", 2 * case.batch_size)
    lines = [
        f"  the first batch after a change from {case.batch_size} to {2 * case.batch_size} images:"
    ]
    for row in result:
        windows = found[row["variant"]].counted
        row["next_s"] = rounded(median(w.laps["next"] for w in windows))
        row["extra_s"] = rounded(median(w.laps["first"] - w.laps["next"] for w in windows))
        target = "" if row["variant"] == "originals" else f" (target: under {EXTRA_MS:g})"
        line = f"  {row['variant']}: {row['extra_s'] * 1e3:.3g} ms more than the next ones{target}"
        lines.append(f"{line}, which take {row['next_s'] * 1e3:.3g} ms")
    return found, result, lines


def first_and_peak(m: Measured) -> dict[str, Any]:
    peak = m.peak_bytes()
    return {
        "peak_mb": None if peak is None else round(peak / 1e6),
        "first_step_s": rounded(m.first_step),
    }


rounded = timing.rounded

if __name__ == "__main__":
    sys.exit(main())
