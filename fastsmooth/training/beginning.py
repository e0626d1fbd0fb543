"""The weights that a run begins with (--init): of a file, of a run, or published ones.

Whatever somebody else wrote is read as tensors by name and nothing else: safetensors, or torch.load
with weights_only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import pickle
import re
import socket
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsmooth import models
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import note, one_line, warn
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.files import size_of

# Under which trainers keep a state_dict, the average of the weights first, as timm takes it.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and of torch.compile
OF_A_RUN = ("best.safetensors", "last.safetensors")
LEAST_FIT = 0.5  # of a network's tensors; with fewer the weights are those of another
MOST_NAMED = 3  # tensors that a line names
# Networks of torchvision, beside our own, that weights are compared with: the most used.
FAMILIES = (
    "resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "convnext_tiny", "vit_b_16", "vgg16", "densenet121",
)  # fmt: skip
Tensors = dict[str, Tensor]


class Weights(NamedTuple):
    """Tensors by the names that somebody gave them, and where they are from in words."""

    source: str
    tensors: Tensors


def begin_with(c: Config, model: nn.Module, classes: int, aloud: bool = True) -> str:
    """Copy what --init names into the model, which is on the CPU and has so many classes; a line
    that says what was taken. The random state is left alone. `aloud`: a download is announced.

    Tensors of the model that are not there stay as they were drawn. So does a head for another
    number of classes, where tensors differ in their first dimension alone. Raises ConfigError where
    there are no weights to be had, another tensor has another shape, or less than LEAST_FIT of the
    model is there.
    """
    assert c.init is not None
    path = None if c.init == "pretrained" else Path(c.init)
    found = weights_at(path) if path else published(c.model, aloud)
    return fit(model, found, f"--init {c.init}", c.model, classes)


# Where weights come from


def weights_at(path: Path) -> Weights:
    """The weights in a file or a run folder. Raises ConfigError."""
    try:
        if path.is_dir():
            return of_run(path)
        return Weights(str(path), of_file(path))
    except OSError as error:
        raise ConfigError(
            f"--init {path}: {error.strerror or one_line(error)}: give a file of weights or a run "
            "folder"
        ) from None


def of_run(path: Path) -> Weights:
    """The best weights of a run, else the last ones, else those of its newest checkpoint."""
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"--init {path}: it is a folder without config.json, so no run: give a run folder or a "
            "file of weights"
        )
    for name in OF_A_RUN:
        if (path / name).exists():
            return Weights(str(path / name), of_file(path / name))
    try:
        state = Checkpoints(path / "checkpoints", warn).load()
    except CheckpointError as error:
        raise ConfigError(f"--init {error}") from None
    if state is None:
        raise ConfigError(
            f"--init {path}: the run has no weights yet: wait for the end of its first epoch"
        )
    where = f"{path} at update {state.get('update')}"
    return Weights(where, by_name(state.get("model"), path))


def of_file(path: Path) -> Tensors:
    """The tensors in a safetensors file or a state_dict that torch.save wrote. Raises ConfigError,
    and OSError where it cannot be read."""
    size_of(path)  # refuses what is no file
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ConfigError(f"--init {path}: it is empty: give a file of weights")
    if path.suffix == ".safetensors" or head[8:] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"--init {path}: it is damaged, or no safetensors file ({said(error)}): give "
                "another one"
            ) from None
    try:
        # the arguments that trainers keep beside their weights: plain values by name
        known = torch.serialization.safe_globals([argparse.Namespace])
        with known, warnings.catch_warnings(action="ignore"):  # of old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that it did not write
        raise ConfigError(f"--init {path}: {why_unread(error)}") from None
    return by_name(unwrapped(content), path)


def why_unread(error: Exception) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"it holds code ({code[1]}) and not tensors alone, and is not run: save the "
            "state_dict() of the model"
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    words = detail[1][:150] if detail else said(error)
    return (
        f"torch.load reads no weights in it ({words}): give a safetensors file, or a "
        "state_dict that torch.save wrote"
    )


def said(error: Exception) -> str:
    """The first sentence of an error."""
    return one_line(error).split(". ")[0][:150] or type(error).__name__


def unwrapped(content: Any) -> Any:
    """The state_dict in what a trainer saved."""
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return content[name]
    return content


def by_name(content: Any, path: Path) -> Tensors:
    items = content.items() if isinstance(content, dict) else ()
    found = {key: v for key, v in items if isinstance(key, str) and isinstance(v, Tensor)}
    if not found:
        raise ConfigError(
            f"--init {path}: it holds no tensors by name: give the state_dict() of a model"
        )
    return found


def published(name: str, aloud: bool) -> Weights:
    """The pretrained weights of a network of torchvision or timm, which may have to be downloaded.
    Raises ConfigError where none are published or they cannot be had."""
    library, _, network = name.partition("/")
    try:
        with offline_at_once(network, aloud):
            return (of_torchvision if library == "torchvision" else of_timm)(network)
    except OSError as error:  # of which all errors of a connection are
        raise ConfigError(
            f"--init pretrained: the weights of {name} cannot be downloaded ({said(error)}): "
            "download them where there is a network, and give the file as --init FILE"
        ) from None


def of_torchvision(network: str) -> Weights:
    from torchvision.models import get_model_weights

    weights = next(iter(get_model_weights(network)), None) and get_model_weights(network).DEFAULT
    if weights is None:
        raise none_published(f"torchvision/{network}")
    with contextlib.redirect_stdout(io.StringIO()):  # torch.hub tells where from, and where to
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return Weights(f"torchvision/{network} ({weights.name})", tensors)


def of_timm(network: str) -> Weights:
    import timm

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it says of every attempt that it failed
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(network, pretrained=True)
    except RuntimeError as error:
        if isinstance(error, OSError) or "No pretrained weights" not in str(error):
            raise OSError(one_line(error)) from None
        raise none_published(f"timm/{network}") from None
    finally:
        logger.setLevel(level)
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    return Weights(f"timm/{network}" + (f" ({tag})" if tag else ""), model.state_dict())


def none_published(name: str) -> ConfigError:
    return ConfigError(
        f"--init pretrained: no pretrained weights are published for {name}: give a file of them, "
        "or leave --init out"
    )


@contextlib.contextmanager
def offline_at_once(network: str, aloud: bool) -> Iterator[None]:
    """Inside, huggingface_hub asks its cache alone where its host has no address: else it tries
    for most of a minute. A proxy knows addresses that this machine does not."""
    try:
        from huggingface_hub import constants
    except ImportError:  # without timm
        yield
        return
    before = constants.HF_HUB_OFFLINE
    if not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    if aloud and not constants.HF_HUB_OFFLINE:
        note(f"the published weights of {network} are downloaded where they are not here yet")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# How they fit


def fit(model: nn.Module, weights: Weights, flag: str, name: str, classes: int) -> str:
    """begin_with for these weights; `flag` and the network's `name` are for messages."""
    own = model.state_dict()
    given = {key if key in own else PREFIXES.sub("", key): v for key, v in weights.tensors.items()}
    adapt_channels(model, own, given)
    # which state_dicts of old do not have, and which counts batches for those who ask
    wanted = [key for key in own if key in given or not key.endswith("num_batches_tracked")]
    shared = [key for key in wanted if key in given]
    other = [key for key in shared if own[key].shape != given[key].shape]
    heads = {given[key].shape[:1] for key in other}  # their numbers of classes
    if len(heads) > 1 or not all(is_head(own[key], given[key], classes) for key in other):
        key = next((k for k in other if not is_head(own[k], given[k], classes)), other[0])
        raise ConfigError(
            f"{flag}: {key} is {list(given[key].shape)}, and in {name} {list(own[key].shape)}: "
            f"{remedy(weights.tensors, name)}"
        )
    taken = [key for key in shared if key not in other]
    if len(taken) < LEAST_FIT * (len(wanted) - len(other)) or not taken:
        raise ConfigError(
            f"{flag}: it has {len(taken)} of the {len(wanted)} tensors of {name} (there are "
            f"{some(given)}, not {some(key for key in wanted if key not in given)}): "
            f"{remedy(weights.tensors, name)}"
        )
    values = {key: checked(key, given[key], own[key], flag) for key in taken}
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
    line = f"weights of {weights.source}: {len(taken)} of {len(wanted)} tensors"
    if other:
        modules = dict.fromkeys(key.rpartition(".")[0] for key in other)
        (count,) = next(iter(heads))
        line += f"; head {some(modules)} ({count:,} classes) left as it was drawn"
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in own]
    if missing:
        line += f"; not there, and left as drawn: {some(missing)}"
    if extra:
        line += f"; there, and not in {name}: {some(extra)}"
    return line


def is_head(own: Tensor, given: Tensor, classes: int) -> bool:
    """Whether the shapes differ in the number of classes alone."""
    return own.dim() == given.dim() > 0 and (
        own.shape[0] == classes and own.shape[1:] == given.shape[1:]
    )


def adapt_channels(model: nn.Module, own: Tensors, given: Tensors) -> None:
    """Where a network of timm takes images of other channels than the weights, give its first
    convolution what timm would: the sum over the channels for one, repeated for more."""
    stems = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for stem in (stems,) if isinstance(stems, str) else stems:
        key = f"{stem}.weight"
        if key not in own or key not in given or own[key].dim() != 4 or given[key].dim() != 4:
            continue
        channels, before = own[key].shape[1], given[key].shape[1]
        if channels != before == 3:
            from timm.models import adapt_input_conv

            with contextlib.suppress(NotImplementedError):  # then the shapes are refused
                given[key] = adapt_input_conv(channels, given[key])


def checked(key: str, value: Tensor, own: Tensor, flag: str) -> Tensor:
    """The value in the dtype of the model's own tensor. Raises ConfigError for what is no dense
    tensor of finite numbers."""
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if not plain or value.is_floating_point() != own.is_floating_point():
        kind = value.dtype if value.layout == torch.strided else value.layout
        raise ConfigError(
            f"{flag}: {key} is {kind}, where the network has {own.dtype}: give weights that are "
            "not quantised"
        )
    value = value.to(own.dtype)
    if not torch.isfinite(value).all():
        raise ConfigError(f"{flag}: {key} has numbers that are not finite: give other weights")
    return value


def remedy(tensors: Tensors, name: str) -> str:
    """What to do with weights that are not those of the network `name`."""
    like = looks_like(tensors)
    if like in ("", name):
        return f"give weights of {name}"
    return f"these look like weights of {like}: give --model {like}, or weights of {name}"


def looks_like(tensors: Tensors) -> str:
    """The network whose tensors these are, of those that are quickly built; "" where none is."""
    shapes = {PREFIXES.sub("", key): v.shape[1:] for key, v in tensors.items()}
    for name in (*models.BUILDERS, *(f"torchvision/{family}" for family in FAMILIES)):
        with torch.device("meta"):
            own = models.build(name, 2).state_dict()
        alike = sum(shapes.get(key) == value.shape[1:] for key, value in own.items())
        # they may lack what counts batches, and have a head of their own
        if alike >= max(0.9 * len(shapes), 0.75 * len(own)):
            return name
    return ""


def some(names: Iterable[str]) -> str:
    """A few by name, then how many more."""
    listed = list(names)
    more = len(listed) - MOST_NAMED
    return ", ".join(listed[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
