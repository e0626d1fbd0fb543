"""The gradient variance and what follows from it, measured while a run trains, unnoticed by it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.foreign import Foreign
from fastsmooth.names import about_value
from fastsmooth.noise import estimators, gradients, hosts
from fastsmooth.noise.estimators import PARTS, Estimate
from fastsmooth.noise.losses import Loss
from fastsmooth.noise.persample import BN, NotCovered, SampleNorms, Unused, sample_norms
from fastsmooth.noise.quantities import PLAIN_SGD, QUANTITIES, measured_of
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Ranks
from fastsmooth.schedule import Point, Smoothing

ESTIMATORS = ("auto", "per-sample", "micro-batch")
MODES = ("train", "eval", *BN)
GROUPS = 4  # parts of a batch for the micro-batch estimator
DECAY = 0.9  # a measurement: of the averages behind the noise scale


@dataclass(frozen=True)
class Every:
    """When to measure: before updates 0, count, 2 count, ...; or before the first of every
    `count`-th epoch."""

    count: int
    epochs: bool = False

    @classmethod
    def parse(cls, when: int | str) -> Every:
        """Of 50 or "every=50" (updates), "2ep" or "every=2ep" (epochs). Raises ValueError for
        anything else."""
        number = str(when).removeprefix("every=")
        count = number.removesuffix("ep")
        if not (count.isdecimal() and int(count)):
            raise ValueError(f"every {when!r}: give a number of updates, or of epochs as in '2ep'")
        return cls(int(count), number != count)

    def period(self, update: int, epoch: int) -> int:
        """Grows by one whenever a measurement falls due."""
        return (epoch if self.epochs else update) // self.count


class NoiseTracker:
    """The gradient variance and what follows from it, of batches of training at the present
    parameters. Training does not notice: model, .grad, optimizer and random numbers are left as
    they were.

        noise = NoiseTracker(model, optimizer, samples=len(train), every=50)
        row = noise(x, y)  # once before each update; None where none is due

    Args:
        model: the network; x [B, ...] goes in, a tensor [B, ...] comes out. Of one that
            DistributedDataParallel wraps every process measures its share of each batch, and all
            get the row of the whole.
        optimizer: any. The delta that is measured is that of its form, where it is NoisySGD; of
            shb, where it is torch.optim.SGD; None of others, and where no bound is published.
        samples: in the training set, of which batches are drawn without replacement.
        every: so many updates, or epochs as in "2ep"; then end_epoch() is called after each.
        loss: as sample_norms takes it.
        estimator: per-sample, of the batch as one; micro-batch, of GROUPS parts of it, each a
            forward pass of its own; auto: per-sample wherever that has a clear meaning.
        bn: BatchNorm while measuring: train or eval, the mode of the model; or batch or frozen,
            which per-sample gradients in training mode know (sample_norms). In train the modules
            of a model in training mode are measured in the modes that they have.
        version: of the bound behind delta, where the form has several (Smoothing).
        ranks: the processes that share every batch; None: those of DistributedDataParallel, where
            that wraps the model, else this one alone.
        quantities: of QUANTITIES (fastsmooth.noise.quantities), whose columns join the row; they
            come out of the same norms, so that "auto" means per-sample then.
        precision: of per-sample products of float32 on a GPU, as sample_norms takes it.
        clips: whether the gradient is clipped before the update: then no published delta holds, and
            delta_measured is None; the rest of a row is of the gradient before it.

    Under autocast to bfloat16 gradients are measured in bfloat16 as they are trained. Under
    autocast to float16, whose gradients vanish without a scaled loss, they are measured without
    autocast, in float32. What torch.compile has made of the model is left out of it: a measurement
    runs as plain PyTorch does. Under gradient checkpointing micro-batches, and batches whose
    per-sample gradients go by layers, are computed again part by part as in training; else all
    that the pass computes is kept (sample_norms).

    A row has, of the batch of B samples with mean gradient g, squared gradient norms as unit:
    c2_sampled, an unbiased estimate of C2 = E||g_i - grad f||^2; c2_sampled_se, its standard error,
    and se_over, what varies in it; grad_norm, ||g||; grad_norm_max and grad_norm_rms, over the
    measurements so far; k2, the papers' K^2: the square of the largest; full_grad_square, the mean
    estimate of ||grad f||^2; noise_scale, C2 / ||grad f||^2 of decaying averages in samples (the
    simple noise scale of McCandlish et al. 2018, arXiv 1812.06162), None while the estimate below
    is not positive; delta_measured, the papers' delta (arXiv 2311.08745, 2402.02325) with this
    batch's C2 and this K^2 at the point's lr, batch size, momentum and nu, None where the groups of
    parameters have several of one of them and no point says which; estimator and bn.

    Raises ValueError for an estimator, bn, `every` or quantity that there is not, and for
    quantities that cannot be had: with the micro-batch estimator or several processes, and cabs
    with momentum or clipping; NotCovered, a ValueError, for a model whose parameters are not whole
    in every process (FSDP, DeepSpeed, DataParallel) or whose batch statistics are those of several
    (SyncBatchNorm), and at the first batch for a model or loss that cannot be measured so, or
    parameters in float16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Foreign,
        *,
        samples: int,
        every: int | str,
        loss: Loss = F.cross_entropy,
        estimator: str = "auto",
        bn: str = "train",
        version: str | None = None,
        ranks: Ranks | None = None,
        quantities: Sequence[str] = (),
        precision: str = "tf32x3",
        clips: bool = False,
    ):
        given = [("estimator", estimator, ESTIMATORS), ("bn", bn, MODES)]
        if isinstance(quantities, str):
            raise ValueError(f"quantities {quantities!r}: give a list of names")
        given += [("quantities", name, tuple(QUANTITIES)) for name in quantities]
        for name, value, known in given:
            if value not in known:
                raise ValueError(f"{name} {value!r}: {about_value(f'--{name}', str(value), known)}")
        check_arguments(model, optimizer, samples, loss)
        self.wrapped = model
        self.model, own_ranks = unwrapped(model)
        self.loss, self.bn, self.optimizer = loss, bn, optimizer
        self.every, self.estimator, self.why = Every.parse(every), estimator, ""
        self.smoothing, self.n = None if clips else smoothing_of(optimizer, version), samples
        self.ranks, self.precision = ranks or own_ranks, precision
        if self.ranks.world > 1 and bn != "eval":
            check_batch_norm(self.model)
        self.quantities = tuple(quantities)
        self.check_quantities(optimizer, clips)
        self.update = self.epoch = 0  # of the calls so far; who calls measure() counts by itself
        self.last_period = -1
        self.passed = 0  # samples since the epoch began
        self.left_out = 0  # batches in a row that a measurement was due for
        self.count, self.largest = 0, 0.0  # measurements; the largest ||g||
        # sums over measurements of ||g||^2 and of estimates of ||grad f||^2
        self.norm_squares = self.full_squares = 0.0
        self.recent_c2 = self.recent_full = 0.0  # decaying averages
        self.epoch_c2: list[float] = []

    def __call__(
        self,
        x: Tensor | Sequence[Tensor],
        y: Tensor | Sequence[Tensor],
        point: Point | None = None,
        *,
        scale: float = 1.0,
        alike: bool = False,
    ) -> dict[str, Any] | None:
        """Call it once before each update, with its batch x [B, ...], y [B, ...]: the row of a
        measurement, None where none is due.

        A batch whose gradient is accumulated over micro-batches comes as two lists, of their x and
        of their y; they are measured one after the other, each about its own mean, so that one at a
        time is in memory. Several processes give their shares of the batch, each as many tensors.
        Per-sample C2 is then the mean square about the micro-batches' own means, that of the
        micro-batch estimator between them (between GROUPS groups of neighbours, where there are
        more).
        `point` is what is in force for the update; None: what the optimizer's groups say, at the
        size of this batch, with `scale` times their lr: the update gets so much of the batch's mean
        gradient, where a trainer divides few micro-batches by the usual number of them.

        Micro-batches of several sizes count by their samples. `alike` says that each has the same
        weight in the training, whatever its size: such a batch is left to the next then, as its
        update is not by the mean over the samples.

        A batch too small to measure, or with a micro-batch that is (the last of an epoch), leaves
        it to the next; a second one in a row is a warning. Raises ValueError where all batches of
        the point's size are too small, NotCovered, on every process where one of them does, and
        inside torch's Join, and FloatingPointError.
        """
        update, self.update = self.update, self.update + 1
        xs, ys = (list(given) if not isinstance(given, Tensor) else [given] for given in (x, y))
        check_batch(xs, ys, point)
        self.look_for_epochs(sum(map(len, ys)) * self.ranks.world)
        if not self.every.period(update, self.epoch) > self.last_period:
            return None
        check_joined(self.wrapped)
        sizes = self.ranks.gather([len(part) for part in ys])
        size = sum(map(sum, sizes))
        with as_measured(ys[0].device):
            if self.estimator == "auto" and min(map(min, sizes)) > 1:
                self.settle_together(xs[0], ys[0])
            if point is not None and len(ys) == 1:
                self.check_size(point.batch_size)
            if why := self.why_left(sizes, alike):
                self.leave_out(why, sizes)
                return None
            self.left_out = 0
            point = point or self.own_point(size, scale)
            return self.measure(xs, ys, point, update, self.epoch, size)

    def look_for_epochs(self, size: int) -> None:
        """Warn of epochs that are asked for and never end; of a batch of about `size` samples."""
        before, self.passed = self.passed, self.passed + size
        if self.every.epochs and before <= 2 * self.n < self.passed:
            warnings.warn(
                f"two epochs of {self.n} samples went by without end_epoch(), by which epochs are "
                "counted: call it after each epoch",
                stacklevel=3,
            )

    def settle_together(self, x: Tensor, y: Tensor) -> None:
        """settle(), the same on every process: per-sample where all can."""
        with self.ranks.together((NotCovered,), NotCovered):
            self.settle(x, y)
        # in the order of the alphabet
        self.estimator, self.why = min(self.ranks.gather((self.estimator, self.why)))

    def why_left(self, sizes: list[list[int]], alike: bool) -> str:
        """Why a batch, of micro-batches of so many samples on each process, is left to the next;
        empty where it can be measured."""
        if alike and len({size for own in sizes for size in own}) > 1:
            return (
                "micro-batches of several sizes weigh alike in the training, whose gradient is not "
                "the mean over the samples then"
            )
        if self.estimator == "micro-batch":
            if all(min(own) >= (2 * GROUPS if len(own) == 1 else 1) for own in sizes):
                return ""
            return (
                f"the micro-batch estimator needs batches of {2 * GROUPS} samples, or two "
                "micro-batches, on each process"
            )
        if min(map(min, sizes)) >= 2:
            return ""
        return (
            "per-sample gradients need two samples in every micro-batch, on each process (where it "
            'has two micro-batches or more, estimator="micro-batch" takes them of one sample)'
        )

    def leave_out(self, why: str, sizes: list[list[int]]) -> None:
        """A batch that is left to the next; the second in a row is a warning."""
        self.left_out += 1
        if self.left_out == 2:
            warnings.warn(
                f"gradient noise not measured: {why}; this batch has {sizes}", stacklevel=3
            )

    @property
    def wants_next(self) -> bool:
        """Whether a call for the update to come would measure, if its batch is not too small."""
        return self.every.period(self.update, self.epoch) > self.last_period

    def skip(self) -> None:
        """In the place of a call, before an update that no measurement is due for."""
        self.update += 1

    def resume_at(self, update: int, epoch: float) -> None:
        """Go on after so many updates and epochs (with a fraction, within one), where nothing else
        is known of a training that is taken up again: it is measured at the updates at which it
        would have been."""
        self.update, self.epoch = update, int(epoch)
        self.last_period = self.every.period(update - 1, math.ceil(epoch) - 1)

    def own_point(self, batch_size: int, scale: float) -> Point | None:
        """What the optimizer's groups say of the update to come, None where they differ."""
        found = {
            (scale * float(group["lr"]), group.get("momentum", 0.0), group.get("nu"))
            for group in self.optimizer.param_groups
        }
        lr, momentum, nu = found.pop()
        return None if found else Point(lr, batch_size, momentum, nu)

    def check_quantities(self, optimizer: torch.optim.Optimizer | Foreign, clips: bool) -> None:
        """Raises ValueError where they cannot be had."""
        if not self.quantities:
            return
        asked = f"quantities {' '.join(self.quantities)}"
        if self.estimator == "micro-batch":
            raise ValueError(f"{asked}: they need the per-sample estimator, not micro-batch")
        if self.ranks.world > 1:
            raise ValueError(
                f"{asked}: they need every sample's distance from the mean gradient of the whole "
                f"batch, of which each of {self.ranks.world} processes has a part: use one process"
            )
        plain = isinstance(optimizer, NoisySGD | torch.optim.SGD) and not any(
            group["momentum"] for group in optimizer.param_groups
        )
        for name in self.quantities:
            if name in PLAIN_SGD and (clips or not plain):
                but = "momentum" if not plain else "clipping"
                raise ValueError(f"quantities {name}: its rule is that of SGD without {but}")

    def settle(self, x: Tensor, y: Tensor) -> None:
        """Decide which estimator "auto" means, by the first two samples of x [B, ...] and y [B,
        ...], B >= 2, which are of the kind that will come.

        Raises NotCovered where the estimator that was asked for cannot be had.
        """
        batch = x[:2], y[:2]
        wanted = "per-sample" if self.quantities else self.estimator
        chosen = choose_estimator(self.model, *batch, wanted, self.bn, self.loss)
        self.estimator, self.why = chosen

    def check_size(self, size: int) -> None:
        """Raises ValueError for a batch of too few samples."""
        if size < self.smallest_batch:
            raise ValueError(
                f"the {self.estimator} estimator needs batches of {self.smallest_batch} or more, "
                f"not {size}"
            )

    @property
    def smallest_batch(self) -> int:
        """The samples of a batch, over all processes, that a measurement takes at least."""
        return (2 * GROUPS if self.estimator == "micro-batch" else 2) * self.ranks.world

    def described(self) -> str:
        """How, in words."""
        when = f"every {self.every.count} {'epochs' if self.every.epochs else 'updates'}"
        how = f"{self.estimator} estimator" + (
            f" of {GROUPS} parts" if self.estimator == "micro-batch" else ""
        )
        return f"{when}: {how}, --bn {self.bn}" + (f" ({self.why})" if self.why else "")

    def due(self, update: int, epoch: int, batch_size: int) -> bool:
        """Whether to measure before this update of this epoch, both counted from 0.

        A batch too small to measure (the last of an epoch) leaves it to the next.
        """
        fits = batch_size >= self.smallest_batch
        return self.every.period(update, epoch) > self.last_period and fits

    def measure(
        self,
        x: Tensor | list[Tensor],
        y: Tensor | list[Tensor],
        point: Point | None,
        update: int,
        epoch: int,
        size: int | None = None,
    ) -> dict[str, Any]:
        """The row of a measurement before update number `update`, from x [B, ...] and y [B, ...],
        or from micro-batches of such.

        With several processes x and y are this one's share of a batch of `size` samples. Leaves no
        trace in the model. Raises FloatingPointError for a gradient that is not finite, and
        ValueError for a batch of too few samples, or of more than there are.
        """
        xs, ys = (given if isinstance(given, list) else [given] for given in (x, y))
        size = size or sum(map(len, ys))
        hosts.check_precision(self.model)
        if self.estimator == "auto":
            self.settle(xs[0], ys[0])
        if len(ys) == 1:
            self.check_size(size)
        if size > self.n:
            raise ValueError(f"a batch of {size} samples, where the training set has {self.n}")
        with gradients.undisturbed(self.model, self.bn):
            c2, grad_square, found = self.estimate(xs, ys, size)
        row = self.row(c2, grad_square, size, point, update, epoch)
        return row | self.more_of(found, c2, point)

    def more_of(
        self, found: SampleNorms | None, c2: Estimate, point: Point | None
    ) -> dict[str, Any]:
        """The columns of the quantities, from the norms that C2 was estimated from."""
        if found is None or not self.quantities:
            return {}
        measured = measured_of(found, self.model, self.n, c2, point.lr if point else math.nan)
        return {key: v for name in self.quantities for key, v in QUANTITIES[name](measured).items()}

    def of_norms(self, found: SampleNorms, point: Point, update: int, epoch: int) -> dict[str, Any]:
        """The row of a measurement that update number `update` has made itself, from the norms of
        its batch, that of a single process. Raises as `measure`."""
        assert found.noise is not None  # the distances from the mean were asked for
        c2 = estimators.per_sample([found.noise.tolist()], self.n)
        row = self.row(c2, found.grad_square.item(), c2.count, point, update, epoch)
        return row | self.more_of(found, c2, point)

    def measured(
        self,
        deviations: list[float],
        sizes: list[int],
        grad_square: float,
        point: Point,
        update: int,
        epoch: int,
    ) -> dict[str, Any]:
        """The row of a measurement by the micro-batch estimator, from ||h_j - h||^2 of parts of
        `sizes` samples and ||h||^2 of the batch that they make. Raises as `measure`."""
        c2 = estimators.between(deviations, sizes, self.n, PARTS)
        return self.row(c2, grad_square, sum(sizes), point, update, epoch)

    def row(
        self,
        c2: Estimate,
        grad_square: float,
        size: int,
        point: Point | None,
        update: int,
        epoch: int,
    ) -> dict[str, Any]:
        """That of an estimate of C2 and of ||g||^2, taken in. Raises FloatingPointError."""
        if not (math.isfinite(c2.value) and math.isfinite(grad_square)):
            raise FloatingPointError("the gradient is not finite")
        self.last_period = self.every.period(update, epoch)
        return self.take_in(c2, grad_square, size, point)

    def estimate(
        self, xs: list[Tensor], ys: list[Tensor], size: int
    ) -> tuple[Estimate, float, SampleNorms | None]:
        """(C2, ||g||^2, the norms they are made of) of a batch of `size` samples, the first two in
        the unit of a squared gradient norm; norms of parts of a batch are None.

        xs [B, ...] and ys [B, ...] each are this process's share of the batch, one tensor or
        micro-batches. Call it inside gradients.undisturbed. Raises NotCovered for a model, loss or
        batch that cannot be measured so, and RankLost.
        """
        if self.estimator == "per-sample":
            return self.by_samples(xs, ys, size)
        if len(ys) == 1:  # cut as one: a part is GROUPS times smaller
            sizes = [len(part) for part in ys[0].tensor_split(GROUPS)]
            xs, ys = list(xs[0].split(sizes)), list(ys[0].split(sizes))
        groups = in_groups(list(zip(xs, ys, strict=True)))
        sizes = [sum(len(y) for _, y in group) for group in groups]
        with self.ranks.together((NotCovered,), NotCovered):
            grads = [self.mean_gradient(group) for group in groups]
        mean = self.over_all(estimators.weighted_mean(grads, sizes), sum(sizes) / size)
        c2 = estimators.micro_batch(grads, mean, sizes, self.n, self.ranks.gather)
        return c2, gradients.norm(mean).item() ** 2, None

    def mean_gradient(self, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """That of all samples of `parts`, (x [B, ...], y [B, ...]) each, a tensor a parameter."""
        objective = gradients.objective_of(self.model, self.loss)
        samples = sum(len(y) for _, y in parts)
        total: list[Tensor] = []
        for x, y in parts:
            own = gradients.batch_gradient(self.model, x, y, objective, len(y) / samples)
            total = list(torch._foreach_add(total, own)) if total else own
        return total

    def by_samples(
        self, xs: list[Tensor], ys: list[Tensor], size: int
    ) -> tuple[Estimate, float, SampleNorms | None]:
        """estimate() from per-sample norms: of each micro-batch about its own mean gradient."""
        alone = len(ys) == 1 and self.ranks.world == 1
        if self.quantities and not alone:
            raise NotCovered(
                f"quantities {' '.join(self.quantities)}: they need every sample's distance from "
                f"the mean gradient of the whole batch, which comes in {len(ys)} micro-batches: "
                "leave them out, or give the batch as one"
            )
        noises: list[list[float]] = []
        mean: list[Tensor] = []
        with self.ranks.together((NotCovered,), NotCovered):
            for x, y in zip(xs, ys, strict=True):
                found = norms(self.model, x, y, self.bn, self.loss, self.precision)
                assert found.noise is not None  # it was asked for
                noises.append(found.noise.tolist())
                if alone:
                    c2 = estimators.per_sample(noises, self.n)
                    return c2, found.grad_square.item(), found
                share = torch._foreach_mul(found.grads, len(y) / size)
                mean = list(torch._foreach_add(mean, share) if mean else share)
        everyone = [noise for process in self.ranks.gather(noises) for noise in process]
        self.ranks.sum_(mean)
        c2 = estimators.per_sample(everyone, self.n)
        return c2, gradients.norm(mean).item() ** 2, None

    def over_all(self, grads: list[Tensor], share: float) -> list[Tensor]:
        """The mean gradient of the whole batch, the same on every process, from the mean gradient
        of this process's share of it.

        `grads` has a tensor [...] a parameter, and so has the result, in the same dtypes; `share`
        is the fraction of the batch that this process has. Raises RankLost.
        """
        if self.ranks.world > 1:
            grads = list(torch._foreach_mul(grads, share))
            self.ranks.sum_(grads)
        return grads

    def take_in(
        self, c2: Estimate, grad_square: float, batch_size: int, point: Point | None
    ) -> dict[str, Any]:
        """Update what runs over the measurements.

        E ||g||^2 = ||grad f||^2 + Var(g), and Var(g) = C2 / b (n - b) / (n - 1): the difference
        estimates ||grad f||^2 without bias, and may be negative. k2, the papers' K^2, is the square
        of the largest ||g|| so far, and delta_measured their bound with it and with the C2 of this
        batch.
        """
        full_square = grad_square - c2.value / batch_size * (self.n - batch_size) / max(
            self.n - 1, 1
        )
        self.count += 1
        self.epoch_c2.append(c2.value)
        self.largest = max(self.largest, math.sqrt(grad_square))
        self.norm_squares += grad_square
        self.full_squares += full_square
        self.recent_c2 = DECAY * self.recent_c2 + (1 - DECAY) * c2.value
        self.recent_full = DECAY * self.recent_full + (1 - DECAY) * full_square
        k2 = self.largest**2
        return {
            "c2_sampled": c2.value,
            "c2_sampled_se": c2.error,
            "se_over": c2.over,
            "estimator": self.estimator,
            "bn": self.bn,
            "grad_norm": math.sqrt(grad_square),
            "grad_norm_max": self.largest,
            "grad_norm_rms": math.sqrt(self.norm_squares / self.count),
            "k2": k2,
            "full_grad_square": self.full_squares / self.count,
            "noise_scale": self.recent_c2 / self.recent_full if self.recent_full > 0 else None,
            "delta_measured": self.degree(max(c2.value, 0.0), k2, point),
        }

    def degree(self, c2: float, k2: float, point: Point | None) -> float | None:
        """delta of these constants at a Point; None where no bound or no point is known."""
        if self.smoothing is None or point is None:
            return None
        nu = self.smoothing.nu if point.nu is None else point.nu
        smoothing = dataclasses.replace(self.smoothing, c2=c2, k2=k2, nu=nu)
        return smoothing.degree(point.lr, point.batch_size, point.momentum)

    def end_epoch(self) -> float | None:
        """Begin the next epoch; the mean C2 of the measurements in the last one, None if none."""
        self.epoch, self.passed = self.epoch + 1, 0
        mean = math.fsum(self.epoch_c2) / len(self.epoch_c2) if self.epoch_c2 else None
        self.epoch_c2 = []
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, with which another tracker goes on as this one would."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])


STATE = (
    "update",
    "epoch",
    "last_period",
    "count",
    "largest",
    "norm_squares",
    "full_squares",
    "recent_c2",
    "recent_full",
    "epoch_c2",
)


def check_arguments(model: Any, optimizer: Any, samples: Any, loss: Any) -> None:
    """Raises ValueError for what no tracker can be made of."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}: give the one that trains")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError("the optimizer has no parameter of the model: give the one that trains it")
    if not isinstance(samples, Integral) or isinstance(samples, bool):
        raise ValueError(f"samples {samples!r}: give the number of samples in the training set")
    if samples < 1:
        raise ValueError(f"samples {samples} is out of range: it is 1 or more")
    if not callable(loss) or isinstance(loss, type):
        raise ValueError(f"loss {loss!r} is no loss(output, target), as F.cross_entropy is")


def check_batch(xs: list[Any], ys: list[Any], point: Any) -> None:
    """Raises ValueError for what is no batch, and for a point that is none."""
    if not ys or len(xs) != len(ys):
        raise ValueError(f"a batch of {len(xs)} x and {len(ys)} y: give as many of each")
    stranger = next((part for part in ys if not isinstance(part, Tensor)), None)
    if stranger is not None:
        raise ValueError(f"y is a {type(stranger).__name__}, not a tensor [B, ...]")
    if point is not None and not isinstance(point, Point):
        raise ValueError(f"point is a {type(point).__name__}, not a fastsmooth.Point")


def in_groups(parts: list[Any]) -> list[list[Any]]:
    """At most GROUPS lists of neighbours, of about the same number each."""
    count = min(len(parts), GROUPS)
    ends = [len(parts) * i // count for i in range(count + 1)]
    return [parts[start:end] for start, end in itertools.pairwise(ends)]


# Wrappers by the name of their class, whose packages need not be here; in them no process, or no
# replica, has the whole of a parameter
SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine", "DataParallel")


def unwrapped(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """The network that DistributedDataParallel wraps, and the processes that share its batches; any
    other as it is, and this process alone. Raises NotCovered for one that is sharded."""
    compiled = getattr(model, "_orig_mod", model)
    name = type(compiled).__name__
    if name in SHARDED or any(type(p).__name__ == "DTensor" for p in compiled.parameters()):
        what = name if name in SHARDED else "a model whose parameters are DTensors"
        raise NotCovered(
            f"{what}: no process holds every parameter whole, so that norms of gradients cannot "
            "be had: measure under DistributedDataParallel, or with one process"
        )
    if isinstance(compiled, nn.parallel.DistributedDataParallel):
        group = compiled.process_group
        world = torch.distributed.get_world_size()
        if torch.distributed.get_world_size(group) != world:
            raise NotCovered(
                f"DistributedDataParallel over a part of the {world} processes: the whole batch "
                "is nowhere then: measure with one process, or over all of them"
            )
        return compiled.module, Ranks(torch.distributed.get_rank(group), world)
    return model, Ranks()


def check_joined(model: nn.Module) -> None:
    """Raises NotCovered inside torch's Join, where a process that has run out of batches answers
    the others' reductions of gradients, and none of a measurement."""
    config = getattr(getattr(model, "_orig_mod", model), "_join_config", None)
    if config is not None and config.enable:
        raise NotCovered(
            "inside torch.distributed's Join, where processes may have unequal numbers of batches, "
            "the others would wait for one that has none left: give all as many, without Join"
        )


def check_batch_norm(model: nn.Module) -> None:
    """Raises NotCovered for one whose batch statistics are those of several processes."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise NotCovered(
            "SyncBatchNorm: the samples of all processes mix, so that no process has the gradient "
            'of its own: measure with bn="eval", or train with BatchNorm'
        )


@contextmanager
def as_measured(device: torch.device) -> Iterator[None]:
    """Around a measurement in a training loop that may have its own precision and compiler."""
    with torch.compiler.set_stance("force_eager"), hosts.precise(device):
        yield


def smoothing_of(
    optimizer: torch.optim.Optimizer | Foreign, version: str | None
) -> Smoothing | None:
    """The noise model of an optimizer's directions; None where none is known. Raises ValueError
    for groups of parameters with noise models of their own."""
    if isinstance(optimizer, NoisySGD):
        nus = {group["nu"] for group in optimizer.param_groups}
        if len(nus) > 1:
            raise ValueError(f"the groups of parameters have several nu ({sorted(nus)}): give one")
        return Smoothing(optimizer.form.name, nu=nus.pop(), version=version)
    groups = optimizer.param_groups
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    if any(group["nesterov"] or group["dampening"] for group in groups):
        return None
    return Smoothing("shb", version=version)  # which without momentum is sgd


def norms(
    model: nn.Module, x: Tensor, y: Tensor, bn: str, loss: Loss, precision: str = "tf32x3"
) -> SampleNorms:
    """sample_norms of x [B, ...] and y [B, ...] for a value of --bn.

    train and eval are modes of the model, and leave sample_norms its bn=None. Raises NotCovered.
    """
    kind = bn if bn in BN else None
    return sample_norms(model, x, y, loss=loss, bn=kind, precision=precision)


def choose_estimator(
    model: nn.Module, x: Tensor, y: Tensor, wanted: str, bn: str, loss: Loss = F.cross_entropy
) -> tuple[str, str]:
    """(per-sample or micro-batch, why) for `wanted`, which may be "auto": per-sample wherever it
    has a clear meaning. Why not per-sample, or not out of one backward pass; empty where it is.

    x [B, ...] and y [B, ...] are a few samples of the kind that will come. Raises NotCovered where
    per-sample is wanted and cannot be.
    """
    if wanted == "micro-batch":
        return wanted, ""
    try:
        with gradients.undisturbed(model, bn):
            found = norms(model, x, y, bn, loss)
    except Unused:
        raise  # of a part of the batch it would have no gradient either
    except NotCovered as error:
        if wanted == "per-sample" or bn in BN:
            raise
        return "micro-batch", str(error)
    return "per-sample", f"gradients written out: {found.how}" if found.how else ""
