"""What every command says and how it ends: exit codes, lines on stdout and stderr, text that others chose.

Whatever reaches a terminal goes through `say`, `tell` or `warn`: they show names and reasons without their control
characters, and a reader that is gone (| head, a closed terminal) never fails the command that speaks to it.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

DONE, SOME_FAILED, BAD_INPUT, DIVERGED, CANNOT_WRITE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 74, 75, 130


def say(line: str) -> None:
    """A line on stdout."""
    put(printable(line, sys.stdout) + "\n", sys.stdout)


def tell(kind: str, words: object) -> None:
    """A line on stderr: `kind` is error, warning or the like, `words` what was wrong and what to do."""
    line = " ".join(str(words).split())
    put(f"fastsmooth: {kind}: {printable(line, sys.stderr)}\n", sys.stderr)


def warn(words: object) -> None:
    """A line on stderr about something that stops nothing."""
    tell("warning", words)


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
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
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
