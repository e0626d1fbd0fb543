"""What a command line of fastsmooth.smooth asks for, and what is refused of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.objectives import OBJECTIVES, SCHEDULES
from fastsmooth.smooth.smoothing import REACH

FIGURES, KINDS = ("light", "heavy", "graduated"), (".svg", ".pdf")
# Flags that change one part alone.
PART_OF = {
    "smoothing": ("noise", "delta", "centred", "dim", "points", "samples"),
    "graduated": (
        *("functions", "schedules", "dim_ego", "rounds", "steps", "draws"),
        *("delta_first", "delta_last", "seeds"),
    ),
}


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
    functions: tuple[str, ...] = tuple(OBJECTIVES)
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


def check(r: Request, given: dict[str, Any]) -> None:
    """Refuse flags that would change nothing, and what cannot be computed."""
    for part, names in PART_OF.items():
        idle = next((name for name in names if name in given and part not in r.parts), None)
        if idle:
            raise ConfigError(
                f"{flag(idle)} has no effect without the part {part}: add it to --parts"
            )
    if r.dim == 1 and "samples" in given:
        raise ConfigError(
            "--samples has no effect with --dim 1, whose curves need no draws: add --dim 2"
        )
    if r.dim == 2 and r.points > 500:
        raise ConfigError(f"--points {r.points} is too many for --dim 2: give at most 500")
    if r.centred and all(NOISES[name].mean is None for name in r.noise):
        raise ConfigError(
            f"--centred: {' and '.join(r.noise)} noise has no mean that could be removed: leave "
            "it out"
        )
    if r.rounds == 1 and r.delta_first != r.delta_last and "graduated" in r.parts:
        raise ConfigError(
            "--rounds 1 has one delta: give --delta-first and --delta-last the same value"
        )
    if r.delta_last > r.delta_first:
        raise ConfigError(
            f"--delta-last {r.delta_last:g} exceeds --delta-first {r.delta_first:g}: delta falls"
        )


def check_unused(out: Path) -> None:
    """Refuse a folder that has results: its figures and numbers would be of two commands."""
    names = ["smooth.json", *(stem + kind for stem in FIGURES for kind in KINDS)]
    there = [name for name in names if (out / name).exists()]
    if there:
        raise ConfigError(
            f"--out {out} has {' '.join(there)} already: choose another folder, or move them"
        )
