"""Saved runs taken up to be measured: their images, their model, and its sharpness.

What is measured joins the run: sharpness.json has every result, metrics.jsonl a row for each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsmooth import data, models
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import Config
from fastsmooth.cli.device import compute_float32, pick_device
from fastsmooth.cli.facts import FILE_SETS, is_among
from fastsmooth.cli.flags import ConfigError
from fastsmooth.data.order import in_order
from fastsmooth.freezing import freeze
from fastsmooth.messages import note, one_line, warn
from fastsmooth.noise.algorithms import Setting
from fastsmooth.noise.sharpness import Sharpness, sharpness
from fastsmooth.processors import keep_within_quota
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.files import read_object
from fastsmooth.runfolder.write import RunFolder, RunFolderError


@dataclass(frozen=True)
class Images:
    """Which images of a run are measured, `batch` of them together."""

    samples: int  # the first so many
    batch: int
    test: bool  # of the test set, else of the training set
    augment: bool
    data_dir: str | None  # where they are now; None where the run's config.json says so

    @property
    def split(self) -> str:
        return "test" if self.test else "train"


def ready_device(name: str) -> torch.device:
    """The device that --device names, ready to be measured on. Raises ConfigError."""
    keep_within_quota(torch)
    device = pick_device(name, torch)
    # TF32 would round the loss more coarsely than it rises
    compute_float32(torch, "ieee")
    return device


def measure_sharpness(
    path: Path,
    setting: Setting,
    rhos: Sequence[float],
    images: Images,
    device: torch.device,
    trust_code: bool = False,
) -> list[dict[str, Any]]:
    """The entries of one run, one for each rho, after they are written to its sharpness.json and
    metrics.jsonl. Raises ConfigError where the run cannot be measured."""
    try:
        return measured(path, setting, rhos, images, device, trust_code)
    except (models.ModelError, data.DataError, CheckpointError, RunFolderError) as error:
        raise ConfigError(str(error)) from error
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{path}: out of memory at --batch {images.batch}: try --device cpu"
        ) from None


def measured(
    path: Path,
    setting: Setting,
    rhos: Sequence[float],
    images: Images,
    device: torch.device,
    trust_code: bool,
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    c = parsing.read_saved(path, with_code=trust_code)
    earlier = earlier_results(path)
    with closing(RunFolder(path)) as folder:  # nobody goes on with the run meanwhile
        sets = open_images(path, c, images, device)
        model, state = load(path, c, sets, device)
        loader = sets.test if images.test else sets.train
        order = in_order(images.samples, images.batch, str(device))
        batches = loader.batches(order, setting.seed if images.augment else None)
        results = sharpness(model, batches, setting, rhos)
        entries = [entry_of(result, setting, images, state["update"]) for result in results]
        if c.loss_in_words != PLAIN:
            warn(f"{path} was trained on {c.loss_in_words}: its sharpness is that of {PLAIN}")
            entries = [{"loss": PLAIN} | entry for entry in entries]
        again = [key(entry) for entry in entries]
        kept = [entry for entry in earlier if key(entry) not in again]
        folder.write("sharpness.json", {"results": kept + entries})
        drop_torn_row(folder)
        seconds = round((time.perf_counter() - started) / len(entries), 3)
        for entry in entries:
            folder.row("measure", standing(state) | row_of(entry) | {"seconds": seconds})
        folder.sync()
    return entries


def earlier_results(path: Path) -> list[dict[str, Any]]:
    saved = path / "sharpness.json"
    if not saved.exists():
        return []
    results = (read_object(saved) or {}).get("results")
    if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
        raise ConfigError(f"{saved} is damaged: move it away, and the run is measured anew")
    return results


def open_images(path: Path, c: Config, images: Images, device: torch.device) -> data.Data:
    """The run's images, as it read them. Raises DataError or ConfigError."""
    if images.augment and not c.changes:
        raise ConfigError(f"--augment: {path} trained on images as they are: leave it out")
    if is_among(c.dataset, FILE_SETS) and c.loader in ("auto", "resident"):
        c = dataclasses.replace(c, loader="threads")  # decodes what is measured alone
    if images.data_dir:
        c = dataclasses.replace(c, data_dir=images.data_dir)
    c = dataclasses.replace(c, image_size=c.sizes.values[-1])  # that of what is not trained on
    sets = data.open_data(c, device, warn)
    there = len(sets.test if images.test else sets.train)
    if images.samples > there:
        kind = "test" if images.test else "training"
        raise ConfigError(
            f"--samples {images.samples} exceeds the {there} {kind} images of {path}: lower "
            "--samples"
        )
    return sets


def load(
    path: Path, c: Config, sets: data.Data, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The model at the newest valid checkpoint, and that checkpoint. Raises CheckpointError,
    DataError or ModelError."""
    state = Checkpoints(path / "checkpoints", warn).load()
    if state is None:
        raise CheckpointError(
            f"{path} has no checkpoint: train it to the end of an epoch, or with --checkpoint-every"
        )
    model = models.build(c.model, sets.classes, c.norm, sets.channels)
    try:
        same_images = state["data"]["fingerprint"] == sets.fingerprint
        model.load_state_dict(state["model"])
        standing(state)
        if c.freeze:
            freeze(model, c.freeze)
            note(f"{path}: measured over the parameters that --freeze left to train")
    except Exception as error:  # a sound file of another program may fail anywhere
        raise CheckpointError(
            f"{path}: its checkpoint is not of {c.model} with {sets.classes} classes: "
            f"{one_line(error)[:200]}: start a new run"
        ) from None
    if not same_images:
        raise data.DataError(
            f"{path}: the images in {c.data_dir} are not those it was trained on: give --data-dir"
        )
    return model.to(device).to(memory_format=torch.channels_last), state


def standing(state: dict[str, Any]) -> dict[str, Any]:
    """The fields of every row, at a checkpoint. lr, batch size, momentum and delta are known at the
    end of an epoch."""
    at = {"epoch": state["epoch"], "step": state["update"], "samples": state["samples"]}
    at |= dict.fromkeys(("lr", "batch_size", "momentum", "delta"))
    last = state["last_epoch"]
    return {name: last[name] for name in at} if last and last["step"] == state["update"] else at


def entry_of(result: Sharpness, setting: Setting, images: Images, update: int) -> dict[str, Any]:
    """A result as sharpness.json has it: what tells it from others, then what was measured."""
    asked = dataclasses.asdict(setting) | {"rho": result.rho, "split": images.split}
    asked |= {"samples": images.samples, "batch": images.batch, "augment": images.augment}
    return asked | {"step": update} | dataclasses.asdict(result)


PLAIN = "cross-entropy"  # what is measured, whatever a run was trained on
MEASURED = {f.name for f in dataclasses.fields(Sharpness)} - {"rho"}


def key(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in MEASURED}


def row_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A result as metrics.jsonl has it, named so that it hides no field that every row has."""
    renamed = {"value": "sharpness", "error": "sharpness_se"}
    settings = {name: value for name, value in entry.items() if name not in ("step", "per_batch")}
    return {renamed.get(name, f"sharpness_{name}"): value for name, value in settings.items()}


def drop_torn_row(folder: RunFolder) -> None:
    """Remove the half row that a killed run left at the end of metrics.jsonl: the next would be
    glued to it."""
    rows = (folder.path / "metrics.jsonl").read_bytes()
    folder.rewind(rows.rfind(b"\n") + 1)
