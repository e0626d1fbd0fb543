"""Weights & Biases, offline or online."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from fastsmooth.runfolder.trackers import Row, Tracked, keep_id, known_id, new_id


class Wandb:
    """A run at Weights & Biases, or the files of one in the run folder.

    What was sent cannot be taken back: after a kill, the rows since the last checkpoint come again.
    """

    def __init__(self, run: Tracked):
        mode = run.config["wandb_mode"]
        if mode in (None, "auto"):
            mode = os.environ.get("WANDB_MODE") or (
                "online" if os.environ.get("WANDB_API_KEY") else "offline"
            )
        self.where = ""
        if mode == "disabled":
            return
        offline = mode in ("offline", "dryrun")
        if offline:
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        kept_in = run.folder / "wandb.json"
        known = known_id(kept_in)
        made = known or new_id()
        self._run = wandb.init(
            project=run.config["wandb_project"],
            entity=run.config["wandb_entity"],
            mode=mode,
            config=run.config,
            dir=str(run.folder),
            name=run.name,
            id=made,
            resume="allow",  # offline too: a later `wandb sync` appends what is of the same id
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        self._files = Path(self._run.dir) if offline else None
        self.where = where_offline(self._files) if self._files else str(self._run.url)
        if known is None:
            for row in run.rows:
                self.row(row)
            # Not before: with the id a resumed run takes these rows for told. Where a kill comes
            # between, it begins a run anew and tells it all of them.
            keep_id(kept_in, made)

    def row(self, row: Row) -> None:
        if self._files is not None and not self._files.exists():  # wandb says nothing of it
            raise FileNotFoundError(f"{self._files} was removed")
        self._run.log(row.numbers | {"update": row.update})

    def finish(self, summary: dict[str, Any], update: int, exit_code: int) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=exit_code)


def where_offline(files: Path) -> str:
    """Where the rows of all parts of an offline run are, and the command that sends them; `files`
    lies in the newest part."""
    folder = files.parent.parent
    return f"offline, in {folder}; to send it: wandb sync {shlex.quote(str(folder))}/offline-run-*"
