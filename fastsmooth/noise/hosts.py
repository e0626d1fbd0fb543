"""Precision and gradient checkpointing of a training loop, and what becomes of both while its model
is measured.

torch.utils.checkpoint.checkpoint computes a part of the forward pass again in the backward pass,
when the pass that has layers report to their probes is over, and would find other tensors than it
left. So what it calls by name in its own module is replaced for the time of a measurement: whoever
has imported `checkpoint` itself, by whatever name, is reached all the same. That holds for PyTorch
2.10 to 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as theirs

from fastsmooth.noise.aside import instead
from fastsmooth.noise.losses import NotCovered

# Precision


def check_precision(model: nn.Module) -> None:
    """Raises NotCovered for a model whose trainable parameters are in float16."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype == torch.float16:
            raise NotCovered(
                f"{name} is in float16, whose gradients vanish below 6e-8 without a scaled loss: "
                "keep the parameters in float32, under autocast if need be, or in bfloat16"
            )


@contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Inside, autocast is off where it is to float16; and keeps no cast of a weight, which would
    take memory until the loop's own block ends, and with which, where a pass without a graph has
    left it, some versions of PyTorch would go on: the weight would get no gradient."""
    kind, before = device.type, torch.is_autocast_cache_enabled()
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.autocast(kind, enabled=False) if half else nullcontext():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


# Gradient checkpointing

# generator(function, ...): up to its first yield what is done before the call of `function`, after
# it what is done afterwards; the later name is what PyTorch 2.14 calls
GENERATOR = "_checkpoint_without_reentrant_generator"
GENERATOR = f"{GENERATOR}_impl" if hasattr(theirs, f"{GENERATOR}_impl") else GENERATOR
REENTRANT = "CheckpointFunction"


def replaced(name: str, value: Any) -> AbstractContextManager[None]:
    """Where this PyTorch has another way, a model without checkpoints is measured all the same."""
    return instead(theirs, name, value) if hasattr(theirs, name) else nullcontext()


def recomputed(within: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[None]:
    """Inside, what is computed again is so within the context that within() gives.

    Around the forward and the backward pass, since a part that is computed again may have such
    parts itself.
    """
    original = getattr(theirs, GENERATOR, None)

    def generator(function: Callable[..., Any], *how: Any, **kwargs: Any) -> Iterator[None]:
        def again(*args: Any, **named: Any) -> Any:
            with within():
                return function(*args, **named)

        assert original  # in the place of which this is
        return original(again, *how, **kwargs)

    return replaced(GENERATOR, generator)


def kept() -> AbstractContextManager[None]:
    """Inside, checkpoint(function, x) is function(x): nothing is computed again, and the tensors of
    the pass are all in memory, as torch.vmap needs it."""

    def generator(*how: Any, **kwargs: Any) -> Iterator[None]:
        yield

    return replaced(GENERATOR, generator)


class Cut:
    """What was called without a graph, as in training."""

    words = ""


# of others that torch.utils.checkpoint recomputes for, as torch.distributed._composable.checkpoint
OTHERWISE = (
    "the model computes parts again in the backward pass, otherwise than by "
    "torch.utils.checkpoint.checkpoint: switch that off, or use the micro-batch estimator"
)


def needs_gradient(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    while torch._C._functorch.is_batchedtensor(value):  # within torch.vmap it does not say so
        value = torch._C._functorch.get_unwrapped(value)
    return value.requires_grad


@contextmanager
def differentiable() -> Iterator[Cut]:
    """Inside, checkpoint(use_reentrant=True) does as use_reentrant=False, which has the same
    gradients and which torch.autograd.grad can go through; but where no input needs a gradient,
    that leaves the function without a graph, in training as here."""
    cut = Cut()

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if any(map(needs_gradient, args)) or not torch.is_grad_enabled():
                how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve}
                return theirs.checkpoint(function, *args, **how)
            cut.words = (
                "; or does checkpoint(use_reentrant=True) get an input that needs no gradient? "
                "Then it does not train in your loop either: give use_reentrant=False"
            )
            with torch.no_grad():
                return function(*args)

    with replaced(REENTRANT, Reentrant):
        yield cut
