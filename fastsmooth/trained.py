"""A run and the model that it trained, ready to use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from fastsmooth.runfolder.read import SavedRun, read_run

if TYPE_CHECKING:
    from torch import nn

    from fastsmooth.data.view import TestedView
    from fastsmooth.runfolder.weights import ModelFacts

Shown = Image.Image | str | PathLike[str]  # an image, or the path of one


class Likely(NamedTuple):
    """A class that an image may be of."""

    name: str  # as people call it
    probability: float  # the model's: the softmax of its logits
    id: str  # as the data set calls it


class Prediction(NamedTuple):
    """What a model says of an image: its likeliest classes, the likeliest first."""

    path: str  # of its file; "" of an image that was given itself
    likely: tuple[Likely, ...]

    @property
    def name(self) -> str:
        """The likeliest class."""
        return self.likely[0].name

    @property
    def probability(self) -> float:
        """Of the likeliest class, as the model's softmax has it."""
        return self.likely[0].probability


@dataclass(frozen=True, eq=False)
class TrainedRun(SavedRun):
    """A run folder as load_run gives it: what SavedRun has of its files, and its model.

    weights: the name of the weights: best, last, best-ema, last-ema or epoch-N; None: those with
    the best test accuracy, which was taken on the same test images, or else the last. device: where
    the model is. trust_code: whether a network that came from a Python file may run that file,
    which can do whatever a program can do.

    What is asked of the model raises ValueError: RunError where the folder has no model.json or no
    such weights, ModelError where the network cannot be built, DataError for an image that cannot
    be read.
    """

    weights: str | None = None
    device: str = "cpu"
    trust_code: bool = False

    @cached_property
    def facts(self) -> ModelFacts:
        """What model.json says of the network and of the images it takes."""
        from fastsmooth.runfolder.weights import read_model

        return read_model(self.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names for people, in the order of the model's outputs."""
        return self.facts.class_names

    @cached_property
    def model(self) -> nn.Module:
        """The network with its weights, in evaluation mode: float32 [B, C, S, S], as `transform`
        makes them, to logits [B, classes]."""
        from fastsmooth.inference import load_model

        return load_model(self)

    @cached_property
    def weights_path(self) -> Path:
        """The file of the weights."""
        from fastsmooth.runfolder.weights import choose_weights

        return choose_weights(self.path, self.weights)

    @cached_property
    def about_weights(self) -> dict[str, Any]:
        """What was noted with the weights: epoch (counted from 0), update, test_acc and test_loss
        they had."""
        from fastsmooth.runfolder.weights import read_about

        return read_about(self.weights_path)

    @cached_property
    def transform(self) -> TestedView:
        """A function from a PIL image, or the path of a file, to float32 [C, S, S]: the view that
        the run tests with. It can be the transform of a torchvision data set."""
        from fastsmooth.inference import view_of

        return view_of(self.facts)

    def predict(self, images: Shown | Iterable[Shown], top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of each image, in their order; of all where there are fewer.

        images: PIL images or paths of files, any number, which are read in threads, some batches
        ahead, and not kept. Raises DataError for one that cannot be read.
        """
        from fastsmooth.inference import predictions

        several = [images] if isinstance(images, Image.Image | str | PathLike) else images
        return list(predictions(self, several, top))


def load_run(
    path: str | PathLike[str],
    weights: str | None = None,
    device: str = "cpu",
    trust_code: bool = False,
) -> TrainedRun:
    """The run in the folder `path`: its configuration, rows and results, and its trained model.

        run = fs.load_run("runs/x")
        run.predict("cat.jpg")[0].name

    weights, device and trust_code are as TrainedRun has them. The model is built when it is asked
    for. Raises RunError, a ValueError, where no config.json can be read.
    """
    saved = read_run(Path(path))
    return TrainedRun(**vars(saved), weights=weights, device=device, trust_code=trust_code)
