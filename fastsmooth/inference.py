"""The model of a saved run, built again, and what it says of images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from os import fspath
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from fastsmooth import models
from fastsmooth.cli.device import pick_device
from fastsmooth.data.view import TestedView
from fastsmooth.messages import one_line
from fastsmooth.runfolder.read import RunError
from fastsmooth.runfolder.weights import ModelFacts, choose_weights, read_weights
from fastsmooth.trained import Likely, Prediction, Shown

if TYPE_CHECKING:
    from fastsmooth.trained import TrainedRun

BATCH = 64  # images through the model together


def load_model(run: TrainedRun) -> nn.Module:
    """The network of model.json with the weights that the run names, in evaluation mode on its
    device. Raises RunError, ModelError and ConfigError."""
    facts = run.facts
    model = models.build(facts.network, len(facts.classes), facts.norm, facts.channels)
    path = choose_weights(run.path, run.weights)
    try:
        model.load_state_dict(read_weights(path)[0])
    except RuntimeError as error:
        raise RunError(
            f"{path} has not the weights of {facts.network}: {one_line(error)[:200]}"
        ) from None
    return model.eval().requires_grad_(False).to(pick_device(run.device, torch))


def view_of(facts: ModelFacts) -> TestedView:
    return TestedView(
        facts.mode, facts.resize, facts.image_size, facts.channels, facts.mean, facts.std
    )


def predictions(run: TrainedRun, images: Iterable[Shown], top: int) -> Iterator[Prediction]:
    """What the model says of each image. Raises DataError for one that cannot be read."""
    device = next(run.model.parameters()).device
    top = min(top, len(run.classes))
    for some in cut(images):
        x = torch.stack([run.transform(image) for image in some])
        for image, (values, places) in zip(
            some, likeliest(run.model, x.to(device), top), strict=True
        ):
            path = "" if isinstance(image, Image.Image) else fspath(image)
            names = (run.classes[place] for place in places)
            yield Prediction(path, tuple(map(Likely, names, values)))


def cut(images: Iterable[Shown]) -> Iterator[tuple[Shown, ...]]:
    """BATCH at a time."""
    left = iter(images)
    while some := tuple(itertools.islice(left, BATCH)):
        yield some


@torch.inference_mode()
def likeliest(model: nn.Module, x: Tensor, top: int) -> list[tuple[list[float], list[int]]]:
    """(probabilities, places) of the `top` largest outputs for each of x [B, C, S, S]."""
    values, places = model(x).float().softmax(dim=1).topk(top, dim=1)
    return list(zip(values.tolist(), places.tolist(), strict=True))
