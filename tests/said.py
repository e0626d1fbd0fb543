"""What a command says and how it ends, in this process, with streams as a shell gives them."""

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

Main = Callable[[list[str]], int]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def said(main: Main, argv: list[str]) -> Said:
    """Run a command line. As in a process, stdout refuses what it cannot encode and stderr escapes it."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", newline="", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as end:  # of argparse's --help
            code = end.code or 0
    return Said(code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


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
