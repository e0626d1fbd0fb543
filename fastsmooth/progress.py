"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, and early on what the run will cost."""

from __future__ import annotations

import sys
import time
from typing import Any

from fastsmooth.messages import printable, say

ANNOUNCE_AFTER = 3.0  # seconds of training before its cost is projected
LINE_EVERY = 30.0  # seconds between lines within an epoch, where there is no bar


def span(seconds: float) -> str:
    """A length of time for people: 42 s, 7 min, 3.5 h, 2.1 days."""
    for limit, unit, divisor in ((100, "s", 1), (100 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """Told of every update and epoch; prints to stdout. `total` is the samples that the whole run will process.

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
        self.bar = self.task = None
        self.quiet, self.delta_unit = quiet, delta_unit
        if sys.stdout.isatty() and not quiet:
            self._open_bar(done)

    def _open_bar(self, done: int) -> None:
        try:
            from rich import progress as rich
        except ImportError:
            return
        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.TextColumn("{task.fields[speed]}"),
        )
        self.bar = rich.Progress(*columns, transient=True)
        self.task = self.bar.add_task("starting", total=self.total, completed=done, speed="")
        self.bar.start()

    def restart_clock(self, done: int) -> None:
        """Leave what came before, compilation say, out of the speed."""
        self.started, self.begun_at = time.monotonic(), done

    def update(self, samples: int, epoch: int, described: str) -> None:
        """After an update: `samples` processed so far, `described` the Point and loss in words."""
        now = time.monotonic()
        rate = self._rate(samples, now)
        if not self.announced and now - self.started > ANNOUNCE_AFTER and rate > 0:
            self.announced = True
            if self.total / rate > 60:
                self.say(
                    f"about {span(self.epoch_samples / rate)} an epoch on {self.device_name}, "
                    f"{span((self.total - samples) / rate)} in all ({rate:,.0f} images/s)"
                )
        line = f"epoch {epoch + 1}/{self.epochs}  {described}"
        if self.bar is not None:
            left = f"{rate:,.0f} images/s, {span((self.total - samples) / rate)} left" if rate > 0 else ""
            self.bar.update(self.task, completed=samples, description=line, speed=left)
        elif now - self.last_line > LINE_EVERY:
            self.last_line = now
            share = samples / self.epoch_samples - epoch
            self.say(f"{line}  {share:.0%} of the epoch  {rate:,.0f} images/s  {self._left(samples, rate)}")

    def epoch(self, row: dict[str, Any]) -> None:
        """The finished epoch's row as a line."""
        now = time.monotonic()
        self.last_line = now
        delta = f"  delta {row['delta']:.4g}{self.delta_unit}" if row["delta"] is not None else ""
        delta += f"  c2 {row['c2']:.4g}" if row["c2"] is not None else ""
        self.say(
            f"epoch {row['epoch'] + 1:>{len(str(self.epochs))}}/{self.epochs}  lr {row['lr']:.4g}  batch {row['batch_size']}"
            + (f"  momentum {row['momentum']:.4g}" if row["momentum"] else "")
            + delta
            + f"  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  test acc {row['test_acc']:.2%}"
            + f"  {row['images_per_second']:,.0f} images/s  {self._left(row['samples'], self._rate(row['samples'], now))}"
        )

    def _rate(self, samples: int, now: float) -> float:
        return (samples - self.begun_at) / max(now - self.started, 1e-9)

    def _left(self, samples: int, rate: float) -> str:
        return f"{span((self.total - samples) / rate)} left" if rate > 0 and samples < self.total else ""

    def say(self, line: str) -> None:
        if self.quiet:
            return
        line = line.rstrip()
        if self.bar is not None:
            self.bar.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
        else:
            say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
