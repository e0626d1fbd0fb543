"""The instruments of a run: --track-noise, --mode critical, --mode sampling.

Each is a row of INSTRUMENTS. What they measure is in fastsmooth.noise; what they need of a run is
in measuring.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.data import Data
from fastsmooth.foreign import Driven, Foreign
from fastsmooth.kernels.tally import State
from fastsmooth.messages import warn
from fastsmooth.noise import gradients
from fastsmooth.noise.instrument import Asked, Instrument, Values
from fastsmooth.noise.online import GROUPS, NoiseTracker
from fastsmooth.noise.persample import NotCovered
from fastsmooth.noise.quantities import layers_of
from fastsmooth.noise.tails import NoiseStatistics
from fastsmooth.noise.threshold import NormRecord
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.files import new_aside, rename, writing
from fastsmooth.runfolder.numbers import exact
from fastsmooth.schedule import Point, memory
from fastsmooth.training import measuring
from fastsmooth.training.joining import Facts, choose_measure
from fastsmooth.training.loop import Diverged, Run
from fastsmooth.training.objective import Objective
from fastsmooth.training.plan import Plan
from fastsmooth.training.step import casting, operands


class InstrumentParts(NamedTuple):
    """What an instrument is made of."""

    plan: Plan
    model: torch.nn.Module  # the one that will be trained
    optimizer: Driven
    data: Data
    ranks: Ranks
    precision: str  # of training: fp32, tf32 or bf16
    compiled: bool  # whether the model is trained through torch.compile
    objective: Objective


# Of noise and mean gradient, both squared: below, products of bfloat16 or TF32 lose the noise in
# their rounding. Errors of C2 over operands of 32 samples, at 2e-3: 2e-3 and 7e-5; at 2e-6: 1.7 and
# 0.04 (relative, beside float64).
LEAST_NOISE = 1e-3
ROUNDED = ("bf16", "tf32")
SAMPLES_LOOKED_AT = 16  # test images by which it is seen what a measuring pass does


class TrackNoise(Instrument):
    """--track-noise: C^2, the noise scale and delta of batches of the training, every so often."""

    name = "track"

    def __init__(
        self,
        tracker: NoiseTracker,
        measure: str,
        why: str,
        norms_every: int,
        plain_update: bool = True,
        about_gradient: str = "",
    ):
        """`measure`: apart or step; `why` not as the step, if something is in the way; norms_every:
        updates from one measurement to the next; plain_update: whether delta is defined for the
        update; about_gradient: a line that says of which gradient C2 is, where the update is along
        another."""
        self.tracker, self.measure, self.why = tracker, measure, why
        self.plain_update, self.about_gradient = plain_update, about_gradient
        self.norms_every = norms_every if measure == "step" else 0
        self.warned = False  # of a precision that does not suffice

    @classmethod
    def of(cls, parts: InstrumentParts) -> TrackNoise | None:
        """Raises ConfigError for a model or a batch that it cannot measure."""
        c = parts.plan.config
        if not c.track_noise:
            return None
        few = torch.arange(min(SAMPLES_LOOKED_AT, len(parts.data.test)))
        x, y = next(iter(parts.data.test.batches([few])))
        quantities = c.quantities or ()
        try:
            tracker = NoiseTracker(
                parts.model,
                parts.optimizer,
                samples=parts.plan.images,
                every=c.track_noise,
                estimator=c.estimator,
                bn=c.bn,
                version=c.bound_version,
                ranks=parts.ranks,
                quantities=quantities,
                precision=operands(parts.precision),
                loss=parts.objective.training,
            )
            with casting(x.device, parts.precision):
                tracker.settle(x, y)
        except NotCovered as error:
            otherwise = "--estimator micro-batch measures any model"
            otherwise += ", without --quantities" if quantities else ""
            raise ConfigError(f"--track-noise: {error}; {otherwise}") from None
        except ValueError as error:
            raise ConfigError(f"--track-noise: {error}") from None
        if c.batch_size < tracker.smallest_batch:
            raise ConfigError(
                f"--track-noise with the {tracker.estimator} estimator needs batches of "
                f"{tracker.smallest_batch} or more, not --batchsize {c.batch_size}"
            )
        facts = Facts(c, tracker.estimator, parts.ranks.world)
        measure, why = choose_measure(facts, parts.model, x, y, parts.compiled)
        every = tracker.every
        updates = every.count * (parts.plan.updates_at_first if every.epochs else 1)
        return cls(tracker, measure, why, updates, c.plain_update, about_gradient(c))

    def introduction(self) -> list[str]:
        line = f"noise measured {self.tracker.described()}"
        if self.measure == "step":
            line += (
                "; by the update itself, whose sums are in another order than without it: training "
                "ends in other bits (--measure step)"
            )
        elif self.why:
            line += f"; apart from the update: {self.why}"
        return [line, *[self.about_gradient] * bool(self.about_gradient)]

    def chosen(self) -> dict[str, str]:
        return {"estimator": self.tracker.estimator, "measure": self.measure}

    def due(self, run: Run) -> bool:
        return self.tracker.due(run.update, run.epoch, run.stream.size)

    def before_gradient(self, run: Run, x: Tensor, y: Tensor, point: Point) -> Values | None:
        at, step, size = (point, run.update, run.epoch), run.step, run.stream.size

        def measured() -> Values:
            with casting(run.device, step.precision):
                return self.tracker.measure(x, y, *at, size)

        values = self.timed(run, measured)
        if self.tracker.estimator == "per-sample":
            return self.judged(run, values, step.norms_in, 1)
        return self.judged(run, values, step.precision, size // GROUPS)

    def falls_out(self, run: Run) -> bool:
        """Whether the update measures by itself, or makes the parts that the estimator wants
        anyway: --micro-batch cuts the batch into as many or more, in the mode that is measured."""
        if self.norms_every:
            return True
        wanted = self.tracker.estimator == "micro-batch" and self.tracker.bn == "train"
        return wanted and run.step.parts_apart(run.stream.size) >= GROUPS

    def after_update(self, run: Run, point: Point) -> Values | None:
        if self not in run.due or not self.falls_out(run):
            return None
        step, size, update = run.step, run.stream.size, run.update - 1
        at, parts = (point, update, run.epoch), step.parts_apart(size)
        norms, step.norms = step.norms, None

        def measured() -> Values:
            if norms is not None:
                return self.tracker.of_norms(norms, *at)
            deviations = step.spread[:parts].tolist()
            square = run.kept.squared_norms[0].item()
            return self.tracker.measured(deviations, [size // parts] * parts, square, *at)

        try:
            values = self.timed(run, measured)
        except FloatingPointError:
            return None  # the run has diverged, and says so by itself
        # where it stood before the update, as for every measurement
        values |= {"step": update, "samples": run.samples - size}
        if norms is not None:
            return self.judged(run, values, step.norms_in, 1)
        return self.judged(run, values, step.precision, size // parts)

    def judged(self, run: Run, values: Values, precision: str, samples: int) -> Values:
        """A measurement with the precision that it was made in, and whether that suffices; what was
        compared are gradients of so many samples each."""
        noise, square = values["c2_sampled"] / samples, values["grad_norm"] ** 2
        suffices = precision not in ROUNDED or noise >= LEAST_NOISE * square
        if not suffices and not self.warned and run.ranks.leader:
            self.warned = True
            step = values.get("step", run.update)
            warn(
                f"the noise measured at update {step} is {noise / square:.1g} of the squared "
                f"gradient norm, less than {precision} products resolve ({LEAST_NOISE:g}): measure "
                "it with --precision fp32 (precision_suffices says of which rows this is so)"
            )
        if not self.plain_update:
            values = values | {"delta_measured": None}
        return values | {"precision": precision, "precision_suffices": suffices}

    def timed(self, run: Run, measure: Callable[[], Values]) -> Values:
        """A measurement, with the seconds that it took, which are no part of the training."""
        before = run.clock.read("track")
        with run.clock.measure("track"):
            values = measure()
        return values | {"seconds": round(run.clock.read("track") - before, 3)}

    def end_epoch(self) -> Values:
        return {"c2_sampled": self.tracker.end_epoch()}

    def files(self, run: Run) -> dict[str, Any]:
        """The layers of which rows have lists, with the first measurement: none comes or goes."""
        if "layers" not in self.tracker.quantities or self.tracker.count != 1:
            return {}
        layers = layers_of(self.tracker.model).items()
        found = [{"name": name, "parameters": count} for name, count in layers]
        return {"layers.json": {"layers": found}}

    def conclusion(self, run: Run) -> list[str]:
        if not self.tracker.count:
            return []
        if self.measure == "step":
            return [f"noise measured {self.tracker.count} times, each by the update itself"]
        tracked, trained = run.clock.read("track"), run.train_seconds + run.clock.read("train")
        share = tracked / max(trained, 1e-9)
        return [
            f"noise measured {self.tracker.count} times, here in {tracked:.2g} s: {share:.1%} of "
            "the training time"
        ]

    def state_dict(self) -> dict[str, Any]:
        return self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)


def about_gradient(c: Config) -> str:
    """Of which gradient --track-noise measures C2, where the update is along another."""
    if c.sam:
        return "C2 is of the plain gradient at the weights, not of that of --sam"
    return "C2 is of the gradient before it is clipped" if c.clip_norm else ""


class Crossings(Instrument):
    """--mode critical: the update from which on the running mean of the gradient norm is at most
    each eps; critical.json has them."""

    name = "crossings"

    def __init__(self, plan: Plan, device: torch.device, ranks: Ranks):
        c = plan.config
        self.full, self.log_every, self.ranks = c.criterion == "full-grad", c.log_every, ranks
        self.every = (c.full_grad_every or plan.updates_at_first) if self.full else 1
        self.record = NormRecord(c.eps, c.criterion, c.min_epochs * plan.updates_at_first, device)
        self.all_crossed = False

    @classmethod
    def of(cls, parts: InstrumentParts) -> Crossings | None:
        if parts.plan.config.mode != "critical":
            return None
        return cls(parts.plan, next(parts.model.parameters()).device, parts.ranks)

    def due(self, run: Run) -> bool:
        return self.full and (run.update + 1) % self.every == 0

    def before_gradient(self, run: Run, x: Tensor, y: Tensor, point: Point) -> None:
        with gradients.undisturbed(run.model, run.config.bn):
            norm = gradients.norm(measuring.full_gradient(run, point))
        self.record.observe(norm, torch.tensor(run.update + 1, device=run.device))

    def observe(self, kept: State) -> None:
        if not self.full:
            self.record.observe(kept.squared_norms[0].sqrt(), kept.updates)

    def after_update(self, run: Run, point: Point) -> None:
        if run.update % self.log_every == 0:
            self.all_crossed = self.ranks.from_leader(all(self.record.crossings()))

    def enough(self) -> bool:
        return self.all_crossed

    @property
    def earliest(self) -> int:
        """The first update that may count; a mean that is at most eps there may have been so at
        any update before, if there is one."""
        return -(-(self.record.ignore + 1) // self.every) * self.every

    def crossings(self, run: Run) -> dict[str, Any]:
        """The first crossing of every eps, None where there was none."""
        c, plan = run.config, run.plan
        crossings: dict[str, Any] = {}
        for eps, step in zip(c.eps, self.record.crossings(), strict=True):
            epochs, rest = divmod(step, plan.updates_at_first)
            entry = {
                "step": step,
                "epoch": (step - 1) // plan.updates_at_first,
                "samples": epochs * plan.samples_at_first + rest * c.batch_size,
                "censored": step == self.earliest > 1,
            }
            crossings[exact(eps)] = entry if step else None
        return crossings

    def files(self, run: Run) -> dict[str, Any]:
        c = run.config
        about = {
            "criterion": c.criterion,
            "optimizer": c.optimizer,
            "lr": c.lr,
            "batch_size": c.batch_size,
            "momentum": None if c.foreign else c.momentum,
            "seed": c.seed,
            "min_epochs": c.min_epochs,
            "first_that_counts": self.earliest,
            "resolution": self.every,
            "updates": run.update,
        }
        if self.full:
            chunk = measuring.chunk_size(run, run.plan.schedule.start)
            about |= {"function": measuring.function_measured(run, chunk)}
        return {"critical.json": about | {"crossings": self.crossings(run)} | self.record.summary()}

    def conclusion(self, run: Run) -> list[str]:
        lines = []
        for eps, entry in self.crossings(run).items():
            if entry is None:
                lines.append(f"eps {eps}: not reached in {run.update:,} updates")
                continue
            line = f"eps {eps}: update {entry['step']:,} ({entry['samples']:,} samples)"
            if entry["censored"]:
                line += (
                    ", the first that counts, so no crossing: it may have been there before "
                    "(--min-epochs, --eps)"
                )
            lines.append(line)
        return lines

    def state_dict(self) -> dict[str, Any]:
        return self.record.state_dict() | {"all_crossed": self.all_crossed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record.load_state_dict(state)
        self.all_crossed = state["all_crossed"]


class Sampling(Instrument):
    """--mode sampling: the search-direction noise after each of --steps updates, in noise.json.

    A direction with momentum depends on the updates before it. So its noise is measured over
    histories: the run goes back, and every draw comes to the point along batches of its own. The
    measurement is made at the update where the histories begin, since the run stands there, and
    reported at the one where they end.
    """

    name = "sampling"

    def __init__(self, plan: Plan):
        c = plan.config
        self.steps, self.draws, self.save_omega = sorted(c.steps), c.draws, c.save_omega
        self.reach = memory(plan.schedule.most_momentum)  # updates that a history replays
        self.points: list[dict[str, Any]] = []  # of noise.json, some not yet told
        self.told = 0  # steps, the first so many
        # what a measurement that was asked to stop has of the histories that are done
        self.begun: dict[str, Any] | None = None

    @classmethod
    def of(cls, parts: InstrumentParts) -> Sampling | None:
        return cls(parts.plan) if parts.plan.config.mode == "sampling" else None

    def introduction(self) -> list[str]:
        if not self.reach:
            return []
        return [
            f"each of {self.draws} directions is that of a history of its own: up to {self.reach} "
            "updates replayed, then a pass over the training images, at each of --steps"
        ]

    def due(self, run: Run) -> bool:
        return run.update in self.steps or bool(self.begins(run.update))

    def begins(self, update: int) -> list[int]:
        """The steps whose histories begin here, and which are not measured yet."""
        measured = {point["step"] for point in self.points}
        return [s for s in self.steps if max(s - self.reach, 0) == update and s not in measured]

    def before_gradient(self, run: Run, x: Tensor, y: Tensor, point: Point) -> Values | None:
        for step in self.begins(run.update):
            self.measure(run, step)
        return self.tell(run) if run.update in self.steps else None

    def enough(self) -> bool:
        return self.told == len(self.steps)

    def measure(self, run: Run, step: int) -> None:
        """Add the point of a step, whose histories begin here, to the points."""
        run.check_finite()
        parameters = sum(p.numel() for p in gradients.trainable(run.model))
        statistics = NoiseStatistics(parameters, run.device)
        norms: list[Tensor] = []  # of the draws that are done
        before, started = 0.0, time.perf_counter()
        if self.begun is not None:
            norms = [values.to(run.device) for values in self.begun["norms"]]
            statistics.load_state_dict(self.begun["statistics"])
            before = self.begun["seconds"]
        omega = None
        if self.save_omega and run.ranks.leader:
            omega = OmegaFile(run.folder.path / f"omega-{step}.npy", (self.draws, parameters))
        try:
            with run.clock.measure("measure"), omega or contextlib.nullcontext():
                noise = self.draw(run, step - run.update, statistics, omega, norms)
        except FloatingPointError as error:
            raise Diverged(f"{error}, measured of update {step}: lower --lr") from None
        except Asked:
            # draws at one point share a random state, and a file of draws is whole or absent
            if step > run.update and not self.save_omega:
                self.begun = {
                    "norms": norms,
                    "statistics": statistics.state_dict(),
                    "seconds": before + time.perf_counter() - started,
                }
            raise
        self.begun = None
        seconds = round(before + time.perf_counter() - started, 3)
        tails = {"statistics": statistics.summary(), "seconds": seconds}
        self.points.append(self.values(run, step, noise) | tails)
        run.progress.restart_clock(run.samples)  # what is told of the speed is that of training

    def draw(
        self,
        run: Run,
        replayed: int,
        statistics: NoiseStatistics,
        omega: OmegaFile | None,
        norms: list[Tensor],
    ) -> gradients.DirectionNoise:
        """The noise of the directions that are not in `norms` yet, [3] each, and of those that are:
        after so many updates replayed, or drawn here."""
        c, point = run.config, measuring.point_after(run, replayed)
        here: list[list[Tensor]] = []  # the full gradient, where all draws are at one point

        def keep(draw: int, vectors: list[Tensor]) -> None:
            statistics.observe(vectors)
            if omega:
                omega.keep(vectors)

        @contextmanager
        def at(draw: int) -> Iterator[list[Tensor]]:
            if replayed:
                with measuring.ahead(run, replayed, draw), gradients.undisturbed(run.model, c.bn):
                    yield measuring.full_gradient(run, point)
            else:
                here[:] = here or [measuring.full_gradient(run, point)]
                yield here[0]

        over, optimizer = "mini-batches drawn at one point", run.step.optimizer
        if isinstance(optimizer, Foreign) and optimizer.has_state:
            over += f", with the state of {optimizer.name} as it stands"
        if replayed:
            over = f"histories, the last {replayed} updates replayed"
        with gradients.undisturbed(run.model, c.bn):
            return gradients.direction_noise(
                optimizer,
                lambda draw: measuring.drawn_gradient(run, draw, point),
                point.batch_size,
                at,
                self.draws,
                run.plan.images,
                keep,
                over,
                norms,
                gradients.trainable(run.model),
            )

    def values(self, run: Run, step: int, noise: gradients.DirectionNoise) -> Values:
        """What noise.json says of a step, but for the tails."""
        c, replayed = run.config, step - run.update
        point = measuring.point_after(run, replayed)
        chunk = measuring.chunk_size(run, point)
        norm, full, c2 = noise.noise_norm(), noise.full_grad_norm(), noise.grad_variance()
        return {
            "step": step,
            "lr": point.lr,
            "batch_size": point.batch_size,
            "momentum": None if c.foreign else point.momentum,
            **({} if point.nu is None else {"nu": point.nu}),
            "noise_norm": norm.value,
            "noise_norm_se": norm.error,
            "full_grad_norm": full.value,
            "full_grad_norm_se": full.error,
            "c2_sampled": c2.value,
            "c2_sampled_se": c2.error,
            "draws": self.draws,
            "se_over": f"{self.draws} {noise.over}",
            "replayed": replayed,
            "bn": c.bn,
            "augmented": c.measure_augment,
            "chunk": chunk,
            "function": measuring.function_measured(run, chunk),
            "noise_norms": noise.noise_norms,
            "grad_noise_norms": noise.grad_noise_norms,
            "full_grad_norms": noise.full_grad_norms,
        }

    def tell(self, run: Run) -> Values:
        """Say what was measured of the present update; the values of its row."""
        found = next(p for p in self.points if p["step"] == run.update)
        found["epoch"] = run.epoch
        self.told = self.steps.index(run.update) + 1
        pairs = [(name, found[key], found[f"{key}_se"]) for name, key in SHOWN]
        line = ", ".join(f"{name} {value:.4g} +- {error:.2g}" for name, value, error in pairs)
        tails = found["statistics"]
        for text in (
            f"{line} (standard errors over {found['se_over']})",
            f"of {found['function']}",
            f"its coordinates have {shown(tails['excess_kurtosis'], 'excess kurtosis')}, "
            f"{shown(tails['ks_distance'], 'KS distance')} to a normal, "
            f"{shown(tails['hill'][1], 'Hill tail index')} over the largest 1 %",
        ):
            run.progress.say(f"update {run.update:,}: {text}")
        return {key: v for key, v in found.items() if not isinstance(v, list | dict)}

    def files(self, run: Run) -> dict[str, Any]:
        about = {
            "optimizer": run.config.optimizer,
            "seed": run.config.seed,
            "images": run.plan.images,
        }
        points = [
            {k: v for k, v in point.items() if k != "seconds"}
            for point in self.points
            if point["step"] in self.steps[: self.told]
        ]
        return {"noise.json": about | {"points": points}}

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "told": self.told, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.told, self.begun = state["points"], state["told"], state["begun"]


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
    """omega-<step>.npy, float32 [draws, parameters], written row by row, named once it is whole.

    Plain writes: a memory map of a file for which the disk has no room is SIGBUS, of which nobody
    could be told.
    """

    def __init__(self, target: Path, shape: tuple[int, int]):
        self.target, self.shape = target, shape
        self.aside = new_aside(target)

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


# In the order in which they are asked; each is None where the flags do not ask for it.
INSTRUMENTS: tuple[Callable[[InstrumentParts], Instrument | None], ...] = (
    TrackNoise.of,
    Crossings.of,
    Sampling.of,
)
