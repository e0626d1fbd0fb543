"""trackio: its store on this machine."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import shlex
import sqlite3
import time
from pathlib import Path
from typing import Any

from fastsmooth.runfolder.trackers import Row, Tracked, keep_id, known_id, new_id, numbers

EVERY = 1.0  # seconds between writes: one takes milliseconds, whatever it holds


class Trackio:
    """A run in the store of trackio, which lies where TRACKIO_DIR says.

    The store is written here, not by trackio.log: that asks the Hub for the user's name, tells runs
    apart by their names alone, and leaves rows to a thread, where a kill loses them and an error is
    not heard of. A row is known by its update and its numbers, so that a resumed run adds those of
    metrics.jsonl that the store lacks and takes back those that metrics.jsonl no longer holds.
    """

    def __init__(self, run: Tracked):
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio
            from trackio import fragments, sqlite_storage, utils

            in_files = utils.get_storage_mode() == "jsonl"  # on a network file system

        self._store, self._fragments = sqlite_storage.SQLiteStorage, fragments
        self._files = fragments.FragmentWriter() if in_files else None
        self._project, self._name = run.config["wandb_project"], run.name
        self._store.validate_project_name(self._project)
        kept_in = run.folder / "trackio.json"
        self._id = known_id(kept_in) or new_id()
        keep_id(kept_in, self._id)  # first: whatever the store lacks of it is added to it later
        self._waiting: list[Row] = []
        self._config: dict[str, Any] | None = None
        self._path: Path | None = None if in_files else self._store.init_db(self._project)
        kept = {self._key(row) for row in run.rows}
        if self._path is None or not self._take_back(self._path, kept):
            created = datetime.datetime.now(datetime.UTC).isoformat()
            self._config = run.config | {"_Created": created}
        self._write(run.rows)
        project = shlex.quote(self._project)
        self.where = (
            f"run {run.name} of project {self._project} in {trackio.TRACKIO_DIR}; to look at it: "
            f"trackio show --project {project}"
        )

    def row(self, row: Row) -> None:
        self._waiting.append(row)
        if time.monotonic() > self._wrote + EVERY:
            self._write(self._waiting)

    def finish(self, summary: dict[str, Any], update: int, exit_code: int) -> None:
        self._waiting += [Row(update, numbers("summary", summary))] * bool(summary)
        self._write(self._waiting)

    def _key(self, row: Row) -> str:
        said = json.dumps(row, sort_keys=True).encode()
        return f"{self._id}-{hashlib.sha256(said).hexdigest()[:16]}"

    def _take_back(self, path: Path, kept: set[str]) -> bool:
        """Delete the rows of this run that are not `kept`; whether the store knows the run."""
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as store, store:
            of_run = (self._id,)
            rows = store.execute("SELECT id, log_id FROM metrics WHERE run_id = ?", of_run)
            gone = [(row,) for row, key in rows if key not in kept]
            store.executemany("DELETE FROM metrics WHERE id = ?", gone)
            return bool(store.execute("SELECT 1 FROM configs WHERE run_id = ?", of_run).fetchone())

    def _write(self, rows: list[Row]) -> None:
        """Put rows into the store that are not there yet."""
        if self._path is not None and not self._path.exists():
            raise FileNotFoundError(f"{self._path} was removed")
        if self._files is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat()
            run = {"project": self._project, "run": self._name, "run_id": self._id}
            run |= {"config": self._config, "timestamp": now}
            self._files.write_local(
                [
                    self._fragments.metric_record(
                        run | {"metrics": row.numbers, "step": row.update, "log_id": self._key(row)}
                    )
                    for row in rows
                ]
            )
        else:
            self._store.bulk_log(
                project=self._project,
                run=self._name,
                run_id=self._id,
                metrics_list=[row.numbers for row in rows],
                steps=[row.update for row in rows],
                config=self._config,
                log_ids=[self._key(row) for row in rows],
            )
        if rows:
            self._config = None
        self._waiting, self._wrote = [], time.monotonic()
