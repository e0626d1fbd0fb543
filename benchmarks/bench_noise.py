"""What gradient noise costs, ours beside other libraries: python -m benchmarks.bench_noise
[--quick] [--device cuda]

Case persample/<model>/<norm>/b<batch> is a training step, forward, backward and an update of
torch.optim.SGD with momentum, that also finds the squared gradient norm of every sample. <norm> is
group (GroupNorm), batch (BatchNorm in evaluation mode, with the batch's own statistics as running
statistics) or timm (a network of timm at 64 pixels, whose class tokens, positions and layer scales
are parameters of no layer, its weights disturbed by 0.02 so that no layer scale is nearly 0). Every
variant has the same weights and images, in channels-last order but for Opacus
and vmap, and must find in float64 what one backward pass a sample does. Variants:

    plain            the step alone
    ours             fastsmooth.persample.sample_norms
    ours_inner       the same, with ||g_i - g||^2 of every sample too
    opacus           Opacus, GradSampleModule: the gradients of all samples, materialised
    opacus_ghost     Opacus, GradSampleModuleFastGradientClipping: norms layer by layer (ghost norms
                     in linear layers alone)
    backpack         BackPACK, BatchL2Grad
    vmap             torch.func: vmap of grad over 8 samples at a time, their norms and their sum
                     kept
    loop             one backward pass a sample

Case fullgrad/<model> is the gradient over all of 10,000 random images. Variants:

    ours             --mode sampling --bn eval, from the resident loader
    ours_compiled    the same with --compile on
    originals        the published code's way (originals.py): in training mode, which moves the
                     running statistics
    originals_eval   the same in evaluation mode, as ours

A library that cannot run on a case is left out with its own words; one that finds other norms ends
the benchmark.

mem_ratio is of the process's resident memory, Python and its libraries included; alloc_ratio is of
what PyTorch's allocator holds at the peak of a step beyond weights, momentum and images, without
what C++ code allocates for itself, as oneDNN and our kernels do block by block.

On a GPU, where the cases persample alone run, a step ends with torch.cuda.synchronize(), float32 is
no TF32 and both ratios are of the memory that PyTorch's allocator holds there: mem_ratio of all of
it, alloc_ratio as above. tests/test_gpu.py is not run first, as the tests are on a CPU:
`gpu_check.sh --tests` runs it, and here every variant is compared in float64 all the same.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import timing
from benchmarks.bench_train import Ours
from benchmarks.originals import OriginalsFullGradient
from benchmarks.timing import Measured, Variant, VariantError
from fastsmooth import models
from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.data.images import Split
from fastsmooth.noise import gradients
from fastsmooth.noise.persample import sample_norms
from fastsmooth.training import measuring
from fastsmooth.training.step import keep_freed_memory

CLASSES, SIZE = 100, 32
LR = 1e-3  # small, since all steps are on the same batch
VMAP_CHUNK, ORIGINALS_CHUNK = 8, 1000
GPU_STEPS = 10  # times the steps of a window, which are that much shorter on a GPU
GPU_BUDGET = 10.0  # seconds for all rounds of a case there
CHECKED = 8  # images of the batch in float64, which takes many times as long
# a value of a sample's gradient: square and add; also subtract the mean, square and add
NORM_FLOP, NOISE_FLOP = 2, 5
# Relative, of the squared norm of each sample. In float32 the variants' forward passes round
# differently, and where a ReLU's input is that near to zero its gradient jumps: up to 1e-3 of a
# squared norm, in whichever way it is computed.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
# the extra "bench", and the networks of the cases timm
PEERS = ("opacus", "backpack-for-pytorch", "timm")
TESTS = ("test_persample.py", "test_persample_layers.py", "test_conv_noise.py", "test_modes.py")


@dataclass(frozen=True)
class NormCase:
    """Training steps on one batch. A window has `steps` steps, and one of the variants in SLOW."""

    model: str
    norm: str
    batch_size: int
    steps: int
    names: tuple[str, ...] = ()  # of its variants; empty: all
    size: int = SIZE  # pixels a side
    options: tuple[tuple[str, Any], ...] = ()  # of a network of timm
    rounds: int = 6
    budget: float = 240.0  # seconds for all rounds
    lead: int = 1
    ratio_to: str = "plain"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"persample/{self.model}/{self.norm}/b{self.batch_size}"

    @property
    def units(self) -> int:
        return self.batch_size

    def variants(self, names: Iterable[str]) -> list[Variant]:
        exact = one_by_one(self, torch.float32, self.batch_size)
        kept = [name for name in self.names or NORMS if name in names]
        return [
            Variant(name, NormStep, (self, name, exact), 1 if name in SLOW else None)
            for name in kept
        ]

    def on_gpu(self) -> NormCase:
        return replace(
            self, device="cuda", steps=self.steps * GPU_STEPS, budget=min(self.budget, GPU_BUDGET)
        )


@dataclass(frozen=True)
class FullCase:
    """Full gradients over `images` random images."""

    model: str
    images: int = 10_000
    names: tuple[str, ...] = ()  # of its variants; empty: all
    rounds: int = 3
    budget: float = 240.0
    steps: int = 1
    lead: int = 0  # a pass is long enough to be in the middle of a run
    ratio_to: str = "originals"

    @property
    def name(self) -> str:
        return f"fullgrad/{self.model}"

    @property
    def units(self) -> int:
        return self.images

    def variants(self, names: Iterable[str]) -> list[Variant]:
        kept = [name for name in self.names or FULLS if name in names]
        return [Variant(name, FULLS[name], (self,)) for name in kept]


# BackPACK extends the layers of torch.nn that a model is a sequence of, and these are none. Opacus
# 1.6 is left out for ConvNeXt: its convolutions after a LayerNorm have channels-last activations
# whatever the model's memory format, and their norms are wrong as below, some gradients 140 % off.
TIMM = ("plain", "ours", "ours_inner", "opacus", "opacus_ghost", "vmap", "loop")
CASES = (
    *(NormCase("resnet18", norm, 32, steps=1) for norm in ("group", "batch")),
    *(NormCase("resnet20", norm, 32, steps=5) for norm in ("group", "batch")),
    NormCase("resnet18", "group", 128, steps=1, names=("plain", "ours", "ours_inner")),
    NormCase(
        "vit_tiny_patch16_224",
        "timm",
        32,
        steps=2,
        size=64,
        options=(("img_size", 64),),
        names=TIMM,
    ),
    NormCase("convnext_atto", "timm", 32, steps=2, size=64, names=(*TIMM[:3], *TIMM[-2:])),
    FullCase("resnet20"),
)
QUICK = (
    NormCase("resnet8", "group", 4, steps=1, rounds=2, budget=0.0),
    FullCase("resnet8", images=40, names=("ours", "originals"), rounds=2, budget=0.0),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = timing.arguments(
        "What gradient noise costs beside a plain training step, ours and other libraries'."
    )
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the cases persample alone"
    )
    timing.add_selection(p, (case.name for case in CASES), (*NORMS, *FULLS))
    args = p.parse_args(argv)
    cases, tests = timing.selected(p, args, CASES, QUICK), TESTS
    if args.device == "cuda":
        if not torch.cuda.is_available():
            p.error("--device cuda: this machine has no GPU that PyTorch can use: leave it out")
        cases, tests = [case.on_gpu() for case in cases if isinstance(case, NormCase)], ()
    report = timing.Report("bench_noise", argv, args.json, args.out)
    report.header["about"] |= {"peers": versions_of_peers(), "device": args.device}
    return timing.run_cases(
        report, args.quick, tests, cases, lambda case: bench(case, set(args.variants), report)
    )


def versions_of_peers() -> dict[str, str | None]:
    """Of each library; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def bench(case: NormCase | FullCase, names: set[str], report: timing.Report) -> None:
    report.say(case.name)
    if isinstance(case, NormCase) and case.norm == "timm" and not find_spec("timm"):
        report.say("  not measured: timm is not installed")
        return
    variants = case.variants(names | {case.ratio_to})
    needed = {case.ratio_to, *(v.name for v in variants if v.name.startswith("ours"))}
    about: dict[str, Any] = {"not_measured": [], "variants": {v.name: {} for v in variants}}

    def leave_out(line: str) -> None:
        about["not_measured"].append(line)
        report.say(f"  {line}")

    if isinstance(case, NormCase):
        variants = those_that_agree(case, variants, about["variants"], leave_out)
    found = timing.measure(variants, case.steps, case.rounds, case.lead, case.budget, leave_out)
    timing.require_measured(case.name, found, needed)
    about["variants"] = {
        name: about["variants"][name] | first_and_peak(m) for name, m in found.items()
    }
    result = timing.rows("bench_noise", case.name, found, case.ratio_to, case.units)
    lines = timing.table(result, "images", found)
    if isinstance(case, NormCase):
        add_allocations(case, [v for v in variants if v.name in found], result, about["variants"])
        about["floor"] = floor(case)
        lines += describe(result, about)
    for line in lines:
        report.say(line)
    report.add(case.name, result, about)


def first_and_peak(m: Measured) -> dict[str, Any]:
    peak = m.peak_bytes()
    return {
        "peak_mb": None if peak is None else round(peak / 1e6),
        "first_step_s": rounded(m.first_step),
    }


# The obvious way, which every variant is compared with


@dataclass(frozen=True)
class Exact:
    """Of the mean loss of a batch at the initial weights, with g its gradient and g_i those of the
    samples."""

    squares: list[float]  # ||g_i||^2
    noise: list[float]  # ||g_i - g||^2
    grad_square: float  # ||g||^2


def one_by_one(case: NormCase, dtype: torch.dtype, count: int) -> Exact:
    """Of the first `count` images of the batch, by one backward pass each; g by one of them all."""
    model, x, y = model_and_batch(case, torch.contiguous_format, dtype, count)
    params = list(model.parameters())

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), params)]
        )

    mean = gradient(x, y)
    squares, noise = [], []
    for one, label in zip(x.split(1), y.split(1), strict=True):
        g = gradient(one, label)
        squares.append(square(g))
        noise.append(square(g - mean))
    return Exact(squares, noise, square(mean))


def square(t: Tensor) -> float:
    return torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2


def model_and_batch(
    case: NormCase, memory_format: torch.memory_format, dtype: torch.dtype, count: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and the first `count` images of the batch: the same numbers in every memory
    format, dtype and device."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = "ieee"  # as fastsmooth.train has it
    torch.manual_seed(0)
    model = built(case)
    x = torch.randn(case.batch_size, 3, case.size, case.size)
    y = torch.randint(CLASSES, (case.batch_size,))
    if case.norm == "batch":
        set_running_statistics(model, x)
    form = {"device": case.device, "dtype": dtype, "memory_format": memory_format}
    return model.to(**form), x[:count].to(**form), y[:count].to(case.device)


def built(case: NormCase) -> nn.Module:
    if case.norm != "timm":
        return models.build(case.model, CLASSES, case.norm)
    import timm

    model = timm.create_model(case.model, num_classes=CLASSES, **dict(case.options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


@torch.no_grad()
def set_running_statistics(model: nn.Module, x: Tensor) -> None:
    """Those of the batch x, so that evaluation mode normalises as training would; leaves the model
    in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(x)
    model.eval()


# The variants of persample: each is made in a process of its own


class NormStep:
    """A variant of NORMS: one call is a training step on as many images as `exact` has, which the
    first is compared with."""

    def __init__(
        self, case: NormCase, variant: str, exact: Exact, dtype: torch.dtype = torch.float32
    ):
        keep_freed_memory()  # as fastsmooth.train does it, for every variant
        # so too; one step in float64 gains nothing by it
        torch.backends.cudnn.benchmark = dtype == torch.float32
        self.exact, self.dtype = exact, dtype
        memory_format = torch.contiguous_format if variant in CONTIGUOUS else torch.channels_last
        self.model, self.x, self.y = model_and_batch(case, memory_format, dtype, len(exact.squares))
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.params, lr=LR, momentum=0.9, foreach=True)
        self.gradient = NORMS[variant](self)
        self.first: dict[str, Any] | None = None

    def __call__(self) -> None:
        found = self.gradient()
        if self.first is None:
            self.first = found | {"grad_square": sum(square(p.grad) for p in self.params)}
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y)

    def keep(self, grads: Iterable[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def error(self) -> float:
        """The largest relative error of what the first step found, over all samples."""
        errors = []
        for name, found in self.first.items():
            found, exact = (
                torch.as_tensor(v, dtype=torch.float64).cpu()
                for v in (found, getattr(self.exact, name))
            )
            errors.append(((found - exact).abs() / exact).max())
        return torch.stack(errors).max().item()  # NaN if any is

    def check(self) -> None:
        """Raises FloatingPointError where the first step found something else, or the weights are
        no longer finite."""
        if not self.error() <= TOLERANCE[self.dtype]:
            raise FloatingPointError(
                f"a relative error of {self.error():.3g} beside one backward pass a sample"
            )
        if not all(p.isfinite().all() for p in self.params):
            raise FloatingPointError("the weights are not finite")


Found = dict[str, Tensor]  # squares [B], and noise [B] where it was asked for
Gradient = Callable[[], Found]  # leaves the gradient of the mean loss in .grad


def plain(s: NormStep) -> Gradient:
    def gradient() -> Found:
        s.keep(torch.autograd.grad(s.loss(s.model), s.params))
        return {}

    return gradient


def ours(s: NormStep, noise: bool) -> Gradient:
    def gradient() -> Found:
        found = sample_norms(s.model, s.x, s.y, noise=noise)
        s.keep(found.grads)
        return {"squares": found.squares} | ({"noise": found.noise} if noise else {})

    return gradient


def opacus(s: NormStep) -> Gradient:
    from opacus.grad_sample import GradSampleModule

    ignore_warnings()
    model = GradSampleModule(s.model)

    def gradient() -> Found:
        s.loss(model).backward()
        squares = sum(squares_of(p.grad_sample) for p in s.params)
        for p in s.params:
            p.grad_sample = None
        return {"squares": squares}

    return gradient


def opacus_ghost(s: NormStep) -> Gradient:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    ignore_warnings()
    model = GradSampleModuleFastGradientClipping(s.model)

    def gradient() -> Found:
        s.loss(model).backward()
        return {"squares": model.get_norm_sample().square()}

    return gradient


def backpack(s: NormStep) -> Gradient:
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    ignore_warnings()
    model, criterion = extend(s.model), extend(nn.CrossEntropyLoss())

    def gradient() -> Found:
        with extended(BatchL2Grad()):
            criterion(model(s.x), s.y).backward()
        missed = [name for name, p in model.named_parameters() if not hasattr(p, "batch_l2")]
        if missed:
            raise NotImplementedError(
                f"BackPACK finds no norms of {missed[0]}: no BatchL2Grad for its layer"
            )
        # of the mean loss's gradients
        return {"squares": sum(p.batch_l2 for p in s.params) * len(s.y) ** 2}

    return gradient


def vmapped(s: NormStep) -> Gradient:
    ignore_warnings()  # of what it does sample by sample
    # the optimizer changes them in place
    params = {name: p.detach() for name, p in s.model.named_parameters()}

    def loss_of_one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(s.model, params, x[None]), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))

    def gradient() -> Found:
        squares, total = [], None
        for x, y in zip(s.x.split(VMAP_CHUNK), s.y.split(VMAP_CHUNK), strict=True):
            rows = list(gradients(params, x, y).values())
            squares.append(sum(map(squares_of, rows)))
            total = add(total, [g.sum(0) for g in rows])
            del rows  # before there are others
        s.keep(torch._foreach_div(total, len(s.y)))
        return {"squares": torch.cat(squares)}

    return gradient


def loop(s: NormStep) -> Gradient:
    def gradient() -> Found:
        squares, total = [], None
        for x, y in zip(s.x.split(1), s.y.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(s.model(x), y), s.params)
            squares.append(torch.stack(torch._foreach_norm(grads)).square().sum())
            # cloned, since one may be a part of another's memory, as a class token's of positions'
            total = [g.clone() for g in grads] if total is None else add(total, grads)
            del grads  # before there are others
        s.keep(torch._foreach_div(total, len(s.y)))
        return {"squares": torch.stack(squares)}

    return gradient


def ignore_warnings() -> None:
    """Of libraries that warn of their own hooks for every model; what they get wrong is found by
    check()."""
    warnings.simplefilter("ignore", UserWarning)


def squares_of(rows: Tensor) -> Tensor:
    """[B] from [B, ...]."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).square()


def add(total: list[Tensor] | None, grads: Iterable[Tensor]) -> list[Tensor]:
    if total is None:
        return list(grads)
    torch._foreach_add_(total, list(grads))
    return total


NORMS: dict[str, Callable[[NormStep], Gradient]] = {
    "plain": plain,
    "ours": lambda s: ours(s, noise=False),
    "ours_inner": lambda s: ours(s, noise=True),
    "opacus": opacus,
    "opacus_ghost": opacus_ghost,
    "backpack": backpack,
    "vmap": vmapped,
    "loop": loop,
}
SLOW = {"opacus", "opacus_ghost", "backpack", "vmap", "loop"}  # several times a plain step
# Opacus 1.6 reads activations as if they were contiguous: the squared norms of channels-last ones
# are up to 80 % off. vmap is a little faster so.
CONTIGUOUS = {"opacus", "opacus_ghost", "vmap"}


# The variants of fullgrad


def random_images(count: int) -> Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return Split(rng.integers(0, CLASSES, count), pixels)


class OursFullGradient(Ours):
    """The full gradient of the run that fastsmooth.train prepares for --mode sampling."""

    def __init__(self, case: FullCase, compile: str):
        flags = (
            f"--dataset cifar100 --model {case.model} --mode sampling --steps 0 --bn eval "
            "--loader resident --device cpu"
        )
        flags += f" --compile {compile}"
        c = configs.resolve(parsing.parse(flags.split()).given)
        self.scratch = tempfile.TemporaryDirectory()
        self.run = self._prepare(c, random_images(case.images))
        self.point = self.run.schedule(0)

    def __call__(self) -> None:
        with gradients.undisturbed(self.run.model, self.run.config.bn):
            self.found = measuring.full_gradient(self.run, self.point)

    def check(self) -> None:
        require_finite(self.found)


class Originals(OriginalsFullGradient):
    def __init__(self, case: FullCase, training: bool):
        images = random_images(case.images)
        torch.manual_seed(0)
        net = models.build(case.model, CLASSES).train(training)
        super().__init__(net, images.pixels, images.labels, ORIGINALS_CHUNK)
        if sys.platform == "linux":
            # a script's workers are forked there; this process was spawned, and would spawn its own
            # at every pass
            self.loader.multiprocessing_context = "fork"

    def __call__(self) -> None:
        self.found = super().__call__()

    def check(self) -> None:
        require_finite(self.found)


def require_finite(grads: list[Tensor]) -> None:
    if not all(g.isfinite().all() for g in grads):
        raise FloatingPointError("the full gradient is not finite")


FULLS: dict[str, Callable[[FullCase], Callable[[], Any]]] = {
    "ours": partial(OursFullGradient, compile="off"),
    "ours_compiled": partial(OursFullGradient, compile="on"),
    "originals": partial(Originals, training=True),
    "originals_eval": partial(Originals, training=False),
}


# Whether the variants agree, and what a step of each holds: in a process that measures no time


def apart(function: Callable[[Variant], Any], variants: list[Variant]) -> list[Any]:
    """function(variant) of each, in a process of its own, so that nothing of it is in this one's
    children or memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=1, mp_context=context, initializer=quieten_profiler
    ) as pool:
        return list(pool.map(function, variants))


def those_that_agree(
    case: NormCase,
    variants: list[Variant],
    about: dict[str, dict[str, Any]],
    leave_out: Callable[[str], None],
) -> list[Variant]:
    """Leaves out what cannot run on this network; raises VariantError where a variant finds other
    norms in float64."""
    exact = one_by_one(case, torch.float64, min(CHECKED, case.batch_size))
    checks = [Variant(v.name, NormStep, (case, v.name, exact, torch.float64)) for v in variants]
    kept, wrong = [], []
    for variant, error in zip(variants, apart(error_or_reason, checks), strict=True):
        if isinstance(error, str):
            leave_out(f"not measured: {variant.name}: {error}")
            continue
        kept.append(variant)
        about[variant.name]["float64_error"] = rounded(error)
        if not error <= TOLERANCE[torch.float64]:
            wrong.append(f"{variant.name} is wrong: a relative error of {error:.3g} in float64")
    if wrong:
        raise VariantError("; ".join(wrong))
    return kept


def error_or_reason(variant: Variant) -> float | str:
    """The largest relative error of its norms, or why the variant cannot be made or run."""
    try:
        step = variant.make(*variant.args)
        step()
    except Exception as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    return step.error()


def add_allocations(
    case: NormCase,
    variants: list[Variant],
    result: list[dict[str, Any]],
    about: dict[str, dict[str, Any]],
) -> None:
    count = allocated_bytes_on_gpu if case.device == "cuda" else allocated_bytes
    held = dict(zip((v.name for v in variants), apart(count, variants), strict=True))
    # weights, momentum, images: what else a variant keeps from step to step is its own
    state = held["plain"][0]
    own = {name: peak - state for name, (_, peak) in held.items()}
    for row in result:
        row["alloc_ratio"] = rounded(own[row["variant"]] / own["plain"])
        about[row["variant"]]["alloc_mb"] = rounded(own[row["variant"]] / 1e6)


def quieten_profiler() -> None:
    # else it writes to stderr that it starts, stops and finds no GPU
    os.environ["KINETO_LOG_LEVEL"] = "99"


def allocated_bytes(variant: Variant) -> tuple[int, int]:
    """What PyTorch's CPU allocator holds between two steps, and the most that it holds in the
    second.

    Resident memory says the same with all of Python around it, which is several times what a small
    network needs.
    """
    gc.collect()  # what another variant left would be freed, and counted, while this one runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = variant.make(*variant.args)
        step()
        with record_function("counted step"):
            step()
    events = profiled.profiler.kineto_results.events()
    began = next(e.start_ns() for e in events if e.name() == "counted step")
    held = between = peak = 0
    for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += e.nbytes()
        if e.start_ns() < began:
            between = held
        else:
            peak = max(peak, held)
    return between, peak


def allocated_bytes_on_gpu(variant: Variant) -> tuple[int, int]:
    """The same of the GPU's allocator."""
    gc.collect()
    step = variant.make(*variant.args)
    step()
    between = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return between, torch.cuda.max_memory_allocated()


# The least that a step must compute


def floor(case: NormCase) -> dict[str, Any]:
    """FLOPs of a training step, and of norms beside it where a sample's weight gradient is a step's
    own intermediate.

    Forward pass, input gradient and weight gradient are 2 FLOPs a multiply-accumulate each. The
    norms then cost NORM_FLOP a value of each sample's gradient, those of the noise NOISE_FLOP.
    Convolutions and linear layers alone: the rest of a step is not arithmetic that counts.
    """
    layers = [
        {"layer": name, "step_flop": step * case.batch_size, "values": values * case.batch_size}
        for name, step, values in counted_layers(case)
    ]
    step, values = (sum(layer[key] for layer in layers) for key in ("step_flop", "values"))
    total = {"layer": "all", "step_flop": step, "values": values}
    return {"all": shares(total, step), "layers": [shares(layer, step) for layer in layers]}


def shares(layer: dict[str, Any], step: int) -> dict[str, Any]:
    """With the extra work as a percentage of the whole step of `step` FLOPs."""
    extra = {"norms_percent": NORM_FLOP, "noise_percent": NOISE_FLOP}
    return layer | {
        key: rounded(100 * flop * layer["values"] / step) for key, flop in extra.items()
    }


def counted_layers(case: NormCase) -> list[tuple[str, int, int]]:
    """(name, FLOPs of a step, parameters) of each convolution and linear layer, for one sample;
    nothing is computed."""
    found: list[tuple[str, int, int]] = []

    def note(label: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        outputs = output.shape[1 if isinstance(layer, nn.Conv2d) else -1]
        macs = output.numel() // outputs * layer.weight.numel()
        passes = 3 if inputs[0].requires_grad else 2  # the images need no gradient
        found.append((label, passes * 2 * macs, sum(p.numel() for p in layer.parameters())))

    with torch.device("meta"):
        model = built(case)
        for label, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(partial(note, label))
        model(torch.empty(1, 3, case.size, case.size))
    return found


def describe(result: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    measured = {row["variant"]: about["variants"][row["variant"]] for row in result}
    held = ", ".join(
        f"{row['variant']} {measured[row['variant']]['alloc_mb']:g} MB ({row['alloc_ratio']:.2f})"
        for row in result
    )
    errors = ", ".join(f"{name} {v['float64_error']:.1g}" for name, v in measured.items())
    least = about["floor"]["all"]
    return [
        f"  tensors at the peak of a step, beyond weights, momentum and images: {held}",
        f"  largest relative error in float64 beside one backward pass a sample: {errors}",
        f"  floor: {least['step_flop'] / 1e9:.4g} GFLOP a step in convolutions and linear layers; "
        f"at the least {least['norms_percent']:.2g} % more for the norms, "
        f"{least['noise_percent']:.2g} % for those of the noise",
    ]


rounded = timing.rounded

if __name__ == "__main__":
    sys.exit(main())
