"""What a run minimises, and what it tells of the test images."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth.cli.config import Config
from fastsmooth.noise.losses import Loss


class Objective(NamedTuple):
    """The two losses of a run, loss(logits, target): logits float32 [b, classes], target int64 [b],
    in training also float32 [b, classes], where images are mixed. Each is a mean over the b
    samples of a value that depends on one sample alone."""

    training: Loss = F.cross_entropy
    testing: Loss = F.cross_entropy  # of target int64 [b]


def objective_of(c: Config) -> Objective:
    """What --loss and --label-smoothing say. Test images are judged by cross-entropy without
    smoothing, so that runs with and without can be compared."""
    smoothing = c.label_smoothing
    if c.loss == "bce":
        return Objective(partial(binary_cross_entropy, label_smoothing=smoothing))
    if smoothing:
        return Objective(partial(F.cross_entropy, label_smoothing=smoothing))
    return Objective()


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
