"""What every command says and how it ends: exit codes, lines on stdout and stderr, text that others chose.

Whatever reaches a terminal goes through `say`, `show`, `note`, `tell` or `warn`: they show names and reasons without their control
characters, wrap them where a terminal is narrower, and a reader that is gone (| head, a closed terminal) never fails the
command that speaks to it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from fastsmooth.terminal import columns, wrapped

DONE, SOME_FAILED, BAD_INPUT, DIVERGED, CANNOT_WRITE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 74, 75, 130


def say(line: str, indent: int = 4) -> None:
    """A line on stdout beside the work. Where a terminal is narrower it goes on below, `indent` columns in."""
    put_line(line, sys.stdout, indent)


def show(*lines: str, indent: int = 4, whole: bool = False) -> None:
    """Lines on stdout that the command is there to print; never wrapped if a program may read them (`whole`)."""
    for line in lines:
        put_line(line, sys.stdout, indent, whole)


def note(line: str) -> None:
    """A line on stderr that is neither an error nor a warning."""
    put_line(line, sys.stderr)


def note_again(line: str) -> None:
    """A line on stderr that on a terminal takes the place of the one before."""
    put(printable(line, sys.stderr) + ("\r" if on_terminal(sys.stderr) else "\n"), sys.stderr)


def tell(kind: str, words: object) -> None:
    """A line on stderr: `kind` is error, warning or the like, `words` what was wrong and what to do."""
    note(f"fastsmooth: {kind}: {' '.join(str(words).split())}")


def warn(words: object) -> None:
    """A line on stderr about something that stops nothing."""
    tell("warning", words)


def put_line(line: str, stream: TextIO | None, indent: int = 4, whole: bool = False) -> None:
    room = None if whole else columns(stream)
    put("\n".join(wrapped(printable(line, stream), room, indent)) + "\n", stream)


def on_terminal(stream: TextIO | None) -> bool:
    return columns(stream) is not None


def put(text: str, stream: TextIO | None) -> None:
    """Write the text as it is, at once. Once the stream's reader is gone, what is written there goes nowhere."""
    if stream is None:  # a process without a terminal may have been started without the stream
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # or Python would fail on what is left in its buffer when it ends
        os.close(nowhere)


def one_line(error: BaseException) -> str:
    """An exception's words on one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str, stream: TextIO | None = None) -> str:
    """The text on one line, in what the stream (stdout) can show: of other characters the bytes are written, \\xHH each."""
    if text.isascii() and text.isprintable():
        return text
    stream = stream or sys.stdout
    stream = getattr(stream, "rich_proxied_file", stream)  # while a bar is shown
    encoding = getattr(stream, "encoding", None) or "ascii"
    return "".join(c if c.isprintable() and c.encode(encoding, "ignore") else escaped(c) for c in text)


def escaped(c: str) -> str:
    """The bytes of a character, \\xHH each."""
    # a byte of a file name that is not UTF-8 comes as one of these surrogates
    as_bytes = c.encode("utf-8", "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in as_bytes)


def printable_path(path: str) -> str:
    """The path on one line; one that cannot be shown as it is comes as bash reads it: $'caf\\xe9.jpg'."""
    quoted = path.replace("\\", "\\\\").replace("'", "\\'")
    return path if printable(path) == path else f"$'{printable(quoted)}'"


def command(name: str) -> str:
    """How one of our commands is called, in the way in which this process was: fastsmooth train, python -m fastsmooth.train."""
    program = Path(sys.argv[0])
    if program.stem == "fastsmooth":
        return f"fastsmooth {name}"
    of_package = program.name == "__main__.py" and program.parent.name == "fastsmooth"
    return f"python -m fastsmooth {name}" if of_package else f"python -m fastsmooth.{name}"


def end_with(main: Callable[[], int]) -> NoReturn:
    """Be the process of a command. What Python says by itself about others' code goes the way of all lines too."""

    def traced(kind, error, trace) -> None:
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            note(line)

    def warned(message, category, filename, lineno, file=None, line=None) -> None:
        warn(f"{message} ({category.__name__} of {filename}:{lineno})")

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(self.format(record))

    def ended(thread) -> None:
        if thread.exc_type is not SystemExit:
            traced(thread.exc_type, thread.exc_value, thread.exc_traceback)

    sys.excepthook, threading.excepthook, warnings.showwarning = traced, ended, warned
    logging.lastResort = Noted(logging.WARNING)
    sys.exit(main())
