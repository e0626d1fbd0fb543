"""Make fastsmooth/data/digits.npz from scikit-learn's copy of the UCI digits: python
scripts/make_digits.py

Needs scikit-learn. The output is the same bytes on every run.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastsmooth.messages import say

TARGET = Path(__file__).resolve().parent.parent / "fastsmooth" / "data" / "digits.npz"


def main() -> None:
    digits = load_digits()
    arrays = {
        "images": digits.images.astype(np.uint8),  # [1797, 8, 8], values 0..16
        "labels": digits.target.astype(np.uint8),  # [1797]
    }
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            # a fixed time stamp, so that the file does not change with the day it was made
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)),
                buffer.getvalue(),
                zipfile.ZIP_DEFLATED,
            )
    say(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
