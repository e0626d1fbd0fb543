"""cpu.cpp as a shared library: built with the C++ compiler that torch.compile uses too, once a machine, and kept.

The library lies in $XDG_CACHE_HOME/fastsmooth (~/.cache/fastsmooth) under a name that holds a hash of the source, the
flags, the compiler and the processor, so that a home directory shared by unlike machines serves none of them wrong code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed; the message says which."""


def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C++ compiler found (CXX, c++, g++, clang++)")


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise BuildError(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed without a word'])[0]}")
    return done.stdout


def build() -> Path:
    """The library's path, built if it is not there. Raises BuildError."""
    cxx = compiler()
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has no OpenMP: one thread there
    key = "\n".join([SOURCE.read_text(), *FLAGS, *threads, run([cxx, "--version"]), processor()])
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsmooth"
    except RuntimeError:
        raise BuildError("no home directory to keep it in: name a folder in XDG_CACHE_HOME") from None
    target = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            aside = Path(scratch) / target.name
            run([cxx, *FLAGS, *threads, str(SOURCE), "-o", str(aside)])
            os.replace(aside, target)  # whole or not at all, whoever else builds it now
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}") from None
    return target


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, with one warning, where it cannot be built."""
    try:
        return ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(f"the kernels run in plain PyTorch, slower: {error}", stacklevel=2)
        return None


def function(name: str, *dtypes: torch.dtype) -> Callable[..., None]:
    """The library's function of this name for tensors of these dtypes."""
    return getattr(library(), "_".join([name, *(str(dtype).removeprefix("torch.") for dtype in dtypes)]))


def addresses(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
