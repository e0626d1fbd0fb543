"""What is installed and usable on this machine, and what a run would miss: --doctor

Nothing is imported before it is examined, so that an installation without PyTorch, or with a broken
one, is told too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastsmooth import __version__
from fastsmooth.cli.config import Config
from fastsmooth.cli.device import pick_device
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import one_line, show
from fastsmooth.processors import THREADS, keep_within_quota, processors, quota
from fastsmooth.runfolder.files import cache_folder, only_mine
from fastsmooth.runfolder.trackers import TRACKERS

if TYPE_CHECKING:
    import torch


OK, NOTE, BAD = "ok", "note", "BAD"  # a note is what a run does without, BAD what it cannot
ROOM = 10**7  # bytes: less does not hold the checkpoints of the smallest network
LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch() -> None:
    """Refuse a launcher's environment that lacks what several processes need to meet."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    wrong = []
    for name in LAUNCH:
        value = os.environ.get(name)
        if not value or not (name == "MASTER_ADDR" or value.isdigit()):
            wrong.append(name)
    if wrong:
        verb = "is" if len(wrong) == 1 else "are"
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but {', '.join(wrong)} {verb} not set to "
            "what several processes need: start them with torchrun, or unset WORLD_SIZE for one "
            "process"
        )


@dataclass(frozen=True)
class Row:
    """A line of the report; where something is wrong the text ends with the remedy."""

    name: str
    text: str
    state: str = OK


@dataclass(frozen=True)
class Required:
    """A package without which nothing runs."""

    module: str
    holds: str  # a name in it, by which it is told from another module of that name
    oldest: str
    pip: str  # what `pip install` is given


@dataclass(frozen=True)
class Extra:
    """A package that some flag or command wants."""

    name: str
    module: str
    distributions: tuple[str, ...]
    use: str
    pip: str
    heavy: bool = False  # seconds or much memory to import: done for a run that asks for it alone


TORCH = "torch torchvision"
REQUIRED = {  # each after those that it imports, so that the one to blame comes first
    "numpy": Required("numpy", "ndarray", "1.26", "numpy"),
    "pillow": Required("PIL.Image", "open", "5.3", "pillow"),
    "torch": Required("torch", "Tensor", "2.10", TORCH),
    "torchvision": Required("torchvision", "ops", "0.25", TORCH),
    "safetensors": Required("safetensors", "safe_open", "0.4", "safetensors"),
}
EXTRAS = (
    Extra("triton", "triton", ("triton", "pytorch-triton"), "the kernels on a GPU", "triton"),
    Extra(
        "dali",
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "--loader dali, the fastest for files",
        "'fastsmooth[dali]'",
    ),
    Extra("timm", "timm", ("timm",), "--model timm/NAME", "'fastsmooth[timm]'", heavy=True),
    Extra("matplotlib", "matplotlib", ("matplotlib",), "PDF figures", "'fastsmooth[plot]'"),
    *(
        Extra(name, name, (name,), f"--tracker {name}", f"'fastsmooth[{name}]'", heavy=True)
        for name in TRACKERS
    ),
    Extra("rich", "rich", ("rich",), "a progress bar", "'fastsmooth[progress]'"),
    Extra("ray", "ray", ("ray",), "fastsmooth.sweep --ray", "'fastsmooth[ray]'", heavy=True),
)


def examine(c: Config) -> None:
    """Print what a run of `c` finds here, a line each. Raises ConfigError where no run can be
    done."""
    bad = []
    for row in rows(c):
        show(f"{row.state:<4}  {row.name:<12} {row.text}", indent=19)
        if row.state == BAD:
            bad.append(row)
    if bad:
        more = f" ({len(bad) - 1} more above, marked {BAD})" if len(bad) > 1 else ""
        raise ConfigError(f"no run can be done here: {bad[0].name} {bad[0].text}{more}")
    show("a run can be done")


def rows(c: Config) -> Iterator[Row]:
    """The lines of the report, each made when it is asked for."""
    yield Row("fastsmooth", f"{__version__} in {Path(__file__).parents[1]}")
    yield Row("python", f"{platform.python_version()}, {sys.executable}")
    modules = {}
    for name, needed in REQUIRED.items():
        if name == "torchvision" and "torch" not in modules:
            yield without_torch()
            continue
        module, row = required(name, needed)
        if module is not None:
            modules[name] = module
        if name == "torchvision" and module is not None:
            row = belonging(row, modules["torch"], module)
        yield row
    torch = modules.get("torch")
    for package in EXTRAS:
        yield guarded(package.name, partial(extra, package, c, torch))
    yield guarded("processors", lambda: threads(torch))
    yield launch()
    if torch is not None:
        try:
            yield from devices(c, torch)
        except Exception as error:
            yield Row("device", f"cannot be examined ({described(error)}): try --device cpu", BAD)
    yield guarded("memory", memory)
    yield guarded("--out", lambda: out(Path(c.out or "runs")))
    yield guarded("cache", cache)


def guarded(name: str, look: Callable[[], Row]) -> Row:
    """The row, or what looking raised: what is broken may raise anything, and the next rows are
    wanted all the same."""
    try:
        return look()
    except Exception as error:
        return Row(name, f"cannot be examined: {described(error)}", NOTE)


def described(error: BaseException) -> str:
    kind = type(error).__name__
    return f"{kind}: {one_line(error)}" if str(error).strip() else kind


def attempt(module: str) -> tuple[Any, str]:
    """The imported module, or None and the error; what it prints and warns of is not shown."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        return None, described(error)


def present(module: str) -> bool:
    """Whether something can be imported by this name; a mere folder of that name cannot."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that it would be in
        return False
    except Exception:  # that package is broken, and an import will say how
        return True
    return spec is not None and spec.origin is not None


def recorded(distributions: tuple[str, ...]) -> dict[str, str]:
    """The version of those that are installed, by name, as pip recorded it."""
    versions = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def numbers(version: str) -> tuple[int, ...]:
    """(2, 14, 1) of "2.14.1+cu130"."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def required(name: str, needed: Required) -> tuple[Any, Row]:
    """The module, where it can be used, and its row."""
    if not present(needed.module):
        return None, Row(name, f"missing: pip install {needed.pip}", BAD)
    module, why = attempt(needed.module)
    if module is None:
        again = f"pip install --force-reinstall {needed.pip}"
        return None, Row(name, f"cannot be imported ({why}): {again}", BAD)
    if not hasattr(module, needed.holds):
        place = getattr(module, "__file__", "another module")
        text = f"is hidden by {place}, which is something else of that name: rename that"
        return None, Row(name, text, BAD)
    version = str(module.__version__)
    if numbers(version) < numbers(needed.oldest):
        text = (
            f"{version} is too old, {needed.oldest} is the oldest: pip install --upgrade "
            f"{needed.pip}"
        )
        return None, Row(name, text, BAD)
    return module, Row(name, version + (f", {built_for(module)}" if name == "torch" else ""))


def built_for(torch: ModuleType) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "for CPUs, without CUDA"


def without_torch() -> Row:
    versions = recorded(("torchvision",))
    if versions:
        return Row("torchvision", f"{versions['torchvision']}, not tried without PyTorch", NOTE)
    return Row("torchvision", f"missing: pip install {TORCH}", BAD)


def belonging(row: Row, torch: ModuleType, torchvision: ModuleType) -> Row:
    """Whether this torchvision was made for this PyTorch: what it records, and whether its compiled
    part works with it."""
    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.tensor([0.5, 1.0]), 0.5)
    except Exception as error:
        why = f"does not work with PyTorch {torch.__version__} ({described(error)})"
        return Row(row.name, f"{row.text} {why}: pip install --upgrade {TORCH}", BAD)
    wanted = wanted_torch()
    if wanted and not wanted.holds(torch.__version__):
        text = (
            f"{row.text} was made for PyTorch {wanted.version}, not {torch.__version__}: pip "
            f"install --upgrade {TORCH}"
        )
        return Row(row.name, text, NOTE)
    return Row(row.name, f"{row.text}, works with this PyTorch")


@dataclass(frozen=True)
class Wanted:
    """The PyTorch that torchvision asks for."""

    exactly: bool
    version: str

    def holds(self, version: str) -> bool:
        has, wanted = numbers(version), numbers(self.version)
        return has[: len(wanted)] == wanted if self.exactly else has >= wanted


def wanted_torch() -> Wanted | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("torchvision") or ():
            match = re.match(r"torch\s*\(?(==|>=)\s*(\d[\d.]*)", line)
            if match:
                return Wanted(match[1] == "==", match[2])
    return None


def extra(package: Extra, c: Config, torch: ModuleType | None) -> Row:
    """The row of a package; it is BAD where `c` asks for the package and it cannot be used."""
    timm = c.model.startswith("timm/") or c.optimizer.startswith("timm/")
    needed = {"dali": c.loader == "dali", "timm": timm}
    asked = needed.get(package.name, False)
    wrong = BAD if asked else NOTE
    cuda = torch.version.cuda if torch is not None else None
    pip = package.pip
    if package.name == "dali" and (cuda or "").startswith("12."):
        pip = "nvidia-dali-cuda120"  # the extra's is for CUDA 13
    installed = recorded(package.distributions)
    if not present(package.module):
        return Row(package.name, f"missing, for {package.use}: pip install {pip}", wrong)
    versions = " and ".join(installed.values())
    if package.heavy and installed and not asked and package.name not in c.trackers:
        return Row(package.name, f"{versions}, not tried; for {package.use}")
    module, why = attempt(package.module)
    if module is None:
        again = f"pip install --force-reinstall --no-deps {' '.join(installed) or pip}"
        text = f"{versions} cannot be imported ({why}); for {package.use}: {again}"
        return Row(package.name, text.strip(), wrong)
    other_cuda = bool(cuda) and unlike(next(iter(installed), ""), cuda or "")
    if package.name == "dali" and (len(installed) > 1 or other_cuda):
        text = (
            f"{versions} of {' and '.join(installed)} beside a PyTorch of CUDA {cuda}: pip "
            f"uninstall {' '.join(installed)}, then pip install {pip}"
        )
        return Row(package.name, text, NOTE)
    versions = versions or getattr(module, "__version__", "of unknown version")
    return Row(package.name, f"{versions}, for {package.use}")


def unlike(dali: str, cuda: str) -> bool:
    """Whether a DALI, such as nvidia-dali-cuda130, is for another CUDA than PyTorch's."""
    return "cuda" in dali and not dali.partition("cuda")[2].startswith(cuda.partition(".")[0])


def threads(torch: ModuleType | None) -> Row:
    text = f"{processors()} of {os.cpu_count()} usable"
    if quota() < math.inf:
        text += f" (the container's quota is {quota():.3g})"
    if torch is not None:
        keep_within_quota(torch)  # as a run does
        said = [f"{name}={os.environ[name]}" for name in THREADS if os.environ.get(name)]
        text += f", PyTorch takes {torch.get_num_threads()} threads"
        text += f" ({', '.join(said)})" if said else ""
    return Row("processors", text)


def launch() -> Row:
    """What a launcher such as torchrun has set."""
    said = [f"{name}={os.environ[name]}" for name in LAUNCH if name in os.environ]
    text = ", ".join(said) or "one process: no launcher has set WORLD_SIZE"
    try:
        check_launch()
    except ConfigError as error:
        return Row("launch", str(error), BAD)
    return Row("launch", text)


def devices(c: Config, torch: ModuleType) -> Iterator[Row]:
    """Every GPU, the device of the run and the kernels there."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()  # warns of a driver that is too old
    for number in range(torch.cuda.device_count() if usable else 0):
        yield guarded(f"cuda:{number}", partial(gpu, number, torch))
    if not usable:
        yield no_gpu(torch, [str(warning.message) for warning in said])
    try:
        device = pick_device(c.device, torch, c.precision)
        (torch.ones(8, device=device) * 2).sum().item()
    except ConfigError as error:
        yield Row("device", str(error), BAD)
        return
    except Exception as error:
        why = described(error)
        text = f"--device {c.device} cannot compute ({why}): --device cpu trains without it"
        yield Row("device", text, BAD)
        return
    yield Row("device", f"--device {c.device} is {device}")
    for where in dict.fromkeys((device, torch.device("cpu"))):
        yield kernels(where, torch, c.kernels if where == device else "auto")


def gpu(number: int, torch: ModuleType) -> Row:
    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    major, minor = torch.cuda.get_device_capability(number)
    return Row(
        f"cuda:{number}",
        f"{name}, {gigabytes(free)} free of {gigabytes(total)}, compute capability {major}.{minor}",
    )


def no_gpu(torch: ModuleType, said: list[str]) -> Row:
    mps = torch.backends.mps.is_available()
    text = "an Apple GPU" if mps else "none that PyTorch can use"
    if said:
        return Row("GPU", f"{text}: {' '.join(' '.join(said).split())}", NOTE)
    if not mps and Path("/proc/driver/nvidia/version").exists():
        text += f", though an NVIDIA driver is here: this PyTorch is {built_for(torch)}; "
        text += f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}"
        return Row("GPU", text, NOTE)
    return Row("GPU", text)


def kernels(device: torch.device, torch: ModuleType, asked: str) -> Row:
    """Which kernels run on the device, where `asked` is asked for; builds them for a CPU."""
    name = f"{device.type} kernels"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            from fastsmooth.kernels import backend, native  # with PyTorch, which may be broken

            backend.use(asked, device)
            chosen = backend.choose(device, torch.float32)
        except Exception as error:
            return Row(name, f"cannot be chosen: {described(error)}", BAD)
    messages = [" ".join(str(warning.message).split()) for warning in said]
    if asked not in ("auto", chosen):
        return Row(name, f"--kernels {asked} cannot run here: give --kernels {chosen}", BAD)
    if chosen == "native":
        return Row(name, "; ".join([f"native: C++, built by {native.compiler()}", *messages]))
    if chosen == "triton":
        return Row(name, "triton")
    why = "; ".join(messages) or "plain PyTorch, slower"
    try:
        native.compiler()
        remedy = ""
    except native.BuildError:
        remedy = ": install one, or name it in CXX" if device.type == "cpu" else ""
    return Row(name, f"reference: {why}{remedy}", NOTE)


def memory() -> Row:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return Row("memory", f"{gigabytes(free)} free of {gigabytes(total)}")


def out(path: Path) -> Row:
    """Where run folders go: no run begins that cannot write there."""
    above = nearest(path)
    if not above.is_dir():
        return Row("--out", f"{path}: {above} is not a folder: choose another --out", BAD)
    if not os.access(above, os.W_OK | os.X_OK):
        return Row("--out", f"{path}: {above} cannot be written: choose another --out", BAD)
    free = shutil.disk_usage(above).free
    text = f"{path}, {gigabytes(free)} free"
    if free < ROOM:
        return Row("--out", f"{text}: make room, or choose another --out", BAD)
    return Row("--out", text)


def cache() -> Row:
    """Where the C++ kernels and the sizes of image files are kept."""
    remedy = "name another folder in XDG_CACHE_HOME"
    try:
        path = cache_folder()
    except RuntimeError as error:
        return Row("cache", f"none: {one_line(error)} {remedy}", NOTE)
    above = nearest(path)
    text = f"{path}, {gigabytes(shutil.disk_usage(above).free)} free"
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        return Row("cache", f"{text}, cannot be written: {remedy}", NOTE)
    if path.is_dir() and not only_mine(path):
        text += ", other users may write there, so the C++ kernels are kept elsewhere"
        return Row("cache", f"{text}: {remedy}", NOTE)
    return Row("cache", text)


def nearest(path: Path) -> Path:
    """The path, or what exists of those above it."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
