"""Lines on stdout and stderr whose reader is gone or whose disk is full, and what is said of
errors."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rows import read_rows
from said import one_line, said

from fastsmooth import messages, sharpness, train
from fastsmooth.messages import BAD_INPUT, CANNOT_WRITE, UNEXPECTED, CannotWrite, failure
from fastsmooth.prepare import __main__ as prepare
from fastsmooth.report import __main__ as report
from fastsmooth.runfolder import write as runfolder
from fastsmooth.runfolder.files import replace
from fastsmooth.smooth import __main__ as smooth
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import machines, store
from fastsmooth.sweep import table as tables

PRODUCTS = {
    "the plan": ["fastsmooth.train", "--plan"],
    "the plan as JSON": ["fastsmooth.train", "--plan", "--json"],
    "help": ["fastsmooth.train", "--help"],
    "the version": ["fastsmooth.train", "--version"],
    "the plan of a sweep": ["fastsmooth.sweep", "--plan", "--out", "nowhere", "--lr", "0.1", "0.2"],
    "help of a sweep": ["fastsmooth.sweep", "--help"],
}
WITH_FULL = pytest.mark.full


@pytest.mark.parametrize(
    "name", [n if "JSON" in n else pytest.param(n, marks=WITH_FULL) for n in PRODUCTS]
)
def test_what_a_command_is_there_to_print_is_printed_or_it_fails(name):
    """A disk that is full and a stdout that was closed: 74 and a line. A reader that has enough (|
    head): 0 and nothing."""
    command = [sys.executable, "-m", *PRODUCTS[name]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, one_line(done.stderr)) == (
        74,
        "cannot write standard output: No space left on device",
    )
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "-", *command], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, one_line(done.stderr)) == (
        74,
        "cannot write standard output: it is closed",
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def stream(request):
    """stdout and stderr, which lead where nobody reads."""
    kind = request.param
    if kind == "a pipe without reader":
        reader, writer = os.pipe()
        os.close(reader)
    elif kind == "a terminal that is closed":
        reader, writer = os.openpty()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    out, err = (os.fdopen(os.dup(writer), "w") for _ in range(2))
    os.close(writer)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
    out.close()  # which would raise, were something left in them
    err.close()


GONE = ["a pipe without reader", "a terminal that is closed", "a full disk"]


@pytest.mark.parametrize("stream", GONE, indirect=True)
def test_what_is_said_beside_the_work_may_be_lost(stream):
    for _ in range(2):
        messages.say("a line")
        messages.warn("a line")
    os.write(sys.stdout.fileno(), b"which leads nowhere now")


@pytest.mark.parametrize("stream", GONE, indirect=True)
def test_the_table_of_a_sweep_survives_its_reader(stream, monkeypatch, tmp_path):
    pytest.importorskip("rich")
    monkeypatch.setattr(tables, "on_terminal", lambda stream: True)
    run = store.Planned("lr=1", ("--lr=1",), {})
    table = tables.Table(tmp_path, [run, run], 1)
    assert table.live is not None
    table.show([run])
    table.drawn = 0
    table.show([run])
    table.ended(run)
    table.close()


def test_streams_that_were_closed_are_not_those_of_the_next_file():
    """With 1 and 2 free, metrics.jsonl would be what others take for stdout and stderr."""
    code = (
        "import os, fastsmooth.train as t; t.main(['--version']); print(*map(os.readlink, "
        "['/proc/self/fd/1', '/proc/self/fd/2']), file=os.fdopen(3, 'w'))"
    )
    shell = 'exec 3>&1; exec "$0" -c "$1" 1>&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, code], stdout=subprocess.PIPE, text=True
    )
    assert done.stdout == "/dev/null /dev/null\n"


# Signals


def test_what_was_ignored_at_the_start_stays_ignored():
    before = {number: signal.getsignal(number) for number in messages.STOPPING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts with &
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with machines.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Errors


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as found:
        return found


FAILURES = {
    "a write": (CannotWrite(errno.EIO, "Input/output error", "x/y.json"), 74,
        "cannot write x/y.json: Input/output error"),
    "a library's write": (OSError(errno.ENOSPC, "No space left on device", "fig.pdf"), 74,
        "cannot write fig.pdf: No space left"),
    "files": (OSError(errno.EMFILE, "Too many open files", "a.jpg"), 74,
        "Too many open files (a.jpg): raise the limit (ulimit -n)"),
    "files in a write": (CannotWrite(errno.EMFILE, "Too many open files", "a"), 74,
        "Too many open files (a): raise the limit"),
    "a process": (ChildProcessError("a process was killed: why"), 74, "a process was killed: why"),
    "a pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 74,
        "BrokenPipeError: [Errno 32] Broken pipe: the traceback is in "),
    "a read": (FileNotFoundError(2, "No such file", "z"), 74,
        "FileNotFoundError: [Errno 2] No such file: 'z': the traceback is in "),
    "/dev/shm": (OSError(errno.ENOSPC, "No space left on device"), 74,
        "OSError: [Errno 28] No space left on device: the traceback"),
    "one of ours": (KeyError("batch"), 70, "KeyError: 'batch': the traceback is in "),
    "one without words": (AssertionError(), 70, "AssertionError: the traceback is in "),
    "one of many lines": (RuntimeError("a\n  b"), 70, "RuntimeError: a b: the traceback is in "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_is_named_after_what_happened(name, tmp_path):
    error, code, words = FAILURES[name]
    found, line = failure(raised(error), tmp_path)
    assert found == code and line.startswith(words) and "\n" not in line
    kept = tmp_path / "traceback.txt"
    assert kept.exists() == ("traceback" in words)
    if kept.exists():
        assert (
            line.endswith(f"the traceback is in {kept}")
            and type(error).__name__ in kept.read_text()
        )
        assert "in raised" in kept.read_text()


def test_a_traceback_without_a_folder_is_in_a_temporary_file_and_without_one_its_place_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(messages.tempfile, "tempdir", str(tmp_path))
    code, line = failure(raised(KeyError("x")), tmp_path / "gone")
    (kept,) = tmp_path.iterdir()
    assert (
        code == 70
        and line.endswith(f"the traceback is in {kept}")
        and "KeyError" in kept.read_text()
    )
    monkeypatch.setattr(messages.tempfile, "tempdir", str(tmp_path / "gone"))
    assert f"raised in {__file__}:" in failure(raised(KeyError("x")))[1]


COMMANDS = {
    "train": (train.main, ["--plan"], "print_plan"),
    "prepare": (
        prepare.main,
        ["--data-dir", "in", "--out", "o", "--short-side", "9"],
        "fastsmooth.prepare.work.prepare",
    ),
    "sweep": (sweep.main, ["--plan", "--out", "o", "--lr", "0.1"], "grid_runs"),
    "sharpness": (sharpness.main, ["run"], "fastsmooth.saved.ready_device"),
    "sharpness of a run": (sharpness.main, ["run", "--json"], "fastsmooth.saved.measure_sharpness"),
    "report": (report.main, ["run"], "read_runs"),
    "smooth": (smooth.main, ["--out", "o"], "parse"),
}


def place(main, function: str) -> str:
    """Where a command finds a function: in its own module, or in the one that is named."""
    return function if "." in function else f"{main.__module__}.{function}"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_ends_in_a_traceback(name, tmp_path, monkeypatch):
    main, argv, function = COMMANDS[name]
    monkeypatch.setattr(messages.tempfile, "tempdir", str(tmp_path))
    for error, code in (
        (ZeroDivisionError("of ours"), UNEXPECTED),
        (OSError(errno.EIO, "bad", "f"), CANNOT_WRITE),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(place(main, function), fail)
        found = said(main, argv)
        assert (found.code, found.out) == (code, "")
        assert str(error) in one_line(found.err)
        kept = Path(found.err.split("the traceback is in ")[1].strip())
        assert kept.parent == tmp_path and "in fail" in kept.read_text()
        monkeypatch.undo()
        monkeypatch.setattr(messages.tempfile, "tempdir", str(tmp_path))


def test_an_interrupted_command_is_130_and_silent(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("report", "sharpness", "smooth", "train"):
        main, argv, function = COMMANDS[name]
        monkeypatch.setattr(place(main, function), interrupted)
        found = said(main, argv)
        assert (found.code, found.out, found.err) == (130, "", "")


def test_a_file_that_cannot_be_replaced_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastsmooth.runfolder.files.os.fsync", full)
    with pytest.raises(CannotWrite, match="No space left") as caught:
        replace(tmp_path / "status.json", b"{}")
    assert caught.value.filename == str(tmp_path / "status.json") and not list(tmp_path.iterdir())


def test_the_exit_codes_are_those_of_the_documentation():
    page = Path(train.__file__).parent.parent / "docs" / "run-folder.md"
    for code in (*range(4), 70, 74, 75, 130):
        assert f"\n| {code} | " in page.read_text()
    assert {BAD_INPUT, UNEXPECTED, CANNOT_WRITE, messages.PREEMPTED} == {2, 70, 74, 75}


# metrics.jsonl


def test_a_metrics_file_that_is_removed_or_replaced_is_written_again(tmp_path, capsys):
    folder = runfolder.RunFolder(tmp_path)
    path = tmp_path / "metrics.jsonl"
    for harm in (path.unlink, lambda: (path.unlink(), path.write_text("other"))):
        folder.row("step", {"step": 1})
        size = folder.sync()
        whole = path.read_bytes()
        harm()
        folder.row("step", {"step": 2})
        assert folder.sync() > size and path.read_bytes().startswith(whole)
        assert "was removed or replaced under the run" in one_warning(capsys)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 1, 2]
    folder.sync()
    assert not capsys.readouterr().err
    os.truncate(path, 5)
    with pytest.raises(CannotWrite, match="rows were cut"):
        folder.sync()
    folder.close()


def one_warning(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastsmooth: warning: ")
    return line
