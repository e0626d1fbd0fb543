"""The C++ library in the cache: whole, of this user alone, and made once however many make it."""

import os
import shutil
import stat
import threading
import warnings
from pathlib import Path

import pytest

from fastsmooth.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler")


@pytest.fixture
def cache(quick_compiler, monkeypatch, tmp_path) -> Path:
    """The folder of the library, not yet there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastsmooth"


@pytest.fixture
def builds(quick_compiler):
    return lambda: (quick_compiler / "compiled").read_text().count("\n")


def built() -> tuple[Path, list[str]]:
    """The library and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = native.build()
    return path, [str(warning.message) for warning in said]


def test_the_library_is_built_once_and_kept(cache, builds):
    path, said = built()
    before = path.stat()
    assert built() == (path, []) and said == [] and builds() == 1
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(cache.iterdir()) == [path]  # nothing half made beside it


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "altered": lambda path: path.write_bytes(
        path.read_bytes().replace(b"\x00\x01", b"\x00\x02", 1)
    ),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "writable by the group": lambda path: path.chmod(0o720),
    "writable by all": lambda path: path.chmod(0o702),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another user's": lambda path: os.chown(path, 65534, -1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_damaged_or_may_be_anothers_is_built_again(cache, damage, builds):
    first, said = built()
    assert not said and builds() == 1
    content = first.read_bytes()
    if damage == "another user's" and os.geteuid():
        pytest.skip("only root gives files away")
    DAMAGE[damage](first)
    path, (line,) = built()
    assert (
        line.startswith(f"{first} ")
        and line.endswith(": it is not loaded but built again")
        and builds() == 2
    )
    assert path.read_bytes() == content and stat.S_ISREG(os.lstat(path).st_mode)
    assert path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o777 == 0o700
    assert built() == (path, []) and builds() == 2  # said and done once
    assert native.library() is not None


def test_a_damaged_library_of_other_bytes_than_the_new_one_is_removed(cache, monkeypatch):
    monkeypatch.setenv("MORE", "as another linker wrote it")
    first, _ = built()
    DAMAGE["cut"](first)
    monkeypatch.setenv("MORE", "")
    path, said = built()
    assert len(said) == 1 and path != first and list(cache.iterdir()) == [path]
    assert built() == (path, [])


def test_the_umask_lets_nobody_write_the_library(cache):
    before = os.umask(0)
    try:
        path, _ = built()
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (cache, path)] == [0o700] * 2
    assert built() == (path, [])


def give_away(cache: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives folders away")
    os.chown(cache, 65534, -1)


FOLDERS = {
    "writable by the group": (lambda cache: cache.chmod(0o770), "it may be written by other users"),
    "writable by all": (lambda cache: cache.chmod(0o1777), "it may be written by other users"),
    "another user's": (give_away, "it belongs to another user"),
    "a file": (lambda cache: (cache.rmdir(), cache.write_bytes(b"")), "File exists"),
    "a link to nothing": (
        lambda cache: (cache.rmdir(), cache.symlink_to("nowhere")),
        "File exists",
    ),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_is_not_ours_alone_is_not_used(
    cache, folder, tmp_path, builds, quick_compiler
):
    """What lies there under the right name, with the right bytes, is not loaded either."""
    path, _ = built()
    shutil.move(path, tmp_path / path.name)
    make, words = FOLDERS[folder]
    make(cache)
    if cache.is_dir():
        shutil.copy(tmp_path / path.name, cache)
    private = quick_compiler / "tmp" / f"fastsmooth-{os.geteuid()}"
    for _ in range(2):
        other, (line,) = built()
        assert other == private / path.name
        assert line.startswith(f"{cache}: {words}: the C++ kernels are kept in {private} instead")
    assert builds() == 2 and private.stat().st_mode & 0o777 == 0o700


def test_a_link_of_ours_to_a_folder_of_ours_is_one(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    path, said = built()
    assert path.parent == cache and not said


def test_where_no_folder_is_ours_alone_the_kernels_run_in_plain_pytorch(cache, monkeypatch):
    """For another user who finds everything as this one left it."""
    path, _ = built()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(UserWarning) as said:
        assert native.library() is None
    (line,) = [str(warning.message) for warning in said]
    assert (
        line.startswith("the kernels run in plain PyTorch, slower: ")
        and line.count("belongs to another user") == 2
    )
    assert "XDG_CACHE_HOME" in line and path.exists()


def test_without_a_home_directory_the_library_is_kept_among_temporary_files(
    cache, monkeypatch, tmp_path, quick_compiler
):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    path, (line,) = built()
    assert path.parent == quick_compiler / "tmp" / f"fastsmooth-{os.geteuid()}"
    assert line.startswith("no home directory: the C++ kernels are kept in ")


@pytest.mark.parametrize("alike", [True, False], ids=["the same bytes", "other bytes each"])
def test_many_that_build_at_once_all_have_a_whole_library(cache, monkeypatch, alike):
    """Each would take half a library of another for its own where they were not named when they are
    whole."""
    monkeypatch.setenv("SLOW", "0.2")
    if not alike:
        monkeypatch.setenv("MORE", "other")
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.build())) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 4 and all(
        path.name == native.name_of(path.name[4:20], path.read_bytes()) for path in found
    )
    assert sorted(set(found)) == sorted(cache.iterdir())  # and nothing half made
    again, said = built()
    assert again in found and not said


def test_a_library_of_an_earlier_version_whose_name_holds_no_hash_is_not_loaded(cache, builds):
    path, _ = built()
    path.rename(cache / f"{path.name[:20]}.so")
    again, said = built()
    assert again == path and builds() == 2 and not said
