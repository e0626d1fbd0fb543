"""Training steps: ours in all forms, what measuring adds, and other loops."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import bench_noise
from benchmarks.bench_noise import NormCase, NormStep
from benchmarks.gpu import product
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.lanes import AnyLane, Here, Lane, call, race
from benchmarks.gpu.peers import LR, LoaderLoop, Ours, ResidentLoop
from benchmarks.timing import rounded

IMAGES = 200_000  # so many that no epoch ends, and nothing is evaluated, while updates are timed
EPOCH = 50_000  # images that the other loops have
WORKERS = 16
MODEL = {False: "resnet18", True: "resnet8"}  # by whether the cell is dry


def flags_for(cell: Cell, batch_size: int, *more: str) -> list[str]:
    flags = ["--dataset", "cifar100", "--model", MODEL[cell.dry], "--batchsize", str(batch_size)]
    flags += ["--optimizer", "shb", "--lr", str(LR), "--log-every", "1000000"]
    flags += ["--device", cell.device.type, *more]
    return flags if not cell.dry else without_gpu(flags)


def without_gpu(flags: list[str]) -> list[str]:
    """The same on a CPU, where nothing is compiled or captured and TF32 is no precision."""
    values = {"--compile": "off", "--graphs": "off", "--precision": "fp32"}
    return [values.get(before, flag) for before, flag in zip(["", *flags], flags, strict=False)]


class Lanes:
    """The lanes of a cell; those that fail are told and left out."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.by_name: dict[str, AnyLane] = {}

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(list(self.by_name))

    def close(self, names: list[str]) -> None:
        for name in names:
            self.by_name.pop(name).close()

    def begin(
        self, cases: dict[str, str], loops: dict[str, tuple[Any, ...]]
    ) -> dict[str, list[float]]:
        """Make all loops, by name (make, *args), at once; seconds of the first updates of each.
        `cases`: what the rows of each are called."""
        kind = Here if self.cell.dry else Lane
        for name, (make, *args) in loops.items():
            self.by_name[name] = self.by_name.get(name) or kind()
            self.by_name[name].ask("begin", make, *args)
        firsts = {}
        for name in loops:
            with self.cell.part(cases[name], variant=name):
                firsts[name] = self.by_name[name].answer()
        self.close([name for name in loops if name not in firsts])
        return firsts

    def tell(
        self,
        case: str,
        firsts: dict[str, list[float]],
        ratio_to: str,
        batch_size: int,
        kernels: bool = False,
        seconds: float = 0.2,
        rounds: int = 5,
        **about: Any,
    ) -> None:
        """Race them, and tell what an update takes in each; with `kernels` how many it runs. A lane
        named VARIANT/more is told as VARIANT."""
        if self.cell.dry:
            seconds, rounds = 1e-3, 2
        lanes = {name: self.by_name[name] for name in firsts}

        def failed(name: str, error: RuntimeError) -> None:
            self.close([name])
            with self.cell.part(case, variant=variant_of(name)):
                raise error

        found = race(lanes, firsts, seconds, rounds, failed)
        by_variant = {variant_of(name): measured for name, measured in found.items()}
        self.cell.tell_times(case, by_variant, ratio_to, batch_size, per="images", **about)
        for name in found:
            variant = variant_of(name)
            with self.cell.part(f"{case}/facts", variant=variant):
                facts = call(lanes[name], "facts")
                if kernels:
                    facts |= {"kernels_an_update": call(lanes[name], "kernels", 3)}
                shown = [rounded(s) for s in firsts[name]]
                self.cell.tell(f"{case}/facts", variant=variant, first_updates_s=shown, **facts)


def variant_of(name: str) -> str:
    return name.partition("/")[0]


# --precision, --compile, --graphs
FORMS = {
    "bf16, eager": ("bf16", "off", "off"),
    "bf16, compiled": ("bf16", "on", "off"),
    "bf16, eager, graph": ("bf16", "off", "on"),
    "bf16, compiled, graph": ("bf16", "on", "on"),
    "tf32, compiled, graph": ("tf32", "on", "on"),
    "fp32, compiled, graph": ("fp32", "on", "on"),
}


def training_steps(cell: Cell) -> None:
    """Whole updates of fastsmooth.train at growing batch sizes, by precision, compilation and
    graphs. Other precisions run at one size alone."""
    sizes, other = ((32, 128, 512, 1024), 128) if not cell.dry else ((2, 4), 4)
    images = IMAGES if not cell.dry else 3000
    others = [name for name, (precision, *_) in FORMS.items() if precision != "bf16"]
    with Lanes(cell) as lanes:
        for size in sizes:
            running = [name for name in FORMS if size == other or name not in others]
            loops = {
                name: (Ours, flags_for(cell, size, *form_flags(*FORMS[name])), images)
                for name in running
            }
            case = f"step/b{size}"
            firsts = lanes.begin(dict.fromkeys(loops, case), loops)
            about = {"batch": size, "model": MODEL[cell.dry]}
            lanes.tell(case, firsts, "bf16, compiled", size, size == other, **about)
            lanes.close([name for name in others if name in lanes.by_name])


def form_flags(precision: str, compiled: str, graphs: str) -> list[str]:
    return ["--precision", precision, "--compile", compiled, "--graphs", graphs]


def peers(cell: Cell) -> None:
    """The same network in other loops, all bfloat16 autocast, SGD with momentum."""
    sizes, epoch, workers, images = (128, 512), EPOCH, WORKERS, IMAGES * 3 // 2
    if cell.dry:
        sizes, epoch, workers, images = (4, 8), 60, 0, 3000
    model, device = MODEL[cell.dry], cell.device.type
    with Lanes(cell) as lanes:
        loops, cases = {}, {}
        for size in sizes:
            mine = flags_for(cell, size, *form_flags("bf16", "on", "auto"))
            for name, loop in {
                "ours": (Ours, mine, images),
                "loader": (LoaderLoop, model, size, epoch, device, workers),
                "resident": (ResidentLoop, model, size, epoch, device),
            }.items():
                loops[f"{name}/b{size}"], cases[f"{name}/b{size}"] = loop, f"peers/b{size}"
        firsts = lanes.begin(cases, loops)
        for size in sizes:
            some = {name: first for name, first in firsts.items() if name.endswith(f"/b{size}")}
            about = {"batch": size, "model": model, "precision": "bf16", "workers": workers}
            # windows of an epoch or more of the resident loop, which augments at its beginning
            about |= {"seconds": 1.4, "rounds": 3}
            lanes.tell(f"peers/b{size}", some, "resident", size, **about)
            lanes.close([name for name in some if name in lanes.by_name])


# Per-sample norms


def per_sample(cell: Cell) -> None:
    """What the norms of all samples' gradients cost beside a plain step, in float32 and TF32."""
    case = NormCase("resnet18", "group", 128, steps=1)
    if cell.dry:
        case = NormCase("resnet8", "group", 4, steps=1)
    case = replace(case, device=cell.device.type)
    exact = bench_noise.one_by_one(case, torch.float32, case.batch_size)
    names = ["plain", "ours", "ours_inner", "vmap"]
    if find_spec("opacus"):
        names.insert(3, "opacus_ghost")
    else:
        cell.tell(case.name, variant="opacus_ghost", skipped="Opacus is not installed")
    for how in ("ieee", "tf32") if not cell.dry else ("ieee",):
        norm_steps(cell, case, names, exact, how)
    measured_updates(cell)


def norm_steps(
    cell: Cell, case: NormCase, names: list[str], exact: bench_noise.Exact, how: str
) -> None:
    precision = {"ieee": "fp32", "tf32": "tf32"}[how]
    steps: dict[str, NormStep] = {}
    for name in names:
        with cell.part(f"{case.name}/{precision}", variant=name):
            step = NormStep(case, name, exact)
            product.multiply_in(how)  # NormStep has set it to ieee
            step()
            steps[name] = step
    found = cell.measure(steps, seconds=0.4, rounds=5)
    cell.tell_times(
        f"{case.name}/{precision}",
        found,
        "plain",
        case.batch_size,
        per="images",
        precision=precision,
    )
    for name, step in steps.items():
        with cell.part(f"{case.name}/{precision}/right", variant=name):
            cell.tell(f"{case.name}/{precision}/right", variant=name, error=rounded(step.error()))
            if how == "ieee":
                step.check()
    steps.clear()


def measured_updates(cell: Cell) -> None:
    """Updates of a run that measures at each of them, apart and as the step, beside those of one
    that never does; all eager."""
    size = 128 if not cell.dry else 4
    common = ["--norm", "group", *form_flags("bf16", "off", "off")]
    images = IMAGES // 2 if not cell.dry else 3000
    loops = {"plain": (Ours, flags_for(cell, size, *common), images)}
    for name in ("apart", "step"):
        flags = flags_for(cell, size, *common, "--track-noise", "every=1", "--measure", name)
        loops[f"measured, {name}"] = (Ours, flags, images)
    with Lanes(cell) as lanes:
        case = f"measured/b{size}"
        firsts = lanes.begin(dict.fromkeys(loops, case), loops)
        about = {
            "batch": size,
            "model": MODEL[cell.dry],
            "precision": "bf16",
            "compile": "off",
            "norm": "group",
        }
        lanes.tell(case, firsts, "plain", size, **about)
