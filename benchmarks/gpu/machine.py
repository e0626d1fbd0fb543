"""What the machine can do at best, and where an update's time goes there."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import product
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.events import Kernel, captured, device_seconds, host_seconds, kernels_of, whole
from benchmarks.gpu.images import random_images
from benchmarks.timing import rounded

COPIED = 1 << 30  # bytes of a buffer that is copied, many times any cache
SIDE = 8192  # of the matrices that are multiplied
EMPTY = 200  # kernels of a graph that do next to nothing
TOP, GAPS = 30, 8  # longest kernels and gaps that are told
PROFILED = 5  # updates
BUCKET = 45 << 20  # bytes that processes exchange for ResNet-18


def ceilings(cell: Cell) -> None:
    """Bandwidth, products, launches."""
    with cell.part("bandwidth"):
        bandwidth(cell, COPIED if not cell.dry else 1 << 16)
    for name, dtype, how in (
        ("bf16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("fp32", torch.float32, "ieee"),
    ):
        with cell.part(f"product/{name}"):
            product_of(cell, name, dtype, how, SIDE if not cell.dry else 64)
    with cell.part("launches"):
        launches(cell)


def bandwidth(cell: Cell, size: int) -> None:
    a, b = (torch.randn(size // 4, device=cell.device) for _ in range(2))
    found = cell.measure({"copy": lambda: b.copy_(a), "in_place": a.neg_})
    cell.tell_times(
        f"bandwidth/{size >> 20}MB", found, "copy", 2 * size, per="bytes, read or written"
    )


def product_of(cell: Cell, name: str, dtype: torch.dtype, how: str, side: int) -> None:
    product.multiply_in(how)
    a, b = (torch.randn(side, side, device=cell.device, dtype=dtype) for _ in range(2))
    found = cell.measure({name: lambda: torch.mm(a, b)}, rounds=5)
    cell.tell_times(f"product/{side}", found, name, 2 * side**3, precision=name, per="FLOP")


def launches(cell: Cell) -> None:
    """A kernel of one value: launched, and replayed EMPTY at a time."""
    one = torch.ones(1, device=cell.device)

    def many() -> None:
        for _ in range(EMPTY):
            one.neg_()

    replay = captured(cell.device, many)
    host = cell.measure({"launch": one.neg_}, host_seconds, most=400)
    cell.tell_times("launch/host", host, "launch", 1, per="launches")
    device = cell.measure({"launch": one.neg_}, device_seconds, most=400)
    cell.tell_times("launch/device", device, "launch", 1, per="launches")
    about = {"per": "kernels", "kernels": EMPTY, "captured": cell.device.type == "cuda"}
    for name, clock in (("host", host_seconds), ("device", device_seconds), ("both", whole)):
        found = cell.measure({"replay": replay}, clock, most=20)
        cell.tell_times(f"replay/{name}", found, "replay", EMPTY, **about)


def timeline(cell: Cell) -> None:
    """The kernels of updates as they follow each other, and an exchange within a graph."""
    sizes = (128, 32) if not cell.dry else (4,)
    flags = ["--dataset", "cifar100", "--model", "resnet18", "--precision", "bf16"]
    if cell.dry:
        flags = ["--dataset", "cifar100", "--model", "resnet8", "--device", "cpu"]
        flags += ["--compile", "off"]
    images = random_images(50_000 if not cell.dry else 400, 250)
    for size in sizes:
        with cell.part(f"profile/b{size}"):
            profile_updates(cell, [*flags, "--batchsize", str(size)], images, size)
    with cell.part("exchange"):
        exchange(cell, BUCKET if not cell.dry else 1 << 12)


def profile_updates(cell: Cell, flags: list[str], images: Any, size: int) -> None:
    how = ["--graphs", "on"] if cell.device.type == "cuda" else []
    trainer = product.Trainer([*flags, *how], images)
    try:
        trainer.advance(30 if not cell.dry else 3)
        # the first profile of a process starts the profiler
        for _ in range(2):
            seen = kernels_of(cell.device, lambda: trainer.advance(PROFILED), trainer.call)
        tell_timeline(cell, f"profile/b{size}", seen, PROFILED, trainer.facts())
    finally:
        trainer.close()


def tell_timeline(
    cell: Cell, case: str, seen: list[Kernel], updates: int, facts: dict[str, Any]
) -> None:
    gaps, end = [], seen[0].start
    busy = 0.0
    for before, kernel in pairwise([seen[0], *seen]):
        if kernel.start > end:
            gaps.append((kernel.start - end, before.name, kernel.name))
        busy += max(kernel.start + kernel.took - max(end, kernel.start), 0.0)
        end = max(end, kernel.start + kernel.took)
    span = end - seen[0].start
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for kernel in seen:
        by_name[kernel.name].append(kernel.took)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    cell.tell(
        case,
        updates=updates,
        kernels_an_update=round(len(seen) / updates, 1),
        span_us=rounded(span / updates),
        busy_us=rounded(busy / updates),
        gaps_us=rounded((span - busy) / updates),
        gaps=[
            {"us": rounded(us), "after": short(before), "before": short(after)}
            for us, before, after in sorted(gaps, reverse=True)[:GAPS]
        ],
        **facts,
    )
    for name, took in longest:
        us = sum(took) / updates
        cell.tell(
            case,
            kernel=short(name),
            us=rounded(us),
            calls=len(took) / updates,
            share=rounded(us * updates / span),
        )


def short(name: str) -> str:
    """Names of templates are pages long."""
    return name if len(name) <= 120 else f"{name[:80]}...{name[-37:]}"


def exchange(cell: Cell, size: int) -> None:
    """The sum over one process of as much as ResNet-18's processes exchange, alone and captured."""
    gpu = cell.device.type == "cuda"
    store = dist.FileStore(str(Path(cell.scratch) / "store"), 1)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        bucket = torch.randn(size // 4, device=cell.device)
        before = bucket.clone()
        step = lambda: dist.all_reduce(bucket)  # noqa: E731  # two variants of one call
        step()
        variants = {"alone": step, "captured": captured(cell.device, step)}
        found = cell.measure(variants, whole, seconds=0.05, rounds=5, most=200)
        cell.tell_times("exchange/world1", found, "alone", size, per="bytes", captured=gpu)
        cell.check(
            "exchange/world1",
            torch.equal(bucket, before),
            what="the sum over one process is itself",
        )
        del variants
    finally:
        dist.destroy_process_group()
