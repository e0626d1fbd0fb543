"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from pathlib import Path
from typing import Any

from fastsmooth.runfolder.trackers import Row, Tracked, numbers


class Tensorboard:
    """An event file in RUN/tensorboard for each part of a run.

    A row is one event, on the disk when row() returns. SummaryWriter's thread is not used: what it
    meets would be a traceback of its own. A part begins by taking back what the files before it
    hold, and by telling the rows that metrics.jsonl holds, so that none is missing or there twice.
    """

    def __init__(self, run: Tracked):
        import tensorboard  # noqa: F401  # that it is missing is said before torch says it otherwise
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        times = times_in(folder)
        host = f"{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{time.time_ns() / 1e9:020.9f}.{host}"
        self._file = RecordWriter(self._path.open("xb"))
        self._write(file_version="brain.Event:2")
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=0, session_log=begun)
        lines = json.dumps(run.config, indent=1).splitlines()
        self._write(step=0, summary=text("config", "\n".join(f"    {line}" for line in lines)))
        for row in run.rows:
            first = next(iter(row.numbers), "")
            self.row(row, times.get((first, row.update)))
        self.where = (
            f"in {folder}; to look at it: tensorboard --logdir {shlex.quote(str(run.folder))}"
        )

    def row(self, row: Row, when: float | None = None) -> None:
        if not self._path.exists():
            raise FileNotFoundError(f"{self._path} was removed")
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in row.numbers.items()]
        self._write(step=row.update, summary=self._summary(value=values), wall_time=when)

    def finish(self, summary: dict[str, Any], update: int, exit_code: int) -> None:
        self.row(Row(update, numbers("summary", summary)))
        self._file.close()

    def _write(self, wall_time: float | None = None, **what: Any) -> None:
        event = self._event(wall_time=wall_time or time.time(), **what)
        self._file.write(event.SerializeToString())
        self._file.flush()


def times_in(folder: Path) -> dict[tuple[str, int], float]:
    """When what the event files hold was written, by name and update, in seconds."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return {
        (value.tag, event.step): event.wall_time
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
