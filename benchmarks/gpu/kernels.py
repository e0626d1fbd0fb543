"""The kernels: whether they are right, and what they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_kernels, bench_train
from benchmarks.bench_kernels import BETA, LR, NU
from benchmarks.gpu import product
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.events import captured, device_seconds, host_seconds
from benchmarks.timing import rounded
from fastsmooth import models
from fastsmooth.data import augment as draws
from fastsmooth.data.chunks import normalisation
from fastsmooth.forms import FORMS
from fastsmooth.kernels import backend, tally
from fastsmooth.kernels.affine_grads import affine_grads
from fastsmooth.kernels.augment import augment, augment_ref
from fastsmooth.kernels.conv_noise import conv_noise, conv_spread
from fastsmooth.kernels.persample_noise import persample_noise
from fastsmooth.kernels.update import Plan, Rule, update
from fastsmooth.optim import NoisySGD, coefficients

EPS = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")
# of parameters: odd sizes, one, more than a block of a kernel
SHAPES = ((64, 64, 3, 3), (1,), (1000, 513), (7, 3, 3, 3))
DECAY = 0.01


def right(cell: Cell) -> None:
    """Every kernel beside float64 in plain PyTorch. What it computes does not depend on a flag."""
    product.multiply_in("ieee")
    checks: list[tuple[str, Callable[[Cell, str], None]]] = [
        *(
            (f"update/{form}/{dtype}", check_update)
            for form in FORMS
            for dtype in ("float32", "bfloat16")
        ),
        *((f"persample_noise/B{rows}", check_noise) for rows in (4, 8, 37, 300)),
        *((f"conv_noise/{case}", check_conv) for case in CONVOLUTIONS),
        *(
            (f"affine_grads/{kind}/{order}", check_affine)
            for kind in ("batch", "group")
            for order in ("channels last", "pixels last")
        ),
        *((f"augment/{kind}", check_augment) for kind in ("none", "crop-flip-rotate")),
        *((f"update/K{K}", check_parts) for K in (4, 8)),
        ("augment/cursor", check_cursor),
        ("tally", check_tally),
    ]
    for case, check in checks:
        with cell.part(case):
            check(cell, case)


def verdict(cell: Cell, case: str, errors: dict[str, float], bound: float) -> None:
    """Relative errors, of which none may be above the bound."""
    implementation = backend.choose(cell.device, torch.float32)
    shown = {name: rounded(error) for name, error in errors.items()}
    right = all(error <= bound for error in errors.values())  # NaN is not
    cell.check(case, right, errors=shown, bound=bound, implementation=implementation)


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||."""
    exact = exact.double().cpu()
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def rule_for(form: str, device: torch.device) -> tuple[Rule, bool, list[float]]:
    values = coefficients(FORMS[form], LR, BETA, NU, DECAY)
    return Rule(*(backend.scalar(value, device) for value in values)), FORMS[form].mixes, values


def step_of(p: Tensor, g: Tensor, m: Tensor, values: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, direction) after the update, in float64. A form without momentum moves along u."""
    lr, beta, alpha, fresh, kept, decay = values
    u = g + decay * p
    m = beta * m + alpha * u
    direction = fresh * u + kept * m
    return p - lr * direction, m, direction


def check_update(cell: Cell, case: str) -> None:
    """Two steps from a momentum that is not zero."""
    _, form, name = case.split("/")
    dtype, has_buffer = getattr(torch, name), FORMS[form].has_buffer
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(4)]
    params, first, second, buffers = ([t.to(dtype) for t in ts] for ts in drawn)
    buffers = [m.float() for m in buffers]
    rule, mixed, values = rule_for(form, cell.device)
    if not has_buffer:
        values = [values[0], 0.0, 1.0, 0.0, 1.0, values[5]]
    elif not mixed:
        values = [*values[:3], 0.0, 1.0, values[5]]
    exact_p, exact_m = [p.double() for p in params], [m.double() for m in buffers]
    p, m = ([t.to(cell.device) for t in ts] for ts in (params, buffers))
    for grads in (first, second):
        found = update(p, [g.to(cell.device) for g in grads], m if has_buffer else [], rule, mixed)
        moved = [
            step_of(*each, values)
            for each in zip(exact_p, [g.double() for g in grads], exact_m, strict=True)
        ]
        exact_p, exact_m, directions = (list(column) for column in zip(*moved, strict=True))
        if dtype != torch.float32:  # every step rounds the parameters
            exact_p = [t.to(dtype).double() for t in exact_p]
    squares = torch.stack(
        [sum(t.double().square().sum() for t in ts) for ts in (second, directions)]
    )
    errors = {"p": max(map(relative, p, exact_p)), "norms": relative(found, squares)}
    if has_buffer:
        errors["m"] = max(map(relative, m, exact_m))
    # a value in bfloat16 that lies between two is rounded either way
    verdict(cell, case, errors, 4 * EPS if dtype == torch.float32 else 4e-4)


def check_parts(cell: Cell, case: str) -> None:
    """A shb step along the mean of K gradients, whose noise is a thousandth of it."""
    K = int(case.rpartition("K")[2])
    generator = torch.Generator().manual_seed(K)

    def drawn(scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(s, generator=generator) for s in SHAPES]

    params, buffers, near = drawn(), drawn(), drawn()
    parts = [[m + d for m, d in zip(near, drawn(1e-3), strict=True)] for _ in range(K)]
    rule, mixed, values = rule_for("shb", cell.device)
    wide = [torch.stack(column).double() for column in zip(*parts, strict=True)]
    means = [rows.mean(dim=0) for rows in wide]
    moved = [
        step_of(p.double(), g, m.double(), [*values[:3], 0.0, 1.0, values[5]])
        for p, g, m in zip(params, means, buffers, strict=True)
    ]
    exact_p, exact_m, directions = (list(column) for column in zip(*moved, strict=True))
    p, m = ([t.to(cell.device) for t in ts] for ts in (params, buffers))
    plan = Plan(p, m, mixed)
    given = [[g.to(cell.device) for g in part] for part in parts]
    sums, noise, squares = plan.along_mean(given, rule)
    away = sum((w - g).flatten(1).square().sum(1) for w, g in zip(wide, means, strict=True))
    norms = torch.stack([sum(t.square().sum() for t in ts) for ts in (means, directions)])
    errors = {
        "p": max(map(relative, p, exact_p)),
        "m": max(map(relative, m, exact_m)),
        "norms": relative(sums.sum(dim=0), norms),
        "noise": relative(noise, away),
        "squares": relative(squares, sum(w.flatten(1).square().sum(1) for w in wide)),
    }
    verdict(cell, case, errors, 1e-5)


def check_noise(cell: Cell, case: str) -> None:
    """Rows whose noise is a thousandth of their mean, the hard case, and their shb step."""
    rows, columns = int(case.rpartition("B")[2]), 10_007
    generator = torch.Generator().manual_seed(rows)
    mean = torch.randn(columns, generator=generator)
    G = mean + 1e-3 * torch.randn(rows, columns, generator=generator)
    p, m = torch.randn(2, columns, generator=generator)
    rule, mixed, values = rule_for("shb", cell.device)
    wide = G.double()
    exact = wide.mean(dim=0)
    exact_p, exact_m, direction = step_of(
        p.double(), exact, m.double(), [*values[:3], 0.0, 1.0, values[5]]
    )
    p, m = p.to(cell.device), m.to(cell.device)
    found = persample_noise(G.to(cell.device), p, m, rule, mixed)
    products = torch.stack([exact @ exact, direction @ direction, direction @ exact])
    verdict(
        cell,
        case,
        {
            "noise": relative(found.noise, (wide - exact).square().sum(1)),
            "squares": relative(found.squares, wide.square().sum(1)),
            "sums": relative(found.sums, products),
            "p": relative(p, exact_p),
            "m": relative(m, exact_m),
        },
        1e-5,
    )


# In float32 (ieee, tf32, tf32x3) or bfloat16; of `first` deviations are taken of stored rows.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "first": {"x": (6, 3, 32, 32), "p": 64, "k": 3, "stride": 1, "in": ("ieee", "bf16")},
    "64": {"x": (4, 64, 16, 16), "p": 64, "k": 3, "stride": 1, "in": ("tf32x3", "tf32", "bf16")},
    "128/2": {"x": (5, 64, 16, 16), "p": 128, "k": 3, "stride": 2, "in": ("ieee", "bf16")},
    "1x1/2": {"x": (4, 64, 16, 16), "p": 128, "k": 1, "stride": 2, "in": ("tf32x3", "bf16")},
    "512": {"x": (3, 512, 4, 4), "p": 512, "k": 3, "stride": 1, "in": ("tf32x3", "bf16")},
    "linear": {"x": (7, 512, 1, 1), "p": 100, "k": 1, "stride": 1, "in": ("ieee",)},
}
# of a sum of products whose operands are rounded: to 24, about 21, 11 and 8 bits
BOUNDS = {"ieee": 1e-5, "tf32x3": 2e-5, "tf32": 5e-3, "bf16": 2e-2}


def check_conv(cell: Cell, case: str) -> None:
    """Beside one weight gradient a sample in float64."""
    shape = CONVOLUTIONS[case.partition("/")[2]]
    rule = {"stride": shape["stride"], "padding": shape["k"] // 2}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape["x"], generator=generator)
    weight = torch.zeros(shape["p"], x.shape[1], shape["k"], shape["k"], dtype=torch.float64)
    dy = torch.randn(F.conv2d(x, weight.float(), **rule).shape, generator=generator)
    weight.requires_grad_()
    rows = torch.stack(
        [
            torch.autograd.grad(F.conv2d(a[None], weight, **rule), weight, b[None])[0].flatten()
            for a, b in zip(x.double(), dy.double(), strict=True)
        ]
    )
    on = {"device": cell.device, "memory_format": torch.channels_last}
    sizes = [[shape["k"]] * 2, [rule["stride"]] * 2, [rule["padding"]] * 2, [1, 1]]
    dw, squares = rows.sum(0).view_as(weight), rows.square().sum(1)
    away = (rows - rows.mean(0)).square().sum(1)
    for precision in shape["in"]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        how = "ieee" if precision == "bf16" else precision
        given = x.to(dtype).to(**on), dy.to(dtype).to(**on), *sizes, 1
        norms, found = (conv_noise(*given, noise, how) for noise in (False, True))
        of_spread, spread = conv_spread(*given, how)
        errors = {
            "dw": max(relative(g, dw) for g in (norms.dw, found.dw, of_spread)),
            "squares": max(relative(s.squares, squares) for s in (norms, found)),
            "noise": relative(found.noise, away),
            "spread": relative(spread, away.sum()),
        }
        verdict(cell, f"{case}/{precision}", errors, BOUNDS[precision])


def check_affine(cell: Cell, case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 9, 64, 8, 8, generator=generator)
    kind, order = case.split("/")[1:]
    shape = (1, 64) if kind == "batch" else (9, 8)
    mean = torch.randn(shape, generator=generator)
    rstd = torch.rand(shape, generator=generator) + 0.5
    center, scale = (
        t.double().repeat_interleave(64 // shape[1], 1)[..., None, None] for t in (mean, rstd)
    )
    last = torch.channels_last if order == "channels last" else torch.contiguous_format
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = x.to(dtype), dy.to(dtype)
        wide = dy.double()
        exact = (wide * (x.double() - center) * scale).sum((2, 3)), wide.sum((2, 3))
        operands = [t.to(cell.device, memory_format=last) for t in (x, dy)]
        found = affine_grads(*operands, mean.to(cell.device), rstd.to(cell.device))
        pairs = zip(("dw", "db"), found, exact, strict=True)
        errors = {name: relative(f, e) for name, f, e in pairs}
        # plain PyTorch, which a CPU has for bfloat16, rounds a sum's terms
        bound = 1e-5 if dtype == torch.float32 or not cell.dry else 1e-2
        verdict(cell, f"{case}/{str(dtype).removeprefix('torch.')}", errors, bound)


def check_augment(cell: Cell, case: str) -> None:
    """Bit for bit what plain PyTorch gives on the CPU."""
    kind, size = case.partition("/")[2], 32
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, size, size, 3), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, 50, (37,), generator=generator)
    table = normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), CPU)
    moves = None
    if kind != "none":
        moves = draws.moves(kind, size, draws.draw(kind, size, 0, 3, torch.arange(50)))
    exact = augment_ref(pixels, index, moves, table, torch.empty(37, size, size, 3))
    given = (None if t is None else t.to(cell.device) for t in (pixels, index, moves, table))
    found = augment(*given).cpu()
    cell.check(case, torch.equal(found, exact), values=found.numel())


def check_cursor(cell: Cell, case: str) -> None:
    """Images and labels from a place of the order that the device knows, in both dtypes."""
    size, count, start = 32, 37, 9
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, size, size, 3), dtype=torch.uint8, generator=generator)
    order, labels = torch.randint(0, 50, (2, 60), generator=generator)
    labels = labels[:50].contiguous()
    moves = draws.moves("crop-flip", size, draws.draw("crop-flip", size, 0, 3, torch.arange(50)))
    table = normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), CPU)
    rows = order[start : start + count]
    exact = augment_ref(pixels, rows, moves, table, torch.empty(count, size, size, 3))
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(count, size, size, 3, dtype=dtype, device=cell.device)
        out_labels = torch.empty(count, dtype=torch.int64, device=cell.device)
        cursor = torch.tensor(start, device=cell.device)
        given = (t.to(cell.device) for t in (pixels, order, moves, table.to(dtype)))
        places = {"cursor": cursor, "labels": labels.to(cell.device), "out_labels": out_labels}
        augment(*given, out, **places)
        same = torch.equal(out.cpu(), exact.to(dtype))
        same &= torch.equal(out_labels.cpu(), labels[rows])
        cell.check(case, same, dtype=str(dtype), values=out.numel())


def check_tally(cell: Cell, case: str) -> None:
    """Three updates beside plain PyTorch on the CPU: the second is not finite."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(1500, 2, dtype=torch.float64, generator=generator)
    states = tally.zeros(cell.device), tally.zeros(CPU)
    cursors = [torch.tensor(5, device=device) for device in (cell.device, CPU)]
    for loss in (2.5, math.nan, 0.25):
        values = norms, torch.tensor(loss), torch.tensor(17)
        on = [t.to(cell.device) for t in values]
        tally.tally(*on, states[0], 32, cursors[0], 32)
        tally.tally_ref(*values, states[1], 32, cursors[1], 32)
    found, exact = (
        [t.cpu() for t in (*state, c)] for state, c in zip(states, cursors, strict=True)
    )
    close = all(
        torch.allclose(f, e, rtol=1e-12, atol=0, equal_nan=True)
        for f, e in zip(found, exact, strict=True)
    )
    cell.check(case, close, found=[str(t.tolist()) for t in found])


# What the update takes


class Stepper:
    """Steps of an optimizer along gradients that stay, from zero momentum."""

    def __init__(self, model: str, device: torch.device, make: Callable[..., Any]):
        with torch.device("meta"):
            shapes = [p.shape for p in models.build(model, 100).parameters()]
        self.start, self.grads = (
            [
                torch.randn(s, generator=torch.Generator().manual_seed(seed)).to(device)
                for s in shapes
            ]
            for seed in (0, 1)
        )
        self.params = [torch.nn.Parameter(p.clone()) for p in self.start]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.optimizer, self.steps = make(self.params), 0
        self.apply = self.optimizer.step

    def __call__(self) -> None:
        self.apply()
        self.steps += 1

    def capture(self, device: torch.device) -> None:
        self.apply = captured(device, self.apply)
        if isinstance(self.optimizer, NoisySGD):
            self.optimizer.settle()
        self.steps += 3 if device.type == "cuda" else 0  # which come before a capture

    def check(self) -> None:
        """Raises FloatingPointError where the parameters are not that many steps away."""
        for p, start, g in zip(self.params, self.start, self.grads, strict=True):
            bench_kernels.require_moved(p.detach(), start, g.double(), "shb", self.steps)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "ours": lambda params: NoisySGD(params, "shb", LR, BETA),
    "foreach": lambda params: torch.optim.SGD(params, LR, BETA, foreach=True),
    "fused": lambda params: torch.optim.SGD(params, LR, BETA, fused=True),
}


def update_times(cell: Cell) -> None:
    """The shb step over ResNet-18's tensors, host and device apart, as it is and captured."""
    model = "resnet18" if not cell.dry else "resnet8"
    steppers = {}
    for name, make in OPTIMIZERS.items():
        for how in ("", ", captured"):
            with cell.part(f"update/{model}/shb", variant=name + how):
                stepper = Stepper(model, cell.device, make)
                stepper()  # the momentum is there from the first step on
                if how:
                    stepper.capture(cell.device)
                steppers[name + how] = stepper
    parameters = sum(p.numel() for p in next(iter(steppers.values())).params)
    about = {"precision": "fp32", "parameters": parameters, "bytes_a_parameter": 20}
    about |= {"captured": "on a GPU alone"} if cell.dry else {}
    for part, clock, base in (
        ("host", host_seconds, "fused"),
        ("device", device_seconds, "fused, captured"),
    ):
        with cell.part(f"update/{model}/shb/{part}"):
            found = cell.measure(steppers, clock, rounds=9, most=10)
            cell.tell_times(f"update/{model}/shb/{part}", found, base, 20 * parameters, **about)
    with cell.part(f"update/{model}/shb/parts"):
        parts_times(cell, model)
    for name, stepper in steppers.items():
        with cell.part(f"update/{model}/shb/right", variant=name):
            stepper.check()
            cell.check(f"update/{model}/shb/right", True, variant=name, steps=stepper.steps)


def parts_times(cell: Cell, model: str) -> None:
    """The step along the mean of K gradients, with the noise of each, beside that along one."""
    stepper = Stepper(model, cell.device, OPTIMIZERS["ours"])
    params, parameters = stepper.start, sum(p.numel() for p in stepper.start)
    rule, mixed, _ = rule_for("shb", cell.device)
    plan = Plan(params, [torch.zeros_like(p) for p in params], mixed)
    steps: dict[str, Callable[[], Any]] = {"K1": lambda: plan(stepper.grads, rule)}
    for K in (2, 4, 8):
        parts = [[g.clone() for g in stepper.grads] for _ in range(K)]
        steps[f"K{K}"] = partial(plan.along_mean, parts, rule)
    for part, clock in (("host", host_seconds), ("device", device_seconds)):
        found = cell.measure(steps, clock, most=10)
        case = f"update/{model}/shb/parts/{part}"
        about = {"precision": "fp32", "bytes_a_parameter": "4 K + 16", "per": "parameters"}
        cell.tell_times(case, found, "K1", parameters, **about)


# What convolutions take

# of operands: their dtype, and what float32 products are made in
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
SHARED = ("bf16", "tf32")  # in which per-sample shares are measured


def convolutions(cell: Cell) -> None:
    """The weight gradient of every convolution of ResNet-18 in cuDNN, and with per-sample norms,
    deviations and their sum beside it."""
    model, batch = ("resnet18", 128) if not cell.dry else ("resnet8", 2)
    torch.backends.cudnn.benchmark = True
    layers = []
    for shape, count in bench_train.convolutions(model).items():
        side = (shape.size - 1) // shape.stride + 1
        kernel = f"{shape.kernel}x{shape.kernel}/{shape.stride}"
        case = f"dw/{shape.inputs}-{shape.outputs}/{kernel}/{side}x{side}"
        work = 2 * batch * side**2 * shape.outputs * shape.inputs * shape.kernel**2
        variants = {}
        for precision in PRECISIONS:
            made = weight_gradients(cell, shape, batch, side, precision)
            variants |= {f"{name}, {precision}": step for name, step in made.items()}
        layers.append((case, count, work, variants))
    with cell.part("dw/compiled"):
        began = time.perf_counter()
        compile_in_threads(
            step
            for *_, variants in layers
            for name, step in variants.items()
            if not name.startswith("cudnn")
        )
        cell.tell("dw/compiled", seconds=rounded(time.perf_counter() - began))
    totals: dict[str, float] = {}
    for case, count, work, variants in layers:
        with cell.part(case):
            clock = {"clock": device_seconds, "seconds": 0.02, "rounds": 5, "most": 20}
            found = cell.measure(variants, **clock)
            about = {"layers": count, "batch": batch, "per": "FLOP"}
            cell.tell_times(case, found, "cudnn, bf16", work, **about)
            for name, measured in found.items():
                totals[name] = totals.get(name, 0.0) + count * measured.seconds()
    flop = sum(count * work for _, count, work, _ in layers)
    for name, seconds in totals.items():
        about = {"per_s": rounded(flop / seconds), "per": "FLOP", "batch": batch}
        cell.tell("dw/all", variant=name, median_s=rounded(seconds), **about)


def compile_in_threads(steps: Iterable[Callable[[], Any]]) -> None:
    """Call each once: a kernel takes a second or two to be compiled, most of it outside Python."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda step: step(), steps):
            pass


def weight_gradients(
    cell: Cell, shape: bench_train.ConvShape, batch: int, side: int, precision: str
) -> dict[str, Callable[[], Any]]:
    """cuDNN's, and those with norms, deviations and spread; the process is told at each call how
    float32 is multiplied, since precisions take turns."""
    dtype, how = PRECISIONS[precision]
    pad, k = shape.kernel // 2, shape.kernel
    on = {"device": cell.device, "dtype": dtype}
    x, dy, weight = (
        torch.randn(size, **on).to(memory_format=torch.channels_last)
        for size in (
            (batch, shape.inputs, shape.size, shape.size),
            (batch, shape.outputs, side, side),
            (shape.outputs, shape.inputs, k, k),
        )
    )
    rule = ([shape.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1)
    sizes = ([k] * 2, [shape.stride] * 2, [pad] * 2, [1, 1], 1)

    def cudnn() -> None:
        product.multiply_in(how)
        torch.ops.aten.convolution_backward(dy, x, weight, None, *rule, (False, True, False))

    def with_shares(noise: bool) -> None:
        product.multiply_in(how)
        conv_noise(x, dy, *sizes, noise, how)

    if precision not in SHARED:
        return {"cudnn": cudnn}
    return {
        "cudnn": cudnn,
        "norms": partial(with_shares, False),
        "deviations": partial(with_shares, True),
        "spread": partial(conv_spread, x, dy, *sizes, how),
    }
