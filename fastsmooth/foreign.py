"""Optimizers that are no form of ours: torch/NAME, timm/NAME, FILE.py:NAME.

Nothing is known of their rule. So what a run wants of a step, the direction, is read off the
parameters: m_t = (p_before - p_after) / lr, the vector that is multiplied by -lr.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fastsmooth import owncode
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.names import hint
from fastsmooth.optim import NoisySGD
from fastsmooth.schedule import Point

WORDS = {"true": True, "false": False, "none": None}
LONGEST = 300  # characters of an error's words
# what torch.optim.Optimizer itself counts outside its state
COUNTED = {"_step_count", "_opt_called"}


class OptimizerError(ValueError):
    """The optimizer asked for cannot be used; the message says why and what to do."""


class Foreign:
    """A torch.optim.Optimizer of another maker, with what a run and its instruments use of
    NoisySGD.

    All that it remembers must be in its state and its param_groups, as for any checkpoint of
    PyTorch. `partial_norms`, float64 [1, 2]: ||g||^2 and ||m_t||^2 of the last step, m_t to the
    rounding of a parameter; None before the first.
    """

    def __init__(self, name: str, inner: torch.optim.Optimizer, lr: float):
        """Raises OptimizerError for one that cannot be driven by a learning rate and gradients."""
        self.name, self.inner, self.lr = name, inner, lr
        self.ratios = []
        for rate in (group.get("lr") for group in inner.param_groups):
            if not isinstance(rate, int | float | Tensor):
                raise OptimizerError(f"--optimizer {name}: its groups of parameters have no lr")
            self.ratios.append(float(rate) / lr)
        self.partial_norms: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The hyperparameters that its constructor was given, or has of its own."""
        return self.inner.defaults

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def sq_norms(self) -> Tensor | None:
        """[||g||^2, ||m_t||^2] of the last step, float64 [2]; None before the first."""
        return None if self.partial_norms is None else self.partial_norms.sum(dim=0)

    @property
    def has_state(self) -> bool:
        """Whether a direction depends on more than the gradient at hand."""
        return any(isinstance(v, Tensor) for s in self.inner.state.values() for v in s.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def set_point(self, point: Point) -> None:
        """Give the groups the lr of a Point, each by its ratio to the others, in place."""
        self.lr = point.lr
        for group, ratio in zip(self.param_groups, self.ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(point.lr * ratio)
            else:
                group["lr"] = point.lr * ratio

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a .grad."""
        params = [p for p in self.params if p.grad is not None]
        if not params:
            self.partial_norms = None
            return
        before = [p.detach().clone() for p in params]
        grad_square = square([p.grad for p in params if p.grad is not None])
        self.inner.step()
        moved = square(torch._foreach_sub(before, params))
        lr = self.lr or math.inf  # nothing has moved at lr 0
        self.partial_norms = torch.stack([grad_square, moved / lr**2])[None]

    @torch.no_grad()
    def step_along_mean(self, parts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """One update along the mean of K gradients: NoisySGD.step_along_mean."""
        params = [p for p in self.params if p.requires_grad]
        columns = [torch.stack(of_one) for of_one in zip(*parts, strict=True)]  # [K, ...] each
        means = [column.mean(dim=0) for column in columns]
        for p, mean in zip(params, means, strict=True):
            p.grad = mean
        noise = [square(torch._foreach_sub(part, means)) for part in parts]
        squares = [square(part) for part in parts]
        self.step()
        return torch.stack(noise), torch.stack(squares)

    @torch.no_grad()
    def directions(self, grads: list[Tensor] | None = None) -> list[Tensor]:
        """The m_t that step() would apply for `grads`, with the state as it stands; changes
        nothing. As NoisySGD.directions; computed in float64 where the optimizer takes that, else
        to the rounding of a parameter."""
        params = [p for p in self.params if p.requires_grad and (grads or p.grad is not None)]
        given = grads or [p.grad for p in params if p.grad is not None]
        wide = wide_dtype(params[0].device)
        try:
            return self._moved(params, given, wide)
        except (RuntimeError, TypeError, ValueError):  # kernels of its own, for one dtype
            return self._moved(params, given, None)

    def _moved(
        self, params: list[Tensor], grads: list[Tensor], dtype: torch.dtype | None
    ) -> list[Tensor]:
        with self._aside(dtype):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            before = [p.detach().clone() for p in params]
            self.inner.step()
            return [(b - p) / self.lr for b, p in zip(before, params, strict=True)]

    @contextmanager
    def _aside(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, the parameters and the state are copies, of a dtype where one is given, and no
        parameter has a gradient; no random number is drawn that would be drawn later."""
        held = [(p, p.data, p.grad) for p in self.params]
        devices = {p.device for p in self.params if p.device.type == "cuda"}
        with self.kept(), torch.random.fork_rng(devices=list(devices)):
            try:
                for p, data, _ in held:
                    if dtype is not None:
                        self.inner.state[p] = widened(self.inner.state.get(p, {}), data, dtype)
                    p.grad = None
                    p.data = data.to(dtype or data.dtype, copy=True)
                yield
            finally:
                for p, data, grad in held:
                    p.grad = None  # its dtype is that of the copy
                    p.data = data
                    p.grad = grad

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Steps and changes of hyperparameters inside leave no trace in the optimizer."""
        groups = [
            {key: copy.deepcopy(v) for key, v in group.items() if key != "params"}
            for group in self.param_groups
        ]
        state, counts = dict(self.inner.state), self._counts()
        norms, lr = self.partial_norms, self.lr
        for p, values in state.items():
            self.inner.state[p] = copy.deepcopy(values)
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, groups, strict=True):
                params = group["params"]
                group.clear()
                group.update({"params": params} | before)
            self.inner.state.clear()
            self.inner.state.update(state)
            vars(self.inner).update(counts)
            self.partial_norms, self.lr = norms, lr

    def _counts(self) -> dict[str, Any]:
        """The numbers among its attributes."""
        return {k: v for k, v in vars(self.inner).items() if isinstance(v, int | float)}

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        # as they were saved: torch gives them the dtype of the parameter
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for p, number in zip(self.params, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                held = self.inner.state[p][key]
                if isinstance(value, Tensor) and held.dtype != value.dtype:
                    self.inner.state[p][key] = value.to(held.device, copy=True)

    @torch.no_grad()
    def try_out(self) -> None:
        """A step aside, along zeros. Raises OptimizerError where it fails, and where what it keeps
        could not be kept in a checkpoint."""
        before = self._counts()
        with self._aside(None):
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            try:
                self.inner.step()
            except Exception as error:
                said = words(self.name, error)
                raise OptimizerError(f"--optimizer {self.name}: its step: {said}") from None
            after = self._counts()
            changed = [k for k in after if k not in COUNTED and after[k] != before.get(k)]
            if changed:
                raise OptimizerError(
                    f"--optimizer {self.name}: it counts {changed[0]} outside its state, so no "
                    "checkpoint could hold it: keep it in self.state or in the param_groups"
                )
            check_plain(self.name, self.inner.state_dict())


def square(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares over all coordinates of tensors [...] of any shapes: float64 0-d."""
    wide = wide_dtype(tensors[0].device)
    norms = [torch.linalg.vector_norm(t, dtype=wide) for t in tensors]
    return torch.stack(norms).square().sum()


def widened(state: dict[str, Any], p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The state of a parameter, that which has the parameter's own dtype in another one."""

    def of(key: str, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dtype == p.dtype and key != "step"
        return value.to(dtype) if fits else value

    return {key: of(key, value) for key, value in state.items()}


def check_plain(name: str, state: dict[str, Any]) -> None:
    """Raises OptimizerError for a state_dict that a checkpoint, which runs no code when it is
    read, could not give back."""
    buffer = io.BytesIO()
    empty = _pytree.tree_map_only(Tensor, lambda t: t.new_empty(0), state)
    try:
        torch.save(empty, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        kind = " ".join(str(error).split())[:LONGEST]
        raise OptimizerError(
            f"--optimizer {name}: its state holds what no checkpoint can ({kind}): keep tensors, "
            "numbers and text in it"
        ) from None


# How it is made


def build(
    name: str,
    arguments: Sequence[str],
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    weight_decay: float,
) -> Foreign:
    """The optimizer torch/NAME, timm/NAME or FILE.py:NAME over tensors or groups of them, tried
    out.

    arguments: NAME=VALUE each, of its constructor. weight_decay goes to it where it takes one.
    Raises OptimizerError, in one line, for whatever is wrong with any of that.
    """
    make = maker(name)
    try:
        signature = inspect.signature(make).parameters
    except (TypeError, ValueError):
        raise OptimizerError(
            f"--optimizer {name}: not a class or function that makes an optimizer"
        ) from None
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    given = {text.partition("=")[0]: literal(text.partition("=")[2]) for text in arguments}
    for key in given:
        if key not in signature and not open_ended:
            meant = hint(key, signature) or f"it takes {described(signature)}"
            raise OptimizerError(f"--optimizer-args {key}: {name} has no such argument: {meant}")
    if "lr" not in signature and not open_ended:
        raise OptimizerError(f"--optimizer {name}: its constructor takes no lr")
    if "weight_decay" in signature or (open_ended and weight_decay):
        given["weight_decay"] = weight_decay
    elif weight_decay:
        raise OptimizerError(f"--weight-decay: {name} takes none: leave it out")
    try:
        inner = make(list(params), lr=lr, **given)
    except Exception as error:
        raise OptimizerError(
            f"--optimizer {name}: {words(name, error)}: it takes {described(signature)}"
        ) from None
    if not isinstance(inner, torch.optim.Optimizer):
        raise OptimizerError(
            f"--optimizer {name}: it makes a value of type {type(inner).__name__}, no "
            "torch.optim.Optimizer"
        )
    check_driven(name, inner)
    optimizer = Foreign(name, inner, lr)
    optimizer.try_out()
    return optimizer


def maker(name: str) -> Callable[..., Any]:
    """What makes the optimizer. Raises OptimizerError for a name that there is not."""
    library, _, own = name.partition("/")
    if library == "torch":
        known = {
            key: value
            for key, value in vars(torch.optim).items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        }
        del known["Optimizer"]
        if own not in known:
            near = hint(own, known, "torch/") or f"there are {', '.join(sorted(known))}"
            raise OptimizerError(f"--optimizer {name}: torch.optim has no such optimizer: {near}")
        if own == "SparseAdam":
            raise OptimizerError(
                f"--optimizer {name}: it takes sparse gradients only, and a network's are dense: "
                "use torch/Adam"
            )
        return known[own]
    if library == "timm":
        return of_timm(own)
    try:
        return owncode.load(name)
    except owncode.CodeError as error:
        raise OptimizerError(f"--optimizer {name}: {error}") from None


def of_timm(name: str) -> Callable[..., Any]:
    try:
        from timm import optim
    except ImportError:
        raise OptimizerError(
            f"--optimizer timm/{name} needs timm: pip install 'fastsmooth[timm]'"
        ) from None
    known = optim.list_optimizers()
    if name not in known:
        near = hint(name, known, "timm/") or f"there are {', '.join(known)}"
        raise OptimizerError(f"--optimizer timm/{name}: timm has no such optimizer: {near}")
    if optim.get_optimizer_info(name).second_order:
        raise OptimizerError(
            f"--optimizer timm/{name}: it wants second derivatives, which a step does not compute: "
            "use another"
        )
    return optim.get_optimizer_class(name, bind_defaults=True)


def check_driven(name: str, inner: torch.optim.Optimizer) -> None:
    """Raises OptimizerError for one whose step wants more than gradients."""
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptimizerError(
            f"--optimizer {name}: its step evaluates the loss again and again (a closure), where a "
            "run takes one gradient a batch: use another"
        )


def literal(text: str) -> Any:
    """A number, several (0.9,0.95), true, false or none; anything else as text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def described(signature: Any) -> str:
    """The arguments that --optimizer-args may give, with their defaults."""
    own = [p for key, p in signature.items() if key not in ("params", "lr", "weight_decay")]
    named = [p for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in named]
    return (" ".join(text.replace(", ", ",") for text in shown) or "no arguments")[:LONGEST]


def words(name: str, error: Exception) -> str:
    """An error of an optimizer in one line; of own code with its file and line."""
    if ".py:" in name:
        return owncode.fault(error, owncode.split(name)[0])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"


Driven = NoisySGD | Foreign  # what a run may be trained by
