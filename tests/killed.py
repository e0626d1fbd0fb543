"""A run that dies at an update, in this process."""

from typing import Any

import pytest

from fastsmooth.training import loop


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, update: int) -> None:
    """Runs die in the method of that name, once, at that update."""
    method = getattr(loop.Run, name)

    def die(run: loop.Run, *given: Any) -> Any:
        if run.update == update:
            monkeypatch.setattr(loop.Run, name, method)
            raise Killed
        return method(run, *given)

    monkeypatch.setattr(loop.Run, name, die)
