"""Whether the measurement of a batch can be its step of training: --measure.

The gradient that comes with the norms of samples is that of the batch, where nothing tells a
measuring pass from an ordinary one: one process, the whole batch at once, BatchNorm as in training,
the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import one_line
from fastsmooth.noise import gradients
from fastsmooth.noise.persample import NotCovered, training_norms

# How far the outputs and buffers of two passes may be apart, as a share of the largest: more than
# rounding, and far less than another mask of dropout makes.
CLOSE = 0.02


class Facts(NamedTuple):
    """What it hangs on, beside the model."""

    config: Config
    estimator: str
    processes: int


# What keeps a measurement from being the step, in words.
OBSTACLES: tuple[tuple[Callable[[Facts], bool], str], ...] = (
    (
        lambda f: f.estimator != "per-sample",
        "the micro-batch estimator takes gradients of parts of a batch",
    ),
    (
        lambda f: f.config.bn not in ("train", "batch"),
        "--bn {bn} measures another gradient than the one that trains",
    ),
    (lambda f: f.config.sam is not None, "--sam trains along another gradient"),
    (lambda f: f.config.samples_at_once is not None, "--micro-batch cuts the batch"),
    (
        lambda f: f.processes > 1,
        "several processes share the batch, and each measures about a mean of its own",
    ),
)


def choose_measure(
    facts: Facts, model: nn.Module, x: Tensor, y: Tensor, compiled: bool
) -> tuple[str, str]:
    """(apart or step, why apart): what --measure names, or what auto means here.

    x [B, ...] and y [B] are some images of the kind that will come; `compiled`: whether ordinary
    passes go through torch.compile. Raises ConfigError where a step is asked for and cannot be.
    """
    c = facts.config
    pays = x.device.type == "cuda" and not c.deterministic
    if c.measure == "apart" or (c.measure == "auto" and not pays):
        return "apart", ""
    why = next((words for holds, words in OBSTACLES if holds(facts)), "").format(bn=c.bn)
    why = why or difference(model, x, y, "batch" if c.bn == "batch" else None, compiled)
    if why and c.measure == "step":
        raise ConfigError(f"--measure step: {why}: use --measure apart")
    return ("apart", why) if why else ("step", "")


def difference(model: nn.Module, x: Tensor, y: Tensor, bn: str | None, compiled: bool) -> str:
    """What tells a measuring pass over x [B, ...] and y [B] from an ordinary one, in words; empty
    where nothing does. Leaves the model and the random state alone."""
    found = []
    try:
        for measuring in (False, True):
            with gradients.undisturbed(model, "train"), torch.no_grad():
                before = random_state(x.device)
                output = training_norms(model, x, y, bn=bn)[1] if measuring else model(x)
                after = random_state(x.device)
                found.append((output, [b.clone() for b in model.buffers()], after))
    except (NotCovered, NotImplementedError) as error:
        return one_line(error)[:200]
    (plain, buffers, numbers), (measured, moved, drawn) = found
    if compiled and not torch.equal(before, numbers):
        return "the model draws random numbers, which are others once it is compiled"
    if not (torch.equal(numbers, drawn) and close(plain, measured)):
        return "the model draws other random numbers while it is measured"
    if not all(map(close, buffers, moved)):
        return "the model keeps other statistics while it is measured"
    return ""


def random_state(device: torch.device) -> Tensor:
    """That of the numbers which a model on the device draws."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def close(a: Tensor, b: Tensor) -> bool:
    """Whether a and b, of one shape, are equal but for rounding."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= CLOSE * a.abs().max()) if a.numel() else True
