"""Every choice of a run as one frozen Config; flags, TOML files and config.json are all made from its fields.

Nothing here imports torch, so that --help, --plan and every refusal answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsmooth.files import read_file, read_object
from fastsmooth.messages import command, show
from fastsmooth.names import about_flag, about_value, hint
from fastsmooth.terminal import columns

MOST_EPOCHS = 1_000_000  # every epoch is planned before the first
LARGEST_TOML = 1 << 16  # bytes
MOST_DOTS = 3000  # in a line of it: the time that a key takes grows with the square of its dots
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 1024  # pixels a side
SMALLEST, LARGEST = 1e-100, 1e100  # numbers whose squares and quotients are numbers


class ConfigError(ValueError):
    """A flag, a file or a combination that cannot be run; the message says what and what to do."""


# --------------------------------------------------------------------------------------------------------------------
# What is known of the data sets before any of them is opened. Defaults are the papers'.

PAPER = {"epochs": 200, "lr": 0.1, "batch_size": 32, "min_epochs": 11, "steps": (10_000,)}
CIFAR = PAPER | {"model": "resnet18", "image_size": 32}


@dataclass(frozen=True)
class SetFacts:
    """Sizes that --plan needs, and the defaults a data set brings along."""

    train: int | None  # images in the training split; None: only the folder knows
    test: int | None
    classes: int | None
    defaults: dict[str, Any]


SETS = {
    "digits": SetFacts(
        1437,
        360,
        10,
        {
            "model": "resnet8",
            "image_size": 8,
            "augment": "none",
            "epochs": 15,
            "lr": 0.1,
            "batch_size": 32,
            "min_epochs": 1,
            "steps": (200,),
        },
    ),
    "cifar10": SetFacts(50_000, 10_000, 10, CIFAR | {"augment": "crop-flip"}),
    "cifar100": SetFacts(50_000, 10_000, 100, CIFAR | {"augment": "crop-flip-rotate"}),
    "imagenet": SetFacts(
        1_281_167,
        50_000,
        1000,
        PAPER
        | {
            "model": "torchvision/resnet34",
            "image_size": 224,
            "augment": "resized-crop-flip",
            "batch_size": 256,
            "steps": (1000,),
        },
    ),
    "folder": SetFacts(
        None,
        None,
        None,
        # what is None the images say, once they are there
        PAPER | {"model": None, "image_size": None, "augment": None, "epochs": 20, "min_epochs": 1, "steps": (200,)},
    ),
}
# The networks that images call for, by the largest size each is for, in pixels a side.
NETWORKS = {16: "resnet20", 64: "resnet18", LARGEST_IMAGE: "torchvision/resnet34"}
SMALL, USUAL = 64, 224  # images up to SMALL are taken as they are, others in steps of STEP up to USUAL
STEP = 32

# Published bounds (data set, optimizer, model, lr, momentum) -> (C^2, K^2), from critical batch sizes at eps 0.5; they say
# nothing of another data set, network, learning rate or momentum.
PUBLISHED = {
    ("cifar100", "sgd", "resnet18", 0.1, 0.0): (1280.0, None),  # arXiv 2402.02325 and its reviews
    ("cifar100", "shb", "resnet18", 0.1, 0.9): (
        25.318,
        1.77**2,
    ),  # the same; its code (main.py at 1f49b05) has all digits
    ("cifar100", "nshb", "resnet18", 0.1, 0.9): (128.0, 4.5**2),
    ("cifar100", "sgd", "wrn-28-10", 0.1, 0.0): (10.0, None),
    ("cifar100", "shb", "wrn-28-10", 0.1, 0.9): (0.79, 1.66**2),  # the code
    ("cifar100", "nshb", "wrn-28-10", 0.1, 0.9): (1.0, 4.262**2),
}
# What else the published code trained with: another value is another gradient noise.
PUBLISHED_WITH = {"augment": "crop-flip-rotate", "norm": "batch", "weight_decay": 0.0}

PUBLISHED_FLAGS = {"decay_epoch", "power", "beta", "nu", "eps", "steps"}  # of the published code, some without effect

METHODS = (
    "constant", "lr", "batch", "hybrid", "poly", "cosine", "exp", "beta", "lr-beta", "beta-batch", "lr-batch",
)  # fmt: skip
SOLVED = {"beta", "lr-beta", "beta-batch", "lr-batch"}  # methods that solve for a target delta
BETA_METHODS = {"beta", "lr-beta", "beta-batch"}
OPTIMIZERS = ("sgd", "shb", "nshb", "qhm")
MODES = ("normal", "critical", "sampling")
AUGMENTS = ("none", "crop-flip", "crop-flip-rotate", "resized-crop-flip")


# --------------------------------------------------------------------------------------------------------------------
# One parser for each kind of number. All refuse nan and inf.


def real(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
            bound = f"at most {LARGEST:g}" if abs(value) > 1 else f"0 or at least {SMALLEST:g}"
            raise argparse.ArgumentTypeError(f"{text} cannot be computed with: its size must be {bound}")
        if value < low or value > high or (open_low and value == low) or (open_high and value == high):
            bounds = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -math.inf else []
            bounds += [f"{'below' if open_high else 'at most'} {high:g}"] if high < math.inf else []
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(bounds)}")
        return value

    return parse


def whole(low: int, high: int = 2**63 - 1):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            most = "" if high == 2**63 - 1 else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be at least {low}{most}")
        return value

    return parse


def duration(text: str) -> float:
    """Seconds from "90", "45s", "30m" or "1.5h"."""
    # with an exponent: config.json may hold 1e-05
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([smh]?)", text)
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90, 45s, 30m or 1.5h")
    return seconds


def text(value: str) -> str:
    if value.splitlines() != [value] or "\0" in value:  # every message that quotes it is one line
        raise argparse.ArgumentTypeError("it holds a line break or a NUL character" if value else "it is empty")
    try:
        value.encode()  # nor could a page, a tracker or a terminal be told of it
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8: give another name") from None
    return value


def device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not auto, cpu, cuda, cuda:N or mps")
    return value


def every(value: str) -> str:
    if not re.fullmatch(r"every=[1-9]\d{0,8}(ep)?", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not every=N (updates) or every=Nep (epochs)")
    return value


def budget(value: str) -> str:
    if not re.fullmatch(r"(epochs|updates|samples)=[1-9]\d{0,17}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not epochs=N, updates=N or samples=N")
    return value


def option(
    default: Any,
    group: str,
    help: str,
    parse: Callable[[str], Any] | None = None,
    *,
    names: Iterable[str] = (),
    choices: Iterable[str] | None = None,
    metavar: str | None = None,
    many: bool = False,
    only: tuple[str, set[str]] | None = None,
) -> Any:
    """A field of Config with what its flag needs. `only` names the field and values without which it has no effect."""
    metadata = {
        "group": group,
        "help": help,
        "parse": parse,
        "names": tuple(names),
        "choices": tuple(choices) if choices else None,
        "metavar": metavar,
        "many": many,
        "only": only,
    }
    return field(default=default, metadata=metadata)


positive = real(0, open_low=True)
momentum = real(0, 1, open_high=True)
CHUNKED, DALI = {"auto", "dali", "threads", "torch"}, {"auto", "dali"}
MEMORY_SETS = {"cifar10", "cifar100", "imagenet", "folder"}
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One run. A value of None means "the data set's or the published default"; resolve() leaves none that matters."""

    # fmt: off
    dataset: str = option("digits", "data", "what to train on", choices=SETS)
    data_dir: str = option("data", "data", "where the images are, or are downloaded to", text, metavar="DIR", only=("dataset", MEMORY_SETS))
    image_size: int | None = option(None, "data", "pixels a side (folder: what the images call for)", whole(SMALLEST_IMAGE, LARGEST_IMAGE), metavar="N", only=("dataset", {"folder", "imagenet"}))
    augment: str | None = option(None, "data", "of the training images", choices=AUGMENTS, metavar="NAME")
    loader: str = option("auto", "data", "resident: all images on the device; dali, threads: decode ahead; torch: DataLoader", choices=("auto", "resident", "dali", "threads", "torch"))
    workers: int | None = option(None, "data", "threads or processes that load (one a processor)", whole(0, 256), metavar="N", only=("loader", CHUNKED))
    chunk: int | None = option(None, "data", "samples decoded together (512, on CUDA 2048; files 64, on CUDA 128)", whole(1, 1 << 16), metavar="N", only=("loader", CHUNKED))
    on_bad_image: str = option("raise", "data", "raise: stop; zeros: serve it black and count it", choices=("raise", "zeros"), only=("dataset", {"folder", "imagenet"}))
    hw_decoder_load: float = option(0.65, "data", "dali on CUDA: share of the hardware decoder", real(0, 1), metavar="X", only=("loader", DALI))
    decoder_device_memory: int = option(16, "data", "dali on CUDA: MB that a decoder's buffers begin with", whole(0, 65536), metavar="MB", only=("loader", DALI))
    decoder_host_memory: int = option(8, "data", "the same in host memory", whole(0, 65536), metavar="MB", only=("loader", DALI))
    drop_last: bool = option(False, "data", "drop the last partial batch of an epoch")

    model: str | None = option(None, "model", "resnet8 resnet20 resnet18 resnet34 resnet50 wrn-28-10 mobilenetv2 torchvision/NAME timm/NAME", text, metavar="NAME")
    norm: str = option("batch", "model", "normalisation layers", choices=("batch", "group"))
    sync_bn: bool = option(False, "model", "several processes: BatchNorm over the batch of all of them", only=("norm", {"batch"}))
    micro_batch: int | None = option(None, "model", "at most so many samples through the model together, to save memory", whole(1), metavar="N")

    method: str = option("constant", "schedule", "how lr, batch and momentum change", choices=(*METHODS, "sampling"), metavar="METHOD")
    epochs: int | None = option(None, "schedule", "passes over the data", whole(1, MOST_EPOCHS), metavar="N")
    budget: str | None = option(None, "schedule", "in place of --epochs: epochs=N, updates=N or samples=N", budget, metavar="WHAT=N")
    lr: float | None = option(None, "schedule", "learning rate at the start", positive, metavar="X")
    batch_size: int | None = option(None, "schedule", "batch size at the start", whole(1), names=("-b", "--batchsize"), metavar="N")
    decay_epoch: int | None = option(None, "schedule", "epochs between steps (a fifth of --epochs)", whole(1), metavar="N", only=("method", {"lr", "batch", "hybrid"}))
    power: float = option(0.9, "schedule", "exponent of poly and of the momentum schedules", positive, metavar="P", only=("method", {"poly"} | SOLVED))
    gamma: float = option(0.9, "schedule", "factor an epoch of exp", real(0, 1, open_low=True), metavar="G", only=("method", {"exp"}))
    c2: float | None = option(None, "schedule", "gradient variance C^2 behind delta", positive, metavar="X")
    k2: float | None = option(None, "schedule", "squared gradient norm K^2 behind delta", real(0), metavar="X", only=("optimizer", {"shb", "nshb"}))
    nshb_delta: str = option("v3", "schedule", "published form of the NSHB delta", choices=("v1", "v3"), only=("optimizer", {"nshb"}))
    compat: str = option("none", "schedule", "original: the published code's shifted indices", choices=("none", "original"))

    optimizer: str = option("sgd", "optimizer", "update rule", choices=OPTIMIZERS)
    beta: float = option(0.9, "optimizer", "momentum", momentum, names=("--beta1", "--momentum"), metavar="X", only=("optimizer", {"shb", "nshb", "qhm"}))
    nu: float = option(0.5, "optimizer", "mixing factor of qhm", real(0, 1), metavar="X", only=("optimizer", {"qhm"}))
    weight_decay: float = option(0.0, "optimizer", "L2 penalty added to the gradient", real(0), metavar="X")

    mode: str = option("normal", "measure", "train, find first crossings, or sample noise", choices=MODES)
    eps: tuple[float, ...] = option((0.5,), "measure", "critical: thresholds", positive, metavar="X", many=True, only=("mode", {"critical"}))
    criterion: str = option("mean-norm", "measure", "critical: what must fall below eps", choices=("mean-norm", "rms-norm", "full-grad"), only=("mode", {"critical"}))
    min_epochs: int | None = option(None, "measure", "critical: no crossing counts before", whole(0), metavar="N", only=("mode", {"critical"}))
    full_grad_every: int | None = option(None, "measure", "critical, full-grad: updates between looks (an epoch)", whole(1), metavar="N", only=("criterion", {"full-grad"}))
    steps: tuple[int, ...] | None = option(None, "measure", "sampling: updates before each measurement", whole(0), metavar="N", many=True, only=("mode", {"sampling"}))
    draws: int | None = option(None, "measure", "sampling: directions drawn at each point (16; with momentum 8, each after a history of its own)", whole(2, 65535), metavar="N", only=("mode", {"sampling"}))
    track_noise: str | None = option(None, "measure", "C2, noise scale and delta of training batches: every=50 updates, every=2ep", every, metavar="WHEN")
    estimator: str = option("auto", "measure", "of --track-noise; auto: per-sample where BatchNorm allows it", choices=("auto", "per-sample", "micro-batch"))
    bn: str = option("train", "measure", "BatchNorm while measuring; per-sample: batch, frozen or eval", choices=("train", "eval", "batch", "frozen"))
    measure_augment: bool = option(False, "measure", "measure on augmented images")
    save_omega: bool = option(False, "measure", "sampling: keep the noise vectors, omega-<step>.npy", only=("mode", {"sampling"}))

    seed: int = option(0, "run", "of weights, order and augmentation", whole(0), metavar="N")
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:N or mps", device, metavar="DEV")
    compile: str = option("auto", "run", "torch.compile; auto: on CUDA only", choices=("auto", "on", "off"))
    kernels: str = option("auto", "run", "native: C++, on CPUs; triton: on NVIDIA GPUs; reference: plain PyTorch", choices=("auto", "native", "triton", "reference"))
    precision: str = option("fp32", "run", "of the forward and backward pass", choices=("fp32", "tf32", "bf16"))
    deterministic: bool = option(False, "run", "same bits on every run of a GPU, slower")
    out: str | None = option(None, "run", "run folder (runs/<time>-<dataset>-<method>)", text, metavar="DIR")
    resume: bool = option(False, "run", "go on with the run in --out")
    checkpoint_every: int | None = option(None, "run", "updates between checkpoints (an epoch)", whole(1), metavar="N")
    log_every: int = option(50, "run", "updates between step rows", whole(1), metavar="N")
    max_time: float | None = option(None, "run", "save and stop after: 90, 45s, 30m, 1.5h", duration, metavar="T")
    wandb_mode: str = option("off", "run", "Weights & Biases; auto: online with a key, else offline", choices=("off", "auto", "offline", "online"))
    wandb_project: str = option("fastsmooth", "run", "wandb project", text, metavar="NAME")
    wandb_entity: str | None = option(None, "run", "wandb entity", text, metavar="NAME")
    # fmt: on

    def __post_init__(self) -> None:
        check(self)

    @property
    def momentum(self) -> float:
        """The optimizer's momentum at the start: beta, or 0 for plain SGD."""
        return 0.0 if self.optimizer == "sgd" else self.beta

    @property
    def images(self) -> int | None:
        """Training images, where that is known before the data set is opened."""
        return SETS[self.dataset].train

    @property
    def limit(self) -> tuple[str, int] | None:
        """What --budget says: epochs, updates or samples, and how many."""
        unit, _, amount = (self.budget or "").partition("=")
        return (unit, int(amount)) if unit else None

    @property
    def assumed(self) -> tuple[str, ...]:
        """The constants behind delta that are taken as 1: not given, and not published for this setting."""
        return (("c2",) if self.c2 is None else ()) + (("k2",) if self.k2 is None and uses_k2(self) else ())

    @property
    def delta_unit(self) -> str:
        """What follows a delta: nothing where its constants are known."""
        return {(): "", ("c2",): " C"}.get(self.assumed, f" ({' = '.join([*self.assumed, '1'])})")

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# Whose `auto` is resolved once: what it chose is in the checkpoints, and a run that goes on uses it again.
RESOLVED_ONCE = ("device", "loader", "compile", "kernels", "estimator")
# What may differ between the two halves of an interrupted run: nothing that changes a bit of its result.
FREE_ON_RESUME = {"out", "resume", "max_time", "wandb_mode", "wandb_project", "wandb_entity", "data_dir", "workers"}


def flag(name: str) -> str:
    """The flag a person would type for a field: --batchsize, --lr."""
    return "--batchsize" if name == "batch_size" else "--" + name.replace("_", "-")


def check(c: Config) -> None:
    """Refuse contradictions that no default can resolve."""
    if c.batch_size is not None and c.images is not None and c.batch_size > c.images:
        raise ConfigError(
            f"--batchsize {c.batch_size} exceeds the {c.images} training images of {c.dataset}: lower --batchsize"
        )
    if c.method in BETA_METHODS and c.optimizer == "sgd":
        raise ConfigError(f"--method {c.method} changes the momentum: choose --optimizer shb, nshb or qhm")
    if c.method in BETA_METHODS and c.beta == 0:
        raise ConfigError(f"--method {c.method} lowers the momentum, which --beta 0 leaves no room for: raise --beta")
    if c.mode == "critical" and c.method != "constant":
        raise ConfigError(f"--mode critical holds the noise fixed: use --method constant, not {c.method}")
    if c.mode == "sampling" and c.budget is not None:
        raise ConfigError(
            "--budget has no meaning with --mode sampling, which ends at the last of --steps: use --epochs"
        )
    for name, thing in (("steps", "update"), ("eps", "threshold")):
        values = getattr(c, name) or ()
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"--{name} names {twice} more than once: give every {thing} once")
    if c.estimator != "auto" and c.track_noise is None:
        raise ConfigError("--estimator has no effect without --track-noise every=N")
    if c.bn in ("batch", "frozen"):
        if c.track_noise is None or c.estimator == "micro-batch":
            raise ConfigError(f"--bn {c.bn} is a choice of per-sample gradients: it needs --track-noise every=N")
        if c.mode == "sampling" or c.criterion == "full-grad":
            raise ConfigError(f"--bn {c.bn} has no meaning for a full gradient: use --bn train or eval")
    if c.mode == "sampling" and c.bn == "eval" and c.momentum:
        raise ConfigError(
            f"--bn eval with {c.optimizer}: its direction is made of gradients in training mode, which the gradient in "
            "evaluation mode is not the mean of: use --bn train, or --optimizer sgd"
        )
    if c.sync_bn and c.micro_batch is not None:
        raise ConfigError("--sync-bn wants the whole batch at once, --micro-batch cuts it: leave one of them out")
    if c.sync_bn and c.compile == "on":
        raise ConfigError(
            "--sync-bn exchanges numbers within the forward pass, which --compile on cannot: leave one out"
        )
    if c.sync_bn and c.track_noise is not None:
        raise ConfigError("--track-noise measures parts of a batch, which --sync-bn mixes: leave --sync-bn out")
    if c.loader == "resident" and c.augment == "resized-crop-flip":
        raise ConfigError("--augment resized-crop-flip decodes whole images: use --loader torch")
    if c.dataset == "digits" and c.augment == "resized-crop-flip":
        raise ConfigError("--augment resized-crop-flip needs image files: digits has none")


def resolve(given: dict[str, Any]) -> Config:
    """Fill what was not given: first from the data set, then from the published constants."""
    given, effective = fill(given)
    refuse_idle(given, effective)
    return dataclasses.replace(effective, **constants(effective))


def without_idle(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, less the flags that have no effect with the others."""
    given, effective = fill(given)
    return {name: value for name, value in given.items() if name not in idle(given, effective)}


def fill(given: dict[str, Any]) -> tuple[dict[str, Any], Config]:
    """What was given in its plainest form, and the Config of it with the defaults of the data set."""
    given = dict(given)
    if given.get("method") == "sampling":
        if given.setdefault("mode", "sampling") != "sampling":
            raise ConfigError(f"--method sampling means --mode sampling, but --mode is {given['mode']}")
        given["method"] = "constant"
    facts = SETS[given.get("dataset", "digits")]
    values = facts.defaults | given
    if values["image_size"] is not None:
        values = suited(values)
    # of sgd the directions of one point, with momentum those of histories, each with a full gradient of its own
    momentum = 0.0 if values.get("optimizer", "sgd") == "sgd" else values.get("beta", 0.9)
    values.setdefault("draws", 8 if momentum else 16)
    if follows_augmentation(values.get("mode", "normal"), momentum, values["augment"]):
        values["measure_augment"] = True
    if "budget" in given and "epochs" in given:
        raise ConfigError("--epochs and --budget both say how long to train: give one of them")
    if values.get("decay_epoch") is None and "budget" not in given:  # else once the epochs are known
        values["decay_epoch"] = max(1, values["epochs"] // 5)
    return given, Config(**values)


def suited(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the network and the augmentation that images of their size call for, where none was given."""
    size = values["image_size"]
    network = next(name for largest, name in NETWORKS.items() if size <= largest)
    augment = "crop-flip" if size <= SMALL else "resized-crop-flip"
    return values | {"model": values["model"] or network, "augment": values["augment"] or augment}


def fitted(c: Config, side: int) -> Config:
    """`c` with what was left to the images, whose shorter side has `side` pixels: --image-size, --model and --augment.

    Images up to SMALL pixels are taken as they are, larger ones at a multiple of STEP. A network for small images (all but
    torchvision's and timm's) is given SMALL pixels at the most.
    """
    small = side <= SMALL or (c.model is not None and "/" not in c.model)
    size = min(max(side, SMALLEST_IMAGE), SMALL) if small else min(side // STEP * STEP, USUAL)
    found = suited({"image_size": size, "model": c.model, "augment": c.augment})
    follows = follows_augmentation(c.mode, c.momentum, found["augment"])
    return dataclasses.replace(c, **found, measure_augment=c.measure_augment or follows)


def follows_augmentation(mode: str, momentum: float, augment: str | None) -> bool:
    """Whether a direction is measured on augmented images: where its buffer is made of gradients of augmented ones."""
    return mode == "sampling" and momentum > 0 and augment not in (None, "none")


def constants(c: Config) -> dict[str, float]:
    """The published C^2 and K^2 where none were given; a schedule that is solved from them refuses to guess."""
    as_published = all(getattr(c, name) == value for name, value in PUBLISHED_WITH.items())
    c2, k2 = PUBLISHED.get(setting(c), (None, None)) if as_published else (None, None)
    found = {}
    if c.c2 is None and c2 is not None:
        found["c2"] = c2
    if c.k2 is None and k2 is not None and (c.c2 is None or uses_k2(c)):
        found["k2"] = k2
    if c.method in SOLVED and uses_k2(c) and dataclasses.replace(c, **found).assumed:
        raise ConfigError(
            f"--method {c.method} with {c.optimizer} is solved from the noise constants, and none are published for "
            f"{setting_of(c)}: give --c2 and --k2 (measure them with --mode sampling)"
        )
    return found


def setting(c: Config) -> tuple[str, str, str | None, float | None, float]:
    """What the constants are published by."""
    return c.dataset, c.optimizer, c.model, c.lr, c.momentum


def setting_of(c: Config) -> str:
    """The same in words, with what keeps published constants from it."""
    network = f" with {c.model}" if c.model else ""  # of a folder's images before they are looked at
    words = f"{c.optimizer}{network} on {c.dataset} at lr {c.lr:g}" + (f", beta {c.beta:g}" if c.momentum else "")
    others = [f"{flag(name)} {getattr(c, name)}" for name, value in PUBLISHED_WITH.items() if getattr(c, name) != value]
    return " ".join([words, *others]) if setting(c) in PUBLISHED else words


def uses_k2(c: Config) -> bool:
    return c.optimizer == "shb" or (c.optimizer == "nshb" and c.nshb_delta == "v1")


def idle(given: dict[str, Any], c: Config) -> list[str]:
    """The names of what was given without effect."""
    limited = {name: FIELDS[name].metadata["only"] for name in given}
    return [name for name, only in limited.items() if only is not None and getattr(c, only[0]) not in only[1]]


HINTS = {  # where a flag has no effect with this value of the flag that it hangs on
    ("power", "exp"): "; the factor of exp is --gamma",
    ("gamma", "poly"): "; the exponent of poly is --power",
    ("beta", "sgd"): "; PyTorch's SGD with momentum is --optimizer shb",
}


def refuse_idle(given: dict[str, Any], c: Config) -> None:
    """A flag that would change nothing is a misunderstanding: say so instead of ignoring it.

    The published command lines have theirs always, so under --compat original those pass; not the --power of exp, which was
    its factor there.
    """
    for name in idle(given, c):
        if c.compat == "original" and name in PUBLISHED_FLAGS and (name, c.method) != ("power", "exp"):
            continue
        only = FIELDS[name].metadata["only"]
        values = " or ".join(sorted(only[1], key=str))
        hint = HINTS.get((name, getattr(c, only[0])), "")
        raise ConfigError(
            f"{flag(name)} has no effect with {flag(only[0])} {getattr(c, only[0])}: it needs {flag(only[0])} {values}{hint}"
        )


# --------------------------------------------------------------------------------------------------------------------


WIDEST = 118  # columns of a page of help


class Page(argparse.HelpFormatter):
    """Help as wide as the terminal, in which no word is broken."""

    def __init__(self, prog: str):
        width = min(columns(sys.stdout) or WIDEST, WIDEST)
        super().__init__(prog, max_help_position=min(30, width // 3), width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        whole = {"break_long_words": False, "break_on_hyphens": False}
        return textwrap.wrap(" ".join(text.split()), width, **whole)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting and says what was meant."""

    several = ""  # what to say of several values where a flag takes one

    def __init__(self, **options: Any):
        super().__init__(**({"allow_abbrev": False, "formatter_class": Page} | options))

    def parse_args(self, args: list[str], namespace: Any = None) -> argparse.Namespace:
        for word in args:
            if re.fullmatch(r"(--[^=]+=|-[^-]=?)--", word):  # argparse would give the flag an empty list
                self.error(f"{word}: -- is no value")
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self.about(rest[0], args))
        return found

    def about(self, word: str, args: list[str]) -> str:
        """What to say about a word that belongs to no flag."""
        known = [name for action in self._actions for name in action.option_strings]
        name = word.partition("=")[0]
        if re.match(r"-[^\d.]", name):
            return about_flag(name, known)
        before = self.flag_before(word, args)
        if before is not None:
            takes = f"no value: {before.help}" if before.nargs == 0 else f"one value{self.several}"
            return f"unexpected {word!r}: {before.option_strings[0]} takes {takes}"
        if "--data-dir" in known and os.path.isdir(word):
            return f"unexpected {word!r}: a folder of images is given as --dataset folder --data-dir {word}"
        return f"unexpected {word!r}: {hint(name, known) or '--help lists the flags'}"

    def flag_before(self, word: str, args: list[str]) -> argparse.Action | None:
        """The flag after whose values the word stands; None where no flag is before it."""
        action, room = None, 0.0
        for arg in args:
            name, equals, _ = arg.partition("=")
            if name in self._option_string_actions:
                action = self._option_string_actions[name]
                room = 0 if equals else {None: 1, 0: 0}.get(action.nargs, math.inf)
            elif room:
                room -= 1
            elif arg == word:
                break
        return action

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0]
            raise argparse.ArgumentError(None, f"{name} {value}: {about_value(name, value, action.choices)}")

    def print_help(self, file: Any = None) -> None:
        show(*self.format_help().splitlines())

    def error(self, message: str) -> None:
        message = re.sub(r"^argument (\S+?)(?:/\S+)*: ", r"\1: ", message)
        message = re.sub(r"^the following arguments are required: (.*)", r"\1 is missing: --help says how", message)
        message = re.sub(r"\S{200,}", lambda word: word[0][:100] + "…", message)
        raise ConfigError(message.replace("\n", " "))


def parser() -> Parser:
    p = Parser(
        prog=command("train"),
        usage="%(prog)s [flags]",
        description="Train or measure one image classifier; without flags, a small network on the digits that ship with it. "
        "Defaults come with --dataset; the run prints what it uses.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    p.several = f"; {command('sweep')} does a run for each of several"
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = p.add_argument_group(meta["group"])
        if isinstance(f.default, bool):
            kind: dict[str, Any] = {"action": "store_true"}
        else:
            kind = {"metavar": meta["metavar"], "choices": meta["choices"], "type": meta["parse"]}
            if meta["many"]:
                kind |= {"nargs": "+"}
        shown = meta["help"]
        if not isinstance(f.default, bool | tuple) and f.default is not None and f.default != "auto":
            shown += f" ({f.default})"
        if meta["choices"] and meta["metavar"]:  # too many to stand in braces
            shown += ": " + " ".join(meta["choices"])
        names = [*meta["names"], "--" + name.replace("_", "-")]
        names.sort(key=lambda word: (word != flag(name), len(word)))
        groups[meta["group"]].add_argument(*names, dest=name, help=shown.replace("%", "%%"), **kind)
    other = p.add_argument_group("other")
    other.add_argument(
        "--config",
        metavar="FILE",
        type=text,
        help="a TOML file of flags, or config.json of a run; the command line overrides it",
    )
    other.add_argument("--plan", action="store_true", help="print the schedule and its cost, touch no data")
    other.add_argument("--json", action="store_true", help="with --plan: one JSON object an epoch")
    other.add_argument(
        "--doctor", action="store_true", help="say what is installed and usable here, and what is missing"
    )
    other.add_argument("--check-data", action="store_true", help="decode every image once and list the bad ones")
    other.add_argument("-h", "--help", action="store_true", help="this page")
    other.add_argument("--version", action="store_true", help="print the version")
    return p


@dataclass(frozen=True)
class Request:
    """What a command line asks for: the fields it gave, and what to do with them."""

    given: dict[str, Any]
    plan: bool = False
    doctor: bool = False
    check_data: bool = False
    json: bool = False
    help: bool = False
    version: bool = False


REQUESTS = {f.name for f in dataclasses.fields(Request)} - {"given"}  # flags that are no field of a Config


def parse(argv: list[str]) -> Request:
    """Flags (dashes and underscores alike) over the file that --config names. Raises ConfigError."""
    p = parser()
    values = vars(p.parse_args([plain(word) for word in argv]))
    extra = {key: values.pop(key, False) for key in REQUESTS}
    path = values.pop("config", None)
    asked = [flag(key) for key in ("plan", "doctor", "check_data") if extra[key]]
    if len(asked) > 1:
        raise ConfigError(f"{asked[0]} and {asked[1]} do not go together: give one of them")
    if extra["json"] and not extra["plan"]:
        raise ConfigError("--json goes with --plan")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    if path is not None:
        lengths = {"epochs", "budget"}  # two ways to say one thing
        read = {
            name: value
            for name, value in read_flags(p, path).items()
            if not (name in lengths and lengths & given.keys())
        }
        given = read | given
    return Request(given, **extra)


def plain(word: str) -> str:
    """--decay_epoch=3 as --decay-epoch=3."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def read_flags(p: Parser, path: str) -> dict[str, Any]:
    """The flags in a TOML or JSON file, or those that a run was started with, out of its config.json."""
    source = f"--config {path}"
    if path.endswith(".json") or text_of(path, source).lstrip().startswith("{"):  # with which no TOML begins
        table = json_table(path, source)
        if "resume" in table:  # as every run's has, and no file of flags
            return flags_of(at_home(saved_config(table, source), Path(path).parent))
    else:
        table = toml_table(path, source)
    for key in table:
        if key.replace("-", "_") in {"config", "resume"} | REQUESTS:
            raise ConfigError(f"{source}: {key} belongs on the command line")
    return from_table(p, table, source)


def text_of(path: str, source: str) -> str:
    """The text of a file of flags. Raises ConfigError, before it reads a file that is too large to be one."""
    try:
        return read_file(Path(path), LARGEST_TOML).decode()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}: give a TOML file of flags") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not a text file: give a TOML file of flags") from None


def json_table(path: str, source: str) -> dict[str, Any]:
    """What a JSON file of flags holds, less its nulls. Raises ConfigError."""
    try:
        table = json.loads(text_of(path, source))
        return {key: value for key, value in table.items() if value is not None}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{source}: not JSON of flags: {error}: give the config.json of a run") from None


def toml_table(path: str, source: str) -> dict[str, Any]:
    """What a TOML file of flags holds. Raises ConfigError."""
    content = text_of(path, source)
    try:
        if any(line.count(".") > MOST_DOTS for line in content.splitlines()):
            raise RecursionError
        table = tomllib.loads(content)
        str(table)  # raises ValueError for more digits than Python writes: of a hexadecimal number it reads them
        return table
    except RecursionError:
        raise ConfigError(
            f"{source}: not TOML of flags: it is nested too deep: write plain lines such as lr = 0.1"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None


def from_table(p: Parser, table: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields in a table read from a file, put through the same checks as flags."""
    words: list[str] = []
    absent: list[str] = []
    for key, value in table.items():
        name = "--" + key.replace("_", "-")
        if not re.fullmatch(
            r"[\w-]+", key, re.ASCII
        ):  # argparse would split "lr=1", and take "" for the end of all flags
            raise ConfigError(f"{source}: {key[:100]!r} is no flag: --help lists them")
        if isinstance(value, dict):
            raise ConfigError(f"{source}: [{key[:100]}] is a table: write plain lines such as lr = 0.1")
        if isinstance(value, bool):
            (words if value else absent).append(name)
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words.append(f"{name}={value}")
    try:
        p.parse_args(absent)  # false leaves a flag out, but only a flag that exists and takes no value
        values = vars(p.parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def read_saved(folder: Path) -> Config:
    """The Config that a run folder was started with."""
    path = folder / "config.json"
    try:
        saved = json.loads(read_file(path).decode())
        given = {key: value for key, value in saved.items() if value is not None}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: is this a run folder?") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged, so the run cannot be identified: {error}") from None
    return at_home(saved_config(given, str(path)), folder)


def saved_config(given: dict[str, Any], source: str) -> Config:
    """The Config in the table of a run's config.json. Raises ConfigError."""
    filled = {*SETS["digits"].defaults, "decay_epoch", "draws"}  # by resolve(), for every data set
    lacking = sorted(filled - given.keys())
    if lacking:
        raise ConfigError(f"{source} is damaged, so the run cannot be identified: it lacks {', '.join(lacking)}")
    found = from_table(parser(), given, source)
    stranger = next((name for name in found if name not in FIELDS), None)
    if stranger:
        raise ConfigError(f"{source} is damaged, so the run cannot be identified: {stranger} is no setting of a run")
    return Config(**found)


def at_home(c: Config, folder: Path) -> Config:
    """`c` with its images where they lay when the run in `folder` was started, wherever this process was."""
    home = (read_object(folder / "env.json") or {}).get("data_dir")
    if isinstance(home, str) and home.isprintable() and os.path.isdir(home):
        return dataclasses.replace(c, data_dir=home)
    return c


def flags_of(c: Config) -> dict[str, Any]:
    """The fewest flags that make this Config, but for where it runs: what was given, as far as it can be told."""
    left = {name: getattr(c, name) for name, f in FIELDS.items() if getattr(c, name) != f.default}
    left = {name: value for name, value in left.items() if name not in ("out", "resume")}
    if c.budget is not None:  # the images said how many epochs that is
        steps = {"decay_epoch"} if c.decay_epoch == max(1, c.epochs // 5) else set()
        left = {name: value for name, value in left.items() if name not in {"epochs"} | steps}
    left = without_idle(left)
    whole = resolve(left)
    for name in list(left):
        rest = {other: value for other, value in left.items() if other != name}
        try:
            left = rest if resolve(rest) == whole else left
        except ConfigError:
            continue
    return left


def resumed(given: dict[str, Any]) -> Config:
    """The Config of the run in --out; flags that are given again must agree with what it was started with."""
    if "out" not in given:
        raise ConfigError("--resume needs --out DIR: the run folder to go on with")
    saved = read_saved(Path(given["out"]))
    if given.get("method") == "sampling":
        given = {key: value for key, value in given.items() if key != "method"} | {"mode": "sampling"}
    # what auto chose may give way to what is asked for
    free = FREE_ON_RESUME | {name for name in RESOLVED_ONCE if getattr(saved, name) == "auto"}
    for name, value in given.items():
        before = getattr(saved, name)
        if name not in free and value != before:
            was = f"has {flag(name)} {shown(before)}, not {shown(value)}"
            if before is None or before is False:
                was = f"was started without {flag(name)}"
            raise ConfigError(f"--resume: the run in {given['out']} {was}: leave the flag out, or start a new run")
    return dataclasses.replace(saved, **{key: v for key, v in given.items() if key in free})


def as_before(c: Config, chosen: dict[str, Any], source: str) -> Config:
    """`c` with what `auto` chose before, read from a checkpoint. Raises ConfigError where that is nothing it can choose."""
    names = [name for name in RESOLVED_ONCE if getattr(c, name) == "auto" and name in chosen]
    return dataclasses.replace(c, **from_table(parser(), {name: str(chosen[name]) for name in names}, source))


def exact(value: float) -> str:
    """The number in as few digits as read back as the same: 0.5, 1, 1e-05, 0.5000001."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
