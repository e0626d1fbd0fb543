"""SGD, SHB, NSHB and QHM: one update with its forms named.

    sgd    m = g                                       (momentum is not used)
    shb    m = beta m + g                              torch.optim.SGD(momentum=beta)
    nshb   m = beta m + (1 - beta) g                   no bias correction: the first direction is (1 - beta) g
    qhm    d = beta d + (1 - beta) g,  m = (1 - nu) g + nu d        (Ma and Yarats 2019)

and then p -= lr m, from zero buffers, with g the gradient plus weight_decay p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FORMS = ("sgd", "shb", "nshb", "qhm")
Scalar = float | Tensor


def add_scaled(xs: list[Tensor], ys: list[Tensor], scale: Scalar) -> None:
    """xs += scale ys. Eager code takes the fused multiply-add that torch.optim.SGD takes, so their bits agree; compiled
    code takes a 0-d tensor, so that a new value does not compile again."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(xs, torch._foreach_mul(ys, scale))
    else:
        torch._foreach_add_(xs, ys, alpha=scale)


def advance(form: str, grads: list[Tensor], buffers: list[Tensor], beta: Scalar, nu: float) -> list[Tensor]:
    """Move the momentum buffers on by one gradient, in place, and return the directions m_t."""
    if form == "sgd":
        return grads
    torch._foreach_mul_(buffers, beta)
    add_scaled(buffers, grads, 1.0 if form == "shb" else 1 - beta)
    if form != "qhm":
        return buffers
    directions = torch._foreach_mul(grads, 1 - nu)
    add_scaled(directions, buffers, nu)
    return directions


def update(
    form: str,
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: Scalar,
    beta: Scalar,
    nu: float,
    weight_decay: float,
) -> None:
    """One step of `form`, in place on params and buffers."""
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    add_scaled(params, advance(form, grads, buffers, beta, nu), -lr)


class NoisySGD(torch.optim.Optimizer):
    """The four forms as one torch optimizer. lr and momentum change in place and leave the buffers alone.

    Args: params, form (one of FORMS), lr, momentum (beta), nu (qhm alone), weight_decay. The state of a parameter is
    its "momentum_buffer", as in torch.optim.SGD; sgd has none. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        form: str,
        lr: float,
        momentum: float = 0.0,
        nu: float = 1.0,
        weight_decay: float = 0.0,
    ):
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
        if not (lr >= 0 and 0 <= momentum < 1 and 0 <= nu <= 1 and weight_decay >= 0):
            raise ValueError(f"out of range: lr {lr}, momentum {momentum}, nu {nu}, weight_decay {weight_decay}")
        defaults = {"lr": lr, "momentum": momentum, "nu": nu, "weight_decay": weight_decay}
        if form in ("sgd", "shb"):
            defaults["dampening"] = 0.0  # without it torch.optim.SGD cannot go on from this state
        super().__init__(params, defaults)
        self.form = form
        self._compiled: Callable[..., None] | None = None
        self._scalars: dict[int, tuple[Tensor, Tensor]] = {}

    def compile(self, backend: Callable | str = "inductor") -> None:
        """Run the update through torch.compile from now on."""
        self._compiled = torch.compile(update, backend=backend, dynamic=False)

    def set_point(self, lr: float, momentum: float) -> None:
        """Change the hyperparameters of every group in place."""
        for group in self.param_groups:
            group["lr"], group["momentum"] = lr, momentum

    def _gather(self, group: dict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(params, gradients, buffers) of a group, the missing buffers made as zeros."""
        params = [p for p in group["params"] if p.grad is not None]
        if self.form == "sgd":
            return params, [p.grad for p in params], []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            params, grads, buffers = self._gather(group)
            if not params:
                continue
            lr, beta = group["lr"], group["momentum"]
            apply = update
            if self._compiled is not None:
                apply, (lr, beta) = self._compiled, self._as_tensors(number, lr, beta)
            apply(self.form, params, grads, buffers, lr, beta, group["nu"], group["weight_decay"])
        return loss

    def _as_tensors(self, number: int, lr: float, beta: float) -> tuple[Tensor, Tensor]:
        if number not in self._scalars:
            self._scalars[number] = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        lr_tensor, beta_tensor = self._scalars[number]
        return lr_tensor.fill_(lr), beta_tensor.fill_(beta)

    @torch.no_grad()
    def directions(self, grads: list[Tensor] | None = None) -> list[Tensor]:
        """The m_t that step() would apply for `grads` (default: the .grad of the parameters); changes nothing.

        The tensors are new, in the order of the parameters of all groups.
        """
        found: list[Tensor] = []
        given = iter(grads) if grads is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if given is not None or p.grad is not None]
            if not params:
                continue
            now = [next(given) if given is not None else p.grad for p in params]
            if group["weight_decay"]:
                now = torch._foreach_add(now, params, alpha=group["weight_decay"])
            buffers = []
            if self.form != "sgd":
                states = [self.state.get(p, {}).get("momentum_buffer") for p in params]
                buffers = [torch.zeros_like(p) if s is None else s.clone() for p, s in zip(params, states, strict=True)]
            found += [m.clone() for m in advance(self.form, now, buffers, group["momentum"], group["nu"])]
        return found
