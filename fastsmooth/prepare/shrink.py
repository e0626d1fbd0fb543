"""One image made smaller."""

from __future__ import annotations

import io
from contextlib import suppress

from PIL import Image, features

from fastsmooth.data.files import Files
from fastsmooth.data.images import DataError, open_image
from fastsmooth.data.index import Index

LONGEST_SIDE = 65_500  # pixels that libjpeg writes
# Training resizes again. On ImageNet's photographs, brought to short side 256 and then cropped and
# resized as for training at 224, bicubic copies came 1.4 dB nearer to the views of the originals
# than bilinear ones (33.4 to 32.0 dB), and at 320 by 2.0 dB (36.9 to 34.9); Lanczos another 0.5
# dB, but its copies are larger and the view that is tested is 4 dB further away at 256.
FILTER = Image.Resampling.BICUBIC
# As most photographs come. Whole colour (4:4:4) brought the views 1.1 to 3.2 dB nearer at quality
# 92, in 28 % more bytes that are decoded each time.
SUBSAMPLING = "4:2:0"


def encoder() -> str:
    """Whose bytes they are: another version may make others."""
    library = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {Image.__version__}, libjpeg {library}"


def smaller(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `short` pixels, the other rounded down, as
    torchvision's Resize has it; as it is where that is no less."""
    width, height = size
    if min(size) <= short:
        return size
    return (short, short * height // width) if width <= height else (short * width // height, short)


def shrunk(files: Files, index: Index, i: int, short: int, quality: int) -> bytes:
    """Image i as a JPEG with a shorter side of at most `short` pixels; decoded once, so that it is
    known to be whole.

    A grey or RGB JPEG that is small enough comes byte for byte: encoded again it would lose again.
    All else is as training reads it: RGB, not turned by EXIF, without a colour profile. Raises
    DataError for an image that cannot be read.
    """
    image = open_image(files, i)
    index.check(i, files.names[i], image.size)
    size = smaller(image.size, short)
    if size == image.size:
        with suppress(OSError):  # it was there a moment ago
            data = files.read(i).tobytes()
            if is_jpeg(data, size):
                return data
    if max(size) > LONGEST_SIDE:
        reason = f"a JPEG has at most {LONGEST_SIDE:,} pixels a side, not {max(size):,}"
        raise DataError(f"{files.names[i]}: {reason}: remove it or cut it", reason)
    buffer = io.BytesIO()
    resized = image if size == image.size else image.resize(size, FILTER)
    resized.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    data = buffer.getvalue()
    if not is_jpeg(data, size):
        reason = "what was made of it cannot be decoded"
        raise DataError(f"{files.names[i]}: {reason}: is the memory sound?", reason)
    return data


def is_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether this is a whole grey or RGB JPEG of so many pixels (width, height)."""
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:  # damage may raise anything
        if image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == size:
            image.load()
            return True
    return False
