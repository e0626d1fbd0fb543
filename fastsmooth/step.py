"""One training step: forward, loss, backward, update; compiled once for every batch size."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.optim import NoisySGD


class Step:
    """gradient(x, y) leaves the mini-batch gradient in .grad; update() applies the optimizer's form to it.

    With compile=True the model goes through torch.compile, with the batch dimension marked dynamic, so that a schedule
    never compiles again; the update is one kernel either way. `compiled_graphs` counts what was compiled.
    """

    def __init__(self, model: nn.Module, optimizer: NoisySGD, device: torch.device, precision: str, compile: bool):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.autocast, self.compile = precision == "bf16", compile
        self.compiled_graphs = 0
        self._forward = self._plain_forward
        if compile:
            never_guard_on_sizes()
            torch.compiler.reset()  # else the graphs of earlier runs count: a process runs eagerly after eight
            self._forward = torch.compile(self._plain_forward, backend=self._counting_backend)

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, number correct) of the batch [B, 3, H, W], [B], both 0-d on the device; fills .grad."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct = self._forward_for(x, y)(x, y, self.autocast)
        loss.backward()
        return loss.detach(), correct

    def measured_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch with its graph, 0-d, in the mode the model is in: what a measurement differentiates.

        Never under autocast: with --precision bf16 rounding would add its own noise to that of the mini-batch.
        """
        return self._forward_for(x, y)(x, y, False)[0]

    def update(self) -> None:
        self.optimizer.step()

    def grad_norm(self) -> Tensor:
        """The L2 norm of the gradient that the last update applied, over all parameters, 0-d float64 on the device."""
        return self.optimizer.sq_norms[0].sqrt()

    @torch.no_grad()
    def evaluate(self, batches) -> tuple[float, float]:
        """(mean loss, accuracy) over all samples of `batches` in evaluation mode, each weighted the same."""
        self.model.eval()
        loss_sum = torch.zeros((), dtype=wide_dtype(self.device), device=self.device)
        correct_sum = torch.zeros((), dtype=torch.int64, device=self.device)
        count = 0
        for x, y in batches:
            loss, correct = self._forward_for(x, y)(x, y, self.autocast)
            loss_sum += loss.to(loss_sum.dtype) * len(y)
            correct_sum += correct
            count += len(y)
        self.model.train()
        return loss_sum.item() / count, correct_sum.item() / count

    def _plain_forward(self, x: Tensor, y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            logits = self.model(x)
        logits = logits.float()
        return F.cross_entropy(logits, y), (logits.argmax(dim=1) == y).sum()

    def _forward_for(self, x: Tensor, y: Tensor) -> Callable:
        """The compiled forward pass; a batch of one runs eagerly, since compilers treat size one as a constant."""
        if not self.compile or len(y) == 1:
            return self._plain_forward
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        return self._forward

    def _counting_backend(self, graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs)
        self.compiled_graphs += 1  # only now: Dynamo may call a backend again after it has failed
        return compiled


def never_guard_on_sizes() -> None:
    """Keep the compiler from specialising on ranges of the batch size, which would compile again as the batch grows.

    On the CPU, Inductor picks a summation by the size it first sees, and PyTorch's NNPACK asks for a batch of 16.
    """
    from torch.fx.experimental import _config

    _config.backed_size_oblivious = True
    torch.backends.nnpack.set_flags(False)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step: returning it costs a page fault for every 4 kB of activations."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
