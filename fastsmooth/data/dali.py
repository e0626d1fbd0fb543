"""NVIDIA DALI as a decode and geometry engine: not in this version, and refused in words."""

from __future__ import annotations

import importlib.util

import torch

from fastsmooth.data.sets import DataError


def refuse() -> None:
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        package = "nvidia-dali-cuda120" if (torch.version.cuda or "13").startswith("12") else "nvidia-dali-cuda130"
        raise DataError(
            f"--loader dali needs NVIDIA DALI: pip install {package}; this version has no pipeline for it yet, "
            "so use --loader torch or resident"
        )
    raise DataError("--loader dali: this version has no DALI pipeline yet: use --loader torch or resident")
