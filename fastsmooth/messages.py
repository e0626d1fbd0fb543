"""What every command says and how it ends: exit codes, lines on stdout and stderr, text that others
chose.

Whatever reaches a terminal goes through `say`, `show`, `note`, `tell` or `warn`: they show names
and reasons without their control characters, and wrap them where a terminal is narrower. What a
command says beside its work (all but `show`) may be lost without harm: a reader that is gone (|
head, a closed terminal), a disk that is full. What it is there to print (`show`: --plan, --json,
--help) may not.
"""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
import signal
import stat
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from fastsmooth.terminal import columns, wrapped

DONE, SOME_FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
UNEXPECTED, CANNOT_WRITE, PREEMPTED = 70, 74, 75  # sysexits.h: EX_SOFTWARE, EX_IOERR, EX_TEMPFAIL
# of a pipe, a socket and a terminal that nobody reads any more
GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # of a disk, where it names a file
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STDOUT = "standard output"


class CannotWrite(OSError):
    """What was to be written, `filename`, could not be."""


class ReaderGone(OSError):
    """What was to be written has no reader any more, who may have had enough."""


def say(line: str, indent: int = 4) -> None:
    """A line on stdout beside the work: it is lost where nobody reads it. On a narrow terminal it
    goes on `indent` columns in."""
    put_line(line, sys.stdout, indent)


def show(*lines: str, indent: int = 4, whole: bool = False) -> bool:
    """Lines on stdout that the command is there to print; never wrapped if a program may read them
    (`whole`). False where a reader had enough now.

    Raises CannotWrite where they are lost otherwise.
    """
    if sys.stdout is None:
        raise CannotWrite(errno.EBADF, "it is closed", STDOUT)
    room = None if whole else columns(sys.stdout)
    text = (wrapped(printable(line, sys.stdout), room, indent) for line in lines)
    lost = put("".join(f"{row}\n" for rows in text for row in rows), sys.stdout)
    if lost and not isinstance(lost, ReaderGone):
        raise CannotWrite(lost.errno, lost.strerror, STDOUT)
    return lost is None


def note(line: str) -> None:
    """A line on stderr that is neither an error nor a warning."""
    put_line(line, sys.stderr)


def note_again(line: str) -> None:
    """A line on stderr that on a terminal takes the place of the one before."""
    put(printable(line, sys.stderr) + ("\r" if on_terminal(sys.stderr) else "\n"), sys.stderr)


def tell(kind: str, words: object) -> None:
    """A line on stderr: `kind` is error, warning or the like; `words` the fault and the remedy."""
    note(f"fastsmooth: {kind}: {' '.join(str(words).split())}")


def warn(words: object) -> None:
    """A line on stderr about something that stops nothing."""
    tell("warning", words)


def put_line(line: str, stream: TextIO | None, indent: int = 4) -> None:
    put("\n".join(wrapped(printable(line, stream), columns(stream), indent)) + "\n", stream)


def put(text: str, stream: TextIO | None) -> OSError | None:
    """Write the text at once; the error where it is lost, ReaderGone where its reader is gone.

    What is written to the stream after that goes nowhere.
    """
    if stream is None:  # a process without a terminal may have been started without the stream
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        gone = error.errno in GONE and not is_file(stream)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # or Python would fail on what is left in its buffer when it ends
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return ReaderGone(error.errno, error.strerror) if gone else error
    return None


def is_file(stream: TextIO) -> bool:
    """Whether the stream goes into a file, which has no reader that could be gone."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:
        return False


def on_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


class Harmless:
    """stdout for a library that prints by itself: what it writes goes the way of `say`, and never
    fails it."""

    def __init__(self) -> None:
        self.stream = sys.stdout
        self.encoding = self.stream.encoding

    def write(self, text: str) -> int:
        put(text, self.stream)
        return len(text)

    def flush(self) -> None:
        pass  # put has

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


# How a command ends


def on_stop(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have handler(number, frame) called for the signals that ask to stop; their handlers before.

    What was ignored at the start (nohup; a shell's & ignores Ctrl-C) stays ignored.
    """
    numbers = [n for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def exit_code(work: Callable[[], int], refusals: tuple[type[Exception], ...] = ()) -> int:
    """That of a command whose work this is. Whatever it raises is one line on stderr: `refusals`
    are bad input."""
    open_streams()
    try:
        return work()
    except refusals as error:
        tell("error", error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        code, line = failure(error)
        tell("error", line)
        return code


def open_streams() -> None:
    """Let what was closed at the start (>&-) lead nowhere: else the next file that is opened would
    be stdout to others."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def failure(
    error: BaseException, folder: Path | None = None, name: str = "traceback.txt"
) -> tuple[int, str]:
    """(exit code, line) for an error that is no refusal, named after what happened: who catches it
    cannot know.

    The traceback of one that nobody foresaw is kept in the folder, or in a temporary file.
    """
    if not isinstance(error, OSError):
        return UNEXPECTED, unexpected(error, folder, name)
    reason, where = error.strerror or one_line(error), error.filename
    if error.errno in (errno.EMFILE, errno.ENFILE):
        named = f" ({where})" if where else ""
        return CANNOT_WRITE, f"{reason}{named}: raise the limit (ulimit -n)"
    if isinstance(error, CannotWrite) or (error.errno in NO_ROOM and where):
        return CANNOT_WRITE, f"cannot write {where}: {reason}"
    if error.errno is None:  # in words of ours
        return CANNOT_WRITE, reason
    return CANNOT_WRITE, unexpected(error, folder, name)


def unexpected(error: BaseException, folder: Path | None, name: str) -> str:
    """The error's words, and where its traceback is now."""
    text = "".join(traceback.format_exception(error))
    where = (folder and kept(text, folder / name)) or kept(text, None)
    if where:
        at = f"the traceback is in {where}"
    else:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        at = "".join(f"raised in {frame.filename}:{frame.lineno}" for frame in last)
    said = one_line(error)
    kind = type(error).__name__
    return f"{kind}: {said[:300]}: {at}" if said != kind else f"{kind}: {at}"


def kept(text: str, path: Path | None) -> Path | None:
    """The file that the text is in now, a temporary one where no path is given; None where it
    cannot be written."""
    try:
        if path is None:
            descriptor, name = tempfile.mkstemp(".txt", "fastsmooth-traceback-")
            os.close(descriptor)
            path = Path(name)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return path


def one_line(error: BaseException) -> str:
    """An exception's words on one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str, stream: TextIO | None = None) -> str:
    """The text on one line, in what the stream (stdout) can show: of other characters the bytes are
    written, \\xHH each."""
    if text.isascii() and text.isprintable():
        return text
    stream = stream or sys.stdout
    stream = getattr(stream, "rich_proxied_file", stream)  # while a bar is shown
    encoding = getattr(stream, "encoding", None) or "ascii"

    def can_show(c: str) -> bool:
        return c.isprintable() and bool(c.encode(encoding, "ignore"))

    return "".join(c if can_show(c) else escaped(c) for c in text)


def escaped(c: str) -> str:
    """The bytes of a character, \\xHH each."""
    # a byte of a file name that is not UTF-8 comes as one of these surrogates
    how = "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", how))


def csv_line(values: Iterable[str]) -> str:
    """A line of RFC 4180. What cannot be shown, as a line break, is written as \\xHH."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(map(printable, values))
    return text.getvalue()


def printable_path(path: str) -> str:
    """The path on one line; one that cannot be shown as it is comes as bash reads it:
    $'caf\\xe9.jpg'."""
    quoted = path.replace("\\", "\\\\").replace("'", "\\'")
    return path if printable(path) == path else f"$'{printable(quoted)}'"


def command(name: str) -> str:
    """How one of our commands is called, in the way in which this process was: fastsmooth train,
    python -m fastsmooth.train."""
    program = Path(sys.argv[0])
    if program.stem == "fastsmooth":
        return f"fastsmooth {name}"
    of_package = program.name == "__main__.py" and program.parent.name == "fastsmooth"
    return f"python -m fastsmooth {name}" if of_package else f"python -m fastsmooth.{name}"


def end_with(main: Callable[[], int]) -> NoReturn:
    """Be the process of a command. What Python says by itself about others' code goes the way of
    all lines too."""

    def traced(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            note(line)

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        warn(f"{message} ({category.__name__} of {filename}:{lineno})")

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(self.format(record))

    def ended(thread: threading.ExceptHookArgs) -> None:
        if thread.exc_type is not SystemExit:
            traced(thread.exc_type, thread.exc_value, thread.exc_traceback)

    sys.excepthook, threading.excepthook = traced, ended
    warnings.showwarning = warned
    logging.lastResort = Noted(logging.WARNING)
    sys.exit(main())
