"""Parameters that stay as they are (--freeze), and BatchNorm layers that stay with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsmooth.models import ModelError
from fastsmooth.names import hint


class FrozenNorm(nn.Module):
    """A BatchNorm that normalises by its running statistics and never moves them, whatever mode
    the model around it is put in (as timm.layers.freeze_batch_norm_2d, with the same parameters,
    buffers and names as before)."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)  # timm's have dropout and an activation below them
        self.training = False
        return self


class Frozen(NamedTuple):
    """What stays as it is."""

    tensors: int
    parameters: int  # numbers in them
    norms: int  # BatchNorm layers

    def described(self, patterns: Sequence[str], model: nn.Module) -> str:
        """In a line."""
        params = list(model.parameters())
        everything = sum(p.numel() for p in params)
        line = (
            f"--freeze {' '.join(patterns)}: {self.tensors} of {len(params)} tensors, "
            f"{self.parameters:,} of {everything:,} parameters, stay as they are"
        )
        if self.norms:
            line += f"; {self.norms} BatchNorm layers normalise by the running statistics they have"
        return f"{line}; whatever is measured is of the trainable parameters"


def freeze(model: nn.Module, patterns: Iterable[str]) -> Frozen:
    """Have the parameters that a pattern names require no gradient. Raises ModelError for a
    pattern that names none, and where none is left to train.

    A pattern is matched as by fnmatch with the names of parameters and of modules, which mean all
    that is below them: `stem`, `stages.0`, `*.bias`. BatchNorm layers all of whose parameters are
    frozen become FrozenNorms.
    """
    params = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in params if is_named(name, pattern)}
        if not found:
            raise ModelError(f"--freeze {pattern} names no parameter: {instead(pattern, params)}")
        chosen |= found
    if len(chosen) == len(params):
        raise ModelError(
            f"--freeze {' '.join(patterns)} leaves no parameter to train: freeze fewer, as all but "
            f"{list(params)[-1].rpartition('.')[0] or 'the last layer'}"
        )
    for name in chosen:
        params[name].requires_grad_(False)
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and is_frozen(module)
    ]
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for norm in norms:
        kind = type(norm)
        kinds[kind] = kinds.get(kind) or type(f"Frozen{kind.__name__}", (FrozenNorm, kind), {})
        object.__setattr__(norm, "__class__", kinds[kind])
        norm.train(norm.training)
    return Frozen(len(chosen), sum(params[name].numel() for name in chosen), len(norms))


def is_named(name: str, pattern: str) -> bool:
    """Whether the pattern names the parameter or a module that it is in."""
    return any(fnmatchcase(whole, pattern) for whole in accumulate(name.split("."), "{}.{}".format))


def is_frozen(norm: nn.Module) -> bool:
    params = list(norm.parameters(recurse=False))
    return bool(params) and not any(p.requires_grad for p in params)


def instead(pattern: str, names: Iterable[str]) -> str:
    """What may have been meant, or what there is."""
    wholes = dict.fromkeys(
        whole for name in names for whole in accumulate(name.split("."), "{}.{}".format)
    )
    tops = dict.fromkeys(name.partition(".")[0] for name in names)
    near = hint(pattern.rstrip(".*"), wholes)
    return near or f"they begin with {', '.join(tops)}"
