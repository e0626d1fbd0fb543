"""normal, critical, sampling: three short loops over the same updates of the same run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmooth.noise import gradients
from fastsmooth.noise.tails import NoiseStatistics
from fastsmooth.runfolder.files import new_aside, rename, writing
from fastsmooth.runfolder.numbers import exact
from fastsmooth.schedule import Point, memory
from fastsmooth.training.loop import Asked, Diverged, Run


def normal(run: Run) -> None:
    """Train to the last epoch."""
    for x, y, _ in run.updates():
        run.gradient(x, y)
        run.step.update()


def critical(run: Run) -> None:
    """Train until the running mean of the gradient norm has crossed every eps; critical.json says
    at which update."""
    c = run.config
    per_epoch = run.schedule.updates(len(run.data.train), c.drop_last)[0]
    full = c.criterion == "full-grad"
    every = (c.full_grad_every or per_epoch) if full else 1
    for x, y, point in run.updates():
        update = run.update + 1
        if full and update % every == 0:
            run.record.observe(full_gradient_norm(run, point), update)
        run.gradient(x, y)
        run.step.update()
        if not full:
            run.record.observe(run.step.grad_norm(), update)
        if update % c.log_every == 0:
            run.enough = run.ranks.from_leader(all(run.record.crossings()))
    report_crossings(run, per_epoch, every)


def full_gradient_norm(run: Run, point: Point) -> Tensor:
    """||grad f|| at the present parameters, 0-d."""
    try:
        with gradients.undisturbed(run.model, run.config.bn):
            return gradients.norm(run.full_gradient(point))
    except Asked as stop:
        run.stop_before_update(stop.number)


def report_crossings(run: Run, per_epoch: int, every: int) -> None:
    c, n, batch = run.config, len(run.data.train), run.schedule.start.batch_size
    # the first update that may count; a mean that is at most eps there may have been so at any
    # update before, if there is one
    earliest = -(-(run.record.ignore + 1) // every) * every
    crossings: dict[str, Any] = {}
    for eps, step in zip(c.eps, run.record.crossings(), strict=True):
        epochs, rest = divmod(step, per_epoch)
        served = n - n % batch if c.drop_last else n
        samples = epochs * served + rest * batch
        entry = {
            "step": step,
            "epoch": (step - 1) // per_epoch,
            "samples": samples,
            "censored": step == earliest > 1,
        }
        crossings[exact(eps)] = entry if step else None
        found = (
            f"update {step:,} ({samples:,} samples)"
            if step
            else f"not reached in {run.update:,} updates"
        )
        if step == earliest > 1:
            found += (
                ", the first that counts, so no crossing: it may have been there before "
                "(--min-epochs, --eps)"
            )
        run.progress.say(f"eps {exact(eps)}: {found}")
    about = {
        "criterion": c.criterion,
        "optimizer": c.optimizer,
        "lr": c.lr,
        "batch_size": batch,
        "momentum": c.momentum,
    }
    about |= {"seed": c.seed, "min_epochs": c.min_epochs, "first_that_counts": earliest}
    about |= {"resolution": every, "updates": run.update}
    if c.criterion == "full-grad":
        about |= {"function": measured_function(run, run.chunk(run.schedule.start))}
    run.folder.write("critical.json", about | {"crossings": crossings} | run.record.summary())


def measured_function(run: Run, chunk: int) -> str:
    """In words: the function of the parameters whose full gradient is taken."""
    c = run.config
    images = f"augmented as in the epoch ({c.augment})" if c.measure_augment else "not augmented"
    how, statistics = "evaluation mode", "running statistics"
    if c.bn == "train":
        share = chunk if run.step.joined else -(-chunk // run.ranks.world)
        how = "training mode"
        statistics = (
            f"the statistics of {min(share, c.micro_batch or share)} samples at a time, in one "
            "order of the images"
        )
    if run.step.normalises_batches:
        how += f": BatchNorm with {statistics}"
    return (
        f"mean cross-entropy over the {len(run.data.train):,} training images, {images}; the "
        f"model in {how}"
    )


def sampling(run: Run) -> None:
    """Train for the largest of --steps updates, measuring the search-direction noise at each;
    noise.json has the points.

    A direction with momentum is the work of the updates before it. So its noise is measured over
    histories: the run goes back, and every draw comes to its point by batches of its own. That is
    done where the histories begin, and told where they end.
    """
    c = run.config
    reach, last = memory(c.momentum), max(c.steps)
    if reach:
        run.progress.say(
            f"each of {c.draws} directions is that of a history of its own: up to {reach} updates "
            "replayed, then a pass over the "
            "training images, at each of --steps"
        )
    for x, y, point in run.updates():
        for step in sorted(c.steps):
            # before a stop at this update
            measured = any(p["step"] == step for p in run.noise_points)
            if run.update == max(step - reach, 0) and not measured:
                measure_noise(run, step, step - run.update)
        if run.update in c.steps:
            report_noise(run, point)
        if run.update == last:
            return
        run.gradient(x, y)
        run.step.update()


def measure_noise(run: Run, step: int, replayed: int) -> None:
    """Add the point of update `step`, `replayed` updates from here, to noise_points."""
    c = run.config
    run.check_finite()
    omega = OmegaFile(run, step) if c.save_omega and run.ranks.leader else None
    statistics = NoiseStatistics(sum(p.numel() for p in gradients.trainable(run.model)), run.device)
    here: list[list[Tensor]] = []  # the full gradient, where all draws are at one point

    def keep(draw: int, vectors: list[Tensor]) -> None:
        statistics.observe(vectors)
        if omega:
            omega.keep(vectors)

    @contextmanager
    def at(draw: int) -> Iterator[list[Tensor]]:
        if replayed:
            with run.ahead(replayed, draw), gradients.undisturbed(run.model, c.bn):
                yield run.full_gradient(point)
        else:
            here[:] = here or [run.full_gradient(point)]
            yield here[0]

    point = run.point_after(replayed)
    over = (
        f"histories, the last {replayed} updates replayed"
        if replayed
        else "mini-batches drawn at one point"
    )
    started = time.perf_counter()
    with (
        run.clock.measure("measure"),
        gradients.undisturbed(run.model, c.bn),
        omega or contextlib.nullcontext(),
    ):
        try:
            noise = gradients.direction_noise(
                run.step.optimizer,
                lambda draw: run.drawn_gradient(draw, point),
                point.batch_size,
                at,
                c.draws,
                len(run.data.train),
                keep,
                over,
            )
        except FloatingPointError as error:
            raise Diverged(f"{error}, measured of update {step}: lower --lr") from None
        except Asked as stop:
            run.stop_before_update(stop.number)
    norm, full, c2 = noise.noise_norm(), noise.full_grad_norm(), noise.grad_variance()
    values = {
        "noise_norm": norm.value,
        "noise_norm_se": norm.error,
        "full_grad_norm": full.value,
        "full_grad_norm_se": full.error,
        "c2_sampled": c2.value,
        "c2_sampled_se": c2.error,
        "draws": c.draws,
        "se_over": f"{c.draws} {over}",
        "replayed": replayed,
        "bn": c.bn,
        "augmented": c.measure_augment,
        "chunk": run.chunk(point),
        "function": measured_function(run, run.chunk(point)),
    }
    at_step = {
        "step": step,
        "lr": point.lr,
        "batch_size": point.batch_size,
        "momentum": point.momentum,
    }
    norms = {"noise_norms": noise.noise_norms, "grad_noise_norms": noise.grad_noise_norms}
    norms |= {"full_grad_norms": noise.full_grad_norms}
    tails = statistics.summary()
    seconds = round(time.perf_counter() - started, 3)
    run.noise_points.append(at_step | values | norms | {"statistics": tails, "seconds": seconds})
    run.progress.restart_clock(run.samples)  # what is told of the speed is that of training


def report_noise(run: Run, point: Point) -> None:
    """Say and write what was measured of the present update."""
    c = run.config
    found = next(p for p in run.noise_points if p["step"] == run.update)
    found["epoch"] = run.epoch
    values = {key: v for key, v in found.items() if not isinstance(v, list | dict)}
    run.row("measure", point, values)
    about = {"optimizer": c.optimizer, "seed": c.seed, "images": len(run.data.train)}
    points = [
        {k: v for k, v in p.items() if k != "seconds"}
        for p in run.noise_points
        if p["step"] <= run.update
    ]
    run.folder.write("noise.json", about | {"points": points})
    pairs = [(name, found[key], found[f"{key}_se"]) for name, key in SHOWN]
    line = ", ".join(f"{name} {value:.4g} +- {error:.2g}" for name, value, error in pairs)
    run.progress.say(f"update {run.update:,}: {line} (standard errors over {found['se_over']})")
    run.progress.say(f"update {run.update:,}: of {found['function']}")
    tails = found["statistics"]
    run.progress.say(
        f"update {run.update:,}: its coordinates have "
        f"{shown(tails['excess_kurtosis'], 'excess kurtosis')}, "
        f"{shown(tails['ks_distance'], 'KS distance')} to a normal, "
        f"{shown(tails['hill'][1], 'Hill tail index')} over the largest 1 %"
    )


SHOWN = (
    ("||m - grad f||", "noise_norm"),
    ("||grad f||", "full_grad_norm"),
    ("c2_sampled", "c2_sampled"),
)


def shown(estimate: dict[str, Any], name: str) -> str:
    value, error = estimate["value"], estimate["error"]
    return (
        f"{name} undefined"
        if value is None
        else f"{name} {value:.3g} +- " + ("?" if error is None else f"{error:.2g}")
    )


class OmegaFile:
    """omega-<step>.npy, float32 [draws, parameters], written a row at a time and named when it is
    whole.

    Plain writes: a memory map of a file for which the disk has no room is SIGBUS, of which nobody
    could be told.
    """

    def __init__(self, run: Run, step: int):
        self.target = run.folder.path / f"omega-{step}.npy"
        self.aside = new_aside(self.target)
        self.shape = run.config.draws, sum(p.numel() for p in gradients.trainable(run.model))

    def __enter__(self) -> OmegaFile:
        with writing(self.target):
            self.file = self.aside.open("wb")
            about = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
                "fortran_order": False,
            }
            np.lib.format.write_array_header_1_0(self.file, about | {"shape": self.shape})
        return self

    def keep(self, omega: list[Tensor]) -> None:
        """The next row."""
        with writing(self.target):
            self.file.write(torch.cat([w.flatten() for w in omega]).float().cpu().numpy().data)

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with writing(self.target), self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    rename(self.aside, self.target)
        finally:
            self.aside.unlink(missing_ok=True)


MODES = {"normal": normal, "critical": critical, "sampling": sampling}
