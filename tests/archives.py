"""The archives of real images that lie beside the checkout."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).parents[2] / "shared" / "data"


def extracted(name: str, factory: pytest.TempPathFactory, wanted: Callable[[tarfile.TarInfo], bool]) -> Path:
    archive = ARCHIVES / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    target = factory.mktemp("images")
    with tarfile.open(archive) as tar:
        tar.extractall(target, members=filter(wanted, tar), filter="data")
    return target / name
