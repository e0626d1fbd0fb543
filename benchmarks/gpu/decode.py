"""Decoding by DALI while ResNet-50 trains, and each of them alone."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import gpu_decode
from benchmarks.gpu import product
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.images import photographs, random_images
from benchmarks.gpu.steps import form_flags
from benchmarks.timing import rounded
from fastsmooth.data.engines import dali
from fastsmooth.data.engines.dali import Decoder
from fastsmooth.data.images import ImageSet

FILES, CHUNK, BATCH = 4096, 128, 256
SECONDS, ALONE, LEAD = 25.0, 6.0, 3.0
SHARES = (0.9, 1.0, 0.65, 0.0)  # of a chunk that the hardware decoder gets


def decoding(cell: Cell) -> None:
    images = photographs(cell.data, cell.scratch, FILES if not cell.dry else 8)
    if images is None:
        cell.tell("decode", skipped="imagenet-128.tar is not in the data folder")
        return
    settings: dict[str, list[str]] = {"threads": ["--loader", "threads"]}
    if dali.available():
        for share in SHARES if not cell.dry else SHARES[:1]:
            settings[f"dali/hw{share:g}"] = ["--loader", "dali", "--hw-decoder-load", str(share)]
        del settings["threads"]
    else:
        cell.tell("decode", skipped="DALI is not installed", instead="--loader threads")
    with cell.part("decode/train alone"):
        train_alone(cell)
    for name, flags in settings.items():
        with cell.part(f"decode/{name}"):
            if dali.available() and not cell.dry:
                decode_alone(cell, name, float(flags[-1]))
            chunk = str(CHUNK if not cell.dry else 4)
            tell_speed(
                cell, f"decode/{name}", [*flags, "--chunk", chunk], images, SECONDS, chunk=chunk
            )


def flags_for(cell: Cell, *more: str) -> list[str]:
    flags = ["--dataset", "imagenet", "--image-size", "224", "--epochs", "1000"]
    flags += ["--batchsize", str(BATCH), "--model", "torchvision/resnet50", "--lr", "0.001"]
    flags += form_flags("bf16", "on", "auto")
    if cell.dry:
        flags = ["--dataset", "imagenet", "--image-size", "32", "--epochs", "1000"]
        flags += ["--batchsize", "4", "--model", "resnet8", "--lr", "0.001", "--compile", "off"]
    # nothing is saved, which would be timed
    return [*flags, "--checkpoint-every", "1000000", "--device", cell.device.type, *more]


def train_alone(cell: Cell) -> None:
    """Training on images that lie on the device: what decoding must keep up with."""
    count, size = (2048, 224) if not cell.dry else (16, 32)
    images = random_images(count, tests=4, size=size, classes=1000)
    flags = ["--loader", "resident", "--augment", "crop-flip"]
    tell_speed(cell, "decode/train alone", flags, images, ALONE)


def decode_alone(cell: Cell, name: str, share: float) -> None:
    files = gpu_decode.source(cell.scratch / "imagenet-128")
    loader = gpu_decode.loader(files, Decoder(hw_load=share), CHUNK)
    per_s = gpu_decode.window(loader, ALONE)
    cell.tell(f"decode/{name} alone", per_s=rounded(per_s), per="images", chunk=CHUNK)


def tell_speed(
    cell: Cell, case: str, flags: list[str], images: ImageSet, seconds: float, **about: Any
) -> None:
    """Images a second of a run over so many seconds, its evaluations left out, after a few seconds
    that are not counted; and the slowest and the fastest fifth of its windows of ten updates."""
    seconds, lead, each = (seconds, LEAD, 10) if not cell.dry else (0.2, 0.0, 1)
    trainer = product.Trainer(flags_for(cell, *flags), images)
    try:
        trainer.advance(each)
        began, speeds = time.perf_counter(), []
        while time.perf_counter() - began < lead + seconds:
            at, samples, evaluated = clock_of(trainer)
            trainer.advance(each)
            now, after, evaluated_now = clock_of(trainer)
            if now - began > lead:
                speeds.append((after - samples) / (now - at - (evaluated_now - evaluated)))
        ordered = sorted(speeds)
        p20, p50, p80 = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
        about |= {"model": "torchvision/resnet50", "precision": "bf16", "batch": BATCH}
        values = {"per_s": rounded(p50), "p20_per_s": rounded(p20), "p80_per_s": rounded(p80)}
        cell.tell(case, **values, per="images", windows=len(speeds), **about, **trainer.facts())
    finally:
        trainer.close()


def clock_of(trainer: product.Trainer) -> tuple[float, int, float]:
    """(now, samples, seconds of evaluation), the device idle."""
    evaluated = trainer.run.clock.read("eval")  # waits for the device
    return time.perf_counter(), trainer.run.samples, evaluated
