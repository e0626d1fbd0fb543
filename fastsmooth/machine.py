"""What the bits of a run depend on besides its flags: what `auto` chose, and the machine.

Every checkpoint holds both. A run that goes on uses again what was chosen (config.RESOLVED_ONCE), takes over the number of
threads where there are processors for it, and says in one line what is not as it was.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import torchvision

from fastsmooth import __version__
from fastsmooth.config import RESOLVED_ONCE, flag
from fastsmooth.log import processor
from fastsmooth.processors import THREADS, processors


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
    """As many threads of PyTorch as before, where the user says no number and this process has processors for them."""
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
