"""The kernels beside PyTorch's own ways to the same result: python -m benchmarks.bench_kernels
[--quick] [--device cuda]

Case update/<model>/<form> is one optimizer step over the network's tensors with random gradients,
in float32. Variants:

    ours             a Plan of kernels/update.py, which also returns the squared norms of gradient
                     and direction
    loop             the published code's loop: buf.mul_(beta).add_(g), p.add_(buf, alpha=-lr),
                     tensor by tensor
    foreach, fused   torch.optim.SGD(foreach=True) and (fused=True), which know sgd and shb alone
    compiled         torch.compile of the update's arithmetic with lr, beta and nu as 0-d tensors,
                     without the norms
    compiled_norms   the same with both norms: what ours computes

Case persample_noise/B<rows> is one shb step along the mean of B rows, with the noise of each row.
Variants:

    ours             kernels/persample_noise.py
    eager            persample_noise_ref: mean in two parts, sums in float64
    eager_float32    the shortest formulation in plain PyTorch, all of it in float32
    compiled         torch.compile of that

Case host/<model> is what the processor has to do for one shb step over the network's tensors, each
of one value, on one core; nothing waits for the device. Variants:

    ours             NoisySGD.step
    ours_unlaunched  the same up to the launch, which is left out
    fused, foreach   torch.optim.SGD(fused=True) and (foreach=True)

Beside the others runs a yardstick: a copy of memory much larger than any cache, and a change of it
in place, both counted as read plus write. The kernels change parameters in place. On a CPU a copy
is no ceiling for that: it also reads the lines that it overwrites, uncounted, where a change in
place does not.

On a GPU a step of those ends with torch.cuda.synchronize(), so that the time to launch it is in it.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Measured, Variant
from fastsmooth import models
from fastsmooth.forms import FORMS
from fastsmooth.kernels import backend, update
from fastsmooth.kernels.persample_noise import persample_noise, persample_noise_ref
from fastsmooth.kernels.update import Plan, Rule
from fastsmooth.optim import NoisySGD, coefficients
from fastsmooth.training.step import keep_freed_memory

CLASSES, LR, BETA, NU = 100, 0.1, 0.9, 0.7
YARDSTICK_BYTES = 512 << 20  # of each of the two buffers
GPU_STEPS = 50  # times the steps of a window, which are that much shorter on a GPU
GPU_BUDGET = 25.0  # seconds for all rounds of a case there
BLOCK = 1 << 21  # values that are checked at a time, so that checking needs little memory
TESTS = ("test_kernels.py", "test_optim.py")


def shapes_of(model: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in models.build(model, CLASSES).parameters()]


@dataclass(frozen=True)
class UpdateCase:
    """A step of `form` over the tensors of a network. A window has `steps` steps on a CPU."""

    model: str
    form: str
    steps: int = 20
    rounds: int = 8
    budget: float = 60.0  # seconds for all rounds
    yardstick_bytes: int = YARDSTICK_BYTES

    @property
    def name(self) -> str:
        return f"update/{self.model}/{self.form}"

    @property
    def shapes(self) -> list[torch.Size]:
        return shapes_of(self.model)

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @property
    def bytes_a_parameter(self) -> int:
        """The least possible: read g and p, write p; with momentum read and write m."""
        return 12 if self.form == "sgd" else 20

    @property
    def ratio_to(self) -> str:
        return "foreach" if self.form in ("sgd", "shb") else "loop"

    def variants(self, device: str) -> list[Variant]:
        names = [
            name
            for name in UPDATES
            if self.ratio_to == "foreach" or name not in ("foreach", "fused")
        ]
        return [Variant(name, UpdateStep, (self, name, device)) for name in names]


@dataclass(frozen=True)
class NoiseCase:
    """A step of shb along the mean of `rows` gradients of `parameters` values each."""

    rows: int
    parameters: int
    steps: int
    rounds: int = 8
    budget: float = 120.0
    yardstick_bytes: int = YARDSTICK_BYTES
    form: str = "shb"
    ratio_to: str = "eager"

    @property
    def name(self) -> str:
        return f"persample_noise/B{self.rows}"

    @property
    def bytes_a_parameter(self) -> int:
        """The least possible: read the rows, p and m, write p and m."""
        return 4 * self.rows + 16

    def variants(self, device: str) -> list[Variant]:
        # seconds each for many rows
        steps = {"eager": 1, "eager_float32": 1} if device == "cpu" else {}
        return [Variant(name, NoiseStep, (self, name, device), steps.get(name)) for name in NOISES]


@dataclass(frozen=True)
class HostCase:
    """The processor's share of a step of shb over the tensors of a network, on any device."""

    model: str
    steps: int = 300
    rounds: int = 8
    budget: float = 60.0
    form: str = "shb"
    ratio_to: str = "fused"

    @property
    def name(self) -> str:
        return f"host/{self.model}"

    def variants(self, device: str) -> list[Variant]:
        return [Variant(name, HostStep, (self, name, device)) for name in HOSTS]


# its parameters, padded to whole multiples of 16 as rows of a buffer would be
RESNET18 = 11_220_144
CASES = (
    HostCase("resnet18"),
    *(UpdateCase("resnet18", name) for name, form in FORMS.items() if form.bounds),
    NoiseCase(2, RESNET18, steps=8),
    NoiseCase(8, RESNET18, steps=4),
    NoiseCase(32, RESNET18, steps=4),
    # a quarter of the columns: 1.4 GB of rows, as with 32
    NoiseCase(128, RESNET18 // 64 * 16, steps=4),
)
QUICK = (
    UpdateCase("resnet8", "shb", steps=2, rounds=2, budget=0.0, yardstick_bytes=1 << 20),
    NoiseCase(4, 10_000, steps=2, rounds=2, budget=0.0, yardstick_bytes=1 << 20),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = timing.arguments("The kernels beside PyTorch's own ways to the same result.")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one",
    )
    timing.add_selection(p, (case.name for case in CASES), (*HOSTS, *UPDATES, *NOISES))
    args = p.parse_args(argv)
    cases = timing.selected(p, args, CASES, QUICK)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no GPU that PyTorch can use: leave it out")
    device = (
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    report = timing.Report("bench_kernels", argv, args.json, args.out)
    report.header["about"]["device"] = device
    names = set(args.variants)
    return timing.run_cases(
        report, args.quick, TESTS, cases, lambda case: bench(case, device, names, report)
    )


def bench(
    case: HostCase | UpdateCase | NoiseCase, device: str, names: set[str], report: timing.Report
) -> None:
    variants = [v for v in case.variants(device) if v.name in names | {case.ratio_to}]
    if isinstance(case, HostCase):
        return bench_host(case, device, variants, report)
    variants.append(Variant("yardstick", Yardstick, (case.yardstick_bytes, device)))
    steps, budget = (
        (case.steps, case.budget) if device == "cpu" else (case.steps * GPU_STEPS, GPU_BUDGET)
    )
    found = timing.measure(variants, steps, case.rounds, budget=budget, say=report.say)
    timing.require_measured(case.name, found, {case.ratio_to, "yardstick"})
    yardstick = found.pop("yardstick")
    result = timing.rows("bench_kernels", case.name, found, case.ratio_to, case.parameters)
    for row in result:
        row |= distribution(found[row["variant"]], case.parameters * case.bytes_a_parameter)
    about = explain(case, found, yardstick)
    for line in [
        f"{case.name} on {device}",
        *timing.table(result, "params", found),
        *describe(about, result),
    ]:
        report.say(line)
    report.add(case.name, result, about)


def bench_host(case: HostCase, device: str, variants: list[Variant], report: timing.Report) -> None:
    found = timing.measure(variants, case.steps, case.rounds, budget=case.budget, say=report.say)
    timing.require_measured(case.name, found, {case.ratio_to})
    count = len(shapes_of(case.model))
    result = timing.rows("bench_kernels", case.name, found, case.ratio_to, count)
    for row in result:
        row |= percentiles(found[row["variant"]])
    report.say(f"{case.name} on {device}: {count} tensors of one value, one core")
    for line in timing.table(result, "tensors", found):
        report.say(line)
    report.add(case.name, result, {"tensors": count})


# The variants of host: each is made in a process of its own, as those of the other cases are


class HostStep:
    """A variant of HOSTS: one call is one step, after which nothing is waited for."""

    def __init__(self, case: HostCase, variant: str, device: str):
        torch.set_num_threads(1)
        self.case, self.launched, self.steps = case, variant != "ours_unlaunched", 0
        self.params = [
            torch.nn.Parameter(torch.ones([1] * len(shape), device=device))
            for shape in shapes_of(case.model)
        ]
        for p in self.params:
            p.grad = torch.ones_like(p)
        self.run = HOSTS[variant](self)

    def __call__(self) -> None:
        self.run()
        self.steps += 1

    def check(self) -> None:
        for p in self.params:
            one = torch.ones_like(p)
            require_moved(
                p.detach(), one, one.double(), self.case.form, self.steps if self.launched else 0
            )


def host_ours(s: HostStep) -> Callable[[], Any]:
    if not s.launched:
        for name in update.IMPLEMENTATIONS:
            update.IMPLEMENTATIONS[name] = lambda *given: None
    return NoisySGD(s.params, s.case.form, LR, BETA).step


def host_torch(s: HostStep, **implementation: bool) -> Callable[[], Any]:
    return torch.optim.SGD(s.params, lr=LR, momentum=BETA, **implementation).step


HOSTS: dict[str, Callable[[HostStep], Callable[[], Any]]] = {
    "ours": host_ours,
    "ours_unlaunched": host_ours,
    "fused": lambda s: host_torch(s, fused=True),
    "foreach": lambda s: host_torch(s, foreach=True),
}


# The variants of update


class Timed:
    """`run` on a device, waited for. One call is one step; `found` is what the last one
    returned."""

    run: Callable[[], Any]

    def __init__(self, case: UpdateCase | NoiseCase, device: str):
        keep_freed_memory()  # as fastsmooth.train does it, for every variant
        self.case, self.device = case, torch.device(device)
        self.steps, self.found = 0, None
        self.scratch: tempfile.TemporaryDirectory | None = None

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile from an empty cache, so that the first step compiles and says what that
        costs."""
        self.scratch = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.scratch.name
        return torch.compile(function, fullgraph=True)

    def close(self) -> None:
        if self.scratch is not None:
            self.scratch.cleanup()

    def __call__(self) -> None:
        with torch.no_grad():
            self.found = self.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps += 1


def scalars(device: torch.device, *values: float) -> list[Tensor]:
    return [backend.scalar(value, device) for value in values]


def rule_of(form: str, device: torch.device) -> tuple[Rule, bool]:
    """The coefficients of a form and whether its direction is mixed, for a kernel."""
    row = FORMS[form]
    return Rule(*scalars(device, *coefficients(row, LR, BETA, NU, 0.0))), row.mixes


class UpdateStep(Timed):
    """A variant of UPDATES over random tensors of the case's shapes, from zero momentum."""

    def __init__(self, case: UpdateCase, variant: str, device: str):
        super().__init__(case, device)
        self.params, self.grads = self._random(seed=0), self._random(seed=1)
        self.buffers = [] if case.form == "sgd" else [torch.zeros_like(p) for p in self.params]
        self.run = UPDATES[variant](self)

    def _random(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(shape, generator=generator).to(self.device) for shape in self.case.shapes
        ]

    def check(self) -> None:
        for p, start, g in zip(self.params, self._random(seed=0), self.grads, strict=True):
            require_moved(p, start, g.double(), self.case.form, self.steps)
        if self.found is not None:
            _, direction = travelled(self.case.form, self.steps)
            square = sum(g.double().square().sum() for g in self.grads)
            require_close("norms", self.found, torch.stack([square, square * direction**2]))


def update_ours(s: UpdateStep) -> Callable[[], Any]:
    rule, mixed = rule_of(s.case.form, s.device)
    plan = Plan(s.params, s.buffers, mixed)
    return lambda: plan(s.grads, rule).sum(dim=0)


def update_loop(s: UpdateStep) -> Callable[[], Any]:
    form = s.case.form

    def run() -> None:
        for i, (p, g) in enumerate(zip(s.params, s.grads, strict=True)):
            if form == "sgd":
                p.add_(g, alpha=-LR)
                continue
            m = s.buffers[i]
            m.mul_(BETA).add_(g, alpha=1.0 if form == "shb" else 1 - BETA)
            if form == "qhm":
                p.add_(g, alpha=-LR * (1 - NU))
            p.add_(m, alpha=-LR * NU if form == "qhm" else -LR)

    return run


def update_optimizer(s: UpdateStep, **implementation: bool) -> Callable[[], Any]:
    for p, g in zip(s.params, s.grads, strict=True):
        p.grad = g
    return torch.optim.SGD(
        s.params, lr=LR, momentum=BETA if s.buffers else 0.0, **implementation
    ).step


def descend(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: Tensor,
    beta: Tensor,
    nu: Tensor,
    form: str,
) -> list[Tensor]:
    """The update's arithmetic in plain PyTorch, without weight decay; returns the directions."""
    directions = []
    for p, g, m in zip(params, grads, buffers or [None] * len(params), strict=True):
        direction = g
        if form != "sgd":
            direction = m.mul_(beta).add_(g if form == "shb" else g * (1 - beta))
        if form == "qhm":
            direction = g * (1 - nu) + direction * nu
        p.sub_(direction * lr)
        directions.append(direction)
    return directions


def descend_alone(*given: Any) -> None:
    descend(*given)


def descend_with_norms(params: list[Tensor], grads: list[Tensor], *given: Any) -> Tensor:
    """Sums in float32, which converts nothing: ours are in float64."""
    directions = descend(params, grads, *given)
    return torch.stack([sum(t.square().sum() for t in ts) for ts in (grads, directions)])


def update_compiled(
    s: UpdateStep, function: Callable[..., Any] = descend_alone
) -> Callable[[], Any]:
    rule, compiled = scalars(s.device, LR, BETA, NU), s.compile(function)
    return lambda: compiled(s.params, s.grads, s.buffers, *rule, s.case.form)


UPDATES: dict[str, Callable[[UpdateStep], Callable[[], Any]]] = {
    "ours": update_ours,
    "loop": update_loop,
    "foreach": lambda s: update_optimizer(s, foreach=True),
    "fused": lambda s: update_optimizer(s, fused=True),
    "compiled": update_compiled,
    "compiled_norms": lambda s: update_compiled(s, descend_with_norms),
}


# The variants of persample_noise


class NoiseStep(Timed):
    """A variant of NOISES over random rows G [B, P], from zero momentum."""

    def __init__(self, case: NoiseCase, variant: str, device: str):
        super().__init__(case, device)
        generator = torch.Generator().manual_seed(1)
        self.G = torch.randn(case.rows, case.parameters, generator=generator).to(self.device)
        self.p = self._start()
        self.m = torch.zeros_like(self.p)
        self.run = NOISES[variant](self)
        self.sums: Tensor | None = None

    def _start(self) -> Tensor:
        return torch.randn(self.case.parameters, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )

    def check(self) -> None:
        if self.sums is None:
            self.sums = exact_sums(self.G)
        noise, squares = self.sums
        width, mean_square = BLOCK // len(self.G), 0.0
        for G, p, start in zip(
            *(t.split(width, dim=-1) for t in (self.G, self.p, self._start())), strict=True
        ):
            mean, size = (t.mean(dim=0, dtype=torch.float64) for t in (G, G.abs()))
            require_moved(p, start, mean, self.case.form, self.steps, size, len(G))
            mean_square = mean_square + mean.square().sum()
        _, direction = travelled(self.case.form, self.steps)
        sums = mean_square * torch.tensor(
            [1.0, direction**2, direction], dtype=torch.float64, device=self.device
        )
        for name, found, exact in zip(
            ("noise", "squares", "sums"), self.found, (noise, squares, sums), strict=True
        ):
            require_close(name, found, exact)


def exact_sums(G: Tensor) -> Tensor:
    """float64 [2, B]: ||G_i - mean||^2 and ||G_i||^2."""
    total = torch.zeros(2, len(G), dtype=torch.float64, device=G.device)
    for block in G.split(BLOCK // len(G), dim=1):
        x = block.double()
        total += torch.stack([(x - x.mean(dim=0)).square().sum(dim=1), x.square().sum(dim=1)])
    return total


def noise_ours(s: NoiseStep) -> Callable[[], Any]:
    rule = rule_of(s.case.form, s.device)
    return lambda: persample_noise(s.G, s.p, s.m, *rule)


def noise_eager(s: NoiseStep) -> Callable[[], Any]:
    rule = rule_of(s.case.form, s.device)
    return lambda: persample_noise_ref(s.G, s.p, s.m, *rule)


def noise_float32(
    G: Tensor, p: Tensor, m: Tensor, lr: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, squares, sums) of persample_noise, and its shb step, in as few words as PyTorch
    needs."""
    mean = G.mean(dim=0)
    noise = (G - mean).square().sum(dim=1)
    m.mul_(beta).add_(mean)
    p.sub_(m * lr)
    sums = torch.stack([mean.square().sum(), m.square().sum(), (m * mean).sum()])
    return noise, G.square().sum(dim=1), sums


def noise_plain(s: NoiseStep, function: Callable[..., Any] = noise_float32) -> Callable[[], Any]:
    rule = scalars(s.device, LR, BETA)
    return lambda: function(s.G, s.p, s.m, *rule)


NOISES: dict[str, Callable[[NoiseStep], Callable[[], Any]]] = {
    "ours": noise_ours,
    "eager": noise_eager,
    "eager_float32": noise_plain,
    "compiled": lambda s: noise_plain(s, s.compile(noise_float32)),
}


# Whether a variant computes what it should


@functools.cache
def travelled(form: str, steps: int) -> tuple[float, float]:
    """(sum of the directions, the last direction) of `steps` steps from zero momentum, where the
    gradient is always 1."""
    m = direction = total = 0.0
    for _ in range(steps):
        alpha, fresh, kept = FORMS[form].coefficients(BETA, NU)
        m = BETA * m + alpha
        direction = fresh + kept * m
        total += direction
    return total, direction


def require_moved(
    p: Tensor,
    start: Tensor,
    g: Tensor,
    form: str,
    steps: int,
    size: Tensor | None = None,
    terms: int = 1,
) -> None:
    """Raises FloatingPointError unless p is `steps` steps along g away from `start`, but for
    float32's rounding.

    g is float64. Where the variant has it from a sum of `terms`, `size` is the same sum of their
    magnitudes.
    """
    far, size = LR * travelled(form, steps)[0], g.abs() if size is None else size
    error = (p.double() - (start.double() - far * g)).abs()
    # every step rounds p, and every term the sum; lr and the direction, a sum of 1 / (1 - beta)
    # terms, are in the 32
    roundings = steps + terms + 32
    bound = roundings * torch.finfo(torch.float32).eps * (start.double().abs() + far * size)
    if not (error <= bound).all():
        raise FloatingPointError(
            f"parameters after {steps} steps of {form} are {error.max().item():.3g} off"
        )


def require_close(name: str, found: Tensor, exact: Tensor) -> None:
    """Raises FloatingPointError for a relative error above 1e-5: sums of millions of terms, in
    float32 where not ours."""
    error = ((found.double() - exact).abs() / exact.abs()).max().item()
    if not error <= 1e-5:
        raise FloatingPointError(f"{name}: a relative error of {error:.3g}")


# The yardstick, and what the rows say beside it


class Yardstick:
    """One call: a copy of a buffer to another, then a change of one in place."""

    def __init__(self, size: int, device: str):
        self.device = torch.device(device)
        self.a, self.b = (torch.ones(size // 4, device=self.device) for _ in range(2))
        self.bytes = 2 * self.a.nbytes
        self.laps = {"copy": 0.0, "in_place": 0.0}

    def __call__(self) -> None:
        for part, work in (("copy", lambda: self.b.copy_(self.a)), ("in_place", self.a.neg_)):
            began = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.laps[part] += time.perf_counter() - began


def percentiles(measured: Measured) -> dict[str, float]:
    """Of the counted windows' seconds a step."""
    return {f"p{q}_s": rounded(measured.percentile(q)) for q in (20, 50, 80)}


def distribution(measured: Measured, size: int) -> dict[str, float]:
    """Percentiles of the counted windows' seconds a step, and `size` bytes over the middle one."""
    return percentiles(measured) | {"gb_s": rounded(size / measured.seconds() / 1e9)}


def explain(
    case: UpdateCase | NoiseCase, found: dict[str, Measured], yardstick: Measured
) -> dict[str, Any]:
    """The least bytes that a step moves, and how near to the machine's bandwidth each variant comes
    with them."""
    size = case.parameters * case.bytes_a_parameter
    about: dict[str, Any] = {
        "parameters": case.parameters,
        "bytes_a_parameter": case.bytes_a_parameter,
        "bytes": size,
    }
    bandwidth = {
        part: 2 * case.yardstick_bytes / yardstick.lap(part) / 1e9 for part in ("copy", "in_place")
    }
    about |= {f"{part}_gb_s": rounded(value) for part, value in bandwidth.items()}
    about["yardstick_quiet"] = (
        f"{len(yardstick.quiet)} of {len(yardstick.windows)}" if yardstick.knows_load() else None
    )
    about["variants"] = {}
    for name, m in found.items():
        rate, peak = size / m.seconds() / 1e9, m.peak_bytes()
        about["variants"][name] = {
            f"of_{part}": rounded(rate / value) for part, value in bandwidth.items()
        }
        about["variants"][name]["peak_mb"] = None if peak is None else round(peak / 1e6)
        about["variants"][name]["first_step_s"] = rounded(m.first_step)
    return about


def describe(about: dict[str, Any], result: list[dict[str, Any]]) -> list[str]:
    quiet = f" (quiet windows: {about['yardstick_quiet']})" if about["yardstick_quiet"] else ""
    lines = [
        f"  bytes: {about['bytes_a_parameter']} a parameter, {about['bytes'] / 1e6:,.1f} MB a step "
        f"at least; read and write bandwidth of this machine: copy {about['copy_gb_s']:g} GB/s, in "
        f"place {about['in_place_gb_s']:g} GB/s{quiet}"
    ]
    for row in result:
        b, (p20, p50, p80) = (
            about["variants"][row["variant"]],
            (row[f"p{q}_s"] * 1e3 for q in (20, 50, 80)),
        )
        line = f"  {row['variant']}: {row['gb_s']:.4g} GB/s, {b['of_copy']:.0%} of copy bandwidth"
        line += (
            f" ({b['of_in_place']:.0%} of in-place); p20 {p20:.4g}, p50 {p50:.4g}, p80 {p80:.4g} "
            f"ms; first step {b['first_step_s']:.3g} s"
        )
        if b["peak_mb"] is not None:
            line += f"; peak {b['peak_mb']:,} MB"
        lines.append(line)
    return lines


rounded = timing.rounded

if __name__ == "__main__":
    sys.exit(main())
