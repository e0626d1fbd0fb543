"""How the tests run, what they share, and their real images: archives that lie beside the checkout,
extracted once a session."""

import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from archives import extracted

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as fastsmooth.train does before it imports torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other workers have the other cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="what takes minutes too: all cases of the fault suite, whole benchmarks",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="with --full"))


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in its interpreter where there is no GPU; Triton asks when it first sees a
    kernel."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: a value that a kernel forgets to write shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def bound_by_modes() -> Iterator[None]:
    """What a file's mode forbids is forbidden to root too, in this thread and those it starts."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    # effective, permitted and inheritable capabilities, twice 32 bits of each
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(this_thread, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(this_thread, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(this_thread, sets) == 0


@pytest.fixture
def quick_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A C++ compiler that copies the library that is there, slowly and with other bytes where
    asked; no library is loaded.

    Gives a folder with a file `compiled`, of a line for each time, and a folder `tmp` for what is
    temporary.
    """
    from fastsmooth.kernels import native

    if native.library() is None:
        pytest.skip("there is no C++ compiler")
    real, folder = native.build(), tmp_path_factory.mktemp("compiler")
    compiler = folder / "c++"
    compiler.write_text(
        f'''#!/bin/sh
[ "$1" = --version ] && echo 1 && exit
for out; do :; done
head -c 999 "{real}" > "$out" && sleep "${{SLOW:-0}}" && tail -c +1000 "{real}" >> "$out"
[ -z "$MORE" ] || echo "$MORE" $$ >> "$out"
echo >> "{folder}/compiled"
'''
    )
    compiler.chmod(0o755)
    (folder / "tmp").mkdir()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    native.library.cache_clear()
    yield folder
    native.library.cache_clear()


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes apple to butterfly of CIFAR-100 as PNG files: train/CLASS/IMAGE and
    test/CLASS/IMAGE, 100 and 20 a class."""
    return extracted(
        "cifar100-12k", tmp_path_factory, lambda member: Path(member.name).parts[2:3] < ("c",)
    )


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ImageNet photograph of each of 128 classes, at its full size: train/CLASS/IMAGE and
    val/CLASS/IMAGE."""
    return extracted("imagenet-128", tmp_path_factory, lambda member: True)
