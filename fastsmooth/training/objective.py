"""What a run minimises, and what it tells of the test images."""

from __future__ import annotations

import inspect
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth import owncode
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError, is_code
from fastsmooth.noise.losses import Loss, NotCovered, mean_loss


class Objective(NamedTuple):
    """The two losses of a run, loss(logits, target): logits float32 [b, classes], target int64 [b],
    in training also float32 [b, classes], where images are mixed. Each is a mean over the b
    samples of a value that depends on one sample alone; one of own code may give these values,
    [b], and be no such mean (check_loss)."""

    training: Loss = F.cross_entropy
    testing: Loss = F.cross_entropy  # of target int64 [b]


def objective_of(c: Config, device: torch.device) -> Objective:
    """What --loss and --label-smoothing say. Test images are judged by cross-entropy without
    smoothing, so that runs with and without can be compared; with a loss of own code by that.
    Raises ConfigError for own code that cannot be used."""
    if is_code(c.loss):
        own = own_loss(c.loss, device)
        return Objective(own, own)
    smoothing = c.label_smoothing
    if c.loss == "bce":
        return Objective(partial(binary_cross_entropy, label_smoothing=smoothing))
    if smoothing:
        return Objective(partial(F.cross_entropy, label_smoothing=smoothing))
    return Objective()


def own_loss(spec: str, device: torch.device) -> Loss:
    """The loss FILE.py:NAME: a function, or a module or a class of one, which is moved to the
    device. Raises ConfigError."""
    path = owncode.split(spec)[0]
    try:
        loss = owncode.load(spec)
    except owncode.CodeError as error:
        raise ConfigError(f"--loss {spec}: {error}") from None
    if inspect.isclass(loss):
        try:
            loss = loss()
        except Exception as error:
            raise ConfigError(f"--loss {spec}: {owncode.fault(error, path)}") from None
    if not callable(loss):
        raise ConfigError(
            f"--loss {spec}: it is of type {type(loss).__name__}, no function of (logits, target)"
        )
    if isinstance(loss, nn.Module):
        if any(p.requires_grad for p in loss.parameters()):
            raise ConfigError(
                f"--loss {spec}: it has parameters, which no optimizer would train: put them into "
                "the model, or make them buffers"
            )
        loss.to(device)
    return loss


PROBED = 4  # samples by which a loss of own code is looked at


def check_loss(
    c: Config, objective: Objective, classes: int, device: torch.device, processes: int
) -> None:
    """Refuse a loss of own code that gives neither a mean nor a value a sample, or that is no mean
    over the samples where a batch is cut in parts, or gradients of parts are compared."""
    at = torch.Generator().manual_seed(0)
    logits = torch.randn(PROBED, classes, generator=at).to(device).requires_grad_()
    labels = (torch.arange(PROBED) % classes).to(device)
    shares = F.one_hot(labels, classes).float() * 0.7 + 0.3 / classes
    targets = [labels] + [shares] * bool(c.mixup or c.cutmix)
    for target in targets:
        value = called(c.loss, objective.training, logits, target)
        if value.shape not in ((), (PROBED,)):
            raise ConfigError(
                f"--loss {c.loss}: it gives {list(value.shape)} for {PROBED} samples, neither one "
                f"number nor a value a sample, [{PROBED}]"
            )
        if not (value.is_floating_point() and value.requires_grad):
            raise ConfigError(
                f"--loss {c.loss}: what it gives has no gradient (detach, item or an integer?)"
            )
        parts = [
            called(c.loss, objective.training, logits[i : i + 1], target[i : i + 1]).mean()
            for i in range(PROBED)
        ]
        whole = value.mean()
        mean = bool((torch.stack(parts).mean() - whole).abs() <= 1e-4 * (1 + whole.abs()))
        reason = next((r for r in needing_a_mean(c, processes)), None)
        if not mean and reason:
            raise ConfigError(
                f"--loss {c.loss} is not the mean over the samples of a value of each alone, which "
                f"{reason} needs: leave that out, or give a loss that is"
            )
    if c.track_noise:
        try:
            mean_loss(objective.training, logits, targets[-1])
        except NotCovered as error:
            raise ConfigError(f"--track-noise with --loss {c.loss}: {error}") from None


def needing_a_mean(c: Config, processes: int) -> list[str]:
    """What takes the loss of a batch for the mean of those of its parts."""
    found = ["--mode sampling"] * (c.mode == "sampling")
    found += ["--criterion full-grad"] * (c.mode == "critical" and c.criterion == "full-grad")
    found += ["--micro-batch"] * (c.micro_batch is not None)
    return found + ["a run of several processes"] * (processes > 1)


def called(spec: str, loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    """The loss of own code. Raises ConfigError."""
    try:
        value = loss(logits, target)
    except Exception as error:
        where = owncode.fault(error, owncode.split(spec)[0])
        kind = "shares of the classes" if target.ndim == 2 else "labels"
        raise ConfigError(
            f"--loss {spec}: on logits {list(logits.shape)} and {kind} {list(target.shape)}: "
            f"{where}"
        ) from None
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ConfigError(f"--loss {spec}: it gives a value of type {kind}, no tensor")
    return value


def binary_cross_entropy(
    logits: Tensor, target: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Binary cross-entropy of each class by itself (Wightman et al. 2021, section 2): the mean over
    the classes, then over the samples; with reduction "none" [b].

    logits [b, classes]; target int64 [b] or the share of each class, [b, classes].
    """
    classes = logits.shape[1]
    if target.ndim == 1:  # one_hot reads values of the target on the host
        shares = torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)
    else:
        shares = target.to(logits.dtype)
    if label_smoothing:
        shares = shares * (1 - label_smoothing) + label_smoothing / classes
    values = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(dim=1)
    return values.mean() if reduction == "mean" else values


def labels_of(target: Tensor) -> Tensor:
    """int64 [b]: the class of each sample, of mixed ones that which has the largest share."""
    return target if target.ndim == 1 else torch.argmax(target, dim=1)


def among_likeliest(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """int64, 0-d: of how many samples the class is among the `count` with the largest logits.

    logits [b, classes], of `count` classes or more; target int64 [b].
    """
    return (logits.topk(count, dim=1).indices == target.unsqueeze(1)).sum()
