"""A CUDA graph played on a CPU: records what an update does, operator by operator and launch by
launch with their tensors, and does the same again on the same memory.

As a capture does, recording executes nothing in the end: what was written is put back. Where n
replays end in the bits of n ordinary updates, nothing of an update lives in Python. An operator
that reads a value from the device on the host fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastsmooth.kernels import augment, tally, update
from fastsmooth.training import build, device

HOST_READS = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_unique2")
}
KERNELS = (augment, tally, update)  # whose launches are recorded


class HostRead(RuntimeError):
    """The host read a value from the device, which a CUDA graph cannot hold."""


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> (all of it, what it held)
        self.within = False
        self.replays = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name
        if name in HOST_READS:
            raise HostRead(f"{name} reads a value from the device")
        schema = operator._schema.arguments
        named = dict(zip([a.name for a in schema], args, strict=False)) | kwargs
        for argument in schema:
            written = argument.alias_info is not None and argument.alias_info.is_write
            # batch_norm's schema does not tell that it moves these
            if written or argument.name in ("running_mean", "running_var"):
                self.keep(tensors_of(named.get(argument.name)))
        self.within = True  # a launch is part of the operator that makes it
        try:
            result = operator(*args, **kwargs)
        finally:
            self.within = False
        self.calls.append((operator, args, kwargs, result))
        return result

    def launch(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel's implementation, recorded as one call."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self.within:
                return kernel(*args, **kwargs)
            with _disable_current_modes():
                self.keep(tensors_of((args, kwargs)))
                result = kernel(*args, **kwargs)
            self.calls.append((kernel, args, kwargs, result))
            return result

        return recorded

    def keep(self, tensors: list[Tensor]) -> None:
        """What the tensors hold, before it is written over."""
        with _disable_current_modes(), torch.no_grad():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.before and storage.nbytes():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[storage.data_ptr()] = whole, whole.clone()

    def put_back(self) -> None:
        for whole, held in self.before.values():
            whole.copy_(held)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for call, args, kwargs, recorded in self.calls:
            given = {storage_of(t) for t in tensors_of((args, kwargs))}
            with torch._C._AutoDispatchBelowADInplaceOrView():
                result = call(*args, **kwargs)
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.ScriptObject) and hasattr(leaf, "wait"):
                    leaf.wait()  # of an exchange between processes
            if getattr(call, "__name__", "").startswith("empty"):
                continue  # its memory is there, and holds nothing yet
            for to, value in zip(tensors_of(recorded), tensors_of(result), strict=True):
                if storage_of(to) not in given and to.numel():
                    to.copy_(value)

    def reset(self) -> None:
        self.calls.clear()


class TapeRecorder:
    """As training.graphs.CudaRecorder."""

    def __init__(self, *_: Any) -> None:
        self.tapes: list[Tape] = []
        self.most_alive = 0

    def warm(self, update: Callable[[], None]) -> None:
        update()

    def fits(self) -> bool:
        return True

    def record(self, update: Callable[[], None]) -> Tape:
        tape, generator = Tape(), torch.get_rng_state()
        with launches_on(tape), tape:
            update()
        tape.put_back()
        torch.set_rng_state(generator)
        self.tapes.append(tape)
        self.most_alive = max(self.most_alive, sum(bool(tape.calls) for tape in self.tapes))
        return tape


def on_tapes() -> None:
    """In a process of its own: updates are captured on tapes where --graphs on asks for it."""
    build.CudaRecorder = TapeRecorder
    device.choose_graphs = lambda c, *others: c.graphs


@contextmanager
def launches_on(tape: Tape) -> Iterator[None]:
    """Inside, the kernels' launches are recorded too."""
    with ExitStack() as patches:
        for kernel in KERNELS:
            recorded = {name: tape.launch(f) for name, f in kernel.IMPLEMENTATIONS.items()}
            patches.enter_context(patch.dict(kernel.IMPLEMENTATIONS, recorded))
        yield
