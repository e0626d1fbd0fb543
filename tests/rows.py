"""The rows of a run, every line of whose metrics.jsonl has to be one."""

from pathlib import Path
from typing import Any

from fastsmooth.runfolder import read


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows, torn, not_finite = read.read_rows(folder / "metrics.jsonl")
    assert not torn and not not_finite, f"{folder}: {torn} torn lines, {not_finite} not finite"
    return rows
