"""Files that replace others: whole, on the disk before they are named, and by one function in the
whole product."""

import ast
import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from fastsmooth.runfolder import files
from fastsmooth.runfolder.write import RunFolder, RunFolderError, check_unused

ROOT = Path(__file__).parent.parent
# What opens a file to write it, or puts one in the place of another, and where: anything else goes
# through files.replace.
WRITERS = {
    ("files.py", "open O_CREAT"): "the one function",
    ("files.py", "os.replace"): "the one function",
    ("write.py", "open O_CREAT"): "the lock, which is empty",
    ("write.py", "open"): "metrics.jsonl, to which rows are added",
    ("tensorboard.py", "open"): "an event file, to which events are added",
    ("messages.py", "mkstemp"): "a traceback, into a file of its own",
    ("messages.py", "write_text"): "the same",
    (
        "cifar.py",
        "open",
    ): "the part of a download, which goes on where it stopped and is named once its sum is right",
    ("checkpoint.py", "save"): "into memory",
    ("foreign.py", "save"): "into memory",
    ("work.py", "os.rename"): "a folder, whose files are written by the one function before",
    ("index.py", "savez"): "into memory",
    ("tars.py", "savez"): "into memory",
    ("pdf.py", "print_pdf"): "into memory",
    (
        "modes.py",
        "open",
    ): "rows of many MB that are written as they come, and named when they are whole",
    ("stores.py", "open"): "images and shards, aside; images are synced together at the end",
    ("stores.py", "os.replace"): "the same: a sync of each takes longer than to make it",
    ("native.py", "os.replace"): "the kernels import nothing of the package",
    ("aot.py", "write_bytes"): "in a temporary folder that is read by a disassembler",
}
SAVERS = {
    "write_text",
    "write_bytes",
    "savez",
    "savez_compressed",
    "savetxt",
    "savefig",
    "print_pdf",
    "tofile",
}
SAVERS |= {
    "open_memmap",
    "memmap",
    "copy2",
    "copyfile",
    "copytree",
    "mkstemp",
    "NamedTemporaryFile",
}
OF = {"save": ("torch", "np"), "move": ("shutil",)}  # of these modules alone


def writes(node: ast.AST) -> str | None:
    """The name under which WRITERS has a call; None for one that writes no file."""
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    if name == "open" and owner == "os":
        return "open O_CREAT" if "O_CREAT" in ast.dump(node) else None
    if name == "open" and owner not in (
        "Image",
        "tarfile",
        "files",
        "self",
        "archive",
    ):  # which read
        given = node.args[0 if isinstance(function, ast.Attribute) else 1 :][:1]
        modes = given + [k.value for k in node.keywords if k.arg == "mode"]
        reads = all(
            isinstance(m, ast.Constant) and not set(str(m.value)) & set("wx+") for m in modes
        )
        return None if reads else "open"
    if name in ("replace", "rename") and isinstance(function, ast.Attribute):
        # of a path it takes one argument, of a string two, of a dataclass keywords
        return (
            f"{owner}.{name}"
            if owner == "os" or (len(node.args) == 1 and not node.keywords)
            else None
        )
    return name if name in SAVERS or owner in OF.get(name, ()) else None


def calls(path: Path) -> list[tuple[str, int]]:
    found = (
        (writes(node), getattr(node, "lineno", 0)) for node in ast.walk(ast.parse(path.read_text()))
    )
    return [(name, line) for name, line in found if name]


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "fastsmooth").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_that_replaces_another_goes_through_one_function(path):
    others = [(name, line) for name, line in calls(path) if (path.name, name) not in WRITERS]
    assert not others, f"{path}: write it by files.replace, or say in WRITERS why not"


@pytest.mark.parametrize(
    "line",
    [
        "Path('x').write_text('y')",
        "open('x', 'w')",
        "open('x', mode='r+')",
        "path.open('wb')",
        "path.open(mode)",
        "os.replace(a, b)",
        "path.replace(target)",
        "path.rename(target)",
        "shutil.move(a, b)",
        "figure.savefig('x')",
        "os.open('x', os.O_WRONLY | os.O_CREAT)",
    ],
)
def test_what_writes_a_file_is_seen(line):
    assert [writes(node) for node in ast.walk(ast.parse(line)) if writes(node)]


@pytest.mark.parametrize(
    "line",
    ["open('x')", "path.open('rb')", "path.open('a')", "'a'.replace('b', 'c')", "replace(c, lr=1)"],
)
def test_what_writes_no_file_is_not(line):
    assert not [writes(node) for node in ast.walk(ast.parse(line)) if writes(node)]


def test_a_file_is_on_the_disk_before_it_is_named_and_its_name_is_after(tmp_path, monkeypatch):
    done, fsync, renamed = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file")
        fsync(descriptor)

    def named(*paths):
        done.append("name")
        renamed(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    folder = RunFolder.create(tmp_path / "run", {"lr": 0.1}, {})
    assert done == ["file", "name", "folder"] * 2  # env.json, config.json
    folder.status("done", "", 5)
    folder.write("summary.json", {})
    assert done == ["file", "name", "folder"] * 4
    folder.close()


def test_two_that_replace_a_file_at_once_never_leave_a_mixture(tmp_path, monkeypatch):
    """The second one comes while the first is on its way to the disk."""
    path, fsync, nested = tmp_path / "file", os.fsync, []

    def interrupted(descriptor):
        if not nested:
            nested.append(1)
            files.replace(path, b"second" * 1000)
            assert path.read_bytes() == b"second" * 1000
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    files.replace(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_many_that_replace_a_file_at_once(tmp_path):
    path, wrong = tmp_path / "file", []
    files.replace(path, b"0" * 1000)

    def write(k: int) -> None:
        for _ in range(25):
            files.replace(path, str(k).encode() * 1000 * (k + 1))
            data = path.read_bytes()
            if len(set(data)) != 1 or len(data) != 1000 * (int(data[:1]) + 1):
                wrong.append(data[:20])

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_there_stays_where_it_cannot_be_replaced(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    files.replace(path, b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError):
            files.replace(tmp_path / name, b"x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.skipif(sys.platform != "linux", reason="umask")
def test_the_modes_of_files_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.replace(tmp_path / "file", b"x")
        files.replace(tmp_path / "private", b"x", mode=0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "private")] == [
        0o640,
        0o600,
    ]


def test_a_run_killed_while_it_made_its_folder_begins_anew_and_leaves_nothing(
    tmp_path, monkeypatch
):
    """A half written env.json and config.json; anything else in a folder is somebody's."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (
        ".env.json.0123abcd.tmp",
        ".config.json.89abcdef.tmp",
        "env.json",
        ".lock",
        "metrics.jsonl",
    ):
        (folder / name).write_bytes(b"")
    (folder / ".config.json.89abcdef.tmp").write_bytes(b'{"lr"')
    check_unused(folder)
    RunFolder.create(folder, {"lr": 0.1}, {}).close()
    assert sorted(os.listdir(folder)) == [".lock", "config.json", "env.json", "metrics.jsonl"]
    for name in (".mine.json.tmp", ".status.json.0123abcd.tmp", ".env.json.0123abcx.tmp", "link"):
        other = tmp_path / f"other{name}"
        other.mkdir()
        (other / name).symlink_to("nowhere")
        with pytest.raises(RunFolderError, match="exists"):
            check_unused(other)
