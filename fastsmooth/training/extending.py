"""A finished run trained on in a folder of its own (--extend): its state, in the new run's
counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import check_finished
from fastsmooth.data import Data
from fastsmooth.foreign import Driven
from fastsmooth.messages import one_line, warn
from fastsmooth.optim import HYPERPARAMETERS
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.read import read_status
from fastsmooth.training.loop import FORMAT, Origin, Run

State = dict[str, Any]


def finished(folder: str) -> tuple[State, Origin]:
    """The state at the end of a finished run, and what it was. Raises ConfigError for a run that is
    not finished, and CheckpointError where the checkpoint of its end cannot be used."""
    path = Path(folder)
    check_finished(path)
    state = Checkpoints(path / "checkpoints", warn).load()
    if state is None:
        raise CheckpointError(
            f"--extend {folder}: the run has no checkpoint, and so no state to go on from: begin "
            "with its weights by --init, or start a new run"
        )
    if "update" in state and state.get("format") != FORMAT:
        raise CheckpointError(
            f"--extend {folder}: its checkpoint has the form of another version of fastsmooth: "
            "extend it with the version that made it"
        )
    try:
        epoch, update = whole(state["epoch"]), whole(state["update"])
        place = state["data"]
        first = whole(place.get("first_epoch", 0)) + whole(place["epoch"])
        first += whole(place["cursor"]) > 0  # --budget ended it inside an epoch
    except Exception as error:  # a sound file of another program may fail anywhere
        raise unsuited(folder, error) from None
    if update != read_status(path).get("step"):
        raise CheckpointError(
            f"--extend {folder}: its newest valid checkpoint is of update {update:,}, and the run "
            "ended later: begin with those weights by --init, or start a new run"
        )
    return state, Origin(folder, epoch, update, first)


def whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of a place in a run")
    return value


def unsuited(folder: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"--extend {folder}: its checkpoint is not of a run with these flags "
        f"({one_line(error)[:200]}): start a new run"
    )


def first_epoch(state: State | None, origin: Origin | None) -> int:
    """The data's number of the first epoch of the run that goes on from a state, or begins after
    `origin`."""
    if origin is not None:
        return origin.first_epoch
    place = (state or {}).get("data")
    found = place.get("first_epoch") if isinstance(place, dict) else None
    return found if type(found) is int else 0


def check(state: State, origin: Origin, model: nn.Module, optimizer: Driven, data: Data) -> None:
    """Refuse a state that is not of these images, this model and this optimizer, before anything is
    written. Raises ConfigError and CheckpointError."""
    try:
        if state["data"]["fingerprint"] != data.fingerprint:
            raise ConfigError(
                f"--extend {origin.run}: the images are not those that it was trained on: give "
                f"them as --data-dir, or begin with its weights by --init"
            )
        before = {name: value.shape for name, value in state["model"].items()}
        if before != {name: value.shape for name, value in model.state_dict().items()}:
            raise ValueError("it has other tensors than the model")
        groups = [group["params"] for group in state["optimizer"]["param_groups"]]
        if groups != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
            raise ValueError("its optimizer has other groups of parameters")
    except ConfigError:
        raise
    except Exception as error:  # a sound file of another program may fail anywhere
        raise unsuited(origin.run, error) from None


def take_over(run: Run, state: State, origin: Origin) -> None:
    """Stand at the beginning of a run with all that the finished run `origin` left in `state`, but
    for what is counted in a run. Raises CheckpointError where it is not of such a run."""
    run.folder.rewind(0)  # rows of a process that was killed before its first checkpoint
    try:
        place = {"epoch": 0, "cursor": 0, "first_epoch": origin.first_epoch}
        run.restore(
            state
            | {"data": state["data"] | place}
            | {"optimizer": with_flags(state["optimizer"], run)}
            | {"epoch": 0, "update": 0, "samples": 0, "last_epoch": {}}
            | {"best_test_acc": None, "best_epoch": None, "best_ema_test_acc": None}
            | {"meter": run.meter.state_dict(), "window": run.window.state_dict()}
            | {"instruments": {i.name: i.state_dict() for i in run.instruments}}
            | {"asked": [], "epoch_seconds": 0.0}
        )
    except Exception as error:  # a sound file of another program may fail anywhere
        raise unsuited(origin.run, error) from None


def with_flags(before: State, run: Run) -> State:
    """The state of the finished run's optimizer with the hyperparameters that the flags say now."""
    now = run.step.optimizer
    # what such a flag does not say may be counted there
    arguments = [text.partition("=")[0] for text in run.config.optimizer_args or ()]
    said = {*HYPERPARAMETERS, *arguments}
    fresh = now.state_dict()["param_groups"]
    groups = [
        group | {name: own[name] for name in said if name in own}
        for group, own in zip(before["param_groups"], fresh, strict=True)
    ]
    return before | {"param_groups": groups}
