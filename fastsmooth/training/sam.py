"""Sharpness-aware minimisation: the gradient at a point some way uphill, in the place of that at
the weights.

With g the gradient of a batch at the weights w, and g_p that of the same batch at

    w_p = w + rho g / ||g||

SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2 and 3) updates w along g_p, and GSAM (Zhuang et al.
2022, arXiv 2203.08065, algorithm 1) along g_p - alpha g_v, where g_v is the part of g that is
perpendicular to g_p: g = g_v + g_h, g_h = (<g, g_p> / ||g_p||^2) g_p. Its rho is constant here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsmooth.noise.gradients import norm
from fastsmooth.noise.persample import unchanged

TINY = 1e-12  # beside ||g||, as in the code that the papers' authors and others published


class Sam(NamedTuple):
    """What --sam says."""

    rho: float
    alpha: float = 0.0  # of GSAM; 0: SAM

    @classmethod
    def parse(cls, text: str) -> Sam:
        """Of "rho=0.05" or "rho=0.05,alpha=0.2", which cli.flags.sam has let pass."""
        return cls(*(float(part.partition("=")[2]) for part in text.split(",")))

    def apply(
        self, model: nn.Module, params: Sequence[Tensor], gradient: Callable[[], object]
    ) -> None:
        """Have the gradient of SAM in .grad, where that at the weights is.

        `gradient` leaves the gradient of the same batch, at the weights that there are then, in the
        .grad of `params`. Weights and buffers, BatchNorm's running statistics among them, are
        afterwards what they were before, to the last bit. The host reads no value of the device.
        """
        with torch.no_grad():
            moved = [p for p in params if p.grad is not None]
            slopes = [p.grad for p in moved if p.grad is not None]
            weights = [p.detach().clone() for p in moved]
            way = torch._foreach_mul(slopes, self.rho / (norm(slopes) + TINY))
            torch._foreach_add_(moved, way)
            # the next gradient may be written where this one is
            slopes = [g.clone() for g in slopes] if self.alpha else []
            del way
        with unchanged(list(model.buffers())):
            gradient()
        with torch.no_grad():
            torch._foreach_copy_(moved, weights)
            if self.alpha:
                self._turn(slopes, [filled(p) for p in moved])

    def _turn(self, slopes: list[Tensor], uphill: list[Tensor]) -> None:
        """GSAM's direction in the place of `uphill`, g_p: g_p - alpha (g - c g_p)."""
        along = dot(slopes, uphill) / (dot(uphill, uphill) + TINY**2)
        torch._foreach_mul_(uphill, 1 + self.alpha * along)
        torch._foreach_add_(uphill, slopes, alpha=-self.alpha)


def filled(p: Tensor) -> Tensor:
    """The .grad of p, zeros where the last pass by chance left it out."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """0-d: the inner product over all of them, each pair of one shape."""
    return torch.stack([s.sum() for s in torch._foreach_mul(a, b)]).sum()
