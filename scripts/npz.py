"""How the shipped arrays are written: the same bytes on every run, whatever the day."""

import io
import zipfile
from pathlib import Path

import numpy as np


def write(target: Path, arrays: dict[str, np.ndarray]) -> None:
    """The arrays by name in one .npz, packed as small as zlib does."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            # a fixed time stamp, so that the file does not change with the day it was made
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)),
                buffer.getvalue(),
                zipfile.ZIP_DEFLATED,
            )
