"""How lines fit a terminal: wrapped between words, or without the fields that matter least. What is
redirected is never cut."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from typing import TextIO

UNKNOWN = 80  # columns of a terminal that does not say how many it has


def columns(stream: TextIO | None) -> int | None:
    """The width of the terminal that the stream leads to; None where it leads elsewhere."""
    try:
        if stream is None or not stream.isatty():
            return None
        asked = int(os.environ.get("COLUMNS") or 0)
        return asked or os.get_terminal_size(stream.fileno()).columns or UNKNOWN
    except (OSError, ValueError):  # a closed stream, COLUMNS that is no number
        return UNKNOWN


def cells(text: str) -> int:
    """The columns that a text takes: letters of East Asia take two, a lone accent none."""
    return len(text) if text.isascii() else sum(map(cell, text))


def cell(c: str) -> int:
    return 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1


def wrapped(line: str, room: int | None, indent: int = 4) -> list[str]:
    """The line in parts of at most `room` columns, all but the first indented; a word that is
    longer stays whole."""
    if room is None or cells(line) <= room:
        return [line]
    parts = [""]
    for space, word in re.findall(r"(\s*)(\S+)", line):
        if not parts[-1]:
            parts[-1] = space + word
        elif cells(parts[-1] + space + word) <= room:
            parts[-1] += space + word
        else:
            parts.append(" " * min(indent, room // 2) + word)
    return parts


class Fields:
    """Lines of one kind, each made of named fields, of which those in `least_first` are left out as
    far as a terminal is narrow.

    What was left out of one line is left out of all that follow.
    """

    def __init__(self, least_first: Iterable[str]):
        self.least_first = tuple(least_first)
        self.gone: set[str] = set()

    def line(self, fields: dict[str, str], room: int | None) -> str:
        """The fields, those that are empty left out, with two spaces between them."""
        kept = {name: text for name, text in fields.items() if text and name not in self.gone}
        for name in self.least_first:
            if room is None or cells("  ".join(kept.values()).rstrip()) <= room:
                break
            if kept.pop(name, None):
                self.gone.add(name)
        return "  ".join(kept.values()).rstrip()


class Table(Fields):
    """Lines below each other. `layout` has each column's heading and how its cells are set, as ">9"
    (9 wide, to the right)."""

    def __init__(self, layout: dict[str, str], least_first: Iterable[str]):
        super().__init__(least_first)
        self.layout = layout

    def heading(self, room: int | None) -> str:
        return self.row(self.layout, room)

    def row(self, cells_: Iterable[str], room: int | None) -> str:
        """The line of the cells, one a column."""
        pairs = zip(self.layout.items(), cells_, strict=True)
        return self.line({name: f"{text:{how}}" for (name, how), text in pairs}, room)
