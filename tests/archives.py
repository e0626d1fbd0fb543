"""Archives: those of real images that lie beside the checkout, and made ones."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).parents[2] / "shared" / "data"


def extracted(
    name: str, factory: pytest.TempPathFactory, wanted: Callable[[tarfile.TarInfo], bool]
) -> Path:
    archive = ARCHIVES / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    target = factory.mktemp("images")
    with tarfile.open(archive) as tar:
        tar.extractall(target, members=filter(wanted, tar), filter="data")
    return target / name


def tar_of(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    """A gzipped archive of the files, by name, and of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return buffer.getvalue()
