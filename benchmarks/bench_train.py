"""Training steps a second, ours against the loop of the published code: python -m
benchmarks.bench_train [--quick]

A step is everything that the loop does for a mini-batch: loading and augmenting it, forward,
backward, update, and the bookkeeping of loss and accuracy. Variants:

    originals       the published code's loop (originals.py)
    ours            python -m fastsmooth.train --dataset cifar100 --device cpu
    ours_compiled   the same with --compile on; the first step, which compiles, is reported and not
                    counted

Beside them runs a yardstick: one matrix product, and the network's convolutions one by one with
nothing between them. What they take alone is the time that only faster convolution code could
lower.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.originals import CIFAR100_MEAN, CIFAR100_STD, Originals
from benchmarks.timing import Measured, Variant
from fastsmooth import data, models
from fastsmooth.cli import config as configs
from fastsmooth.cli import flags as flag_types
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.progress import Progress
from fastsmooth.data.images import DataError, ImageSet, Split, decode_all
from fastsmooth.data.source import BadImages
from fastsmooth.data.stream import Batch
from fastsmooth.messages import warn
from fastsmooth.optim import NoisySGD
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.runfolder.machine import environment
from fastsmooth.runfolder.trackers import Trackers
from fastsmooth.runfolder.write import RunFolder
from fastsmooth.training.clock import Clock
from fastsmooth.training.loop import Run
from fastsmooth.training.plan import make_plan
from fastsmooth.training.step import Step, keep_freed_memory

CLASSES, SIZE, LR = 100, 32, 0.1
TRAIN_IMAGES, TEST_IMAGES = 50_000, 1_000
MATMUL = 2048
TESTS = ("test_augment.py", "test_data.py", "test_optim.py")


@dataclass(frozen=True)
class Case:
    """A network and a batch size; a window has `steps` steps after `lead` that are not timed."""

    model: str
    batch_size: int
    steps: int
    lead: int
    rounds: int
    budget: float  # seconds for all rounds
    images: int = TRAIN_IMAGES

    @property
    def name(self) -> str:
        return f"train/{self.model}/b{self.batch_size}"


CASES = (Case("resnet18", 32, 3, 1, 8, 115.0), Case("resnet8", 128, 12, 2, 8, 70.0))
QUICK = (Case("resnet8", 8, 2, 1, 2, 20.0, images=500),)
VARIANTS = ("originals", "ours", "ours_compiled")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = timing.arguments(
        "Training steps a second, ours against the loop of the published code, on the CPU."
    )
    p.add_argument(
        "--data-dir",
        metavar="DIR",
        help="train on DIR/train/CLASS/*.png of 100 classes, not on random pixels",
    )
    p.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        help="beside originals, which always run",
    )
    args = p.parse_args(argv)
    report = timing.Report("bench_train", argv, args.json, args.out)
    with tempfile.TemporaryDirectory() as scratch:

        def bench_one(case: Case) -> None:
            images = write_images(Path(scratch), case.images, args.data_dir, report)
            bench(case, images, {"originals", *args.variants}, report)

        cases = QUICK if args.quick else CASES
        return timing.run_cases(
            report, args.quick, TESTS, cases, bench_one, (DataError, flag_types.ConfigError)
        )


def bench(case: Case, images: str, names: set[str], report: timing.Report) -> None:
    makers = {"originals": make_originals, "ours": Ours, "ours_compiled": OursCompiled}
    variants = [Variant(name, makers[name], (case, images)) for name in VARIANTS if name in names]
    variants.append(Variant("yardstick", Yardstick, (case,), steps=1))
    found = timing.measure(variants, case.steps, case.rounds, case.lead, case.budget, report.say)
    timing.require_measured(case.name, found, {"originals", "yardstick"})
    yardstick = found.pop("yardstick")
    result = timing.rows("bench_train", case.name, found, "originals", case.batch_size)
    about = explain(case, found, yardstick)
    for line in [case.name, *timing.table(result, "images", found), *describe(about)]:
        report.say(line)
    report.add(case.name, result, about)


# The images


def write_images(scratch: Path, count: int, data_dir: str | None, report: timing.Report) -> str:
    """A file of `count` training images and some test images, from `data_dir` repeated as often as
    need be, or random."""
    path = scratch / f"images-{count}.npz"
    if path.exists():
        return str(path)
    if data_dir is None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, count)
        source = f"{count:,} images of random pixels, {SIZE}x{SIZE}, {CLASSES} classes"
    else:
        split = read_folder(data_dir)
        pixels, labels = (
            np.resize(split.pixels, (count, SIZE, SIZE, 3)),
            np.resize(split.labels, count),
        )
        source = f"{count:,} training images: the {len(split):,} of --data-dir in turn"
    report.header["about"]["images"] = source
    report.say(source)
    np.savez(path, pixels=pixels, labels=labels)
    return str(path)


def read_folder(data_dir: str) -> Split:
    c = configs.resolve({"dataset": "folder", "data_dir": data_dir, "image_size": SIZE})
    images = data.READERS["folder"](c)
    if len(images.classes) != CLASSES:
        raise DataError(f"--data-dir {data_dir} has {len(images.classes)} classes, not {CLASSES}")
    split = decode_all(
        images.train,
        SIZE,
        lambda split, i: split.image(i).resize((SIZE, SIZE)),
        BadImages("raise", print).report,
    )
    # by class no longer, so that a part holds all classes
    order = np.random.default_rng(0).permutation(len(split))
    return Split(split.labels[order], split.pixels[order])


def load_images(path: str) -> Split:
    with np.load(path) as file:
        return Split(file["labels"], file["pixels"])


# The variants: each is made in a process of its own


def make_originals(case: Case, images: str) -> Originals:
    split = load_images(images)
    torch.manual_seed(0)
    return Originals(
        models.build(case.model, CLASSES), split.pixels, split.labels, case.batch_size, LR
    )


def updates_of(run: Run) -> Iterator[None]:
    """The updates of training.loop.train, one each time that it is asked."""
    for point in run.epochs_left():
        with run.clock.measure("train"):
            for batch in run.batches_left():
                run.advance(batch, point)
                yield
                run.count(point)
                run.after_update(point)
        run.end_epoch(point)


class Ours:
    """The run that fastsmooth.train prepares, stopped after every update. One call is one step;
    laps as in Originals."""

    compile = "off"

    def __init__(self, case: Case, images: str):
        flags = (
            f"--dataset cifar100 --model {case.model} --batchsize {case.batch_size} --lr {LR} "
            "--loader resident"
        )
        c = configs.resolve(
            parsing.parse([*flags.split(), "--device", "cpu", "--compile", self.compile]).given
        )
        self.scratch = tempfile.TemporaryDirectory()
        self.run = self._prepare(c, load_images(images))
        self.laps = {"data": 0.0, "gradient": 0.0, "update": 0.0}
        self._updates = updates_of(self.run)
        # this process has no other run
        for part, owner, name in (
            ("data", Batch, "ahead"),
            ("gradient", Step, "gradient"),
            ("update", Step, "update"),
        ):
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _prepare(self, c: configs.Config, split: Split) -> Run:
        """As fastsmooth.train does it, but for signals and the images, which stand in for
        CIFAR-100's."""
        keep_freed_memory()
        test = Split(split.labels[:TEST_IMAGES], split.pixels[:TEST_IMAGES])
        classes = tuple(map(str, range(CLASSES)))
        device = torch.device(c.device)
        stand_in = ImageSet(split, test, classes, CIFAR100_MEAN, CIFAR100_STD)
        with patch.dict(data.READERS, cifar100=lambda config: stand_in):
            images = data.open_data(c, device)
        plan = make_plan(c, len(images.train))
        torch.manual_seed(c.seed)
        model = models.build(c.model, images.classes, c.norm).to(device)
        model = model.to(memory_format=torch.channels_last)
        optimizer = NoisySGD(
            model.parameters(), c.optimizer, c.lr, c.momentum, c.nu, c.weight_decay
        )
        step = Step(model, optimizer, device, "fp32", c.compile == "on")
        out = Path(self.scratch.name) / "run"
        folder = RunFolder.create(out, c.to_json(), environment())
        trackers = Trackers((), c.to_json(), out, warn)
        checkpoints = Checkpoints(out / "checkpoints", warn)
        run = Run(plan, images, model, step, device, folder, checkpoints, trackers, Clock())
        run.progress = Progress(
            c.epochs, len(images.train), c.epochs * len(images.train), 0, "this CPU"
        )
        return run

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.laps[part] += time.perf_counter() - began

        return timed

    def __call__(self) -> None:
        next(self._updates)

    def check(self) -> None:
        self.run.check_finite()

    def close(self) -> None:
        self.run.folder.close()
        self.scratch.cleanup()


class OursCompiled(Ours):
    compile = "on"

    def __init__(self, case: Case, images: str):
        super().__init__(case, images)
        # an empty cache, so that the first step compiles and says what that costs
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(self.scratch.name) / "inductor")


# The yardstick


@dataclass(frozen=True)
class ConvShape:
    """A convolution as a network calls it: `size` is the side of its input in pixels."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    input_gradient: bool  # the first layer's input needs none

    def flop(self, batch_size: int) -> int:
        """Of forward and backward, an addition and a multiplication apart: each gradient costs what
        the forward does."""
        pixels = ((self.size - 1) // self.stride + 1) ** 2
        passes = 3 if self.input_gradient else 2
        return passes * 2 * batch_size * pixels * self.outputs * self.inputs * self.kernel**2


def convolutions(name: str) -> Counter[ConvShape]:
    """The convolutions of the network, each with the number of layers that have it; nothing is
    computed."""
    found: Counter[ConvShape] = Counter()

    def note(layer: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        side, stride = layer.kernel_size[0], layer.stride[0]
        x = inputs[0]
        found[
            ConvShape(
                layer.in_channels, layer.out_channels, side, stride, x.shape[-1], x.requires_grad
            )
        ] += 1

    with torch.device("meta"):
        model = models.build(name, CLASSES)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(note)
        model(torch.empty(1, 3, SIZE, SIZE))
    return found


def step_flop(case: Case) -> int:
    """Floating-point operations of one forward and backward pass, as torch.utils.flop_counter
    counts them."""
    with torch.device("meta"):
        model = models.build(case.model, CLASSES)
        x = torch.empty(case.batch_size, 3, SIZE, SIZE)
        y = torch.zeros(case.batch_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


class Yardstick:
    """One call: a matrix product, then each convolution of the network forward and backward, in our
    process settings."""

    def __init__(self, case: Case):
        keep_freed_memory()
        self.a, self.b = torch.randn(2, MATMUL, MATMUL)
        self.work = {
            shape: self._prepare(shape, case.batch_size) for shape in convolutions(case.model)
        }
        self.laps: dict[Any, float] = {"matmul": 0.0} | dict.fromkeys(self.work, 0.0)

    def _prepare(
        self, shape: ConvShape, batch_size: int
    ) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor]:
        layer = models.conv(shape.inputs, shape.outputs, shape.kernel, shape.stride)
        layer = layer.to(memory_format=torch.channels_last)
        x = torch.randn(batch_size, shape.inputs, shape.size, shape.size).to(
            memory_format=torch.channels_last
        )
        x.requires_grad_(shape.input_gradient)
        return layer, x, torch.randn_like(layer(x).detach())

    def __call__(self) -> None:
        for part, took in self._timed():
            self.laps[part] += took

    def _timed(self) -> Iterator[tuple[Any, float]]:
        began = time.perf_counter()
        torch.mm(self.a, self.b)
        yield "matmul", time.perf_counter() - began
        for shape, (layer, x, output_gradient) in self.work.items():
            wanted = [layer.weight, x] if shape.input_gradient else [layer.weight]
            began = time.perf_counter()
            torch.autograd.grad(layer(x), wanted, output_gradient)
            yield shape, time.perf_counter() - began


# What bounds a step


def explain(case: Case, found: dict[str, Measured], yardstick: Measured) -> dict[str, Any]:
    """Where the time of a step goes, and what the machine could do at best."""
    flop, layers = step_flop(case), convolutions(case.model)
    rates = {shape: shape.flop(case.batch_size) / fastest(yardstick, shape) for shape in layers}
    alone = sum(count * yardstick.lap(shape) for shape, count in layers.items())
    best = max(rates, key=rates.get)
    about: dict[str, Any] = {"gflop_a_step": rounded(flop / 1e9)}
    about["matmul_gflop_s"] = rounded(2 * MATMUL**3 / fastest(yardstick, "matmul") / 1e9)
    about["best_convolution_gflop_s"] = rounded(rates[best] / 1e9)
    about["best_convolution"] = (
        f"{best.kernel}x{best.kernel}, {best.inputs} to {best.outputs} channels, "
        f"{best.size}x{best.size} pixels"
    )
    about["convolutions_alone_s"] = rounded(alone)
    about["yardstick_quiet"] = (
        f"{len(yardstick.quiet)} of {len(yardstick.windows)}" if yardstick.knows_load() else None
    )
    about["variants"] = {name: breakdown(m, flop, alone) for name, m in found.items()}
    return about


def fastest(measured: Measured, part: Any) -> float:
    return min(w.laps[part] for w in measured.counted)


def breakdown(measured: Measured, flop: int, alone: float) -> dict[str, Any]:
    seconds, helpers, peak = measured.seconds(), measured.helpers_cpu(), measured.peak_bytes()
    total = sum(measured.lap(part) for part in ("data", "gradient", "update"))
    shares = {part: rounded(measured.lap(part) / total) for part in ("data", "gradient", "update")}
    return {
        "shares": shares,
        "gflop_s": rounded(flop / seconds / 1e9),
        "convolutions_alone_share": rounded(alone / seconds),
        "workers_cpu_s": None if helpers is None else rounded(helpers),
        "peak_mb": None if peak is None else round(peak / 1e6),
        "first_step_s": rounded(measured.first_step),
    }


def describe(about: dict[str, Any]) -> list[str]:
    lines = []
    for name, b in about["variants"].items():
        data_share, gradient, update = (
            b["shares"][part] for part in ("data", "gradient", "update")
        )
        line = (
            f"  {name}: data {data_share:.1%}, forward and backward {gradient:.1%}, update "
            f"{update:.1%} of a step"
        )
        line += f"; {b['gflop_s']:.0f} GFLOP/s; first step {b['first_step_s']:.3g} s"
        if b["workers_cpu_s"]:
            line += f"; its workers' CPU {b['workers_cpu_s'] * 1e3:.0f} ms a step beside it"
        if b["peak_mb"]:
            line += f"; peak {b['peak_mb']:,} MB without workers"
        lines.append(line)
    quiet = f" (quiet windows: {about['yardstick_quiet']})" if about["yardstick_quiet"] else ""
    lines.append(
        f"  arithmetic: {about['gflop_a_step']:g} GFLOP a step; this machine's matmul of {MATMUL} "
        f"{about['matmul_gflop_s']:.0f} GFLOP/s, best convolution "
        f"{about['best_convolution_gflop_s']:.0f} GFLOP/s "
        f"({about['best_convolution']}){quiet}"
    )
    shares = ", ".join(
        f"{b['convolutions_alone_share']:.0%} of {name}" for name, b in about["variants"].items()
    )
    alone = about["convolutions_alone_s"] * 1e3
    lines.append(
        f"  bound: the convolutions alone, one by one, take {alone:.4g} ms, which is {shares}"
    )
    return lines


rounded = timing.rounded

if __name__ == "__main__":
    sys.exit(main())
