"""The implementations of a kernel that can run here, as parameters of a test."""

import pytest
import torch

from fastsmooth.kernels import native, update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(update.triton is None, reason="no triton")
needs_cxx = pytest.mark.skipif(
    DEVICE.type == "cuda" or native.library() is None, reason="for CPUs with a C++ compiler"
)
triton, cxx = pytest.param("triton", marks=needs_triton), pytest.param("native", marks=needs_cxx)
every_implementation = pytest.mark.parametrize("implementation", [triton, cxx, "reference"])
