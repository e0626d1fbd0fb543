"""What lies in the cache: a library that somebody else may have written never runs, a damaged one
kills nothing."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from forks import SERVER

from fastsmooth.kernels import native

ATTACK = """#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) void attack() { fclose(fopen(getenv("CANARY"), "w")); }
"""


def load(environment: dict[str, str], temporary: str, said: str) -> None:
    """Load the library in a process of its own, and write down what was said."""
    os.environ.update(environment)
    tempfile.tempdir = temporary
    native.library.cache_clear()
    with warnings.catch_warnings(record=True) as lines:
        warnings.simplefilter("always")
        library = native.library()
    Path(said).write_text("\n".join(str(line.message) for line in lines))
    assert library is not None and library.update_float32


@pytest.fixture
def attack(tmp_path) -> Path:
    """A library that makes the file CANARY when it is loaded."""
    source, library = tmp_path / "attack.cpp", tmp_path / "attack.so"
    source.write_text(ATTACK)
    subprocess.run(
        [shutil.which("c++"), "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    return library


def give_away(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(path, 65534, -1)


def put(attack: Path, path: Path, **given) -> None:
    """The attack under the name of a library."""
    target = path.with_name(
        native.name_of(path.name[4:20], attack.read_bytes()) if given.get("summed") else path.name
    )
    path.unlink()
    shutil.copy(attack, target)
    target.chmod(given.get("mode", 0o700))
    if given.get("away"):
        give_away(target)


CASES = {
    "another user's, its sum right": lambda attack, path: put(attack, path, summed=True, away=True),
    "writable by others, its sum right": lambda attack, path: put(
        attack, path, summed=True, mode=0o777
    ),
    "in a folder of another user": lambda attack, path: (
        put(attack, path, summed=True),
        give_away(path.parent),
    ),
    "in a folder that others may write": lambda attack, path: (
        put(attack, path, summed=True),
        path.parent.chmod(0o777),
    ),
    "in the place of ours": lambda attack, path: put(attack, path),
    "under a name without a sum": lambda attack, path: (
        put(attack, path),
        path.rename(path.with_name(path.name[:20] + ".so")),
    ),
    "a link to it": lambda attack, path: (path.unlink(), path.symlink_to(attack)),
    "cut in half": lambda attack, path: os.truncate(path, path.stat().st_size // 2),
    "cut to one page": lambda attack, path: os.truncate(path, 4096),
    "zeros in it": lambda attack, path: path.write_bytes(
        path.read_bytes()[:8192] + bytes(65536) + path.read_bytes()[73728:]
    ),
    "empty": lambda attack, path: os.truncate(path, 0),
}


FEW = (
    "another user's, its sum right",
    "in a folder that others may write",
    "in the place of ours",
    "cut in half",
)


@pytest.mark.parametrize("case", CASES)
def test_a_library_that_is_not_ours_or_not_whole_is_never_loaded(
    case, tmp_path, attack, quick_compiler, cases
):
    if cases("a library in the cache of another user's, or damaged", 1, int(case in FEW)) == 0:
        pytest.skip("with --full")
    canary = tmp_path / "canary"
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": str(quick_compiler / "c++"),
        "CANARY": str(canary),
    }

    def start() -> str:
        line = (environment, str(quick_compiler / "tmp"), str(tmp_path / "said"))
        process = SERVER.Process(target=load, args=line)
        process.start()
        process.join(60)
        assert process.exitcode == 0  # -7 is SIGBUS
        return (tmp_path / "said").read_text()

    assert start() == ""
    (path,) = (tmp_path / "cache" / "fastsmooth").iterdir()
    CASES[case](attack, path)
    said = start()
    assert not canary.exists()
    assert len(said.splitlines()) == (0 if "without a sum" in case else 1)
    if "folder" not in case:
        assert start() == "" and not canary.exists()


def test_the_library_does_harm_where_it_is_loaded(tmp_path, attack, cases):
    cases("a hostile library that is real", 1, 1)
    line = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", line, str(attack)],
        env=os.environ | {"CANARY": str(tmp_path / "canary")},
        check=True,
    )
    assert (tmp_path / "canary").exists()
