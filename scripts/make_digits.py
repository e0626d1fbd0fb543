"""Make fastsmooth/data/digits.npz from scikit-learn's copy of the UCI digits: python
scripts/make_digits.py

Needs scikit-learn. The output is the same bytes on every run.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth.messages import say
from scripts import npz

TARGET = Path(__file__).resolve().parent.parent / "fastsmooth" / "data" / "digits.npz"


def main() -> None:
    digits = load_digits()
    arrays = {
        "images": digits.images.astype(np.uint8),  # [1797, 8, 8], values 0..16
        "labels": digits.target.astype(np.uint8),  # [1797]
    }
    npz.write(TARGET, arrays)
    say(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
