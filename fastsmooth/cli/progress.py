"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, and early on what the
run will cost."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO, cast

from fastsmooth.messages import Harmless, on_terminal, printable, say
from fastsmooth.terminal import Fields, columns

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

ANNOUNCE_AFTER = 3.0  # seconds of training before its cost is projected
LINE_EVERY = 30.0  # seconds between lines within an epoch, where there is no bar
BAR_EVERY = 0.1  # seconds between changes of the bar
BAR, PERCENT = (10, 40), 4  # columns: the least and the most of the bar itself


def span(seconds: float) -> str:
    """A length of time for people: 42 s, 7 min, 3.5 h, 2.1 days."""
    for limit, unit, divisor in ((100, "s", 1), (100 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """Told of every update and epoch; prints to stdout. `total` is the samples that the whole run
    will process.

    `quiet`: another process of the same run does the talking. `delta_unit` follows every delta.
    """

    def __init__(
        self,
        epochs: int,
        epoch_samples: int,
        total: int,
        done: int,
        device_name: str,
        quiet: bool = False,
        delta_unit: str = "",
    ):
        self.epochs, self.epoch_samples, self.device_name = epochs, epoch_samples, device_name
        self.total, self.begun_at = total, done
        self.started = self.last_line = time.monotonic()
        self.announced = False
        self.bar: Bar | None = None
        self.quiet, self.delta_unit = quiet, delta_unit
        self.at_work = Fields(("speed", "batch", "lr", "loss", "left"))
        self.finished = Fields(
            (
                *("speed", "test loss", "c2", "momentum", "delta", "left", "batch", "lr"),
                *("top5", "train loss", "ema acc"),
            )
        )
        if on_terminal(sys.stdout) and not quiet:
            self._open_bar(done)

    def _open_bar(self, done: int) -> None:
        try:
            from rich import progress as rich  # an extra, for terminals alone
            from rich.console import Console
            from rich.table import Column
        except ImportError:
            return
        least, most = BAR
        shown = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(None, table_column=Column(min_width=least, max_width=most)),
            rich.TaskProgressColumn(),
        )
        # lines on stderr go above the bar where both are on the terminal, else where the user sent
        # them
        self.bar = rich.Progress(
            *shown,
            console=Console(file=cast(TextIO, Harmless())),  # it has what rich uses
            transient=True,
            redirect_stderr=on_terminal(sys.stderr),
        )
        self.bar.add_task("starting", total=self.total, completed=done)
        self.bar.start()

    def restart_clock(self, done: int) -> None:
        """Leave what came before, compilation say, out of the speed."""
        self.started, self.begun_at = time.monotonic(), done

    def update(self, samples: int, epoch: int, point: Any, loss: float | None) -> None:
        """After an update: `samples` processed so far, at the Point, with the mean loss of late
        where there is one."""
        now = time.monotonic()
        rate = self._rate(samples, now)
        if not self.announced and now - self.started > ANNOUNCE_AFTER and rate > 0:
            self.announced = True
            if self.total / rate > 60:
                self.say(
                    f"about {span(self.epoch_samples / rate)} an epoch on {self.device_name}, "
                    f"{span((self.total - samples) / rate)} in all ({rate:,.0f} images/s)"
                )
        if now - self.last_line <= (LINE_EVERY if self.bar is None else BAR_EVERY):
            return
        self.last_line = now
        share = f"{samples / self.epoch_samples - epoch:.0%} of the epoch"
        fields = {
            "epoch": f"epoch {epoch + 1}/{self.epochs}",
            "lr": f"lr {point.lr:.4g}",
            "batch": f"batch {point.batch_size}",
            "loss": f"loss {loss:.3f}" if loss is not None else "",
            "share": share if self.bar is None else "",
            "speed": f"{rate:,.0f} images/s" if rate > 0 else "",
            "left": self._left(samples, rate),
        }
        room = columns(sys.stdout)
        if self.bar is not None:
            line = self.at_work.line(fields, room and room - BAR[0] - PERCENT - 2)
            (task,) = self.bar.task_ids
            self.bar.update(task, completed=samples, description=printable(line))
        else:
            self.say(self.at_work.line(fields, room))

    def epoch(self, row: dict[str, Any]) -> None:
        """The finished epoch's row as a line."""
        now = time.monotonic()
        self.last_line = now
        delta = row["delta"]
        fields = {
            "epoch": f"epoch {row['epoch'] + 1:>{len(str(self.epochs))}}/{self.epochs}",
            "lr": f"lr {row['lr']:.4g}",
            "batch": f"batch {row['batch_size']}",
            "momentum": f"momentum {row['momentum']:.4g}" if row["momentum"] else "",
            "delta": f"delta {delta:.4g}{self.delta_unit}" if delta is not None else "",
            "c2": f"c2_sampled {row['c2_sampled']:.4g}" if row["c2_sampled"] is not None else "",
            "train loss": f"train loss {row['train_loss']:.4f}",
            "test loss": f"test loss {row['test_loss']:.4f}",
            "test acc": f"test acc {row['test_acc']:.2%}",
            "top5": f"top-5 {row['test_top5']:.2%}" if "test_top5" in row else "",
            "ema acc": f"ema acc {row['ema_test_acc']:.2%}" if "ema_test_acc" in row else "",
            "speed": f"{row['images_per_second']:,.0f} images/s",
            "left": self._left(row["samples"], self._rate(row["samples"], now)),
        }
        self.say(self.finished.line(fields, columns(sys.stdout)))

    def _rate(self, samples: int, now: float) -> float:
        return (samples - self.begun_at) / max(now - self.started, 1e-9)

    def _left(self, samples: int, rate: float) -> str:
        going = rate > 0 and samples < self.total
        return f"{span((self.total - samples) / rate)} left" if going else ""

    def say(self, line: str) -> None:
        if not self.quiet:
            say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
