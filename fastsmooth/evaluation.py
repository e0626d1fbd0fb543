"""How a trained model does on labelled images: accuracy, loss, and what it takes for what."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth import data
from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import Config
from fastsmooth.cli.device import compute_float32
from fastsmooth.data import DataError
from fastsmooth.data.engines import dali
from fastsmooth.data.images import ImageSet, Split
from fastsmooth.data.layouts.trees import TESTS
from fastsmooth.data.order import in_order
from fastsmooth.data.source import BadImages
from fastsmooth.inference import in_batches, reading
from fastsmooth.messages import note_again, on_terminal
from fastsmooth.names import hint
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.weights import ModelFacts
from fastsmooth.training.loop import test_batch_size
from fastsmooth.training.step import casting

if TYPE_CHECKING:
    from fastsmooth.trained import TrainedRun

Z95 = 1.959963984540054  # standard deviations within which 95 % of a normal distribution lie
NAMED = 10  # classes that a refusal lists
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Asked:
    """Which images a model is judged by, and how they are shown to it."""

    data_dir: str | None = None  # None: those of the run
    dataset: str | None = None  # what they are; None: as they are recognised
    labels: str | None = None  # as --labels
    split: str | None = None  # test, train or all; None: test where there is a split, else all
    batch_size: int | None = None  # images through the model together; None: as the run tests
    on_bad_image: str = "raise"  # or zeros
    ignore_unknown: bool = False  # leave out images of classes that the run has not


class Interval(NamedTuple):
    low: float
    high: float


def wilson(correct: int, count: int) -> Interval:
    """Wilson's 95 % interval of a share, `correct` of `count` (1927, JASA 22: 209-212)."""
    share, z2 = correct / count, Z95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Interval(max(center - half, 0.0), min(center + half, 1.0))


@dataclass(frozen=True, eq=False)
class Tally:
    """What a model has said of images."""

    confusion: np.ndarray  # int64 [K, K]: images of a class, the row, taken for one, the column
    loss: float  # mean cross-entropy over the images, natural logarithm
    top5: float | None  # share whose class is among the five likeliest; None of 5 classes or fewer

    @cached_property
    def images(self) -> int:
        return int(self.confusion.sum())

    @cached_property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    @property
    def interval(self) -> Interval:
        return wilson(self.correct, self.images)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model judged by labelled images."""

    tally: Tally
    own: bool  # by the run's own images, read as it reads them
    part: str  # test, train or all
    images: str  # in words: how they were found
    left_out: int  # images of classes that the run has not
    bad: int  # that could not be read, and were shown as black
    view: str  # in words
    precision: str  # fp32, tf32 or bf16


# What is judged


def evaluate(run: TrainedRun, asked: Asked, say: Callable[[str], None]) -> Evaluation:
    """The run's model judged by the images that are asked for. `say` gets a line about what may not
    be meant as it is.

    Raises RunError, ModelError, ConfigError, and DataError: for images that cannot be read, and for
    classes that the run has not.
    """
    facts, model = run.facts, run.model
    device = next(model.parameters()).device
    own = is_own(run, asked)
    c = own_config(run, asked, say) if own else other_config(run, asked)
    images = data.read_set(c)
    for line in images.remarks:
        say(line)
    name, parts = parts_of(images, asked, c)
    parts, left_out = relabelled(parts, images, facts, asked, c)
    count = sum(map(len, parts))
    bad = BadImages(asked.on_bad_image, say)
    size = asked.batch_size or test_batch_size(device, facts.image_size)
    view = f"{facts.image_size}x{facts.image_size} pixels"
    if facts.resize != facts.image_size:
        view = f"the shorter side brought to {facts.resize} pixels, the middle {view} of it"
    if own:
        epoch = tested_augmented(run, c)
        if epoch is not None:
            view = f"{view}, augmented as in epoch {epoch + 1}, as the published code tests"
        batches = own_batches(c, images, parts, device, size, epoch, bad)
    else:
        batches = other_batches(run, parts, device, size, bad)
    precision = precision_of(run, device)
    try:
        tally = judged(model, progress(batches, count), len(facts.classes), precision)
    except torch.OutOfMemoryError:
        raise configs.ConfigError(
            f"out of memory at --batch-size {size}: lower it, or use --device cpu"
        ) from None
    return Evaluation(tally, own, name, images.about, left_out, len(bad.reasons), view, precision)


def is_own(run: TrainedRun, asked: Asked) -> bool:
    """Whether the images are those of the run, read as it reads them: also where --data-dir names
    the folder that they are in."""
    if asked.dataset is not None or asked.labels is not None:
        return False
    if asked.data_dir is None:
        return True
    c = parsing.read_saved(run.path)
    return c.dataset in configs.WITH_DATA_DIR and same_place(asked.data_dir, c.data_dir)


def same_place(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or no path
        return False


def own_config(run: TrainedRun, asked: Asked, say: Callable[[str], None]) -> Config:
    """The run's, at the size that it tests at, with the loader that it had: decoders differ by a
    grey level here and there."""
    c = parsing.read_saved(run.path)
    loader = chosen_loader(run) if c.loader == "auto" else c.loader
    if loader == "dali" and not dali.available():
        loader = "threads"
        say(
            "the run's images were decoded by NVIDIA DALI, which is not installed here: some "
            "pixels differ by a little"
        )
    size = c.sizes.values[-1]
    return dataclasses.replace(c, image_size=size, loader=loader, on_bad_image=asked.on_bad_image)


def chosen_loader(run: TrainedRun) -> str:
    """What --loader auto chose when the run was made, as its newest checkpoint says; auto where
    nothing does."""
    try:
        state = Checkpoints(run.path / "checkpoints", lambda line: None).load()
    except CheckpointError:
        state = None
    made_with = (state or {}).get("made_with")
    loader = made_with.get("loader") if isinstance(made_with, dict) else None
    return loader if loader in ("resident", "dali", "threads", "torch") else "auto"


def other_config(run: TrainedRun, asked: Asked) -> Config:
    """A Config that finds the images that are asked for; those without a split in one piece."""
    given = {
        "data_dir": asked.data_dir and tested_alone(asked.data_dir),
        "dataset": asked.dataset,
        "labels": asked.labels,
    }
    c = configs.resolve({name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(c, val_share=0.0)


def tested_alone(data_dir: str) -> str:
    """Of a folder that has a test set beside no training set, that of the test set."""
    folder = Path(data_dir)
    parts = [part for part in TESTS if (folder / part).is_dir()]
    alone = len(parts) == 1 and not (folder / "train").exists()
    return str(folder / parts[0]) if alone else data_dir


def parts_of(images: ImageSet, asked: Asked, c: Config) -> tuple[str, list[Split]]:
    """(test, train or all, the splits that are meant). Raises DataError where there is no split."""
    whole = not len(images.test)
    if whole and asked.split not in (None, "all"):
        raise DataError(
            f"--split {asked.split}: the images of {place(c)} have no split: leave it out, and all "
            "are evaluated"
        )
    name = asked.split or ("all" if whole else "test")
    both = [images.train] if whole else [images.train, images.test]
    return name, {"train": [images.train], "test": [images.test], "all": both}[name]


def place(c: Config) -> str:
    """Where images are, in words."""
    return c.dataset if c.dataset == "digits" else c.data_dir


def relabelled(
    parts: Sequence[Split], images: ImageSet, facts: ModelFacts, asked: Asked, c: Config
) -> tuple[list[Split], int]:
    """(the splits with the model's numbers for labels, how many images are left out): classes are
    matched by name. Raises DataError for classes that the model has not."""
    places = places_of(images, facts)
    present = Counter[int]()
    for part in parts:
        present.update(part.labels.tolist())
    unknown = [k for k in sorted(present) if places[k] < 0]
    if unknown and not asked.ignore_unknown:
        refuse_unknown([images.classes[k] for k in unknown], facts, c)
    known = [part.take(np.flatnonzero(places[part.labels] >= 0)) for part in parts]
    if not sum(map(len, known)):
        raise DataError(f"{place(c)} has no images of the run's classes: {some_of(facts)}")
    kept = [dataclasses.replace(part, labels=places[part.labels]) for part in known if len(part)]
    return kept, sum(present[k] for k in unknown)


def places_of(images: ImageSet, facts: ModelFacts) -> np.ndarray:
    """int64 [classes of the images]: the model's number for each, -1 where it has none. What a data
    set calls a class goes before what people call it, which must be one class's alone."""
    known = {name: k for k, name in enumerate(facts.classes)}
    by_people = Counter(facts.class_names)
    for k, name in enumerate(facts.class_names):
        if by_people[name] == 1:
            known.setdefault(name, k)
    people = images.names or images.classes
    pairs = zip(images.classes, people, strict=True)
    found = (known.get(id_, known.get(name, -1)) for id_, name in pairs)
    return np.fromiter(found, np.int64, len(images.classes))


def refuse_unknown(unknown: Sequence[str], facts: ModelFacts, c: Config) -> None:
    more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
    near = hint(unknown[0], [*facts.classes, *facts.class_names])
    are = "are none" if more else "is none"
    raise DataError(
        f"{place(c)}: class {unknown[0]!r}{more} {are} of the run's: {near or some_of(facts)}: "
        "rename what is meant, or leave such images out with --ignore-unknown"
    )


def some_of(facts: ModelFacts) -> str:
    """The model's classes in words, the first of them where they are many."""
    more = f" and {len(facts.class_names) - NAMED:,} more"
    named = ", ".join(map(repr, facts.class_names[:NAMED]))
    return f"it has {named}{more if len(facts.class_names) > NAMED else ''}"


# How they are shown


def tested_augmented(run: TrainedRun, c: Config) -> int | None:
    """The epoch by whose numbers test images are augmented, as Run.test_batches has it; None where
    they are not."""
    if c.compat != "original" or c.dataset != "imagenet":
        return None
    epoch = run.about_weights.get("epoch")
    return epoch if isinstance(epoch, int) else None


def own_batches(
    c: Config,
    images: ImageSet,
    parts: Sequence[Split],
    device: torch.device,
    size: int,
    epoch: int | None,
    bad: BadImages,
) -> Batches:
    """The batches in which a run tests, by its own loader."""
    side = c.sizes.values[-1]
    # nothing is trained on: one black image stands for it
    black = np.zeros((1, side, side, len(images.mean)), np.uint8)
    nothing = Split(np.zeros(1, np.int64), black)
    for part in parts:
        shown = dataclasses.replace(images, train=nothing, test=part, remarks=())
        opened = data.open_data(c, device, bad.say, images=shown)
        yield from opened.test.batches(in_order(len(part), size), epoch)
        bad.reasons |= opened.bad.reasons


def other_batches(
    run: TrainedRun, parts: Sequence[Split], device: torch.device, size: int, bad: BadImages
) -> Batches:
    """Batches of images from elsewhere, in the view of model.json."""
    view = run.transform
    for part in parts:

        def shown(i: int, part: Split = part) -> Tensor:
            return view(part.image(i))

        every = np.arange(len(part))
        # what is stored together is read together
        order = every if part.files is None else part.files.by_place(every)
        for some in in_batches(reading(shown), order.tolist(), size):
            batch = []
            for i, x in some:
                if isinstance(x, DataError):
                    if part.files is None:
                        raise x
                    bad.report(part.files.names[i], str(x))
                    x = view(Image.new("RGB", (view.size, view.size)))
                batch.append(x)
            x = torch.stack(batch).contiguous(memory_format=torch.channels_last)
            yield x.to(device), torch.from_numpy(part.labels[[i for i, _ in some]]).to(device)


def precision_of(run: TrainedRun, device: torch.device) -> str:
    """What the run computed in, where this device does; PyTorch is set to it."""
    rows = run.of_kind("epoch")
    noted = rows[-1].get("precision") if rows else None
    precision = noted if noted in ("fp32", "tf32", "bf16") else "fp32"
    if precision == "tf32" and device.type != "cuda":
        precision = "fp32"
    compute_float32(torch, "ieee" if precision == "fp32" else "tf32")
    return precision


def progress(batches: Batches, count: int) -> Batches:
    """The batches; on a terminal a line says how far they are once that takes long."""
    done, due, shown = 0, time.monotonic() + 2, False
    for x, y in batches:
        yield x, y
        done += len(y)
        if on_terminal(sys.stderr) and (time.monotonic() > due or (shown and done == count)):
            note_again(f"{done:,} of {count:,} images")
            due, shown = time.monotonic() + 1, True


# What comes of it


@torch.inference_mode()
def judged(model: nn.Module, batches: Batches, classes: int, precision: str) -> Tally:
    """What the model says of the batches: x float32 [B, C, S, S], y int64 [B], both on its device.

    Cross-entropy and ranks are over all of its classes, whichever of them have images.
    """
    confusion = np.zeros((classes, classes), np.int64)
    loss, within = 0.0, 0
    for x, y in batches:
        with casting(x.device, precision):
            logits = model(x)
        logits = logits.float()
        loss += F.cross_entropy(logits, y, reduction="none").cpu().double().sum().item()
        np.add.at(confusion, (y.cpu().numpy(), logits.argmax(dim=1).cpu().numpy()), 1)
        if classes > 5:
            within += int((logits.topk(5, dim=1).indices == y[:, None]).sum())
    count = int(confusion.sum())
    return Tally(confusion, loss / count, within / count if classes > 5 else None)


def by_class(tally: Tally, facts: ModelFacts) -> list[dict[str, Any]]:
    """A row for each class: accuracy is None of one without images."""
    counts = tally.confusion.sum(axis=1).tolist()
    right = np.diagonal(tally.confusion).tolist()
    return [
        {
            "id": facts.classes[k],
            "name": facts.class_names[k],
            "images": counts[k],
            "correct": right[k],
            "accuracy": right[k] / counts[k] if counts[k] else None,
        }
        for k in range(len(facts.classes))
    ]
