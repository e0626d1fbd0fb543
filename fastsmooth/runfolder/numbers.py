"""Numbers that files may hold, and what is made of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SMALLEST, LARGEST = 1e-100, 1e100  # numbers whose squares and quotients are numbers


def exact(value: float) -> str:
    """The number in as few digits as read back as the same: 0.5, 1, 1e-05, 0.5000001."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def number(value: Any) -> bool:
    """Whether it is one that can be squared and divided by."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation with n - 1; None for fewer than two."""
    if len(values) < 2:
        return None
    center = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - 1))
