"""Where a run computes, and what its bits depend on besides the flags.

Every checkpoint holds the latter. A run that goes on uses again what was chosen
(config.RESOLVED_ONCE), takes over the number of threads where there are processors for it, and says
in one line what is not as it was.
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torchvision

from fastsmooth import __version__
from fastsmooth.cli.config import RESOLVED_ONCE, Config
from fastsmooth.cli.device import compute_float32
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.kernels import backend
from fastsmooth.messages import warn
from fastsmooth.processors import THREADS, processors
from fastsmooth.runfolder.machine import processor
from fastsmooth.schedule import Schedule


def choose_kernels(c: Config, device: torch.device) -> str:
    """The implementation of kernels here, built now if need be; a line says if they fall back."""
    backend.use(c.kernels, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = backend.choose(device, torch.float32)
    if c.kernels not in ("auto", chosen):
        needs = {
            "native": "a CPU and a C++ compiler (CXX, c++, g++ or clang++)",
            "triton": "an NVIDIA GPU and Triton",
        }
        raise ConfigError(
            f"--kernels {c.kernels} needs {needs[c.kernels]}: give --kernels {chosen}"
        )
    for warning in caught:
        warn(str(warning.message))
    return chosen


def choose_precision(c: Config, device: torch.device) -> str:
    """fp32, tf32 or bf16: what --precision names, or what auto means here."""
    if c.precision != "auto":
        return c.precision
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "fp32"
    return "tf32"  # as PyTorch convolves by itself, and so as the published code trained


def choose_graphs(c: Config, device: torch.device, kernels: str, processes: int) -> str:
    """on or off: whether updates are captured as CUDA graphs. Raises ConfigError where they cannot
    be: without a GPU, and without its kernels, since the others read numbers on the host.

    A graph is of images of one size, at their place in memory; where the size changes, none is
    captured. Nor is the update of an optimizer that is none of our forms.
    """
    if c.graphs == "on" and device.type != "cuda":
        raise ConfigError(
            f"--graphs on needs an NVIDIA GPU, not --device {device.type}: use --graphs auto"
        )
    if c.graphs == "on" and kernels != "triton":
        raise ConfigError(f"--graphs on needs --kernels triton, not {kernels}: use --graphs auto")
    if c.graphs != "auto":
        return c.graphs
    fits = kernels == "triton" and processes == 1 and len(c.image_stages) == 1 and not c.foreign
    return "on" if fits and not c.deterministic else "off"


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, this thread's work goes to a stream of a GPU that is not the default one, on which
    nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        # after an error there may be work that never ends: an exchange with a process that is gone
        torch.cuda.synchronize(device)


def set_numerics(c: Config, precision: str, schedule: Schedule) -> None:
    """PyTorch's settings for the precision and the repeatability that the flags ask for."""
    # under bf16 of what leaves autocast: measurements, whose rounding is far below their errors
    compute_float32(torch, "ieee" if precision == "fp32" else "tf32")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # cuDNN's search for the fastest algorithm takes seconds at every new batch size (LOG.md)
    same_batch = not schedule.batch_moves and len(list(schedule.stages())) == 1
    torch.backends.cudnn.benchmark = same_batch and not c.deterministic
    torch.backends.cudnn.benchmark_limit = 4  # algorithms that it tries, of ten


def device_name(device: torch.device) -> str:
    """As people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this {device.type.upper()}"


def facts(device: torch.device, processes: int) -> dict[str, Any]:
    """What sums are added by, and in which order. Plain values, for a checkpoint."""
    return {
        "fastsmooth": __version__,
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "torchvision": str(torchvision.__version__),
        "processor": processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def take_over_threads(before: dict[str, Any]) -> None:
    """As many threads of PyTorch as before, where the user says no number and this process has
    processors for them."""
    count = before.get("threads")
    if any(os.environ.get(name) for name in THREADS):
        return
    if isinstance(count, int) and count != torch.get_num_threads() and 0 < count <= processors():
        torch.set_num_threads(count)


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words; empty where nothing does, or nothing is known of before."""
    named = {name: flag(name) if name in RESOLVED_ONCE else name for name in now}
    differing = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{named[name]} {now[name]} instead of {before[name]}" for name in differing)
