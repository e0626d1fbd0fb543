"""What a cell is given, and what it tells."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import events
from benchmarks.gpu.events import Clock, Step
from benchmarks.timing import Measured, rounded

Row = dict[str, Any]


class Cell:
    """A cell at work.

    device: where it computes. dry: on a CPU in a tiny form, so that a mistake in the cell is found
    without a GPU. data: a folder with cifar100-full and archives of images, which may be missing.
    scratch: an empty folder. write: takes each row when it is known.
    """

    def __init__(
        self, name: str, dry: bool, data: Path, scratch: Path, write: Callable[[Row], None]
    ):
        self.name, self.dry, self.data, self.scratch = name, dry, data, scratch
        self.device = torch.device("cpu" if dry else "cuda")
        self.write, self.failed = write, False

    def tell(self, case: str, **values: Any) -> None:
        self.write({"bench": f"gpu_{self.name}", "case": case} | values)

    def measure(
        self,
        variants: dict[str, Step],
        clock: Clock = events.whole,
        seconds: float = 0.1,
        rounds: int = 7,
        most: int = 1000,
    ) -> dict[str, Measured]:
        """events.measure on the cell's device; in a dry cell as briefly as can be."""
        if self.dry:
            seconds, rounds, most = 1e-3, 2, min(most, 20)
        return events.measure(self.device, variants, clock, seconds, rounds, most)

    def tell_times(
        self, case: str, found: dict[str, Measured], ratio_to: str, units: float, **about: Any
    ) -> None:
        """One row a variant, in the form of the other benchmarks. `units` is what a step processes;
        ratios are of seconds, below 1 is faster, and None where `ratio_to` was not measured."""
        base = found.get(ratio_to)
        for name, m in found.items():
            seconds = m.seconds()
            row = {"variant": name, "median_s": rounded(seconds), "per_s": rounded(units / seconds)}
            row |= {f"p{q}_s": rounded(m.percentile(q)) for q in (20, 80)}
            row |= {"ratio": rounded(seconds / base.seconds()) if base else None}
            row |= {"ratio_to": ratio_to, "rounds": len(m.windows)}
            self.tell(case, **row, first_step_s=rounded(m.first_step), **about)

    @contextmanager
    def part(self, case: str, **values: Any) -> Iterator[None]:
        """What fails inside is a row, and stops nothing else of the cell."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.failed = True
            self.tell(case, **values, failed=words(error))

    def check(self, case: str, right: bool, **values: Any) -> None:
        """A row that says whether something is as it must be."""
        self.failed |= not right
        self.tell(case, right=bool(right), **values)


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
