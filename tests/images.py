"""Small images, trees of image files, and data sets opened from them."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsmooth.cli.config import resolve
from fastsmooth.data import open_data
from fastsmooth.data.order import permutation

CPU = torch.device("cpu")
HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None
    and importlib.util.find_spec("nvidia.dali") is not None
)
# with the number of workers
LOADERS = [
    ("resident", 0),
    ("torch", 0),
    ("torch", 2),
    ("threads", 2),
    *([("dali", 2)] if HAS_DALI else []),
]
rng = np.random.default_rng(0)


def opened(loader: str = "resident", workers: int = 0, **given):
    more = {} if loader == "resident" else {"workers": workers}
    if given.get("dataset") == "folder":  # else the images would say, and fitted() settle it
        given.setdefault("image_size", 32)
    return open_data(resolve(given | {"loader": loader} | more), CPU)


def epoch_batches(seed, epoch, n, batch_size, start=0, drop_last=False):
    """The sample indices of the batches of an epoch."""
    order = permutation(seed, epoch, n)
    end = n - n % batch_size if drop_last else n
    return order[start:end].split(batch_size) if start < end else ()


def every_batch(loader, batch_size: int = 64, seed: int = 0, epoch: int | None = None):
    """(x, y) of a whole pass, in the order of the epoch, or of epoch 0 where the images stay as
    stored."""
    return list(loader.batches(epoch_batches(seed, epoch or 0, len(loader), batch_size), epoch))


def one_line(error) -> str:
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


def solid(colour=(10, 200, 90), size=(32, 32), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def noise(size=(32, 32)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def tree(root: Path, files: dict[str, Image.Image | bytes | None]) -> Path:
    """Image files, files of given bytes, and with None empty folders."""
    for name, content in files.items():
        path = root / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content.save(path)
    return root


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
