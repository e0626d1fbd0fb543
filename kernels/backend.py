"""Which implementation of a kernel runs, decided here and nowhere else.

triton      on a GPU
native      on a CPU: cpu.cpp, where there is a C++ compiler
reference   anywhere else: plain PyTorch
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsmooth.kernels import native

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
HAS_TRITON = importlib.util.find_spec("triton") is not None


_asked: dict[str, str] = {}  # device type -> implementation, where not the fastest


def use(implementation: str, device: torch.device) -> None:
    """From now on this implementation on devices of that kind, wherever it can run; auto: the
    fastest that can."""
    _asked[device.type] = implementation


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for parameters of this dtype on this device."""
    asked = _asked.get(device.type, "auto")
    if asked == "reference":
        return asked
    best = fastest(device, dtype)
    return best if asked in ("auto", best) else "reference"


def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest implementation for parameters of this dtype on this device."""
    if device.type == "cuda" and dtype in PARAM_DTYPES and HAS_TRITON:
        return "triton"
    if device.type == "cpu" and dtype in PARAM_DTYPES and native.library():
        return "native"
    return "reference"


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the momentum and of the arithmetic for parameters of this dtype: float32, or float64 for
    float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or the widest that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def scalar(value: float, device: torch.device) -> Tensor:
    """A hyperparameter as the kernels read it: 0-d float64, on the GPU for a GPU, else on the
    CPU."""
    return torch.tensor(
        value, dtype=torch.float64, device=device if device.type == "cuda" else "cpu"
    )


def check_tensors(
    device: torch.device, *expected: tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]
) -> None:
    """Raises ValueError for the first tensor, of name, tensor, dtype and shape, that is not
    contiguous on the device and of these; None passes."""
    for name, tensor, dtype, shape in expected:
        if tensor is None:
            continue
        kind = (tensor.dtype, tensor.shape, tensor.device)
        if kind != (dtype, shape, device) or not tensor.is_contiguous():
            strides = "" if tensor.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"{name} {list(tensor.shape)} of {tensor.dtype} on {tensor.device}{strides}: "
                f"wanted contiguous {list(shape)} of {dtype} on {device}"
            )


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor [...] of the CPU on a device; the processor does not wait until it is there."""
    return pinned(host, device).to(device, non_blocking=True)


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """A tensor [...] of the CPU where the device can fetch it while the processor goes on."""
    return host.pin_memory() if device.type == "cuda" else host


def capturing(device: torch.device) -> bool:
    """Whether what is launched on this device goes into a CUDA graph, and does not run now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def custom_op(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an operator that torch.compile calls without looking inside, on every device, and
    return it. `fake` takes the same arguments and gives empty tensors of the right shapes and
    dtypes."""
    torch.library.define(f"fastsmooth::{name}", schema)
    torch.library.impl(f"fastsmooth::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"fastsmooth::{name}", fake)
    return getattr(torch.ops.fastsmooth, name).default
