"""Rows go to Weights & Biases too, where asked: an adapter at the edge that never stops a run."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import read_object, replace


class Tracker:
    """Rows go to Weights & Biases too, where asked. Whatever it raises becomes one warning: it
    never stops a run.

    `where` says where they are; it is empty where they go nowhere.
    """

    def __init__(self, config: dict[str, Any], folder: Path, warn: Callable[[str], None]):
        self._warn, self._run, self.where = warn, None, ""
        mode = config["wandb_mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or (
                "online" if os.environ.get("WANDB_API_KEY") else "offline"
            )
        if mode in ("off", "disabled"):
            return
        offline = mode in ("offline", "dryrun")
        if offline:
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb

            self._run = wandb.init(
                project=config["wandb_project"],
                entity=config["wandb_entity"],
                mode=mode,
                config=config,
                dir=str(folder),
                name=folder.name,
                id=tracked_as(folder),
                resume="allow",  # offline too: a later `wandb sync` appends what is of the same id
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.define_metric("update")
            self._run.define_metric("*", step_metric="update")
            self.where = (
                where_offline(Path(self._run.dir)) if offline else f"wandb: {self._run.url}"
            )
        except ImportError:
            warn(
                "--wandb-mode: wandb is not installed, so nothing is sent: pip install "
                "'fastsmooth[wandb]'"
            )
        except Exception as error:  # the tracker must never stop a run
            warn(f"wandb: {one_line(error)}: going on without it")
            self._run = None

    def row(self, kind: str, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            numbers = {
                f"{kind}/{key}": v for key, v in values.items() if isinstance(v, int | float)
            }
            self._run.log(numbers | {"update": values.get("step")})
        except Exception as error:  # as above
            self._warn(f"wandb: {one_line(error)}: going on without it")
            self._run = None

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # as above
            self._warn(f"wandb: {one_line(error)}")


def tracked_as(folder: Path) -> str:
    """The id of the run at Weights & Biases: random, and kept in the folder, so that a resumed run
    goes on as the same one."""
    known = (read_object(folder / "wandb.json") or {}).get("id")
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{16}", known):
        return known
    made = secrets.token_hex(8)
    replace(folder / "wandb.json", json.dumps({"id": made}).encode() + b"\n")
    return made


def where_offline(files: Path) -> str:
    """Where the rows of all parts of an offline run are, and the command that sends them; `files`
    lies in the newest part."""
    folder = files.parent.parent
    return (
        f"wandb: offline, in {folder}; to send it: wandb sync "
        f"{shlex.quote(str(folder))}/offline-run-*"
    )
