"""Explicit graduated optimization beside the published loop: python -m benchmarks.bench_smooth
[--quick]

Case graduated/rastrigin/D50 is one optimizer step, from one start: the mean over 100 perturbations
of the central-difference gradient of Rastrigin's function in 50 dimensions, in float64. Variants:

    ours    fastsmooth/smooth/graduated.py: all values of f from the terms of coordinates
    loop    the published algorithm: for each perturbation, for each coordinate, two calls of a
            numpy function of the vector

Claim: a step is at least 50 times as fast, and short runs of both end at the same values but for
the noise of their draws.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.timing import Variant
from fastsmooth.smooth import graduated
from fastsmooth.smooth.objectives import OBJECTIVES, STEP, nice

TESTS = ("test_smooth.py",)
FUNCTION = OBJECTIVES["rastrigin"]


@dataclass(frozen=True)
class Case:
    """`runs` short runs of each, of `rounds` rounds with `run_steps` steps; a window has `steps`
    steps of the loop."""

    dim: int = 50
    draws: int = 100
    steps: int = 4
    rounds: int = 8
    budget: float = 60.0  # seconds for all windows
    runs: int = 8
    run_rounds: int = 4
    run_steps: int = 5

    @property
    def name(self) -> str:
        return f"graduated/rastrigin/D{self.dim}"


CASES = (Case(),)
QUICK = (Case(dim=6, draws=5, steps=2, rounds=2, budget=0.0, runs=2, run_rounds=2, run_steps=2),)
OURS_STEPS = 50  # times the steps of a window, which are that much shorter


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = timing.arguments(
        "Explicit graduated optimization beside the published loop."
    ).parse_args(argv)
    report = timing.Report("bench_smooth", argv, args.json, args.out)
    cases = QUICK if args.quick else CASES
    return timing.run_cases(report, args.quick, TESTS, cases, lambda case: bench(case, report))


def bench(case: Case, report: timing.Report) -> None:
    variants = [
        Variant("ours", Ours, (case,), case.steps * OURS_STEPS),
        Variant("loop", Loop, (case,)),
    ]
    found = timing.measure(variants, case.steps, case.rounds, budget=case.budget, say=report.say)
    timing.require_measured(case.name, found, {"ours", "loop"})
    result = timing.rows("bench_smooth", case.name, found, "loop", 1)
    about = {
        "speedup": timing.rounded(found["loop"].seconds() / found["ours"].seconds())
    } | statistics(case)
    for line in [case.name, *timing.table(result, "steps", found), *describe(about)]:
        report.say(line)
    report.add(case.name, result, about)


class Ours:
    """One call is one step at delta 1."""

    def __init__(self, case: Case):
        torch.set_num_threads(1)  # as fastsmooth.smooth does it
        self.x = graduated.starts(FUNCTION, case.dim, [0])
        self.perturb = graduated.normal(case.dim, case.draws, [0])

    def __call__(self) -> None:
        graduated.descend(FUNCTION, self.x, [1.0], 1, self.perturb)


class Loop:
    """One call is one step at delta 1 and the value after it, as in Ours."""

    def __init__(self, case: Case):
        self.case, self.random = case, np.random.default_rng(0)
        self.x = graduated.starts(FUNCTION, case.dim, [0])[0].numpy()

    def __call__(self) -> None:
        loop_run(self.x, [1.0], 1, self.case.draws, self.random)


def rastrigin(x: np.ndarray) -> float:
    return np.sum(x**2 - 10 * np.cos(2 * np.pi * x)) + 10 * len(x)


def differences(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """The central-difference gradient [D], by two values of f a coordinate."""
    gradient = np.zeros_like(x)
    for i in range(len(x)):
        behind, ahead = x.copy(), x.copy()
        behind[i] -= STEP
        ahead[i] += STEP
        gradient[i] = (f(ahead) - f(behind)) / (2 * STEP)
    return gradient


def loop_run(
    x: np.ndarray, deltas: Iterable[float], steps: int, draws: int, random: np.random.Generator
) -> float:
    """f at the end of a graduated optimization from x [D]."""
    for delta in deltas:
        for _ in range(steps):
            total = np.zeros_like(x)
            for _ in range(draws):
                total += differences(rastrigin, x + delta * random.standard_normal(x.shape))
            x = x - FUNCTION.lr * delta * total / draws
    return float(rastrigin(x))


# Whether both end at the same values


def statistics(case: Case) -> dict[str, Any]:
    """The last values of short runs from the same starts with draws of their own, and their
    difference in pairs."""
    seeds = range(1, case.runs + 1)
    deltas = nice(1.0, 0.01, case.run_rounds)
    start = graduated.starts(FUNCTION, case.dim, seeds)
    perturb = graduated.normal(case.dim, case.draws, seeds)
    ours = graduated.descend(FUNCTION, start, deltas, case.run_steps, perturb)[-1].tolist()
    loop = [
        loop_run(x, deltas, case.run_steps, case.draws, np.random.default_rng(seed))
        for seed, x in zip(seeds, start.numpy(), strict=True)
    ]
    apart = [a - b for a, b in zip(ours, loop, strict=True)]
    return {
        "last_value": {"ours": summary(ours), "loop": summary(loop), "n": case.runs},
        "difference": mean(apart),
        "difference_error": stdev(apart) / math.sqrt(case.runs),
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values)}


def describe(about: dict[str, Any]) -> list[str]:
    ours, loop = (about["last_value"][name] for name in ("ours", "loop"))
    return [
        f"  a step of ours is {about['speedup']:g} times as fast as the loop's",
        f"  last value of {about['last_value']['n']} short runs: ours {ours['mean']:.4g} (sd "
        f"{ours['sd']:.3g}), loop {loop['mean']:.4g} (sd {loop['sd']:.3g}); difference from the "
        f"same starts {about['difference']:.3g} +- {about['difference_error']:.2g}",
    ]


if __name__ == "__main__":
    sys.exit(main())
