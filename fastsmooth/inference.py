"""The model of a saved run, built again, and what it says of images."""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, fspath
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsmooth import models, owncode
from fastsmooth.cli import flags
from fastsmooth.cli.device import pick_device
from fastsmooth.cli.flags import ConfigError, is_code
from fastsmooth.data.images import DataError
from fastsmooth.data.index import load_formats
from fastsmooth.data.view import TestedView
from fastsmooth.messages import one_line
from fastsmooth.processors import keep_within_quota, processors
from fastsmooth.runfolder.read import RunError
from fastsmooth.runfolder.weights import ModelFacts, read_weights
from fastsmooth.trained import Likely, Prediction, Shown, TrainedRun, load_run

BATCH = 64  # images through the model together
AHEAD = 2  # batches that are read while the model has another
T = TypeVar("T")


def opened_run(path: Path, weights: str | None, device: str, trust_code: bool) -> TrainedRun:
    """The run that a command names, its model built, on the device of --device. Raises RunError,
    ModelError and ConfigError."""
    keep_within_quota(torch)
    run = load_run(path, weights, str(pick_device(device, torch)), trust_code)
    _ = run.model
    return run


def load_model(run: TrainedRun) -> nn.Module:
    """The network of model.json with the weights that the run names, in evaluation mode on its
    device. Raises RunError, ModelError and ConfigError."""
    facts = run.facts
    device = device_named(run.device)
    network = network_of(run)
    model = models.build(network, len(facts.classes), facts.norm, facts.channels)
    path = run.weights_path
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise RunError(
            f"{path} has not the weights of {facts.network}: {one_line(error)[:200]}"
        ) from None
    model = model.eval().requires_grad_(False).to(device)
    return model.to(memory_format=torch.channels_last)  # as it was trained and tested


def network_of(run: TrainedRun) -> str:
    """What models.build is to make: of a network from a Python file that which the run folder has a
    copy of. Raises RunError where that file may not be run."""
    network = run.facts.network
    if not is_code(network):
        return network
    path, name = owncode.split(network)
    if not run.trust_code:
        raise RunError(
            f"{run.path}: its network is {name} of a Python file, {path}, which would be run: say "
            "trust_code=True, or --trust-code, if you trust it"
        )
    copy = run.path / "code" / path.name
    return f"{copy if copy.is_file() else path}:{name}"


def device_named(name: str) -> torch.device:
    """The device that a caller in Python names. Raises ConfigError in words without flags."""
    try:
        return pick_device(flags.device(str(name)), torch)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"device: {error}") from None
    except ConfigError as error:
        raise ConfigError(str(error).replace("--device ", "device ")) from None


def view_of(facts: ModelFacts) -> TestedView:
    return TestedView(
        facts.mode, facts.resize, facts.image_size, facts.channels, facts.mean, facts.std
    )


def predictions(
    run: TrainedRun,
    images: Iterable[Shown],
    top: int,
    unread: Callable[[Shown, DataError], None] | None = None,
) -> Iterator[Prediction]:
    """What the model says of each image, as they come: no more than some batches of them are held.

    One that cannot be read is left out, after `unread` was told of it; without that it raises
    DataError.
    """
    if top < 1:
        raise ValueError(f"top is {top}: ask for at least one class")
    device = next(run.model.parameters()).device
    top = min(top, len(run.classes))
    facts = run.facts
    for some in in_batches(reading(run.transform), images, BATCH):
        seen: list[tuple[Shown, Tensor]] = []
        for image, x in some:
            if isinstance(x, Tensor):
                seen.append((image, x))
            elif unread is None:
                raise x
            else:
                unread(image, x)
        if not seen:
            continue
        batch = torch.stack([x for _, x in seen]).to(device)
        for (image, _), (values, places) in zip(
            seen, likeliest(run.model, batch, top), strict=True
        ):
            path = fspath(image) if isinstance(image, str | PathLike) else ""
            pairs = zip(values, places, strict=True)
            likely = (Likely(facts.class_names[k], p, facts.classes[k]) for p, k in pairs)
            yield Prediction(path, tuple(likely))


def reading(view: Callable[[T], Tensor]) -> Callable[[T], Tensor | DataError]:
    """`view`, which gives back what it would raise of an image that cannot be read."""

    def read(image: T) -> Tensor | DataError:
        try:
            return view(image)
        except DataError as error:
            return error

    return read


def in_batches(
    read: Callable[[T], Tensor | DataError], items: Iterable[T], size: int
) -> Iterator[list[tuple[T, Tensor | DataError]]]:
    """`size` items at a time with what `read` makes of each, in their order; AHEAD batches are read
    in threads meanwhile."""
    load_formats()
    waiting: deque[list[tuple[T, Future[Tensor | DataError]]]] = deque()
    with ThreadPoolExecutor(processors()) as pool:
        try:
            for some in cut(items, size):
                waiting.append([(item, pool.submit(read, item)) for item in some])
                if len(waiting) > AHEAD:
                    yield [(item, future.result()) for item, future in waiting.popleft()]
            while waiting:
                yield [(item, future.result()) for item, future in waiting.popleft()]
        finally:  # whoever looks no further waits for no more than what is being read
            pool.shutdown(cancel_futures=True)


def cut(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """`size` at a time."""
    left = iter(items)
    while some := tuple(itertools.islice(left, size)):
        yield some


@torch.inference_mode()
def likeliest(model: nn.Module, x: Tensor, top: int) -> list[tuple[list[float], list[int]]]:
    """(probabilities, places) of the `top` largest outputs for each of x [B, C, S, S]."""
    values, places = model(x).float().softmax(dim=1).topk(top, dim=1)
    return list(zip(values.tolist(), places.tolist(), strict=True))
