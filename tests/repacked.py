"""Real images in other forms than class folders: the same samples must come of all of them."""

import io
import random
import tarfile
from pathlib import Path

import pytest
import torch
from images import CPU, every_batch, tree

from fastsmooth.cli.config import resolve
from fastsmooth.data import Data, Stream, open_data
from fastsmooth.kernels import native

Images = dict[str, bytes]  # by PART/CLASS/NAME


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a test's listings and indices are kept from now on."""
    native.library()  # which lies in the cache too, and takes long to compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fastsmooth"


def taken(root: Path, classes: int, of_class: dict[str, int]) -> Images:
    """Some images of class folders: so many of each of the first classes, by part."""
    names = sorted(path.name for path in (root / next(iter(of_class))).iterdir())[:classes]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for part, count in of_class.items()
        for name in names
        for path in sorted((root / part / name).iterdir())[:count]
    }


def class_folders(root: Path, images: Images) -> Path:
    return tree(root, images)


def shuffled(images: Images, part: str, seed: int = 0) -> list[tuple[str, str, bytes]]:
    """(class, name, content) of each image of a part, in no order."""
    rows = [
        (*name.split("/")[1:], data) for name, data in images.items() if name.split("/")[0] == part
    ]
    random.Random(seed).shuffle(rows)
    return rows


def classes_of(images: Images) -> list[str]:
    return sorted({name.split("/")[1] for name in images})


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def opened(root: Path, dataset: str, loader: str = "threads", workers: int = 2, **given) -> Data:
    more = {} if loader == "resident" else {"workers": workers, "chunk": 7}
    settings = {"dataset": dataset, "data_dir": str(root), "loader": loader, "image_size": 32}
    return open_data(resolve(settings | more | given), CPU, lambda line: None)


def assert_same(data: Data, reference: Data) -> None:
    """The same samples in the same order, as they are tested and as epoch 1 augments them."""
    assert data.classes == reference.classes
    for part in ("train", "test"):
        for epoch in (None, 1):
            found, expected = (
                every_batch(getattr(d, part), 9, 3, epoch) for d in (data, reference)
            )
            for (x, y), (x_expected, y_expected) in zip(found, expected, strict=True):
                assert torch.equal(y, y_expected), part
                assert torch.equal(x, x_expected), (part, epoch)


def assert_same_streams(data: Data, reference: Data, seed: int) -> None:
    """The same batches on any number of ranks, whatever their sizes, and resumed in the middle."""
    rng = random.Random(seed)
    for world in (1, 2, 3):
        sizes = [rng.choice([1, 3, 5, 8, 13]) for _ in range(100)]
        for rank in range(world):
            found, expected = (
                Stream(d.train, seed, 2, d.fingerprint, rank=rank, world=world)
                for d in (data, reference)
            )
            stop, count = rng.randint(1, 4), 0
            for _ in range(2):
                found.batch_size = expected.batch_size = sizes[count]
                batches = found.rest_of_epoch()
                for x_expected, y_expected in expected.rest_of_epoch():
                    x, y = next(batches)
                    assert torch.equal(x, x_expected) and torch.equal(y, y_expected)
                    count += 1
                    if count == stop:
                        state = found.state_dict()
                        found.close()
                        found = Stream(
                            data.train, seed, 2, data.fingerprint, rank=rank, world=world
                        )
                        found.load_state_dict(state)
                        found.batch_size = sizes[count]
                        batches = found.rest_of_epoch()
                    found.batch_size = expected.batch_size = sizes[count]
                assert next(batches, None) is None
            assert found.state_dict() | {"fingerprint": ""} == (
                expected.state_dict() | {"fingerprint": ""}
            )
            found.close()
            expected.close()
