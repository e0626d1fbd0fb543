"""Checkpoints that are whole or absent: written aside, synced, summed, and named last; the newest
valid one is loaded.

A checkpoint is checkpoints/ckpt-<step>.pt (torch.save of plain tensors, numbers and lists) with its
manifest ckpt-<step>.json {"step", "sha256", "bytes"}. A file without a manifest was never finished
and counts for nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastsmooth.runfolder.files import read_file, rename, size_of, write_aside

KEEP = 2  # the newest and, should that be damaged, the one before


class CheckpointError(ValueError):
    """No checkpoint of the run can be used; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one run folder. `warn` takes one line about each that is passed over."""

    def __init__(self, directory: Path, warn: Callable[[str], None]):
        self.directory, self.warn = directory, warn
        # update and epoch: the last update of an epoch is saved again once it is evaluated
        self.saved: tuple[int, int | None] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of update `step`. Raises OSError; the earlier ones stay as they were."""
        if (step, state.get("epoch")) == self.saved:
            return
        self.directory.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        manifest = {"step": step, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        whole, sums = self.directory / f"ckpt-{step}.pt", self.directory / f"ckpt-{step}.json"
        written = write_aside(whole, data)
        try:
            summed = write_aside(sums, json.dumps(manifest).encode())
        except OSError:
            written.unlink(missing_ok=True)
            raise
        # the manifest of the state that this update had before its epoch was evaluated
        if sums.exists():
            sums.unlink()
        for aside, path in ((written, whole), (summed, sums)):
            rename(aside, path)
        self.saved = step, state.get("epoch")
        self._prune()

    def load(self) -> dict[str, Any] | None:
        """The newest state whose sum is right; None if none was saved. Raises CheckpointError."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                state = self._read(step)
            except (OSError, ValueError, RecursionError) as error:
                self.warn(
                    f"{self.directory / f'ckpt-{step}.pt'} is damaged ({error}): going back to the "
                    "one before"
                )
                continue
            self.saved = step, state.get("epoch")
            return state
        if steps:
            raise CheckpointError(
                f"{self.directory}: none of its {len(steps)} checkpoints is valid: start a new run"
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending."""
        if not self.directory.is_dir():
            return []
        manifests = (
            re.fullmatch(r"ckpt-(\d+)\.json", entry.name) for entry in os.scandir(self.directory)
        )
        return sorted(int(match[1]) for match in manifests if match)

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        finished = {f"ckpt-{step}.{end}" for step in self.steps() for end in ("pt", "json")}
        if self.directory.is_dir():
            for entry in os.scandir(self.directory):
                ours = entry.name.startswith((".ckpt-", "ckpt-")) and not entry.is_dir(
                    follow_symlinks=False
                )
                if ours and entry.name not in finished:
                    os.unlink(entry.path)

    def _read(self, step: int) -> dict[str, Any]:
        manifest = json.loads(read_file(self.directory / f"ckpt-{step}.json"))
        path = self.directory / f"ckpt-{step}.pt"
        size_of(path)  # refuses what is no file
        data = path.read_bytes()
        if not isinstance(manifest, dict) or hashlib.sha256(data).hexdigest() != manifest.get(
            "sha256"
        ):
            raise ValueError("its SHA-256 sum is wrong")
        if (manifest.get("step"), manifest.get("bytes")) != (step, len(data)):
            raise ValueError("its manifest is of another file")
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
            raise ValueError(f"torch cannot read it: {type(error).__name__}") from None
        if not isinstance(state, dict):
            raise ValueError("it holds no state of a run")
        return state

    def _prune(self) -> None:
        for step in self.steps()[:-KEEP]:
            # the manifest first: without it the rest counts for nothing
            (self.directory / f"ckpt-{step}.json").unlink(missing_ok=True)
            (self.directory / f"ckpt-{step}.pt").unlink(missing_ok=True)
