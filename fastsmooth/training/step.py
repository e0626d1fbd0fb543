"""One training step: forward, loss, backward, update; compiled once for every batch size."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Bucket, Ranks
from fastsmooth.training.syncnorm import SyncBatchNorm


class Step:
    """gradient(x, y) leaves the mini-batch gradient in .grad; update() applies the optimizer's form
    to it.

    With compile=True the model goes through torch.compile, with the batch dimension marked dynamic,
    so that a schedule never compiles again; the update is one kernel either way. `compiled_graphs`
    counts what was compiled.

    `micro_batch`: at most so many samples go through the model together. With several `ranks`, each
    has its share of the batch, and all end with the same gradient and the same buffers: those of
    BatchNorm are the mean over the samples of what each process found for its share.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: NoisySGD,
        device: torch.device,
        precision: str,
        compile: bool,
        micro_batch: int | None = None,
        ranks: Ranks | None = None,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.autocast, self.compile = precision == "bf16", compile
        self.micro_batch, self.ranks = micro_batch, ranks or Ranks()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.joined = any(isinstance(m, SyncBatchNorm) for m in norms)
        self.normalises_batches = bool(norms)
        # what the processes exchange; the statistics of SyncBatchNorm are the same everywhere
        # already
        self._params = [p for p in model.parameters() if p.requires_grad]
        kept = [m for m in norms if m.running_mean is not None]
        own = [m for m in kept if not isinstance(m, SyncBatchNorm)]
        names = ("running_mean", "running_var")
        self._statistics = [m.get_buffer(name) for m in own for name in names]
        self._counts = [m.get_buffer("num_batches_tracked") for m in kept]
        self.compiled_graphs = 0
        self._bucket: Bucket | None = None
        self._forward = self._plain_forward
        if compile:
            never_guard_on_sizes()
            # else the graphs of earlier runs count: a process runs eagerly after eight
            torch.compiler.reset()
            self._forward = torch.compile(self._plain_forward, backend=self._counting_backend)

    def gradient(self, x: Tensor, y: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
        """(mean loss, number correct) of the batch, both 0-d on the device; fills .grad.

        x [b, 3, H, W] and y [b] are this process's share of a batch of `size` samples: all of it,
        where size is not given.
        """
        size = size or len(y)
        self.optimizer.zero_grad(set_to_none=True)
        sums: tuple[Tensor, Tensor] | None = None
        for part in self.parts(x, y):
            loss, correct = self._mean_loss(*part, self.autocast)
            # before the backward pass, in which SyncBatchNorm mixes the processes
            if len(part[1]) < size:
                loss = loss * (len(part[1]) / size)
            loss.backward()
            loss = loss.detach()
            sums = (loss, correct) if sums is None else (sums[0] + loss, sums[1] + correct)
        if sums is None:  # an empty share
            zero = torch.zeros((), device=self.device)
            sums = zero, zero
        return self._add_up(len(y) / size, *sums, size) if self.ranks.world > 1 else sums

    def parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes through the model together, of x [b, 3, H, W] and y [b]; an empty share does so
        only where the other processes wait for it."""
        if self.micro_batch and len(y) > self.micro_batch:
            return zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True)
        return iter([(x, y)] if len(y) or self.joined else [])

    def measured_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch with its graph, 0-d, in the mode the model is in: what a
        measurement differentiates.

        Never under autocast: with --precision bf16 rounding would add its own noise to that of the
        mini-batch.
        """
        return self._mean_loss(x, y, False)[0]

    def _mean_loss(self, x: Tensor, y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        if len(y) == 0:  # of an empty share: nothing, by way of the layers in which the others wait
            return self.model(x).sum() * 0.0, torch.zeros((), dtype=torch.int64, device=self.device)
        return self._forward_for(x, y)(x, y, autocast)

    @torch.no_grad()
    def _add_up(
        self, share: float, loss: Tensor, correct: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients, running statistics, loss and hits over all processes in one exchange."""
        if self._bucket is None:
            self._bucket = Bucket([*self._params, *self._statistics], extra=2)
        grads = []
        for p in self._params:
            if p.grad is None:  # an empty share
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        if self._statistics:
            torch._foreach_mul_(self._statistics, share)
        self._bucket.extra.copy_(torch.stack([loss, correct.to(loss.dtype)]))
        self._bucket.sum_(grads + self._statistics)
        # some share was empty, and BatchNorm not have counted the batch there
        if size < self.ranks.world:
            for count in self._counts:
                self.ranks.largest_(count)
        loss, correct = self._bucket.extra.clone()
        return loss, correct.round().to(torch.int64)

    def update(self) -> None:
        self.optimizer.step()

    def squared_norms(self) -> Tensor:
        """Those of the gradient that the last update applied and of its direction, over all
        parameters: [2] float64 on the device. Raises RuntimeError before the first."""
        squares = self.optimizer.sq_norms
        if squares is None:
            raise RuntimeError("no update was made yet")
        return squares

    def grad_norm(self) -> Tensor:
        """The L2 norm of the gradient that the last update applied, 0-d float64 on the device."""
        return self.squared_norms()[0].sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """(mean loss, accuracy) over all samples of `batches` in evaluation mode, each weighted the
        same; a batch is x [b, 3, H, W] and y [b].

        With several processes, each gives its own batches, and the means are over those of all.
        """
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
        samples = torch.full_like(loss_sum, count)
        sums = torch.stack([loss_sum, correct_sum.to(loss_sum.dtype), samples])
        self.ranks.sum_([sums])
        all_loss, all_correct, all_samples = sums.tolist()
        return all_loss / all_samples, all_correct / all_samples

    def _plain_forward(self, x: Tensor, y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
            logits = self.model(x)
        logits = logits.float()
        return F.cross_entropy(logits, y), (logits.argmax(dim=1) == y).sum()

    def _forward_for(
        self, x: Tensor, y: Tensor
    ) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
        """The compiled forward pass; a batch of one runs eagerly, since compilers treat size one as
        a constant."""
        if not self.compile or len(y) == 1:
            return self._plain_forward
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        return self._forward

    def _counting_backend(self, graph: Any, inputs: list[Any]) -> Any:
        # it takes long, and a run that compiles nothing needs none of it
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs)
        self.compiled_graphs += 1  # only now: Dynamo may call a backend again after it has failed
        return compiled


def never_guard_on_sizes() -> None:
    """Keep the compiler from specialising on ranges of the batch size, which would compile again as
    the batch grows.

    On the CPU, Inductor picks a summation by the size it first sees, and PyTorch's NNPACK asks for
    a batch of 16.
    """
    fx.backed_size_oblivious = True
    torch.backends.nnpack.set_flags(False)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step: returning it costs a page fault for
    every 4 kB of activations."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
