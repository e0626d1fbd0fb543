"""fastsmooth: train image classifiers under noise schedules and measure how far the noise smooths
the loss."""

from pathlib import Path

__version__ = "0.1.0"

# The kernels stand in a top-level folder of the checkout; an installed copy has them inside the
# package already.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
