"""The device that --device names, by one rule for all commands."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

from fastsmooth.cli.flags import ConfigError

if TYPE_CHECKING:
    import torch


def pick_device(name: str, torch: ModuleType, precision: str = "fp32") -> torch.device:
    """The torch.device of "auto", "cpu", "mps", "cuda" or "cuda:N".

    "cuda" gives each of the processes that torchrun started here a GPU of its own. `torch` is the
    module, which is imported once the flags are right. Raises ConfigError for a device that this
    machine lacks, and for one that does not compute in `precision`.
    """
    if name == "auto":
        name = best(torch)
    if name.startswith("cuda"):
        name = f"cuda:{gpu_index(name, torch)}"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "--device mps: this machine has no Apple GPU that PyTorch can use: --device cpu"
        )
    if precision == "tf32" and not name.startswith("cuda"):
        raise ConfigError(
            f"--precision tf32 is a mode of NVIDIA GPUs: with --device {name} use fp32 or bf16"
        )
    return torch.device(name)


def compute_float32(torch: ModuleType, how: str) -> None:
    """Multiply float32 numbers on an NVIDIA GPU in "ieee" float32 or in "tf32"."""
    torch.backends.cuda.matmul.fp32_precision = how
    torch.backends.cudnn.conv.fp32_precision = how


def best(torch: ModuleType) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def gpu_index(name: str, torch: ModuleType) -> int:
    """The GPU of this process: the one that "cuda:N" names, else that of its rank here."""
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 and ":" in name:
        raise ConfigError(
            f"--device {name} with {processes} processes: --device cuda gives each a GPU of its own"
        )
    if 0 < count < processes:
        raise ConfigError(
            f"{processes} processes on a machine with {count} GPUs: --nproc-per-node {count}, or "
            "--device cpu"
        )
    index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available() or index >= count:
        raise ConfigError(
            f"--device {name}: this machine has {count} CUDA devices that PyTorch can use: "
            "--device cpu"
        )
    return index
