"""Explicit smoothing and explicit graduated optimization of known functions: python -m fastsmooth.smooth [flags]

Smoothing: f_delta(x) = E_u[f(x - delta u)] of Rastrigin's function and of the drop-wave, for noise u with light and with
heavy tails (SPEC B.9). Curves come from closed forms and from quadrature over frequencies, each with its error; the
published demo drew fresh noise at every x, and shifted the Levy distribution by mistake (SPEC C.35).

Graduated: gradient descent on f_delta while delta falls, in many dimensions, beside the same descent without noise
(arXiv 2412.11501, SPEC A.6 and B.5). Writes figures and smooth.json.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Generator, Tensor

from fastsmooth import config as configs
from fastsmooth.config import ConfigError
from fastsmooth.files import replace
from fastsmooth.log import RunFolderError, refusing
from fastsmooth.messages import DONE, command, end_with, exit_code, say, show
from fastsmooth.processors import keep_within_quota
from fastsmooth.terminal import Table, columns

FIGURES, KINDS = ("light", "heavy", "graduated"), (".svg", ".pdf")
REACH = 5.0  # x is in [-REACH, REACH], in every coordinate
TOLERANCE, MAX_NODES = 1e-10, 1 << 14  # of quadrature: what doubling the nodes may change, and when to give up
BLOCK = 1 << 20  # values that are held at a time, so that memory is bounded
STEP = 1e-5  # of central differences: rounding and curvature both err by some 1e-8 of Rastrigin's gradient; published: 1e-8


# The noise u: its characteristic function E exp(i t u), mean, variance and a sampler ----------------------------------


@dataclass(frozen=True)
class Noise:
    """`characteristic` takes t > 0 [k]; `mean` and `variance` are None where they do not exist or are infinite.

    The scales are those of the published demo (SPEC B.9). E||u|| exceeds 1 under several laws, so that equal deltas of two
    laws are not equal degrees of smoothing in the papers' sense (SPEC A.3).
    """

    tails: str  # light or heavy
    law: str
    characteristic: Callable[[ndarray], ndarray]
    draw: Callable[[np.random.Generator, tuple[int, ...]], ndarray]
    mean: float | None = None
    variance: float | None = None


def dawson(x: ndarray) -> ndarray:
    """exp(-x^2) times the integral of exp(s^2) from 0 to x, as a sum over odd n (Rybicki 1989); the error is below 1e-16."""
    h = 0.2  # the error is exp(-(pi / 2h)^2)
    n = np.arange(1, 2 * math.ceil((np.max(np.abs(x)) + 7) / h / 2) + 1, 2)
    away = np.exp(-((x[:, None] - h * n) ** 2)) - np.exp(-((x[:, None] + h * n) ** 2))
    return (away / n).sum(axis=1) / math.sqrt(math.pi)


def rayleigh(t: ndarray) -> ndarray:
    normal = np.exp(-(t**2) / 2)
    return 1 - math.sqrt(2) * t * dawson(t / math.sqrt(2)) + 1j * math.sqrt(math.pi / 2) * t * normal


def pareto(t: ndarray) -> ndarray:
    """The exponential integral E_2(-it): its series near 0, elsewhere its continued fraction (DLMF 6.6.2, 8.9.2)."""
    z, near = -1j * t, t < 2
    series, term = -np.euler_gamma - np.log(z), np.ones_like(z)
    for k in range(1, 40):
        term = term * np.where(near, -z, 0) / k
        series = series - term / k
    fraction = np.zeros_like(z)
    for k in range(120, 0, -1):
        fraction = k * (k + 1) / (z + 2 + 2 * k - fraction)
    return np.where(near, np.exp(-z) - z * series, np.exp(-z) / (z + 2 - fraction))


NOISES: dict[str, Noise] = {
    "normal": Noise("light", "N(0, 1)", lambda t: np.exp(-(t**2) / 2), lambda g, n: g.normal(size=n), 0.0, 1.0),
    "uniform": Noise(
        "light", "U(-2, 2)", lambda t: np.sinc(2 * t / np.pi), lambda g, n: g.uniform(-2, 2, n), 0.0, 4 / 3
    ),
    "exponential": Noise(
        "light", "exponential of mean 1.5", lambda t: 1 / (1 - 1.5j * t), lambda g, n: g.exponential(1.5, n), 1.5, 2.25
    ),
    "rayleigh": Noise(
        "light",
        "Rayleigh of scale 1",
        rayleigh,
        lambda g, n: g.rayleigh(1.0, n),
        math.sqrt(math.pi / 2),
        2 - math.pi / 2,
    ),
    "pareto": Noise("heavy", "Pareto of index 1 from 1 on", pareto, lambda g, n: g.pareto(1.0, n) + 1),
    "cauchy": Noise("heavy", "standard Cauchy", lambda t: np.exp(-t), lambda g, n: g.standard_cauchy(n)),
    "levy": Noise("heavy", "standard Levy", lambda t: np.exp(-np.sqrt(-2j * t)), lambda g, n: g.normal(size=n) ** -2.0),
}


# f_delta --------------------------------------------------------------------------------------------------------------


def rastrigin(x: ndarray) -> ndarray:
    return x**2 - 10 * np.cos(2 * np.pi * x) + 10


def drop_wave(r: ndarray) -> ndarray:
    return -(1 + np.cos(12 * np.pi * r)) / (2 + 0.5 * r**2)


@dataclass(frozen=True)
class Smoothed:
    """f_delta at every x: [n], or [n, n] in two dimensions. `values` is None where the expectation does not exist."""

    values: ndarray | None
    method: str
    error: float | None  # the largest over x: of quadrature an estimate, of draws the standard error


def smooth_rastrigin(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """(x - delta m)^2 + delta^2 v - 10 E cos(2 pi (x - delta u)) + 10 with the mean m and the variance v of u - shift."""
    if delta == 0:
        return Smoothed(rastrigin(x), "f itself", 0.0)
    if noise.mean is None or noise.variance is None:
        return Smoothed(None, "undefined: the second moment of u is infinite", None)
    x = x + delta * shift
    wave = np.exp(2j * np.pi * x) * noise.characteristic(np.array([2 * np.pi * delta])).conj()
    square = (x - delta * noise.mean) ** 2 + delta**2 * noise.variance
    return Smoothed(square - 10 * wave.real + 10, "closed form", 0.0)


def smooth_drop_wave(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """By quadrature over frequencies, with more nodes until twice as many change nothing.

    1 / (4 + y^2) is the integral of exp(iky - 2|k|) / 4 over all k, so that f_delta is one of exp(ikx) times the
    characteristic function of u at -delta k. It decays like exp(-2k) for every noise: a heavy tail costs nothing.
    """
    if delta == 0:
        return Smoothed(drop_wave(x), "f itself", 0.0)
    nodes, before = 128, None
    while True:
        values = over_frequencies(x + delta * shift, delta, noise, nodes)
        error = math.inf if before is None else float(np.abs(values - before).max())
        if error <= TOLERANCE or nodes >= MAX_NODES:
            return Smoothed(values, f"quadrature, {nodes} nodes", error)
        nodes, before = 2 * nodes, values


def over_frequencies(x: ndarray, delta: float, noise: Noise, nodes: int) -> ndarray:
    """-1/2 Re of the integral over k > 0 of exp(-2k) (2 p(k) + p(w + k) + p(w - k)), p(k) = exp(ikx) E exp(-ik delta u).

    w = 12 pi is the drop-wave's frequency. k = s^2 smooths the root at 0 in Levy's characteristic function, and at
    k = 18 the factor exp(-2k) is 2e-16.
    """
    at, weight = np.polynomial.legendre.leggauss(min(nodes, 64))  # in panels: many nodes at once are slow to find
    panels = nodes // len(at)
    end = math.sqrt(18)
    s = ((at + 1) / 2 + np.arange(panels)[:, None]).ravel() * end / panels
    weight = np.tile(weight, panels) * end / panels / 2 * 2 * s * np.exp(-2 * s**2)
    total = np.zeros(len(x))
    w = 12 * np.pi
    for factor, k in ((2, s**2), (1, w + s**2), (1, w - s**2)):
        amplitude = factor * weight * noise.characteristic(delta * k).conj()
        for part in np.array_split(np.arange(len(k)), -(-len(k) * len(x) // BLOCK)):
            total += (np.exp(1j * np.outer(x, k[part])) @ amplitude[part]).real
    return -total / 2


def smooth_rastrigin_2d(x: ndarray, delta: float, noise: Noise, shift: float) -> Smoothed:
    """The sum over two coordinates, with independent noise in each."""
    one = smooth_rastrigin(x, delta, noise, shift)
    return one if one.values is None else Smoothed(one.values[:, None] + one.values, one.method, one.error)


def smooth_drop_wave_2d(x: ndarray, delta: float, noise: Noise, shift: float, samples: int, seed: int) -> Smoothed:
    """The drop-wave of the radius by `samples` draws of u [2], the same at every x, so that surfaces are smooth."""
    if delta == 0:
        return Smoothed(drop_wave(np.hypot(x[:, None], x)), "f itself", 0.0)
    u = noise.draw(np.random.default_rng(seed), (samples, 2)) - shift
    total, squares = np.zeros((2, len(x), len(x)))
    for part in np.array_split(u, -(-samples * len(x) ** 2 // BLOCK)):
        a, b = (x[:, None] - delta * part[:, i] for i in (0, 1))
        found = drop_wave(np.hypot(a[:, None], b))
        total += found.sum(axis=2)
        squares += (found**2).sum(axis=2)
    mean = total / samples
    error = np.sqrt(np.maximum(squares / samples - mean**2, 0) / (samples - 1))
    return Smoothed(mean, f"{samples} common draws", float(error.max()))


# Functions of many coordinates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """How the terms [..., D] of the coordinates become one number, and that number without the term of each."""

    all: Callable[[Tensor], Tensor]  # [..., D] to [...]
    others: Callable[[Tensor], Tensor]  # [..., D] to [..., D]
    put: Callable[[Tensor, Tensor], Tensor]  # others and a term to the number with that term


SUM = Join(lambda t: t.sum(-1), lambda t: t.sum(-1, keepdim=True) - t, torch.add)
# no factor is 0: cos is 0 at odd multiples of pi / 2, none of which is a float64
PRODUCT = Join(lambda t: t.prod(-1), lambda t: t.prod(-1, keepdim=True) / t, torch.mul)


@dataclass(frozen=True)
class Landscape:
    """f(x) = value(D, numbers joined from per-coordinate terms of x [..., D]); its least value is 0.

    `lr` is l0, the learning rate at delta 1 (SPEC B.5). Starts are uniform in [-reach, reach], as published.
    """

    lr: float
    reach: float
    terms: Callable[[Tensor], tuple[Tensor, ...]]
    value: Callable[..., Tensor]
    joins: tuple[Join, ...] = (SUM,)

    def __call__(self, x: Tensor) -> Tensor:
        """f [...] at x [..., D]."""
        return self.value(x.shape[-1], *(join.all(t) for join, t in zip(self.joins, self.terms(x), strict=True)))

    def gradient(self, x: Tensor) -> Tensor:
        """The central differences [..., D] of f at x [..., D].

        Moving one coordinate changes one term of each number, so that all 2 D values of f cost what two do.
        """
        others = [join.others(t) for join, t in zip(self.joins, self.terms(x), strict=True)]
        return (self._moved(x, others, STEP) - self._moved(x, others, -STEP)) / (2 * STEP)

    def _moved(self, x: Tensor, others: list[Tensor], step: float) -> Tensor:
        """f where coordinate i alone is moved, for every i: [..., D]."""
        terms = self.terms(x + step)
        return self.value(x.shape[-1], *(j.put(o, t) for j, o, t in zip(self.joins, others, terms, strict=True)))


def griewank_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    roots = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype).sqrt()
    return x.square() / 4000, (x / roots).cos()


LANDSCAPES: dict[str, Landscape] = {
    "rastrigin": Landscape(
        0.01, 5.12, lambda x: (x.square() - 10 * (2 * math.pi * x).cos(),), lambda n, total: total + 10 * n
    ),
    "ackley": Landscape(
        10,
        32.768,
        lambda x: (x.square(), (2 * math.pi * x).cos()),
        lambda n, squares, waves: 20 + math.e - 20 * (-0.2 * (squares / n).sqrt()).exp() - (waves / n).exp(),
        (SUM, SUM),
    ),
    # with 12 r and raised by 1, as is usual in many dimensions; the curves above have 12 pi x (SPEC B.9)
    "drop_wave": Landscape(
        0.1, 5.12, lambda x: (x.square(),), lambda n, r2: 1 - (1 + (12 * r2.clamp_min(0).sqrt()).cos()) / (2 + 0.5 * r2)
    ),
    "schwefel": Landscape(
        10, 500, lambda x: (x * x.abs().sqrt().sin(),), lambda n, total: 418.9828872724337 * n - total
    ),
    "griewank": Landscape(50, 100, griewank_terms, lambda n, total, product: total - product + 1, (SUM, PRODUCT)),
}


# Graduated optimization -----------------------------------------------------------------------------------------------


def nice(first: float, last: float, rounds: int) -> list[float]:
    """The optimal decay of power 1 (SPEC A.6), counted from round 1 and ending at `last` instead of 0: a straight line."""
    return [first + (last - first) * m / max(rounds - 1, 1) for m in range(rounds)]


def geo(first: float, last: float, rounds: int) -> list[float]:
    return [first * (last / first) ** (m / max(rounds - 1, 1)) for m in range(rounds)]


SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {"nice": nice, "geo": geo}
Perturb = Callable[[], Tensor]  # [seeds, draws, D], anew at every call


def descend(f: Landscape, x: Tensor, deltas: Iterable[float], steps: int, perturb: Perturb) -> Tensor:
    """f [rounds, seeds] after each round of graduated optimization from x [seeds, D].

    A step moves x by -lr delta times the mean over draws of the gradient at x + delta * perturbation.
    """
    values = []
    for delta in deltas:
        for _ in range(steps):
            x = x - f.lr * delta * f.gradient(x[:, None] + delta * perturb()).mean(dim=1)
        values.append(f(x))
    return torch.stack(values)


def starts(f: Landscape, dim: int, seeds: Iterable[int]) -> Tensor:
    """[seeds, dim]; a seed's start does not depend on the other seeds."""
    unit = [torch.rand(dim, generator=Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return f.reach * (2 * torch.stack(unit) - 1)


def normal(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """Standard normal perturbations; those of a seed do not depend on the other seeds."""
    generators = [Generator().manual_seed(2**32 + s) for s in seeds]
    return lambda: torch.stack([torch.randn(draws, dim, generator=g, dtype=torch.float64) for g in generators])


def nothing(dim: int, draws: int, seeds: Iterable[int]) -> Perturb:
    """No perturbation: plain gradient descent, with the learning rates of the schedule."""
    zeros = torch.zeros(len(list(seeds)), 1, dim, dtype=torch.float64)
    return lambda: zeros


METHODS: dict[str, Callable[[int, int, Iterable[int]], Perturb]] = {"graduated": normal, "plain": nothing}


@dataclass(frozen=True)
class Descent:
    """One cell of the table. `values` is f at the end of every round, [rounds, seeds]."""

    function: str
    schedule: str
    method: str
    values: Tensor

    @property
    def best(self) -> Tensor:
        """The least value at the end of a round, one a seed."""
        return self.values.min(dim=0).values

    def summary(self) -> dict[str, Any]:
        """For smooth.json. A value that is not finite is null."""
        sd = self.values.std(dim=1).tolist() if len(self.best) > 1 else [None] * len(self.values)
        return {
            "function": self.function,
            "schedule": self.schedule,
            "method": self.method,
            "mean_best": self.best.mean().item(),
            "sd_best": self.best.std().item() if len(self.best) > 1 else None,
            "mean_last": self.values[-1].mean().item(),
            "sd_last": sd[-1],
            "n": len(self.best),
            "best": self.best.tolist(),
            "mean_by_round": self.values.mean(dim=1).tolist(),
            "sd_by_round": sd,
        }


# The command line -----------------------------------------------------------------------------------------------------


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


PART_OF = {  # flags that change one part alone
    "smoothing": ("noise", "delta", "centred", "dim", "points", "samples"),
    "graduated": (
        "functions",
        "schedules",
        "dim_ego",
        "rounds",
        "steps",
        "draws",
        "delta_first",
        "delta_last",
        "seeds",
    ),
}


def parser() -> configs.Parser:
    p = configs.Parser(
        prog=command("smooth"),
        usage="%(prog)s [flags]",
        description="Smoothed functions and explicit graduated optimization, as figures and smooth.json.",
        argument_default=SUPPRESS,
        add_help=False,
    )
    d, whole, positive = Request(), configs.whole, configs.real(0, open_low=True)
    # fmt: off
    add = p.add_argument
    add("--out", type=configs.text, metavar="DIR", help="folder of the figures and of smooth.json (smooth)")
    add("--parts", nargs="+", choices=d.parts, metavar="PART", help="smoothing graduated (both)")
    add("--seed", type=whole(0, 2**31), metavar="N", help="of draws, starts and perturbations (0)")
    add("-h", "--help", action="store_true", help="this page")
    add = p.add_argument_group("smoothing").add_argument
    add("--noise", nargs="+", choices=NOISES, metavar="NAME", help=f"{'; '.join(f'{name}: {n.law}' for name, n in NOISES.items())} (all)")
    add("--delta", nargs="+", type=configs.real(0, 100), metavar="X", help="degrees of smoothing; 0 is f itself (0.05 0.2 0.5)")
    add("--centred", action="store_true", help="noise without its mean, so that minima do not shift; noise without a mean is skipped")
    add("--dim", type=whole(1, 2), metavar="N", help="1, or 2: Rastrigin summed over coordinates, the drop-wave of the radius (1)")
    add("--points", type=whole(2, 10_000), metavar="N", help="values of x in [-5, 5], in every coordinate (1001; 61 with --dim 2)")
    add("--samples", type=whole(2, 10**6), metavar="N", help="draws of u for the drop-wave with --dim 2 (4096)")
    add = p.add_argument_group("graduated").add_argument
    add("--functions", nargs="+", choices=LANDSCAPES, metavar="NAME", help=f"{' '.join(LANDSCAPES)} (all)")
    add("--schedules", nargs="+", choices=SCHEDULES, metavar="NAME", help="of delta: nice geo (both)")
    add("--dim-ego", type=whole(1, 1000), metavar="D", help=f"coordinates ({d.dim_ego})")
    add("--rounds", type=whole(1, 10**6), metavar="M", help=f"values of delta ({d.rounds})")
    add("--steps", type=whole(1, 10**6), metavar="N", help=f"of descent at every delta ({d.steps})")
    add("--draws", type=whole(1, 1000), metavar="N", help=f"perturbations a step ({d.draws})")
    add("--delta-first", type=positive, metavar="X", help=f"of the first round ({d.delta_first:g})")
    add("--delta-last", type=positive, metavar="X", help=f"of the last round ({d.delta_last:g})")
    add("--seeds", type=whole(1, 10_000), metavar="N", help=f"starts, with perturbations of their own ({d.seeds})")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    given = vars(parser().parse_args([configs.plain(word) for word in argv]))
    if given.pop("help", False):
        return None
    for name, value in given.items():
        if isinstance(value, list):
            if len(set(value)) < len(value):
                raise ConfigError(f"{flag(name)} names a value more than once: give every value once")
            given[name] = tuple(value)
    if given.get("dim") == 2:
        given.setdefault("points", 61)
    if "out" in given:
        given["out"] = Path(given["out"])
    request = Request(**given)
    check(request, given)
    return request


def check(r: Request, given: dict[str, Any]) -> None:
    """Refuse flags that would change nothing, and what cannot be computed."""
    for part, names in PART_OF.items():
        idle = next((name for name in names if name in given and part not in r.parts), None)
        if idle:
            raise ConfigError(f"{flag(idle)} has no effect without the part {part}: add it to --parts")
    if r.dim == 1 and "samples" in given:
        raise ConfigError("--samples has no effect with --dim 1, whose curves need no draws: add --dim 2")
    if r.dim == 2 and r.points > 500:
        raise ConfigError(f"--points {r.points} is too many for --dim 2: give at most 500")
    if r.centred and all(NOISES[name].mean is None for name in r.noise):
        raise ConfigError(f"--centred: {' and '.join(r.noise)} noise has no mean that could be removed: leave it out")
    if r.rounds == 1 and r.delta_first != r.delta_last and "graduated" in r.parts:
        raise ConfigError("--rounds 1 has one delta: give --delta-first and --delta-last the same value")
    if r.delta_last > r.delta_first:
        raise ConfigError(f"--delta-last {r.delta_last:g} exceeds --delta-first {r.delta_first:g}: delta falls")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: list[str] | None = None) -> int:
    """Compute, print and draw what a command line asks for; the exit code."""
    return exit_code(lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunFolderError))


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    require_matplotlib()
    keep_within_quota(torch)
    with refusing(request.out):  # a folder that cannot be written fails now
        request.out.mkdir(parents=True, exist_ok=True)
    check_unused(request.out)
    run(request, shlex.join(["python", "-m", "fastsmooth.smooth", *argv]))
    return DONE


def check_unused(out: Path) -> None:
    """Refuse a folder that has results: figures of one command beside the numbers of another would mislead."""
    names = ["smooth.json", *(stem + kind for stem in FIGURES for kind in KINDS)]
    there = [name for name in names if (out / name).exists()]
    if there:
        raise ConfigError(f"--out {out} has {' '.join(there)} already: choose another folder, or move them")


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the figures need matplotlib: pip install 'fastsmooth[plot]'") from None


def run(r: Request, command: str) -> None:
    """Both parts, each drawn when it is done; smooth.json last."""
    settings = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)} | {"out": str(r.out)}
    result: dict[str, Any] = {"command": command, "settings": settings}
    if "smoothing" in r.parts:
        curves = list(smoothing(r))
        draw_smoothing(r, curves)
        result["smoothing"] = {"x": r.grid.tolist(), "curves": [entry_of(curve, r) for curve in curves]}
    if "graduated" in r.parts:
        with one_thread():
            descents = list(graduated(r))
        draw_graduated(r, descents)
        deltas = {name: SCHEDULES[name](r.delta_first, r.delta_last, r.rounds) for name in r.schedules}
        result["graduated"] = {"deltas": deltas, "results": [d.summary() for d in descents]}
    text = json.dumps(without_nan(result), allow_nan=False)
    replace(r.out / "smooth.json", text.encode() + b"\n")
    say(f"{r.out}: {' '.join(sorted(path.name for path in r.out.iterdir()))}")


@contextmanager
def one_thread() -> Iterator[None]:
    """A step's tensors are so small that a second thread mostly waits, and busily: beside other work 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no word for what is not finite: null."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Curve:
    """f_delta of one function under one noise."""

    function: str
    noise: str
    delta: float
    smoothed: Smoothed


def smoothing(r: Request) -> Iterator[Curve]:
    """Every function under every noise at every delta, each with a line on stdout where there is something to say."""
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
        return {"rastrigin": smooth_rastrigin, "drop_wave": smooth_drop_wave}[function](r.grid, delta, noise, shift)
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
    return words + f"least {least[1]:.6g} at {place}; {s.method}" + (f", error {s.error:.1g}" if s.error else "")


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
    """Every function by every schedule and method, from the same starts, each with a line of the table on stdout."""
    table = Table(LAYOUT, least_first=("sd best", "n", "mean best", "sd last"))
    say(table.heading(columns(sys.stdout)))
    for function in r.functions:
        for schedule in r.schedules:
            for method in METHODS:
                found = Descent(function, schedule, method, all_seeds(r, function, schedule, method))
                numbers = [*mean_and_sd(found.values[-1]), *mean_and_sd(found.best)]
                say(table.row([function, schedule, method, *numbers, f"{r.seeds}"], columns(sys.stdout)))
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
        perturb = METHODS[method](r.dim_ego, r.draws, seeds)
        found.append(descend(f, starts(f, r.dim_ego, seeds), deltas, r.steps, perturb))
    return torch.cat(found, dim=1)


# Figures --------------------------------------------------------------------------------------------------------------


LINES = {"graduated": "-", "plain": "--"}
COLOURS = {"nice": "#0072b2", "geo": "#c94a00"}  # apart for colour-blind eyes, and in grey


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, ndarray]:
    """A figure that belongs to no window, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 2.6 * columns, 0.8 + 2.3 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, stem: Path) -> None:
    """As SVG and as PDF, without dates, so that the same numbers give the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "fastsmooth", "pdf.fonttype": 42}):
        for kind, date in zip(KINDS, ("Date", "CreationDate"), strict=True):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind[1:], metadata={date: None})
            replace(stem.with_suffix(kind), drawn.getbuffer())


def draw_smoothing(r: Request, curves: list[Curve]) -> None:
    """light and heavy, each where it has a noise."""
    for tails in ("light", "heavy"):
        names = [n for n in r.noise if NOISES[n].tails == tails and any(c.noise == n for c in curves)]
        if names:
            figure = (draw_lines if r.dim == 1 else draw_images)(r, [c for c in curves if c.noise in names], names)
            figure.suptitle(f"$f_\\delta(x) = E\\,f(x - \\delta u)$, {tails} tails" + ", centred" * r.centred)
            save(figure, r.out / tails)


def add_legend(figure: Any, axes: ndarray, width: float) -> None:
    """Below all axes [rows, columns], in as many rows as labels of `width` inches need."""
    handles, labels = axes[-1, 0].get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_lines(r: Request, curves: list[Curve], names: list[str]) -> Any:
    """A row a function, a column a noise, a line a delta, the darker the smaller; f itself in dashed grey."""
    from matplotlib import colormaps

    colours = dict(zip(sorted(r.delta), colormaps["viridis"](np.linspace(0, 0.85, len(r.delta))), strict=True))
    figure, axes = new_figure(2, len(names), sharex=True, sharey="row")
    for row, (function, f) in enumerate((("rastrigin", rastrigin), ("drop_wave", drop_wave))):
        for axis, name in zip(axes[row], names, strict=True):
            axis.plot(r.grid, f(r.grid), "--", color="0.65", lw=0.8, label="$f$")
            shown = [c for c in curves if (c.function, c.noise) == (function, name)]
            for curve in (c for c in shown if c.smoothed.values is not None):
                look = {"color": colours[curve.delta], "label": f"$\\delta$ = {curve.delta:g}"}
                axis.plot(r.grid, curve.smoothed.values, lw=1.3, **look)
            say_undefined(axis, shown)
            axis.set_title(f"{function.replace('_', '-')}, {name}", fontsize=10)
        axes[row, 0].set_ylim(*([-2, 52] if function == "rastrigin" else [-1.05, 0.05]))
    add_legend(figure, axes, 1.2)
    return figure


def draw_images(r: Request, curves: list[Curve], names: list[str]) -> Any:
    """A row a function and delta, a column a noise, a colour scale a row."""
    kinds = list(dict.fromkeys((c.function, c.delta) for c in curves))
    figure, axes = new_figure(len(kinds), len(names), sharex=True, sharey=True)
    for row, (function, delta) in enumerate(kinds):
        shown = {c.noise: c for c in curves if (c.function, c.delta) == (function, delta)}
        known = [c.smoothed.values for c in shown.values() if c.smoothed.values is not None]
        for axis, name in zip(axes[row], names, strict=True):
            axis.set_title(f"{function.replace('_', '-')}, $\\delta$ = {delta:g}, {name}", fontsize=8)
            say_undefined(axis, [shown[name]])
            if (values := shown[name].smoothed.values) is not None:
                scale = {"vmin": min(map(np.min, known)), "vmax": max(map(np.max, known))}
                extent = (-REACH, REACH, -REACH, REACH)
                image = axis.imshow(values.T, origin="lower", extent=extent, **scale)
        if known:
            figure.colorbar(image, ax=list(axes[row]))
    return figure


def say_undefined(axis: Any, shown: list[Curve]) -> None:
    if any(c.smoothed.values is None for c in shown):
        words = "undefined for $\\delta > 0$:\n$E\\,u^2$ is infinite"
        look = {"transform": axis.transAxes, "ha": "center", "va": "center", "bbox": {"fc": "white", "ec": "none"}}
        axis.text(0.5, 0.8, words, **look)


def draw_graduated(r: Request, descents: list[Descent]) -> None:
    """A panel a function: mean and range over seeds of f after each round."""
    figure, axes = new_figure(1, len(r.functions))
    rounds = np.arange(1, r.rounds + 1)
    for axis, function in zip(axes[0], r.functions, strict=True):
        for d in (d for d in descents if d.function == function):
            look = {"color": COLOURS[d.schedule], "ls": LINES[d.method]}
            axis.plot(rounds, d.values.mean(dim=1), label=f"{d.schedule}, {d.method}", lw=1.3, **look)
            low, high = d.values.amin(dim=1), d.values.amax(dim=1)
            axis.fill_between(rounds, low, high, color=look["color"], alpha=0.12, lw=0)
        axis.set_title(f"{function.replace('_', '-')}, {r.dim_ego} dimensions", fontsize=10)
        axis.set_xlabel("round")
    axes[0, 0].set_ylabel("f, mean and range over seeds")
    add_legend(figure, axes, 1.7)
    save(figure, r.out / "graduated")


if __name__ == "__main__":
    end_with(main)
