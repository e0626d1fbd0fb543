"""What a measurement takes away for its time, and gives back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
from torch import nn


@contextmanager
def instead(holder: object, name: str, value: Any) -> Iterator[None]:
    """Have `value` as the attribute `name` of an object, and afterwards what it was before."""
    own = name in vars(holder)
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own:
            setattr(holder, name, before)
        else:
            delattr(holder, name)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks of the parameters, as loggers have them, are not called inside."""
    hooks = [(own, dict(own)) for p in model.parameters() if (own := p._backward_hooks)]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, before in hooks:
            own.update(before)


@contextmanager
def same_draws() -> Iterator[None]:
    """Afterwards Python and NumPy draw the random numbers that they would have drawn."""
    python, theirs = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(theirs)
