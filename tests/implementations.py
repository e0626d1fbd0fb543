"""The implementations of a kernel that can run here, as parameters of a test, and what this PyTorch
can do."""

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
compiles_once = pytest.mark.skipif(
    DEVICE.type == "cpu" and torch.__version__ < (2, 12),
    reason="before PyTorch 2.12 a CPU compiles again where a sum outgrows 4,096 values",
)
