"""The forms of the update (fastsmooth.forms) as one torch optimizer, over kernels/update.py.

    sgd    m = g                                       (momentum is not used)
    shb    m = beta m + g                              torch.optim.SGD(momentum=beta)
    nshb   m = beta m + (1 - beta) g                   no bias correction: the first direction is (1
           - beta) g
    qhm    d = beta d + (1 - beta) g,  m = (1 - nu) g + nu d        (Ma and Yarats 2019)

and then p -= lr m, from zero buffers, with g the gradient plus weight_decay p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor

from fastsmooth.forms import Form, form_named
from fastsmooth.kernels import backend
from fastsmooth.kernels.update import Rule, direction_ref, update
from fastsmooth.schedule import Point

HYPERPARAMETERS = ("lr", "momentum", "nu", "weight_decay")


def coefficients(
    form: Form, lr: float, momentum: float, nu: float, weight_decay: float
) -> list[float]:
    """The values of a kernel's Rule."""
    return [lr, momentum, *form.coefficients(momentum, nu), weight_decay]


class NoisySGD(torch.optim.Optimizer):
    """The four forms as one torch optimizer. lr and momentum change in place; the buffers stay.

    Args: params, tensors or groups of them as for torch.optim.SGD; form, a row of fastsmooth.forms
    (sgd, shb, nshb or qhm: shb has the bits of torch.optim.SGD with momentum); lr >= 0; momentum,
    beta in [0, 1); nu in [0, 1], which qhm alone uses; weight_decay >= 0. The state of a parameter
    is its "momentum_buffer", as in torch.optim.SGD; sgd has none.

    After a step `sq_norms` is [||g||^2, ||m_t||^2] over all parameters, float64 on their device, g
    without weight decay.

    Raises ValueError for a form that is no row, with what may have been meant; for values out of
    range; and for a momentum with sgd, which would not use it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        form: str,
        lr: float,
        momentum: float = 0.0,
        nu: float = 0.5,
        weight_decay: float = 0.0,
    ):
        self.form = form_named(form)
        if not (lr >= 0 and 0 <= momentum < 1 and 0 <= nu <= 1 and weight_decay >= 0):
            raise ValueError(
                f"out of range: lr {lr}, momentum {momentum}, nu {nu}, weight_decay {weight_decay}"
            )
        if momentum and not self.form.has_buffer:
            raise ValueError(
                f"form {form} has no momentum: leave momentum {momentum} out, or take shb, which "
                "is PyTorch's SGD with momentum"
            )
        defaults = {"lr": lr, "momentum": momentum, "nu": nu, "weight_decay": weight_decay}
        if not self.form.has_buffer or self.form.coefficients(momentum, nu) == (1.0, 0.0, 1.0):
            # without it torch.optim.SGD, which this is, cannot go on from this state
            defaults["dampening"] = 0.0
        super().__init__(params, defaults)
        self.sq_norms: Tensor | None = None
        self._scalars: dict[int, tuple[list[float], list[Tensor]]] = {}

    def set_point(self, point: Point) -> None:
        """Give every group the lr and the momentum of a Point, in place."""
        for group in self.param_groups:
            group["lr"], group["momentum"] = point.lr, point.momentum

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Steps and changes of hyperparameters inside leave no trace; buffers keep their memory."""
        groups = [dict(group) for group in self.param_groups]
        buffers = {
            p: {name: t.clone() for name, t in state.items()} for p, state in self.state.items()
        }
        sq_norms = self.sq_norms
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, groups, strict=True):
                group.update(before)
            for p in [p for p in self.state if p not in buffers]:
                del self.state[p]
            for p, before in buffers.items():
                for name, t in before.items():
                    self.state[p][name].copy_(t)
            self.sq_norms = sq_norms

    def _gather(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(params, gradients, buffers) of a group, the missing buffers made as zeros."""
        params = [p for p in group["params"] if p.grad is not None]
        if not self.form.has_buffer:
            return params, [p.grad for p in params], []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                dtype = backend.buffer_dtype(p.dtype)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        return params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]

    def _coefficients(self, group: dict[str, Any]) -> list[float]:
        return coefficients(self.form, *(group[name] for name in HYPERPARAMETERS))

    def _rule(self, number: int, device: torch.device) -> Rule:
        """A group's coefficients as 0-d tensors, the same ones as long as their values stay."""
        values = self._coefficients(self.param_groups[number])
        held, tensors = self._scalars.get(number, ([], []))
        if values != held:
            tensors = tensors or [backend.scalar(0.0, device) for _ in values]
            for tensor, value in zip(tensors, values, strict=True):
                tensor.fill_(value)
            self._scalars[number] = values, tensors
        return Rule(*tensors)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a .grad; what the closure returns, if one is given
        to compute it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = []
        for number, group in enumerate(self.param_groups):
            params, grads, buffers = self._gather(group)
            if params:
                found.append(
                    update(
                        params,
                        grads,
                        buffers,
                        self._rule(number, params[0].device),
                        self.form.mixes,
                    )
                )
        self.sq_norms = sum(found[1:], found[0]) if found else None
        return loss

    @torch.no_grad()
    def directions(self, grads: list[Tensor] | None = None) -> list[Tensor]:
        """The m_t that step() would apply for `grads`, weight decay included; changes nothing.

        `grads` has one for every trainable parameter of the groups, [...] in its shape, any dtype;
        by default the .grad of those that have one. The result has new tensors in the same shapes,
        in the order of the groups, in the dtype of the momentum: float32, or float64 for float64
        parameters.
        """
        found: list[Tensor] = []
        given = iter(grads) if grads is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad or (given is None and p.grad is None):
                    continue
                wide = backend.buffer_dtype(p.dtype)
                slope = (next(given) if given is not None else p.grad).to(wide)
                m = self.state.get(p, {}).get("momentum_buffer")
                if m is not None:
                    m = m.clone()
                elif self.form.has_buffer:
                    m = torch.zeros_like(p, dtype=wide)
                _, beta, alpha, fresh, kept, decay = self._coefficients(group)
                direction = direction_ref(
                    p.to(wide), slope, m, beta, alpha, fresh, kept, decay, self.form.mixes
                )
                found.append(direction.clone() if direction is slope else direction)
        return found
