"""The two studies: every function under every noise, and every descent, with a line for each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmooth.figures import NO_PDF, pdf
from fastsmooth.messages import note, say
from fastsmooth.processors import keep_within_quota
from fastsmooth.runfolder.files import finite, replace
from fastsmooth.smooth.figures import draw_graduated, draw_smoothing
from fastsmooth.smooth.graduated import DESCENTS, Descent, descend, one_thread, starts
from fastsmooth.smooth.noises import NOISES, Noise
from fastsmooth.smooth.objectives import OBJECTIVES, SCHEDULES
from fastsmooth.smooth.request import Request
from fastsmooth.smooth.smoothing import (
    BLOCK,
    Case,
    Smoothed,
    smooth_drop_wave,
    smooth_drop_wave_2d,
    smooth_rastrigin,
    smooth_rastrigin_2d,
)
from fastsmooth.terminal import Table, columns


def smoothing(r: Request) -> Iterator[Case]:
    """Every function under every noise at every delta, each with a line on stdout where there is
    something to say."""
    for name in r.noise:
        noise = NOISES[name]
        shift = noise.mean if r.centred else 0.0
        if shift is None:
            say(f"{name}: skipped, since it has no mean that --centred could remove")
            continue
        for function, delta in ((f, d) for f in ("rastrigin", "drop_wave") for d in r.delta):
            case = Case(function, name, delta, smooth(r, function, delta, noise, shift))
            say(line_of(case, r))
            yield case


def smooth(r: Request, function: str, delta: float, noise: Noise, shift: float) -> Smoothed:
    if r.dim == 1:
        return {"rastrigin": smooth_rastrigin, "drop_wave": smooth_drop_wave}[function](
            r.grid, delta, noise, shift
        )
    if function == "rastrigin":
        return smooth_rastrigin_2d(r.grid, delta, noise, shift)
    return smooth_drop_wave_2d(r.grid, delta, noise, shift, r.samples, r.seed)


def minimum(case: Case, r: Request) -> tuple[list[float], float] | None:
    """(x, f_delta(x)) where f_delta is least on the grid; None where it is undefined."""
    values = case.smoothed.values
    if values is None:
        return None
    place = np.unravel_index(values.argmin(), values.shape)
    return [float(r.grid[i]) for i in place], float(values.min())


def line_of(case: Case, r: Request) -> str:
    least, s = minimum(case, r), case.smoothed
    words = f"{case.function:<9}  {case.noise:<11}  delta {case.delta:<6g}  "
    if least is None:
        return words + s.method
    place = ", ".join(f"{x:g}" for x in least[0])
    return (
        words
        + f"least {least[1]:.6g} at {place}; {s.method}"
        + (f", error {s.error:.1g}" if s.error else "")
    )


def entry_of(case: Case, r: Request) -> dict[str, Any]:
    """For smooth.json. `error`: see Smoothed; 0 for a closed form, which float64 alone rounds."""
    least, s = minimum(case, r), case.smoothed
    return {
        "function": case.function,
        "noise": case.noise,
        "tails": NOISES[case.noise].tails,
        "law": NOISES[case.noise].law,
        "delta": case.delta,
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
                values = all_seeds(r, function, schedule, method)
                descent = Descent(function, schedule, method, values)
                numbers = [*mean_and_sd(values[-1]), *mean_and_sd(descent.best)]
                cells = [function, schedule, method, *numbers, f"{r.seeds}"]
                say(table.row(cells, columns(sys.stdout)))
                yield descent


def mean_and_sd(values: Tensor) -> tuple[str, str]:
    """Two cells of the table over `values` [seeds]."""
    return f"{values.mean().item():.6g}", f"{values.std().item():.4g}" if len(values) > 1 else "-"


def all_seeds(r: Request, function: str, schedule: str, method: str) -> Tensor:
    """f [rounds, seeds], some seeds at a time so that memory is bounded."""
    f, deltas = OBJECTIVES[function], SCHEDULES[schedule](r.delta_first, r.delta_last, r.rounds)
    together = max(1, BLOCK // (r.draws * r.dim_ego))
    values = []
    for first in range(r.seed, r.seed + r.seeds, together):
        seeds = range(first, min(first + together, r.seed + r.seeds))
        perturb = DESCENTS[method](r.dim_ego, r.draws, seeds)
        values.append(descend(f, starts(f, r.dim_ego, seeds), deltas, r.steps, perturb))
    return torch.cat(values, dim=1)


def run(r: Request, command: str) -> None:
    """Both parts, each drawn when it is done; smooth.json, which has `command`, last."""
    keep_within_quota(torch)
    settings = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)} | {"out": str(r.out)}
    result: dict[str, Any] = {"command": command, "settings": settings}
    if "smoothing" in r.parts:
        cases = list(smoothing(r))
        draw_smoothing(r, cases)
        curves = [entry_of(case, r) for case in cases]
        result["smoothing"] = {"x": r.grid.tolist(), "curves": curves}
    if "graduated" in r.parts:
        with one_thread():
            descents = list(graduated(r))
        draw_graduated(r, descents)
        deltas = {
            name: SCHEDULES[name](r.delta_first, r.delta_last, r.rounds) for name in r.schedules
        }
        result["graduated"] = {"deltas": deltas, "results": [d.summary() for d in descents]}
    text = json.dumps(finite(result)[0], allow_nan=False)
    replace(r.out / "smooth.json", text.encode() + b"\n")
    if not pdf.available():
        note(NO_PDF)
    say(f"{r.out}: {' '.join(sorted(path.name for path in r.out.iterdir()))}")
