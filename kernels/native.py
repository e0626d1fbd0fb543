"""cpu.cpp as a shared library: built with the C++ compiler that torch.compile uses too, once a
machine, and kept.

The library lies in $XDG_CACHE_HOME/fastsmooth (~/.cache/fastsmooth) under a name that holds a hash
of the source, the flags, the compiler and the processor, so that a home directory shared by unlike
machines serves none of them wrong code, and a hash of its own bytes, so that a damaged one is never
loaded. Nor is one that another user owns or may write, or that lies in such a folder: then the
system's folder for temporary files has one of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-shared", "-fPIC"]


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
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["failed without a word"]
        raise BuildError(f"{command[0]}: {words[0]}")
    return done.stdout


def build() -> Path:
    """The path of a library that nobody else may have written, built if none is kept. Raises
    BuildError."""
    cxx = compiler()
    # Apple's clang has no OpenMP: one thread there
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]
    made_of = [SOURCE.read_text(), *FLAGS, *threads, run([cxx, "--version"]), processor()]
    key = digest("\n".join(made_of).encode())
    command, wrong = [cxx, *FLAGS, *threads, str(SOURCE)], []
    for place in (cache_folder, private_folder):
        try:
            library = kept_or_made(place(), key, command)
        except OSError as error:
            wrong.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            continue
        if wrong:
            warn(
                f"{wrong[0]}: the C++ kernels are kept in {library.parent} instead: name a folder "
                "of yours in XDG_CACHE_HOME"
            )
        return library
    raise BuildError(f"{'; '.join(wrong)}: name a folder of yours in XDG_CACHE_HOME")


def cache_folder() -> Path:
    """Raises OSError where there is no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsmooth"
    except RuntimeError:
        raise OSError("no home directory") from None


def private_folder() -> Path:
    """Where the library is kept until the machine starts anew. Raises OSError where there is no
    folder for such files."""
    return Path(tempfile.gettempdir()) / f"fastsmooth-{os.geteuid()}"


def kept_or_made(folder: Path, key: str, command: list[str]) -> Path:
    """The sound library of this key in the folder, made by the command if there is none. Raises
    OSError and BuildError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    doubt = doubted(os.stat(folder))
    if os.lstat(folder).st_uid != os.geteuid():
        doubt = "belongs to another user"
    if doubt:
        raise PermissionError(errno.EPERM, f"it {doubt}", str(folder))
    bad = []
    for path in sorted(folder.glob(f"cpu-{key}-*.so")):
        try:
            status = os.lstat(path)
            doubt = doubted(status) if stat.S_ISREG(status.st_mode) else "is no file"
            if not doubt and path.name == name_of(key, path.read_bytes()):
                return path
        except FileNotFoundError:  # another process has built it again
            continue
        warn(f"{path} {doubt or 'is damaged'}: it is not loaded but built again")
        bad.append(path)
    made = make(folder, key, command)
    for path in bad:
        if path != made:
            with contextlib.suppress(OSError):
                path.unlink()
    return made


def make(folder: Path, key: str, command: list[str]) -> Path:
    """The new library. Whoever else makes it now, it is whole; the same bytes have the same
    name."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        aside = Path(scratch) / "cpu.so"
        run([*command, "-o", str(aside)])
        aside.chmod(0o700)  # the umask may let others write it
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        target = folder / name_of(key, aside.read_bytes())
        os.replace(aside, target)
    return target


def name_of(key: str, content: bytes) -> str:
    """A name that holds what the library was made of and what it is: a cut or altered one does not
    match its own."""
    return f"cpu-{key}-{digest(content)}.so"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def doubted(status: os.stat_result) -> str:
    """Why a file or a folder may be the work of another user; empty where it cannot be."""
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return "may be written by other users" if others else ""


def warn(words: str) -> None:
    warnings.warn(words, stacklevel=3)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, with one warning, where it cannot be built."""
    try:
        return ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warn(f"the kernels run in plain PyTorch, slower: {error}")
        return None


def function(name: str, *dtypes: torch.dtype) -> Callable[..., None]:
    """The library's function of this name for tensors of these dtypes."""
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return getattr(library(), "_".join([name, *words]))


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where the values of each begin in memory; of tensors of any shapes and dtypes [n]."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
