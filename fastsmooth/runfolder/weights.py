"""A trained model in its run folder: model.json says what it is, NAME.safetensors has its weights.

Names of weights are best and last, with --keep all epoch-N too, and with --ema best-ema and
last-ema. They are those that the network itself gives its tensors, so that torchvision, timm or
the same code load them as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import read_object, replace, size_of
from fastsmooth.runfolder.read import RunError

MODEL, FORMAT = "model.json", 1
ENDING = ".safetensors"
OURS = "fastsmooth"  # the entry of a file's metadata


@dataclass(frozen=True)
class ModelFacts:
    """What model.json says: all that is needed to build the network and to show it an image."""

    network: str  # as --model has it
    norm: str  # batch or group, as --norm
    channels: int  # that the network takes
    classes: tuple[str, ...]  # in the order of its outputs
    class_names: tuple[str, ...]  # the same, as people call them
    mode: str  # of the images: RGB, or L for those of one channel
    resize: int  # pixels: what the shorter side of an image is brought to
    image_size: int  # pixels a side of the centre that is kept of it
    # of each channel, as values from 0 to 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | dataclasses.asdict(self)


# what each field has to be
KINDS = {
    "network": str, "norm": str, "channels": int, "mode": str, "resize": int, "image_size": int,
    "parameters": int,
}  # fmt: skip


def read_model(folder: Path) -> ModelFacts:
    """What the run's model is. Raises RunError."""
    path = folder / MODEL
    found = read_object(path)
    if found is None:
        why = "it is damaged" if path.exists() else "the run has none"
        raise RunError(
            f"{path}: {why}: --resume --out {folder} writes it, of a run of this version"
        )
    if found.get("format") != FORMAT:
        raise RunError(f"{path} has the form of another version of fastsmooth: use that one")
    try:
        facts = {name: found[name] for name in KINDS}
        for name, kind in KINDS.items():
            if type(facts[name]) is not kind:
                raise ValueError(f"its {name} is {facts[name]!r}")
        facts |= {name: tuple(map(str, found[name])) for name in ("classes", "class_names")}
        facts |= {name: tuple(map(float, found[name])) for name in ("mean", "std")}
        model = ModelFacts(**facts)
        check(model)
    except KeyError as error:
        raise RunError(f"{path} is damaged: it lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return model


def check(model: ModelFacts) -> None:
    """Raises ValueError for what no run has written."""
    if not model.classes or len(model.classes) != len(model.class_names):
        raise ValueError(f"{len(model.classes)} classes have {len(model.class_names)} names")
    if model.channels not in (1, 3) or model.mode not in ("RGB", "L"):
        raise ValueError(f"it is of {model.channels} channels of {model.mode} images")
    if {len(model.mean), len(model.std)} != {model.channels} or 0.0 in model.std:
        raise ValueError("its mean and std are not of its channels")
    if not 1 <= model.image_size <= model.resize <= 1 << 16:
        raise ValueError(f"it keeps {model.image_size} of {model.resize} pixels")


def write_weights(
    folder: Path, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """NAME.safetensors, whole or as it was before, with what there is to say about it. The same
    tensors and words give the same bytes. Raises CannotWrite."""
    # one entry, since the format has several in no certain order
    replace(folder / f"{name}{ENDING}", packed(tensors, {OURS: json.dumps(about)}))


def packed(tensors: Mapping[str, Tensor], words: dict[str, str]) -> bytes:
    """A safetensors file of the tensors, with the words as its metadata."""
    # each its own memory in the usual order, which the format wants
    own = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    return save(own, words)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises RunError."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_about(path: Path) -> dict[str, Any]:
    """What was said about the weights in a safetensors file, none of which is read. Raises
    RunError."""
    with opened(path) as file:
        return told((file.metadata() or {}).get(OURS, ""))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. What is wrong with it, until it is closed, is a RunError."""
    try:
        size_of(path)  # refuses a pipe, which would keep its reader waiting
        with safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or one_line(error)}") from None
    except (SafetensorError, ValueError) as error:
        raise RunError(
            f"{path} is no safetensors file, or damaged: {one_line(error)[:200]}"
        ) from None


def told(words: str) -> dict[str, Any]:
    """What was said about weights; empty where nobody, or somebody else, has said anything."""
    try:
        found = json.loads(words)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def weights_in(folder: Path) -> list[str]:
    """The names of the weights in a run folder, in the order of the alphabet."""
    return sorted(path.name.removesuffix(ENDING) for path in folder.glob(f"*{ENDING}"))


def choose_weights(folder: Path, name: str | None) -> Path:
    """The file of the weights `name`; without one, those with the best test accuracy of best and
    best-ema, or else last. Raises RunError."""
    there = weights_in(folder)
    if name is None:
        best = [each for each in ("best", "best-ema") if each in there]
        if best:
            name = max(best, key=lambda each: accuracy(folder / f"{each}{ENDING}"))
        else:
            name = "last"
    if name not in there:
        have = f"it has {', '.join(there)}" if there else "it has none yet"
        raise RunError(
            f"{folder} has no weights {name!r}: {have}: they are written as an epoch or the "
            "run ends, best-ema and last-ema with --ema, epoch-N with --keep all"
        )
    return folder / f"{name}{ENDING}"


def accuracy(path: Path) -> float:
    """The test accuracy that a file of weights says it had."""
    value = read_about(path).get("test_acc")
    return float(value) if isinstance(value, int | float) else -1.0
