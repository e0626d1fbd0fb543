"""The two studies: every function under every noise, and every descent, with a line for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from fastsmooth.messages import say
from fastsmooth.smooth.graduated import DESCENTS, LANDSCAPES, SCHEDULES, Descent, descend, starts
from fastsmooth.smooth.noises import NOISES, Noise
from fastsmooth.smooth.smoothing import (
    BLOCK,
    REACH,
    Smoothed,
    smooth_drop_wave,
    smooth_drop_wave_2d,
    smooth_rastrigin,
    smooth_rastrigin_2d,
)
from fastsmooth.terminal import Table, columns


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    out: Path = Path("smooth")
    parts: tuple[str, ...] = ("smoothing", "graduated")
    seed: int = 0
    noise: tuple[str, ...] = tuple(NOISES)
    delta: tuple[float, ...] = (0.05, 0.2, 0.5)
    centred: bool = False
    dim: int = 1
    points: int = 1001
    samples: int = 4096
    functions: tuple[str, ...] = tuple(LANDSCAPES)
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    dim_ego: int = 50
    rounds: int = 50
    steps: int = 20
    draws: int = 100
    delta_first: float = 1.0
    delta_last: float = 0.01
    seeds: int = 10

    @property
    def grid(self) -> ndarray:
        return np.linspace(-REACH, REACH, self.points)


@dataclass(frozen=True)
class Curve:
    """f_delta of one function under one noise."""

    function: str
    noise: str
    delta: float
    smoothed: Smoothed


def smoothing(r: Request) -> Iterator[Curve]:
    """Every function under every noise at every delta, each with a line on stdout where there is
    something to say."""
    for name in r.noise:
        noise = NOISES[name]
        if r.centred and noise.mean is None:
            say(f"{name}: skipped, since it has no mean that --centred could remove")
            continue
        shift = noise.mean if r.centred else 0.0
        for function, delta in ((f, d) for f in ("rastrigin", "drop_wave") for d in r.delta):
            curve = Curve(function, name, delta, smooth(r, function, delta, noise, shift))
            say(line_of(curve, r))
            yield curve


def smooth(r: Request, function: str, delta: float, noise: Noise, shift: float) -> Smoothed:
    if r.dim == 1:
        return {"rastrigin": smooth_rastrigin, "drop_wave": smooth_drop_wave}[function](
            r.grid, delta, noise, shift
        )
    if function == "rastrigin":
        return smooth_rastrigin_2d(r.grid, delta, noise, shift)
    return smooth_drop_wave_2d(r.grid, delta, noise, shift, r.samples, r.seed)


def minimum(curve: Curve, r: Request) -> tuple[list[float], float] | None:
    """(x, f_delta(x)) where f_delta is least on the grid; None where it is undefined."""
    values = curve.smoothed.values
    if values is None:
        return None
    place = np.unravel_index(values.argmin(), values.shape)
    return [float(r.grid[i]) for i in place], float(values.min())


def line_of(curve: Curve, r: Request) -> str:
    least, s = minimum(curve, r), curve.smoothed
    words = f"{curve.function:<9}  {curve.noise:<11}  delta {curve.delta:<6g}  "
    if least is None:
        return words + s.method
    place = ", ".join(f"{x:g}" for x in least[0])
    return (
        words
        + f"least {least[1]:.6g} at {place}; {s.method}"
        + (f", error {s.error:.1g}" if s.error else "")
    )


def entry_of(curve: Curve, r: Request) -> dict[str, Any]:
    """For smooth.json. `error`: see Smoothed; 0 for a closed form, which float64 alone rounds."""
    least, s = minimum(curve, r), curve.smoothed
    return {
        "function": curve.function,
        "noise": curve.noise,
        "tails": NOISES[curve.noise].tails,
        "law": NOISES[curve.noise].law,
        "delta": curve.delta,
        "method": s.method,
        "error": s.error,
        "minimiser": None if least is None else least[0],
        "minimum": None if least is None else least[1],
        "values": None if s.values is None else s.values.tolist(),
    }


LAYOUT = {  # of the table that graduated() prints
    "function": "<10",
    "schedule": "<8",
    "method": "<9",
    "mean last": ">12",
    "sd last": ">10",
    "mean best": ">12",
    "sd best": ">10",
    "n": ">4",
}


def graduated(r: Request) -> Iterator[Descent]:
    """Every function by every schedule and method, from the same starts, each with a line of the
    table on stdout."""
    table = Table(LAYOUT, least_first=("sd best", "n", "mean best", "sd last"))
    say(table.heading(columns(sys.stdout)))
    for function in r.functions:
        for schedule in r.schedules:
            for method in DESCENTS:
                found = Descent(
                    function, schedule, method, all_seeds(r, function, schedule, method)
                )
                numbers = [*mean_and_sd(found.values[-1]), *mean_and_sd(found.best)]
                say(
                    table.row(
                        [function, schedule, method, *numbers, f"{r.seeds}"], columns(sys.stdout)
                    )
                )
                yield found


def mean_and_sd(values: Tensor) -> tuple[str, str]:
    """Two cells of the table over `values` [seeds]."""
    return f"{values.mean().item():.6g}", f"{values.std().item():.4g}" if len(values) > 1 else "-"


def all_seeds(r: Request, function: str, schedule: str, method: str) -> Tensor:
    """f [rounds, seeds], some seeds at a time so that memory is bounded."""
    f, deltas = LANDSCAPES[function], SCHEDULES[schedule](r.delta_first, r.delta_last, r.rounds)
    together = max(1, BLOCK // (r.draws * r.dim_ego))
    found = []
    for first in range(r.seed, r.seed + r.seeds, together):
        seeds = range(first, min(first + together, r.seed + r.seeds))
        perturb = DESCENTS[method](r.dim_ego, r.draws, seeds)
        found.append(descend(f, starts(f, r.dim_ego, seeds), deltas, r.steps, perturb))
    return torch.cat(found, dim=1)
