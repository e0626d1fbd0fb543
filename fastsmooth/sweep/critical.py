"""The critical batch size: the batch that reaches a threshold with the fewest gradient evaluations,
and what it says of C^2.

T(b) is the number of updates until the running mean of the gradient norm is at most eps (--mode
critical), N(b) = b T(b) the gradient evaluations (SFO), b* the batch with the smallest N (arXiv
2402.02325). A run that is below eps at the first update that counts (--min-epochs) tells an upper
bound of T(b) alone: it is censored, and its batch has no N. C^2 = b* eps^2 / (kappa lr) is an upper
bound through a convergence theorem that is used as a point estimate: nothing forces it to agree
with a measured C^2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.forms import FORMS, is_foreign
from fastsmooth.messages import say, warn
from fastsmooth.runfolder.numbers import LARGEST, SMALLEST, deviation, exact, mean, number
from fastsmooth.runfolder.read import SavedRun, read_run, read_status
from fastsmooth.schedule import Smoothing
from fastsmooth.sweep.grid import apart, words
from fastsmooth.sweep.machines import Stop, on_this_machine
from fastsmooth.sweep.store import NO_START, NOT_STARTED, Planned, Results, write_json
from fastsmooth.sweep.table import name_failed

# What does not tell groups apart: the axis, the repetition, what cannot change a result, and
# constants that only scale delta.
WITHIN = {"batch_size", "seed", "eps", "c2", "k2", "nshb_delta"}
NO_RESULT = configs.FREE_ON_RESUME | {
    "chunk", "loader",
    "checkpoint_every", "log_every", "track_noise", "draws", "estimator", "measure", "device",
    "kernels", "ema", "keep", "top5", "recipe",
    "decay_epoch", "epochs", "budget",
}  # fmt: skip
# batches whose N exceeds the smallest by less belong to the floor of the minimum: it is published
# as very flat
FLAT = 0.1


@dataclass(frozen=True)
class BatchResult:
    """Runs of one batch size, one a seed.

    A seed whose mean norm was at most eps at the first update that counts is censored: it has no
    T(b), only a bound above.
    """

    batch_size: int
    steps: tuple[int | None, ...]  # T(b) of every seed; None: not reached
    # gradient evaluations: b T(b), less what the last batches of epochs lack
    samples: tuple[int | None, ...]
    censored: tuple[bool, ...]  # of every seed

    @property
    def reached(self) -> list[int]:
        """T(b) of the seeds that crossed eps after counting had begun."""
        pairs = zip(self.steps, self.censored, strict=True)
        return [t for t, early in pairs if t is not None and not early]

    @property
    def bounds(self) -> list[int]:
        """The first updates that count, of the censored seeds."""
        pairs = zip(self.steps, self.censored, strict=True)
        return [t for t, early in pairs if t is not None and early]

    @property
    def n(self) -> int:
        return len(self.reached)

    @property
    def not_reached(self) -> int:
        return sum(t is None for t in self.steps)

    @property
    def complete(self) -> bool:
        """Whether every seed has a T(b), without which a mean would be of the seeds that are fast
        or slow; a batch size has at least one seed."""
        return self.n == len(self.steps)

    @property
    def mean_steps(self) -> float | None:
        return mean(self.reached) if self.reached else None

    @property
    def sd_steps(self) -> float | None:
        return deviation(self.reached)

    @property
    def sfo_mean(self) -> float | None:
        """N(b) = b T(b), the mean over seeds; None where one is censored or missed eps."""
        return mean([self.batch_size * t for t in self.reached]) if self.complete else None

    @property
    def sfo_sd(self) -> float | None:
        return deviation([self.batch_size * t for t in self.reached]) if self.complete else None


@dataclass(frozen=True)
class Analysis:
    """One curve N(b): runs that differ in batch size and seed alone, at one threshold."""

    group: dict[str, Any]  # the settings that all have, from their config.json
    eps: float
    batches: tuple[BatchResult, ...]  # by batch size
    kappa: float | None  # None where no convergence theorem gives it, nor then C^2
    k2: float | None  # the largest squared gradient norm that any of the runs met
    k2_mean_square: float | None  # the mean over runs of the mean squared gradient norm

    @property
    def sfo(self) -> dict[int, float]:
        """The mean N(b) of the batch sizes that have one, by batch size."""
        means = {b.batch_size: b.sfo_mean for b in self.batches}
        return {size: value for size, value in means.items() if value is not None}

    @property
    def best(self) -> int | None:
        """b*: the batch size with the smallest mean N."""
        sfo = self.sfo
        return min(sfo, key=lambda size: sfo[size], default=None)

    @property
    def bracket(self) -> tuple[int, int] | None:
        """The smallest and the largest batch size of the floor: N within FLAT of the smallest,
        without a gap around b*."""
        if self.best is None:
            return None
        sizes = [b.batch_size for b in self.batches]
        low = high = sizes.index(self.best)
        while low > 0 and self._flat(sizes[low - 1]):
            low -= 1
        while high + 1 < len(sizes) and self._flat(sizes[high + 1]):
            high += 1
        return sizes[low], sizes[high]

    def _flat(self, batch_size: int) -> bool:
        sfo = self.sfo
        return batch_size in sfo and sfo[batch_size] <= (1 + FLAT) * min(sfo.values())

    @property
    def at_edge(self) -> bool:
        """Whether the floor ends where the batches that were tried, or that reached eps, end: b*
        may lie outside."""
        if self.bracket is None:
            return False
        low, high = self.bracket
        return low == min(self.sfo) or high == max(self.sfo)

    @property
    def censored(self) -> list[int]:
        """The batch sizes with a censored seed: they have no N, and b* may be one of them."""
        return [b.batch_size for b in self.batches if b.bounds]

    @property
    def c2_critical(self) -> float | None:
        if self.best is None or self.kappa is None:
            return None
        return self.grad_variance(self.best, self.kappa)

    @property
    def c2_range(self) -> tuple[float, float] | None:
        """c2_critical at the two ends of the floor."""
        if self.bracket is None or self.kappa is None:
            return None
        low, high = self.bracket
        return self.grad_variance(low, self.kappa), self.grad_variance(high, self.kappa)

    def grad_variance(self, batch_size: float, kappa: float) -> float:
        """C^2 = b* eps^2 / (kappa lr)."""
        return batch_size * self.eps**2 / (kappa * self.group["lr"])

    def batch_of(self, grad_variance: float) -> float | None:
        """The theory's b* = kappa lr C^2 / eps^2 for a C^2 that is known otherwise; None where
        kappa is not known."""
        if self.kappa is None:
            return None
        return self.kappa * self.group["lr"] * grad_variance / self.eps**2

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "batch_size": b.batch_size,
                "steps": list(b.steps),
                "samples": list(b.samples),
                "mean_steps": b.mean_steps,
                "sd_steps": b.sd_steps,
                "sfo_mean": b.sfo_mean,
                "sfo_sd": b.sfo_sd,
                "n": b.n,
                "not_reached": b.not_reached,
                "censored": len(b.bounds),
            }
            for b in self.batches
        ]
        return {
            "group": self.group,
            "eps": self.eps,
            "kappa": self.kappa,
            "batches": rows,
            "best": self.best,
            "bracket": self.bracket,
            "flat_within": FLAT,
            "at_edge": self.at_edge,
            "censored": self.censored,
            "c2_critical": self.c2_critical,
            "c2_range": self.c2_range,
            "k2": self.k2,
            "k2_mean_square": self.k2_mean_square,
        }


def analyse(runs: Iterable[SavedRun]) -> list[Analysis]:
    """One Analysis for every threshold of every group of finished critical runs, in the order of
    the runs."""
    groups: dict[str, list[SavedRun]] = {}
    for run in runs:
        if sound(run):
            groups.setdefault(repr(sorted(settings(run.config).items())), []).append(run)
    analyses = []
    for members in groups.values():
        thresholds = sorted({float(name) for run in members for name in run.critical["crossings"]})
        analyses += [analyse_group(members, eps) for eps in thresholds]
    return analyses


def analyse_group(runs: list[SavedRun], eps: float) -> Analysis:
    batches: dict[int, list[dict[str, Any] | None]] = {}
    for run in sorted(runs, key=lambda run: run.critical["seed"]):
        crossings = {float(name): value for name, value in run.critical["crossings"].items()}
        if eps in crossings:
            batches.setdefault(run.critical["batch_size"], []).append(crossings[eps])
    results = tuple(
        BatchResult(
            size,
            tuple(c["step"] if c else None for c in crossings),
            tuple(c["samples"] if c else None for c in crossings),
            tuple(bool(c and c.get("censored")) for c in crossings),
        )
        for size, crossings in sorted(batches.items())
    )
    config = runs[0].config
    smoothing = Smoothing(config["optimizer"], nu=config.get("nu", 1.0))
    said = [run.critical for run in runs]
    largest = [c["grad_norm_max"] for c in said if number(c.get("grad_norm_max"))]
    squares = [c["grad_norm_rms"] ** 2 for c in said if number(c.get("grad_norm_rms"))]
    return Analysis(
        settings(config),
        eps,
        results,
        smoothing.critical_factor(runs[0].critical["momentum"] or 0.0),
        max(largest) ** 2 if largest else None,
        mean(squares) if squares else None,
    )


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What tells the groups apart."""
    return {name: value for name, value in config.items() if name not in WITHIN | NO_RESULT}


def sound(run: SavedRun) -> bool:
    """Whether the run is finished and its critical.json is one."""
    c = run.critical
    crossings = c.get("crossings")
    return (
        run.state == "done"
        and isinstance(crossings, dict)
        and all(threshold(name) and crossing(value) for name, value in crossings.items())
        and all(isinstance(c.get(name), int) and number(c[name]) for name in ("batch_size", "seed"))
        and c["batch_size"] > 0
        and number(run.config.get("lr"))
        and run.config["lr"] > 0
        and number(run.config.get("nu", 1.0))
        and known(run.config.get("optimizer"), c.get("momentum"))
    )


def known(optimizer: Any, momentum: Any) -> bool:
    """Whether it is the name of an optimizer, with a momentum as it may have: none is said of one
    that is no form."""
    if not isinstance(optimizer, str) or optimizer not in FORMS:
        return isinstance(optimizer, str) and is_foreign(optimizer) and momentum is None
    return number(momentum) and 0 <= momentum < 1


def threshold(name: str) -> bool:
    try:
        return SMALLEST <= float(name) <= LARGEST
    except ValueError:
        return False


def crossing(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(number(value.get(key)) for key in ("step", "samples"))
    )


def sample_at_best(out: Path, done: list[SavedRun], own: dict[str, Any], stop: Stop) -> bool:
    """critical.json: b*, C^2 and K^2 of every curve, with C^2 sampled at b* where the smallest eps
    was reached.

    Whether any of the runs that sample failed.
    """
    failed = False
    curves = analyse(done)
    folder = out / "sampled"
    folder.mkdir(exist_ok=True)
    sampled = sampling_runs(curves, done)
    planned = apart([run for _, run in sampled], folder)  # curves may share a run
    names = {id(curve): run.name for (curve, _), run in zip(sampled, planned, strict=True)}
    runs = list({run.name: run for run in planned}.values())
    write_json(folder / "sweep.json", {"runs": [run.to_json() for run in runs]})
    if runs:
        say(f"sampling C2 at b* in {len(runs)} more runs")
        results = Results(folder, runs)
        on_this_machine(folder, runs, own, stop, results)
        states = results.write(NOT_STARTED if stop.received else NO_START)
        if not stop.received:
            failed = name_failed(folder, runs, states)
    entries = []
    for curve in curves:
        entry = curve.to_json() | {"c2_sampled": None, "c2_sampled_se": None}
        if id(curve) in names and read_status(folder / names[id(curve)]).get("state") == "done":
            entry |= sampled_point(read_run(folder / names[id(curve)]))
        entries.append(entry)
        print_curve(curve, entry)
    write_json(out / "critical.json", {"curves": entries})
    return failed


def sampled_point(run: SavedRun) -> dict[str, Any]:
    """What a sampling run adds to the entry of a curve; nothing, with a warning, where its
    noise.json does not say it."""
    try:
        point = run.noise["points"][-1]
        entries = {"c2_sampled": point["c2_sampled"], "c2_sampled_se": point["c2_sampled_se"]}
        entries |= {"sampled_step": point["step"], "sampled_batch_size": point["batch_size"]}
    except (KeyError, IndexError, TypeError):
        entries = {"c2_sampled": None}
    if all(number(value) for value in entries.values()):
        return entries
    file = run.path / "noise.json"
    warn(f"{file} is damaged: remove its folder, and the noise is sampled again")
    return {}


def sampling_runs(curves: list[Analysis], done: list[SavedRun]) -> list[tuple[Analysis, Planned]]:
    """For every curve the run that samples the noise at b*, where its first seed crossed the
    smallest eps that has a b*."""
    runs = []
    lowest: dict[str, Analysis] = {}
    for curve in sorted(curves, key=lambda curve: -curve.eps):
        if curve.best is not None:
            lowest[repr(curve.group)] = curve
    for curve in curves:
        aim = lowest.get(repr(curve.group))
        if aim is None:
            continue
        of_group = [r for r in done if sound(r) and settings(r.config) == aim.group]
        of_batch = [r for r in of_group if r.critical["batch_size"] == aim.best]
        run = min(of_batch, key=lambda r: r.critical["seed"])
        step = next(b.reached[0] for b in aim.batches if b.batch_size == aim.best)
        runs.append((curve, sampling_run(run, step)))
    return runs


def sampling_run(run: SavedRun, step: int) -> Planned:
    """The run again up to where update `step` was made, where the noise is sampled."""
    left_out = {"mode", "eps", "criterion", "min_epochs", "full_grad_every", "budget"}
    left_out |= {"out", "resume", "max_time", "track_noise", "estimator", "measure"}
    saved = parsing.read_saved(run.path)
    # a direction with a history has no other mode than training
    if saved.bn != "eval" or saved.keeps_history:
        left_out.add("bn")
    values = {name: value for name, value in vars(saved).items() if name not in left_out}
    given = {name: v for name, v in values.items() if v is not None and v is not False}
    given |= {"mode": "sampling", "steps": (step - 1,)}
    return Planned(run.path.name, tuple(words(configs.without_idle(given))), {})


def print_curve(curve: Analysis, entry: dict[str, Any]) -> None:
    about = f"{curve.group['optimizer']}, lr {curve.group['lr']:g}, eps {exact(curve.eps)}"
    without = edge = ""
    if curve.censored:
        sizes = ", ".join(map(str, curve.censored))
        without = f"; left out, since censored at the first update that counts: b {sizes}"
    if curve.bracket is None:  # no b*, nor anything of it
        say(f"{about}: no batch size reached it with every seed{without}")
        return
    if curve.at_edge:
        edge = "; the floor reaches the edge of what was tried, so b* may lie outside"
    low, high = curve.bracket
    line = f"{about}: b* {curve.best} (N within {FLAT:.0%} from {low} to {high}{edge}{without})"
    if curve.c2_range is None:
        line += ", c2_critical unknown: no theorem gives its kappa"
    else:
        least, most = curve.c2_range
        line += f", c2_critical {curve.c2_critical:.4g} ({least:.4g} to {most:.4g})"
    if curve.k2 is not None:
        line += f", k2 {curve.k2:.4g}"
    if entry["c2_sampled"] is not None:
        line += f", c2_sampled {entry['c2_sampled']:.4g} +- {entry['c2_sampled_se']:.2g}"
    say(line)
