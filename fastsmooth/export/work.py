"""From a run to what was asked for, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from fastsmooth.cli.flags import ConfigError
from fastsmooth.export import hub, loading
from fastsmooth.export.graphs import to_onnx, to_torch_export
from fastsmooth.export.hub import of_weights, to_safetensors
from fastsmooth.export.request import ENDINGS, Request
from fastsmooth.models import ModelError
from fastsmooth.runfolder.files import new_aside, rename, replace, writing
from fastsmooth.runfolder.weights import ENDING, MODEL, choose_weights
from fastsmooth.runfolder.write import RunFolderError, refusing
from fastsmooth.trained import TrainedRun

Exporter = Callable[[nn.Module, TrainedRun], tuple[bytes, str]]
# (the bytes of the file, how it was checked) of a network in evaluation mode, a row a form
EXPORTERS: dict[str, Exporter] = {
    "safetensors": lambda model, run: (to_safetensors(model, run), ""),
    "onnx": lambda model, run: to_onnx(model, run.facts),
    "torch-export": lambda model, run: to_torch_export(model, run.facts),
}


def export(request: Request, run: TrainedRun) -> Iterator[str]:
    """Write what is asked for; lines that say what was written, how it was checked and how it is
    loaded. Raises ConfigError, RunError and CannotWrite."""
    try:
        # by name from here on: a run that still trains may have better ones meanwhile
        name = choose_weights(run.path, run.weights).name.removesuffix(ENDING)
        run = dataclasses.replace(run, weights=name)
        ending = ENDINGS[request.to] or f"-{request.to}"
        target = request.out or run.path / "export" / f"{name}{ending}"
        with refusing(target):
            check_target(target, request)
        model = run.model.to(memory_format=torch.contiguous_format)
        if request.to == "hub":
            files, checked = hub.files_of(model, run, request.push), ""
            with refusing(target):
                write_folder(target, files)
            size = sum(map(len, files.values()))
        else:
            data, checked = EXPORTERS[request.to](model, run)
            with refusing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                replace(target, data)
            size = len(data)
    except (ModelError, RunFolderError) as error:
        raise ConfigError(str(error)) from error
    yield f"{target}: {run.facts.network}, {of_weights(run)}, {size / 1e6:,.2f} MB"
    if checked:
        yield checked
    yield "load it: " + "; ".join(loading.of_export(run.facts, request.to, str(target)))
    if request.push:
        yield hub.push(target, request.push)


def check_target(target: Path, request: Request) -> None:
    """Refuse what must not be written over. Raises ConfigError and OSError."""
    if target.parent.resolve() == request.run.resolve():
        raise ConfigError(f"--out {target} is among the run's own files: choose another place")
    if not os.path.lexists(target):
        return
    remedy = "--overwrite replaces it, --out names another place"
    if request.to != "hub":
        if not target.is_file():
            raise ConfigError(f"--out {target} is a folder or no file: name a file")
        if not request.overwrite:
            raise ConfigError(f"{target} exists: {remedy}")
        return
    if not target.is_dir():
        raise ConfigError(f"--out {target} is a file: --to hub writes a folder: name one")
    there = set(os.listdir(target))
    if there and not request.overwrite:
        raise ConfigError(f"{target} exists and is not empty: {remedy}")
    stranger = min(there - hub.FILES, default=None)
    if stranger is not None or (there and MODEL not in there):
        found = f"it holds {stranger}" if stranger else f"it has no {MODEL}"
        raise ConfigError(f"{target} is no export of fastsmooth ({found}): choose another --out")


def write_folder(target: Path, files: dict[str, bytes]) -> None:
    """A folder of these files, in the place of an earlier export of the same name. Raises
    CannotWrite, and OSError where its place cannot be made; then what was there stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, earlier = new_aside(target), new_aside(target)
    try:
        with writing(target):
            aside.mkdir()
            for name, data in files.items():
                replace(aside / name, data)
            if target.exists():
                os.rename(target, earlier)
            try:
                rename(aside, target)
            except OSError:
                if earlier.exists():
                    os.rename(earlier, target)
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
