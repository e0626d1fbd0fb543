"""The forward pass whose backward pass gives per-sample norms, in two ways.

Batched     the model sees the batch. Each of its parameters is used once, by a function that has a
            rule, with the samples in the first dimension. Compiled models go this way alone.
Lifted      the model sees one sample at a time, under torch.vmap, which batches all that it does.
            A function that has a rule sees all samples at once; a parameter that is used in any
            other way, or more than once, is one a sample (layers.Lift), so that its gradient is.
            Where the samples are in what the model makes of them is then no question.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.noise import hosts
from fastsmooth.noise.losses import NotCovered
from fastsmooth.noise.persample.layers import Lift, Made
from fastsmooth.noise.persample.rules import COMPOSED, RULES, Covered, Report, Wanted

Function = Callable[..., Any]
Names = dict[Tensor, str]  # of the trainable parameters, in the order of named_parameters


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments of a function, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class WithoutParameters(TorchFunctionMode):
    """Refuses every use of a parameter of `names`: in a loss it would be nobody's."""

    def __init__(self, names: Names):
        super().__init__()
        self.names = names

    def __torch_function__(
        self,
        function: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for p in tensors_in((*args, *(kwargs or {}).values())):
            if p in self.names:
                name = self.names[p]
                raise NotCovered(f"{name} is used by {function.__name__} in the loss: leave it out")
        return function(*args, **(kwargs or {}))


@contextmanager
def caches_aside(model: nn.Module) -> Iterator[None]:
    """Have what the modules keep from one call to the next as it was: tensors of one pass, with its
    graph, are of no use in another. Those of a pass before are not there meanwhile."""
    kept = [
        (module, name, value.copy() if isinstance(value, dict | list) else value)
        for module, name, value in attributes(model)
    ]
    for _, _, value in attributes(model):
        if isinstance(value, dict):
            for key in [key for key, v in value.items() if of_a_pass(v)]:
                del value[key]
    try:
        yield
    finally:
        for module, name, value in kept:
            vars(module)[name] = value


PLAIN = {bool, int, float, str, tuple}
KEEPERS = (dict, list, Tensor, type(None))


def attributes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, name, value) of what modules have beside parameters, buffers and modules, and may
    keep tensors in."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        # the first is asked of every attribute of a network at every pass
        if type(value) not in PLAIN and name[0] != "_" and isinstance(value, KEEPERS)
    ]


def of_a_pass(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def keeps_tensors(model: nn.Module) -> bool:
    """Whether a module has tensors by some key, as those have that keep them for the next call."""
    return any(
        isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
        for _, _, value in attributes(model)
    )


class OtherSize(NotCovered):
    """An input of a layer does not have the samples in its first dimension."""


class Probes:
    """One a module that owns trainable parameters: [2, B], wide, of zeros."""

    def __init__(self, names: Names, batch: int, device: torch.device):
        def probe(needed: bool) -> Tensor:
            dtype = wide_dtype(device)
            return torch.zeros(2, batch, dtype=dtype, device=device, requires_grad=needed)

        self.module = {p: name.rpartition(".")[0] for p, name in names.items()}
        self.by_module = {module: probe(True) for module in self.module.values()}
        self.spare = probe(False)  # of functions without trainable parameters

    def of(self, held: list[Tensor]) -> Tensor:
        return self.by_module[self.module[held[0]]] if held else self.spare


class Batched(TorchFunctionMode):
    """Has each layer with a parameter of `names` report to its probe; refuses other uses of one.

    `used` are the parameters that were seen.
    """

    def __init__(self, names: Names, batch: int, device: torch.device, wanted: Wanted):
        super().__init__()
        self.names, self.batch, self.wanted = names, batch, wanted
        self.probes = Probes(names, batch, device)
        self.used: set[Tensor] = set()

    def again(self) -> Batched:
        """The same, reporting to the same probes, where a part of the pass is computed again."""
        other = copy.copy(self)
        other.used = set()
        return other

    def __torch_function__(
        self,
        function: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        held = [p for p in tensors_in((*args, *kwargs.values())) if p in self.names]
        # without a gradient: compiled code, whose layers reported when it was traced
        if not (held or function is F.batch_norm) or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        covered = RULES.get(function)
        if covered is None:
            result = function(*args, **kwargs)
            if any(t.requires_grad for t in tensors_in([result])):
                raise NotCovered(f"{self.names[held[0]]} is used by {name_of(function)}")
            return result  # a fact about the parameter, as its shape, or its value without a graph
        for p in held:
            if p in self.used:
                raise NotCovered(f"{self.names[p]} is used more than once")
            self.used.add(p)
        try:
            return self.call(covered, held, *args, **kwargs)
        except NotCovered as error:
            raise type(error)(f"{named(self.names, held)}{error}") from None

    def call(
        self, covered: Covered, held: list[Tensor], input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A rule for an input [B, ...], each of whose samples is a batch of one."""
        if input.shape[0] != self.batch:
            raise OtherSize(
                f"its input {list(input.shape)} for {self.batch} samples does not have them in its "
                "first dimension"
            )
        report = Report(self.probes.of(held), self.wanted)
        return covered.rule(report, input[:, None], *args, **kwargs).flatten(0, 1)


def name_of(function: Function) -> str:
    """As it is written: that of an attribute is T, for Tensor.T.__get__."""
    if function.__name__ == "__get__":
        return getattr(function, "__self__", function).__name__
    return function.__name__


def named(names: Names, held: list[Tensor]) -> str:
    return f"{names[held[0]]}: " if held else ""


@dataclass
class Plan:
    """What becomes of the parameters that no rule takes as they are."""

    lifted: set[Tensor] = field(default_factory=set)  # one a sample
    made: set[Tensor] = field(default_factory=set)  # what weights are made of


@dataclass
class Call:
    """A call of a function that has a rule: the parameters behind its weight and its bias."""

    covered: Covered
    weight: set[Tensor]
    bias: set[Tensor]
    by_itself: bool  # the weight is a parameter


@dataclass
class Survey:
    """Where the parameters of a model meet its samples."""

    calls: list[Call] = field(default_factory=list)
    others: list[set[Tensor]] = field(default_factory=list)  # uses without a rule

    @property
    def met(self) -> set[Tensor]:
        """The parameters that did."""
        parts = [part for call in self.calls for part in (call.weight, call.bias)]
        return set().union(*parts, *self.others)

    def plan(self) -> Plan:
        """By rule is what a single rule uses, itself or as the only weight that is made of it."""
        meetings = [part for call in self.calls for part in (call.weight, call.bias)] + self.others
        count: dict[Tensor, int] = {}
        for p in (p for part in meetings for p in part):
            count[p] = count.get(p, 0) + 1
        lifted = {p for part in self.others for p in part} | {p for p in count if count[p] > 1}
        before = -1
        while len(lifted) > before:  # a weight that cannot go by rule takes the rest of it along
            before = len(lifted)
            for call in self.calls:
                alone = call.covered.behind_bias is None and call.bias & lifted
                if call.weight & lifted or alone:
                    lifted |= call.weight | call.bias
        made = {p for call in self.calls if not call.by_itself for p in call.weight}
        return Plan(lifted, made - lifted)


class Fold(torch.autograd.Function):
    """A function of whole batches, called within torch.vmap: it gets its tensors as [B, ...]."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: under vmap autograd sees what the function itself is made of."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], function: Callable[..., Tensor], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        return function(*(t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True))), 0


def is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


@functools.cache
def signature(rule: Callable[..., Tensor]) -> inspect.Signature:
    return inspect.signature(rule)


class Lifted(TorchFunctionMode):
    """The forward pass of one sample within torch.vmap; `survey`, where there is one, is told where
    the parameters meet the samples, and every function that can goes by its rule."""

    def __init__(
        self,
        names: Names,
        batch: int,
        device: torch.device,
        wanted: Wanted,
        plan: Plan,
        survey: Survey | None = None,
    ):
        super().__init__()
        self.names, self.wanted, self.plan, self.survey = names, wanted, plan, survey
        self.probes = Probes(names, batch, device)
        self.inside: dict[Tensor, Tensor] = {}  # the lifted parameters, of one sample
        self.reported: set[Tensor] = set()

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """The outputs [B, ...] of the model for x [B, ...]."""
        order = [p for p in self.names if p in self.plan.lifted]
        lifted = [Lift.apply(p, self.probes.of([p]), self.wanted.noise) for p in order]

        def one(x: Tensor, *lifted: Tensor) -> Tensor:
            self.inside = dict(zip(order, lifted, strict=True))
            with self, caches_aside(model), hosts.kept():
                output = model(x[None])
            if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != 1:
                shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise NotCovered(f"the output for one sample is {shape}, not a tensor [1, ...]")
            return output[0]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.vmap(one, randomness="different")(x, *lifted)

    def __torch_function__(
        self,
        function: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in COMPOSED:
            with self:
                return COMPOSED[function](*args, **kwargs)
        if function in RULES:
            given = signature(RULES[function].rule).bind(None, *args, **kwargs).arguments
            if is_batched(given["input"]):
                found = self.by_rule(RULES[function], given)
                if found is not None:
                    return found
        args, kwargs = self.lift(args), {key: self.lift(v) for key, v in kwargs.items()}
        held = list(tensors_in((*args, *kwargs.values())))
        if any(map(is_batched, held)):
            others = [self.parents(t) for t in held if not is_batched(t)]
            if self.survey is not None:
                self.survey.others += others
            elif any(others):
                self.refuse(set().union(*others))
        return FOLDED.get(function, function)(*args, **kwargs)

    def by_rule(self, covered: Covered, given: dict[str, Any]) -> Tensor | None:
        """What a rule gives for the arguments `given`; None where it cannot have its weight."""
        given = {key: v for key, v in given.items() if key != "report"}
        weight, bias = given.get("weight"), given.get("bias")
        of_weight, of_bias = self.parents(weight), self.parents(bias)
        by_itself = weight is None or not of_weight or weight in self.names
        if is_batched(weight) or of_weight & self.plan.lifted or not (by_itself or covered.made):
            return None
        late = None  # a bias that is added afterwards
        if is_batched(bias) or of_bias & self.plan.lifted or (of_bias and bias not in self.names):
            if covered.behind_bias is None:
                return None
            late = self.lift(bias)[(..., *[None] * covered.behind_bias)]
            given |= {"bias": None}
        taken = set() if late is not None else of_bias
        if self.survey is not None:
            self.survey.calls.append(Call(covered, of_weight, taken, by_itself))
            self.survey.others += [of_bias] if late is not None else []
        elif self.reported & (of_weight | taken):
            self.refuse(self.reported & (of_weight | taken))
        self.reported |= of_weight | taken
        held = [p for p in self.names if p in of_weight | taken]
        made = None
        if weight is not None and not by_itself:
            made = Made(weight, [p for p in self.names if p in of_weight])
        report = Report(self.probes.of(held), self.wanted, made)
        input = given.pop("input")
        try:
            y = Fold.apply(lambda x: covered.rule(report, x, **given), input)
        except NotCovered as error:
            raise NotCovered(f"{named(self.names, held)}{error}") from None
        return y if late is None else y + late

    def refuse(self, params: set[Tensor]) -> None:
        """As when a model takes another path than it took when it was looked at."""
        name = next(name for p, name in self.names.items() if p in params)
        raise NotCovered(f"{name} is used in another way than in the call before")

    def lift(self, value: Any) -> Any:
        """An argument with the lifted parameters in the place of those that they are."""
        if isinstance(value, Tensor):
            return self.inside.get(value, value)
        if isinstance(value, tuple | list):
            return type(value)(map(self.lift, value))
        return value

    def parents(self, value: Any) -> set[Tensor]:
        """The trainable parameters that a tensor is, or is made of; of none that is batched."""
        if not isinstance(value, Tensor) or is_batched(value) or not value.requires_grad:
            return set()
        if value in self.names:
            return {value}
        found, seen, left = set(), set(), [value.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf in self.names:
                found.add(leaf)
            left += [before for before, _ in node.next_functions]
        return found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> Tensor:
    """F.scaled_dot_product_attention, for which vmap has no rule on a CPU: samples and the first
    dimension become one."""
    function = F.scaled_dot_product_attention
    parts = [query, key, value]
    if query.ndim < 3 or not all(map(is_batched, parts)):
        return function(query, key, value, attn_mask, *args, **kw)

    def folded(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        lead, mask = query.shape[:2], attn_mask
        if masks:
            mask = masks[0][(slice(None), *[None] * (query.ndim - masks[0].ndim))]
            mask = mask.expand(*lead, *mask.shape[2:]).flatten(0, 1)
        elif mask is not None and mask.ndim == query.ndim - 1 and len(mask) > 1:
            mask = mask.expand(len(query), *mask.shape).flatten(0, 1)
        q, k, v = (t.flatten(0, 1) for t in (query, key, value))
        return function(q, k, v, mask, *args, **kw).unflatten(0, lead)

    return Fold.apply(folded, *parts, *([attn_mask] if is_batched(attn_mask) else []))


# What vmap would do sample by sample.
FOLDED: dict[Function, Function] = {F.scaled_dot_product_attention: attention}
