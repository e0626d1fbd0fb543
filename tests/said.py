"""What a command says and how it ends, in this process, with streams as a shell gives them."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO
from unittest import mock

Main = Callable[[list[str]], int]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def said(main: Main, argv: list[str]) -> Said:
    """Run a command line. As in a process, stdout refuses what it cannot encode and stderr escapes
    it."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", newline="", write_through=True)
    err = io.TextIOWrapper(
        io.BytesIO(), "utf-8", "backslashreplace", newline="", write_through=True
    )
    with redirected(out, err):
        code = ending(main, argv)
    return Said(code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


@contextlib.contextmanager
def redirected(out: TextIO, err: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def ending(main: Main, argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as end:  # of argparse's --help
        return end.code or 0


def one_line(text: str) -> str:
    """The message of a refusal: all that stderr holds, without its prefix."""
    assert text.startswith("fastsmooth: error: ") and text.endswith("\n"), text[:500]
    assert len(text.splitlines()) == 1, text[:500]
    return text.removeprefix("fastsmooth: error: ").rstrip("\n")


def refused(main: Main, argv: list[str]) -> str:
    """The message of a refusal with exit code 2 and nothing on stdout."""
    found = said(main, argv)
    assert found.code == 2 and not found.out, found
    return one_line(found.err)


class Seen(NamedTuple):
    code: int
    raw: str  # all that came, control sequences too
    lines: list[str]  # what stands on the screen and above it in the end
    widest: int  # columns of the widest line that ever stood there


def seen(main: Main, argv: list[str], columns: int) -> Seen:
    """Run a command line whose stdout and stderr are a terminal with so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    came: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says EIO at the end of a terminal
            while block := os.read(master, 65536):
                came.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    # rich asks the process's own streams for the width, which are no terminal here
    environment = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(slave, "w", encoding="utf-8", buffering=1))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(redirected(stream, stream))
        code = ending(main, argv)
    reader.join()
    os.close(master)
    raw = b"".join(came).decode("utf-8")
    lines, widest = screen(raw)
    return Seen(code, raw, lines, widest)


CONTROL = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|(.)", re.DOTALL)


def screen(raw: str) -> tuple[list[str], int]:
    """The lines that stand on a terminal in the end, and the length of the longest that ever did:
    one that never wraps."""
    rows, row, column, widest = [[]], 0, 0, 0
    for values, command, c in CONTROL.findall(raw):
        number = int(values) if values.isdigit() else 1
        if command == "A":
            row = max(row - number, 0)
        elif command == "K":
            rows[row] = rows[row][:column] if values in ("", "0") else []
        elif command:
            assert command in "mhl", f"an escape sequence that is not rich's: {values}{command}"
        elif c == "\n":
            row += 1
            if row == len(rows):
                rows.append([])
        elif c == "\r":
            column = 0
        else:
            assert c.isprintable(), f"the character {c!r}"
            line = rows[row]
            line += " " * (column + 1 - len(line))
            line[column] = c
            column += 1
            widest = max(widest, column)
    return ["".join(line).rstrip() for line in rows], widest
