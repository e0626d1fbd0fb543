"""Whole runs: their bits, their seconds, their accuracies."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import product
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.images import part_of_cifar, random_images, whole_cifar
from benchmarks.gpu.steps import form_flags, without_gpu
from benchmarks.timing import rounded
from fastsmooth.data import chunks
from fastsmooth.data.images import ImageSet
from fastsmooth.data.order import permutation
from fastsmooth.messages import DIVERGED, DONE, PREEMPTED

NOT_FINITE = float("nan")
LATE = 16  # updates that a run may go on after one that was not finite
UPDATES = 10  # of an epoch of a short run


def flags_of(cell: Cell, *flags: str) -> list[str]:
    given = ["--dataset", "cifar100", "--device", cell.device.type, *flags]
    return without_gpu(given) if cell.dry else given


def read(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name).read_text())


# Bits


def bits(cell: Cell) -> None:
    """Eager and captured updates end in the same bits, over changes of lr, where a number is not
    finite, and across an interruption."""
    with cell.part("bits/resnet8"):
        same_bits(cell, "resnet8", "off", interrupted=True)
    with cell.part("finite"):
        not_finite(cell)
    if not cell.dry:
        with cell.part("bits/resnet18"):
            same_bits(cell, "resnet18", "on", interrupted=False)


def same_bits(cell: Cell, model: str, compiled: str, interrupted: bool) -> None:
    case, size = f"bits/{model}", batch_of(cell)
    images = random_images(UPDATES * size, tests=size)
    outs = {}
    for how, graphs in (
        ("eager", "off"),
        ("eager again", "off"),  # whether the libraries themselves give the same bits twice
        ("captured", "on"),
        *([("captured, interrupted", "on")] if interrupted else []),
    ):
        flags = ["--model", model, "--method", "exp", "--epochs", "3", "--batchsize", str(size)]
        flags += ["--optimizer", "shb", "--lr", "0.01", *form_flags("bf16", compiled, graphs)]
        outs[how] = cell.scratch / f"{model} {how}"
        if how != "captured, interrupted":
            do(flags_of(cell, *flags), outs[how], images)
            continue
        # inside an epoch, when updates are replayed
        do(flags_of(cell, *flags), outs[how], images, nothing, stop_at(15), code=PREEMPTED)
        do(["--resume"], outs[how], images)
    states = {how: product.last_state(out) for how, out in outs.items()}
    captured = read(outs["captured"], "summary.json").get("captured_graphs")
    if not cell.dry:
        cell.check(case, captured == 1, captured_graphs=captured)
    pairs = [("eager", "eager again"), ("eager", "captured")]
    pairs += [("captured", "captured, interrupted")] if interrupted else []
    for one, other in pairs:
        differing = differences(states[one], states[other])
        cell.check(case, not differing, compared=[one, other], differing=differing[:5], updates=30)


def batch_of(cell: Cell) -> int:
    return 32 if not cell.dry else 4


def nothing(run: Any) -> None:
    pass


def stop_at(update: int) -> Callable[[Any], int]:
    return lambda run: signal.SIGTERM if run.update >= update else 0


def do(flags: list[str], out: Path, images: ImageSet, *rest: Any, code: int = DONE) -> None:
    """A run of fastsmooth.train. Raises RuntimeError where it ends with another code."""
    found = product.run([*flags, "--out", str(out)], images, *rest)
    if found != code:
        why = product.why_ended(out)
        raise RuntimeError(f"fastsmooth.train ended with code {found}, not {code}{why}")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of parameters, buffers and momenta that are not equal bit for bit."""
    found = [n for n, t in one["model"].items() if not torch.equal(t, other["model"][n])]
    tensors, others = (
        [t for t in tree_leaves(state["optimizer"]["state"]) if isinstance(t, Tensor)]
        for state in (one, other)
    )
    pairs = enumerate(zip(tensors, others, strict=True))
    return found + [f"momentum {i}" for i, (a, b) in pairs if not torch.equal(a, b)]


def not_finite(cell: Cell) -> None:
    """An image whose pixels are not finite: exit code 3, the number of the update that met it, and
    not many updates more."""
    expected, size = 12, batch_of(cell)
    count = (expected + 2 * LATE) * size  # the epoch's end, where the device is waited for, is far
    images = random_images(count, tests=size)
    order = permutation(0, 0, count)
    images.train.pixels[order[expected * size - 1]] = 255  # as no other has
    table = chunks.normalisation

    def with_nan(*given: Any) -> Tensor:
        found = table(*given)
        found[:, 255] = NOT_FINITE
        return found

    out = cell.scratch / "not finite"
    flags = ["--model", "resnet8", "--epochs", "1", "--batchsize", str(size), "--augment", "none"]
    flags += form_flags("bf16", "off", "on")
    with (
        patch("fastsmooth.data.chunks.normalisation", with_nan),
        patch("fastsmooth.data.engines.resident.normalisation", with_nan, create=True),
    ):
        code = product.run([*flags_of(cell, *flags), "--out", str(out)], images)
    status = read(out, "status.json")
    late = status["step"] - expected
    cell.check(
        "finite",
        code == DIVERGED and f"at update {expected} " in status["reason"] and 0 <= late <= LATE,
        code=code,
        reason=status["reason"],
        expected=expected,
        updates_late=late,
    )


# Seconds


def whole_runs(cell: Cell) -> None:
    """Ten epochs whose batch grows from 32 to 162, and six whose batch has a new size each."""
    images = None if cell.dry else whole_cifar(cell.data)
    what = "CIFAR-100" if images else "random pixels"
    images = images or random_images(*((50_000, 10_000) if not cell.dry else (40, 8)))
    model = "resnet18" if not cell.dry else "resnet8"
    forms = {
        "hybrid": ["--method", "hybrid", "--epochs", "10"],
        "beta-batch": ["--method", "beta-batch", "--optimizer", "nshb", "--epochs", "6"],
    }
    for name, flags in forms.items():
        if cell.dry:
            flags[-1] = "2"
        with cell.part(f"run/{name}"):
            given = [*flags, "--model", model, *form_flags("bf16", "on", "auto")]
            tell_run(cell, f"run/{name}", flags_of(cell, *given), images, images_are=what)


def tell_run(
    cell: Cell, case: str, flags: list[str], images: ImageSet, epochs: bool = True, **about: Any
) -> dict[str, Any]:
    """Do a run, tell its epochs as they end and what it took in all; its summary."""
    out = cell.scratch / case.replace("/", " ")
    runs: list[Any] = []
    told = 0

    def tell_epoch(run: Any) -> int:
        nonlocal told
        if epochs and run.epoch > told:
            told = run.epoch
            names = ("epoch", "batch_size", "train_seconds", "eval_seconds", "images_per_second")
            row = {name: run.last_epoch[name] for name in (*names, "test_acc")}
            # by then of the whole run: what is compiled and captured is no part of train_seconds
            parts = {f"{part}_s_so_far": run.clock.read(part) for part in ("compile", "capture")}
            cell.tell(case, **row, **{name: rounded(value) for name, value in parts.items()})
        return 0

    began = time.perf_counter()
    do(flags, out, images, runs.append, tell_epoch)
    seconds = time.perf_counter() - began
    tell_epoch(runs[0])
    summary = read(out, "summary.json")
    names = ("final_test_acc", "best_test_acc", "updates", "compiled_graphs", "captured_graphs")
    found = {name: summary.get(name) for name in names}
    environment = read(out, "env.json")
    found |= {name: environment.get(name) for name in ("precision", "graphs")}
    found |= {"flags": " ".join(flags)}
    parts = {
        f"{part}_s": rounded(runs[0].clock.read(part)) for part in ("compile", "capture", "eval")
    }
    cell.tell(
        case, seconds=rounded(seconds), run_seconds=summary["seconds"], **found, **parts, **about
    )
    return summary


# Accuracies


def cifar_part(cell: Cell) -> tuple[ImageSet, str]:
    """(images, what they are): 10,000 of CIFAR-100, or random ones."""
    images = None if cell.dry else part_of_cifar(cell.data)
    if images:
        return images, "10,000 of CIFAR-100"
    return random_images(*((10_000, 2000) if not cell.dry else (40, 8))), "random pixels"


def long_runs(cell: Cell) -> None:
    """The papers' length on 10,000 images, with C2 every 50 updates."""
    images, what = cifar_part(cell)
    model, epochs = ("resnet18", "200") if not cell.dry else ("resnet8", "2")
    for method in ("constant", "batch", "hybrid"):
        flags = ["--model", model, "--method", method, "--epochs", epochs]
        flags += ["--track-noise", "every=50", *form_flags("bf16", "on", "auto")]
        with cell.part(f"long/{method}"):
            tell_run(cell, f"long/{method}", flags_of(cell, *flags), images, False, images_are=what)


SEEDS = (0, 1, 2)


def precisions(cell: Cell) -> None:
    """Final accuracies by precision, the same seeds in each; told seed by seed, so that what is
    finished compares."""
    images, what = cifar_part(cell)
    model, epochs, seeds = "resnet20", "60", SEEDS
    if cell.dry:
        model, epochs, seeds = "resnet8", "1", SEEDS[:2]
    common = ["--model", model, "--epochs", epochs, "--method", "cosine"]
    found: dict[str, list[float]] = {"bf16": [], "tf32": [], "fp32": []}
    for seed in seeds:
        for precision, accuracies in found.items():
            flags = [*common, "--seed", str(seed), *form_flags(precision, "on", "auto")]
            case = f"precision/{precision}/seed{seed}"
            with cell.part(case):
                run = tell_run(cell, case, flags_of(cell, *flags), images, False, images_are=what)
                accuracies.append(run["final_test_acc"])
    for precision, accuracies in found.items():
        if len(accuracies) == len(seeds):
            error = stdev(accuracies) / len(seeds) ** 0.5
            values = {"mean": rounded(mean(accuracies)), "error": rounded(error)}
            cell.tell(f"precision/{precision}", final_test_acc=accuracies, n=len(seeds), **values)
