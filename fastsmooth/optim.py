"""The forms of the update (fastsmooth.forms) as one torch optimizer, over kernels/update.py.

    sgd    m = g                                       (momentum is not used)
    shb    m = beta m + g                              torch.optim.SGD(momentum=beta)
    nshb   m = beta m + (1 - beta) g                   no bias correction: the first direction is (1
           - beta) g
    qhm    d = beta d + (1 - beta) g,  m = (1 - nu) g + nu d        (Ma and Yarats 2019)
    nesterov  d = beta d + g,  m = g + beta d          torch.optim.SGD(momentum=beta, nesterov=True)

and then p -= lr m, from zero buffers, with g the gradient plus weight_decay p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastsmooth.forms import Form, form_named
from fastsmooth.kernels import backend
from fastsmooth.kernels.update import Plan, Rule, direction_ref
from fastsmooth.schedule import Point

HYPERPARAMETERS = ("lr", "momentum", "nu", "weight_decay")
WORKS = 8  # how many choices of parameters an optimizer keeps the plans of


def coefficients(
    form: Form, lr: float, momentum: float, nu: float, weight_decay: float
) -> list[float]:
    """The values of a kernel's Rule."""
    return [lr, momentum, *form.coefficients(momentum, nu), weight_decay]


class Numbers:
    """The coefficients of a group in the memory of its device, where the kernels read them."""

    def __init__(self, device: torch.device):
        # as backend.scalar: not every device has float64
        at = device if device.type == "cuda" else torch.device("cpu")
        self._memory = torch.empty(6, dtype=torch.float64, device=at)
        self.rule = Rule(*self._memory.unbind())
        self._held: list[float] = []

    def fill(self, values: list[float]) -> None:
        """One copy; none where they are held already."""
        if values != self._held:
            host = torch.tensor(values, dtype=torch.float64)
            self._memory.copy_(backend.pinned(host, self._memory.device), non_blocking=True)
            self._held = values


class Job(NamedTuple):
    """What one launch moves: the parameters of a group that have one dtype."""

    plan: Plan
    rule: Rule
    places: list[int]  # of its parameters among all that a step moves


class Work(NamedTuple):
    """A step for one choice of parameters."""

    jobs: list[Job]
    norms: Tensor  # [parts, 2], the sums of all plans


def captured(work: Work) -> bool:
    """Whether a CUDA graph reads memory of it."""
    return any(job.plan.captured for job in work.jobs)


class NoisySGD(torch.optim.Optimizer):
    """The five forms as one torch optimizer. lr, momentum and nu change in place; the buffers stay.

    Args: params, tensors or groups of them as for torch.optim.SGD, all on one device; form, a row
    of fastsmooth.forms (sgd, shb, nshb, qhm or nesterov: shb has the bits of torch.optim.SGD with
    momentum);
    lr >= 0; momentum, beta in [0, 1); nu in [0, 1], which qhm alone uses; weight_decay >= 0. The
    state of a parameter is its "momentum_buffer", as in torch.optim.SGD, made with the optimizer
    and kept in its memory; sgd has none.

    `partial_norms`: ||g||^2, without weight decay, and ||m_t||^2 of the last step in parts,
    [parts, 2], whose sum is `sq_norms`; None before the first step. The next step over the same
    parameters writes the same memory.

    CUDA graphs: a step may be captured, after one over the same parameters that was not. It reads
    lr and momentum from memory, which set_point fills; and needs `settle` before its first replay.

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
        alpha_fresh_kept = self.form.coefficients(momentum, nu)
        nesterov = self.form.mixes and alpha_fresh_kept == (1.0, 1.0, momentum)
        # without them torch.optim.SGD, which this is, cannot go on from this state
        if not self.form.has_buffer or nesterov or alpha_fresh_kept == (1.0, 0.0, 1.0):
            defaults["dampening"] = 0.0
        if nesterov:
            defaults["nesterov"] = True
        self.partial_norms: Tensor | None = None
        self._numbers: dict[tuple[int, torch.device], Numbers] = {}  # by the number of the group
        self._works: dict[tuple[tuple[int, ...], ...], Work] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.SGD does it; with the buffers of the parameters that want a gradient."""
        super().add_param_group(param_group)
        if self.form.has_buffer:
            for p in self.param_groups[-1]["params"]:
                if p.requires_grad:
                    self._buffer(p)

    def _buffer(self, p: Tensor) -> Tensor:
        """The momentum of p [...], which follows p to another device, dtype or order of memory."""
        m, dtype = self.state[p].get("momentum_buffer"), backend.buffer_dtype(p.dtype)
        if m is None:
            m = torch.zeros_like(p, dtype=dtype)
        elif (m.device, m.dtype, m.stride()) != (p.device, dtype, p.stride()):
            m = torch.empty_like(p, dtype=dtype).copy_(m)
            self._works.clear()  # they move the one that was left
        self.state[p]["momentum_buffer"] = m
        return m

    @property
    def sq_norms(self) -> Tensor | None:
        """[||g||^2, ||m_t||^2] of the last step over all parameters, float64 [2] on their device, a
        new tensor; None before the first step."""
        return None if self.partial_norms is None else self.partial_norms.sum(dim=0)

    def set_point(self, point: Point) -> None:
        """Give every group the lr and the momentum of a Point, and its nu where it has one, in
        place."""
        for group in self.param_groups:
            group["lr"], group["momentum"] = point.lr, point.momentum
            if point.nu is not None:
                group["nu"] = point.nu
        self._fill()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state of this optimizer or of torch.optim.SGD; the buffers keep their
        memory."""
        held = {p: state["momentum_buffer"] for p, state in self.state.items()}
        super().load_state_dict(state_dict)
        # as they were saved: torch gives them the dtype of the parameter
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        self.state.clear()
        for p, number in zip(params, numbers, strict=True):
            saved = state_dict["state"].get(number, {}).get("momentum_buffer")
            if p in held:
                self.state[p]["momentum_buffer"] = held[p].zero_()
            if saved is not None and self.form.has_buffer:
                self._buffer(p).copy_(saved)
        for group in self.param_groups:
            for name in HYPERPARAMETERS:
                group.setdefault(name, self.defaults[name])
        self._fill()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Steps and changes of hyperparameters inside leave no trace; buffers keep their memory."""
        groups = [dict(group) for group in self.param_groups]
        buffers = {p: state["momentum_buffer"].clone() for p, state in self.state.items()}
        norms = self.partial_norms
        values = None if norms is None else norms.clone()
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, groups, strict=True):
                group.update(before)
            self._fill()
            for p, state in self.state.items():
                if p in buffers:
                    state["momentum_buffer"].copy_(buffers[p])
                else:
                    state["momentum_buffer"].zero_()
            self.partial_norms = norms
            if norms is not None and values is not None:
                norms.copy_(values)

    def _coefficients(self, group: dict[str, Any]) -> list[float]:
        return coefficients(self.form, *(float(group[name]) for name in HYPERPARAMETERS))

    def _fill(self) -> None:
        """Put the hyperparameters of the groups where the kernels read them, but for those of a
        captured step: `settle` does it then."""
        for (number, device), numbers in self._numbers.items():
            if not backend.capturing(device):
                numbers.fill(self._coefficients(self.param_groups[number]))

    def _work(self, chosen: list[list[Tensor]]) -> Work:
        """What moves the parameters that are chosen of each group: made anew where their addresses
        are."""
        key = tuple(tuple(map(Tensor.data_ptr, params)) for params in chosen)
        work = self._works.get(key)
        if work is None:
            work = self._plan(chosen)
            idle = [old for old, other in self._works.items() if not captured(other)]
            if len(idle) >= WORKS:
                del self._works[idle[0]]
            self._works[key] = work
        self._fill()
        return work

    def _plan(self, chosen: list[list[Tensor]]) -> Work:
        params = list(chain.from_iterable(chosen))
        device = params[0].device
        if any(p.device != device for p in params):
            raise ValueError("parameters on several devices: each device wants its own optimizer")
        jobs, first = [], 0
        for number, some in enumerate(chosen):
            if (number, device) not in self._numbers:
                self._numbers[number, device] = Numbers(device)
            for dtype in dict.fromkeys(p.dtype for p in some):
                places = [i for i, p in enumerate(some, first) if p.dtype == dtype]
                own = [params[i] for i in places]
                buffers = [self._buffer(p) for p in own] if self.form.has_buffer else []
                plan = Plan(own, buffers, self.form.mixes)
                jobs.append(Job(plan, self._numbers[number, device].rule, places))
            first += len(some)
        counts = [len(job.plan.sums) for job in jobs]
        norms = jobs[0].plan.sums.new_empty(sum(counts), 2)
        for job, sums in zip(jobs, norms.split(counts), strict=True):
            job.plan.sums = sums
        return Work(jobs, norms)

    def settle(self) -> None:
        """Between the capture of a step in a CUDA graph and its first replay: copy to the device
        what could not be copied while capturing."""
        for work in self._works.values():
            for job in work.jobs:
                job.plan.settle()
        self._fill()

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
        groups = self.param_groups
        chosen = [[p for p in group["params"] if p.grad is not None] for group in groups]
        if not any(chosen):
            self.partial_norms = None
            return loss
        work = self._work(chosen)
        for plan, rule, _ in work.jobs:
            plan([g for p in plan.params if (g := p.grad) is not None], rule)
        self.partial_norms = work.norms
        return loss

    @torch.no_grad()
    def step_along_mean(self, parts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """One update along the mean of K gradients, whatever .grad is; 2 <= K <= 8.

        Each of the K `parts` is one gradient for every trainable parameter of the groups, in the
        order of the groups, each in its shape and dtype. Returns (noise, squares), float64 [K] on
        their device: ||g_k - mean||^2 and ||g_k||^2. `sq_norms` has the mean for g. Raises
        ValueError for another K, and for gradients that do not fit.
        """
        chosen = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        count = sum(map(len, chosen))
        if any(len(part) != count for part in parts) or not count:
            raise ValueError(
                f"{' and '.join(str(len(part)) for part in parts)} gradients for {count} trainable "
                "parameters: a part has one for each"
            )
        work, found = self._work(chosen), []
        for plan, rule, places in work.jobs:
            own = [[part[i] for i in places] for part in parts]
            found.append(torch.stack(plan.along_mean(own, rule)[1:]))
        self.partial_norms = work.norms
        noise, squares = sum(found[1:], found[0]).unbind()
        return noise, squares

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
