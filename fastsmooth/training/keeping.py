"""The weights that a run leaves for use, beside its checkpoints: --keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsmooth.messages import CannotWrite, warn
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.weights import write_weights
from fastsmooth.training.ema import Ema

Row = Mapping[str, Any]  # of an epoch, as metrics.jsonl has it


@dataclass(frozen=True)
class Keeper:
    """Writes them into a run folder: `keep` is best, last or all.

    Of a run with an average of the weights each has a twin, NAME-ema, that is best by itself.
    """

    keep: str
    network: str
    folder: Path
    model: nn.Module
    ema: Ema | None
    ranks: Ranks

    def after_epoch(self, row: Row, best: float | None, best_ema: float | None) -> None:
        """Those of the epoch of `row`, where they are to be kept; best and best_ema are the test
        accuracies, from 0 to 1, of the best epoch before it, None where there is none."""
        if self.keep == "all":
            self._write(f"epoch-{row['epoch'] + 1}", row)
        if self.keep == "last":
            return
        if best is None or row["test_acc"] > best:
            self._write("best", row)
        if self.ema is not None and (best_ema is None or row["ema_test_acc"] > best_ema):
            self._write("best-ema", row)

    def last(self, row: Row, final: bool) -> None:
        """Those that there are now. `final`: at the end of the run, where they must be written, or
        CannotWrite is raised in every process."""
        for name in ["last"] + ["last-ema"] * (self.ema is not None):
            failed = self._write(name, row, quiet=final)
            reason = final and self.ranks.from_leader(failed and failed.strerror)
            if reason:
                path = str(self.folder / name)
                raise CannotWrite(failed.errno if failed else 0, reason, path) from failed

    def _write(self, name: str, row: Row, quiet: bool = False) -> CannotWrite | None:
        """NAME.safetensors; what prevents it, which is warned of unless `quiet`."""
        if not self.ranks.leader:
            return None
        averaged = name.endswith("-ema") and self.ema is not None
        prefix = "ema_" if averaged else ""
        about = {"network": self.network, "epoch": row.get("epoch"), "update": row.get("step")}
        about |= {key: row.get(prefix + key) for key in ("test_acc", "test_loss")}
        tensors: Mapping[str, Tensor] = self.model.state_dict()
        if averaged and self.ema is not None:
            tensors = self.ema.state_dict()
        try:
            write_weights(self.folder, name, tensors, about)
        except CannotWrite as error:
            if not quiet:
                warn(
                    f"no {name} weights at update {row.get('step'):,} ({error.strerror}): those "
                    "before stay, the run goes on"
                )
            return error
        return None
