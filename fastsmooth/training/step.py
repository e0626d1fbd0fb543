"""One training step: forward, loss, backward, update; compiled once for every batch size."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx
from torch.nn.modules.batchnorm import _BatchNorm

from fastsmooth.foreign import Driven
from fastsmooth.freezing import FrozenNorm
from fastsmooth.kernels import backend
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.kernels.update import MOST_PARTS
from fastsmooth.noise.persample import SampleNorms, training_norms
from fastsmooth.ranks import Exchange, Ranks
from fastsmooth.training.mixing import Mixer
from fastsmooth.training.objective import Objective, among_likeliest, labels_of
from fastsmooth.training.sam import Sam
from fastsmooth.training.syncnorm import SyncBatchNorm

RECOMPILATIONS = 8  # of one size of images, after which PyTorch runs eagerly: its own default


class Tested(NamedTuple):
    """Means over test images."""

    loss: float
    accuracy: float
    top5: float | None  # accuracy within the five likeliest classes, where that is asked for


class Step:
    """gradient(x, y) leaves the mini-batch gradient in .grad; update() applies the optimizer's form
    to it.

    With compile=True the model goes through torch.compile, with the batch dimension marked dynamic,
    so that a schedule never compiles again; the update is one kernel either way. Each of so many
    `sizes` of images, which stay static, compiles once. `compiled_graphs` counts what was compiled.

    measured_gradient(x, y) does as gradient(x, y), with sums in another order, and keeps
    the norms of the samples in `norms`; `bn` is what they are of BatchNorm in training mode.

    `micro_batch`: at most so many samples go through the model together. Where that makes few parts
    of one size, the update takes their gradients as they are, and `spread`, float64 [parts], has
    ||g_k - mean||^2 of each afterwards; else they are added up. With several `ranks`, each
    has its share of the batch, and all end with the same gradient and the same buffers: those of
    BatchNorm are the mean over the samples of what each process found for its share.

    `clip_norm`: update() first scales a gradient that is longer down to it. `sam`: gradient()
    leaves the gradient of SAM in .grad. With either of them the gradients of parts are added up.
    `top5`: evaluate() looks at the five likeliest classes too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Driven,
        device: torch.device,
        precision: str,
        compile: bool,
        micro_batch: int | None = None,
        ranks: Ranks | None = None,
        bn: str | None = None,
        sizes: int = 1,
        objective: Objective = Objective(),  # noqa: B008  # a tuple, which nobody changes
        *,
        mixer: Mixer | None = None,
        clip_norm: float | None = None,
        sam: Sam | None = None,
        top5: bool = False,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.precision, self.autocast, self.compile = precision, precision == "bf16", compile
        # what full gradients are computed in, which leave autocast
        beside = "tf32" if device.type == "cuda" else "fp32"
        self.measures_in = beside if self.autocast else precision
        # of what products norms of samples are made: float32 is three of TF32 on a GPU
        thrice = precision == "fp32" and backend.choose(device, torch.float32) == "triton"
        self.norms_in = "tf32x3" if thrice else precision
        self.bn, self.objective, self.mixer, self.top5 = bn, objective, mixer, top5
        self.clip_norm, self.sam = clip_norm, sam
        self._norm: Tensor | None = None  # of the gradient of the last update before it was clipped
        self.norms: SampleNorms | None = None
        self.dtype = torch.bfloat16 if self.autocast else torch.float32  # of the images
        self.micro_batch, self.ranks = micro_batch, ranks or Ranks()
        norms = [
            m
            for m in model.modules()
            if isinstance(m, _BatchNorm) and not isinstance(m, FrozenNorm)
        ]
        self.joined = any(isinstance(m, SyncBatchNorm) for m in norms)
        self.normalises_batches = bool(norms)
        # what the processes exchange; the statistics of SyncBatchNorm are the same everywhere
        # already
        self._params = [p for p in model.parameters() if p.requires_grad]
        # the same as the optimizer has them, which takes the gradients of parts in its order
        groups = [group["params"] for group in optimizer.param_groups]
        self._in_groups = [p for params in groups for p in params if p.requires_grad]
        kept = [m for m in norms if m.running_mean is not None]
        own = [m for m in kept if not isinstance(m, SyncBatchNorm)]
        names = ("running_mean", "running_var")
        self._statistics = [m.get_buffer(name) for m in own for name in names]
        self._counts = [m.get_buffer("num_batches_tracked") for m in kept]
        self.spread = torch.zeros(MOST_PARTS, dtype=wide_dtype(device), device=device)
        self._apart: list[list[Tensor]] = []  # gradients of parts, where the update takes them so
        self.compiled_graphs = 0
        self._exchange: Exchange | None = None
        if self.ranks.world > 1:
            # SyncBatchNorm has exchanges of its own within the backward pass
            self._exchange = Exchange(self._params, self._statistics, 2, overlap=not self.joined)
        self._forward = self._plain_forward
        if compile:
            never_guard_on_sizes()
            # else the graphs of earlier runs count: a process runs eagerly after RECOMPILATIONS
            torch.compiler.reset()
            torch._dynamo.config.recompile_limit = RECOMPILATIONS * sizes
            self._forward = torch.compile(self._plain_forward, backend=self._counting_backend)

    def gradient(self, x: Tensor, y: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
        """(mean loss, number correct) of the batch, both 0-d on the device; fills .grad, or keeps
        the gradients of its parts for the update.

        x [b, C, H, W], of `dtype`, and y [b] are this process's share of a batch of `size` samples:
        all of it, where size is not given. With a `mixer` it is mixed first, as that has drawn.
        With SAM loss and hits are those at the weights.
        """
        size = size or len(y)
        if self.mixer is not None:
            x, y = self.mixer(x, y)
        sums = self._gradient(x, y, size)
        if self.sam is not None:
            self.sam.apply(self.model, self._params, lambda: self._gradient(x, y, size))
        return sums

    def _gradient(self, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """gradient() at the weights as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: tuple[Tensor, Tensor] | None = None
        parts, self._apart = list(self.parts(x, y)), []
        apart = self.parts_apart(len(y)) > 1
        for number, part in enumerate(parts, 1):
            loss, correct = self._mean_loss(*part, self.autocast)
            # before the backward pass, in which SyncBatchNorm mixes the processes
            weighted = loss * (len(part[1]) / size) if len(part[1]) < size else loss
            own = weighted.detach()
            sums = (own, correct) if sums is None else (sums[0] + own, sums[1] + correct)
            if number == len(parts):
                self._expect(len(y) / size, *sums)
            (loss if apart else weighted).backward()
            if apart:
                self._apart.append(
                    [torch.zeros_like(p) if p.grad is None else p.grad for p in self._in_groups]
                )
                self.optimizer.zero_grad(set_to_none=True)
        if sums is None:  # an empty share
            zero = torch.zeros((), device=self.device)
            sums = zero, zero
            self._expect(0.0, *sums)
        return self._add_up(self._exchange, size, len(parts)) if self._exchange else sums

    def measured_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As `gradient`, of a whole batch of a single process in one part.

        `norms` are those of its samples; the host reads none of their values. A batch whose kind is
        new is looked at first (sample_norms). Raises NotCovered.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with casting(self.device, self.precision):
            precision = operands(self.precision)
            self.norms, logits = training_norms(
                self.model, x, y, loss=self.objective.training, bn=self.bn, precision=precision
            )
        for p, g in zip(self._params, self.norms.grads, strict=True):
            p.grad = g if self.clip_norm is None else g.clone()  # the norms are of the whole
        return self.norms.loss, (logits.argmax(dim=1) == y).sum()

    def parts_apart(self, size: int) -> int:
        """In how many parts the update takes the gradient of a batch of `size` samples."""
        if self._exchange or not self.micro_batch or size % self.micro_batch:
            return 1
        if self.sam is not None or self.clip_norm is not None:
            return 1
        count = size // self.micro_batch
        return count if count <= MOST_PARTS else 1

    def parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes through the model together, of x [b, C, H, W] and y [b], or [b, classes] once
        it is mixed; an empty share does so only where the other processes wait for it."""
        if self.micro_batch and len(y) > self.micro_batch:
            return zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True)
        return iter([(x, y)] if len(y) or self.joined else [])

    def measured_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch with its graph, 0-d, in the mode the model is in: what full
        gradients, and the draws that are compared with them, differentiate.

        Never under autocast: over all images the noise of the mini-batch falls, that of rounding to
        bfloat16 does not.
        """
        return self._mean_loss(x, y, False)[0]

    def _mean_loss(self, x: Tensor, y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        if len(y) == 0:  # of an empty share: nothing, by way of the layers in which the others wait
            return self.model(x).sum() * 0.0, torch.zeros((), dtype=torch.int64, device=self.device)
        return self._forward_for(x, y)(x, y, autocast)

    def _expect(self, share: float, loss: Tensor, correct: Tensor) -> None:
        """Have the exchange begin in the backward pass that comes next, the last one of this batch:
        all but its gradients is known."""
        if self._exchange is None:
            return
        # not in place: autograd may have kept them for the backward pass
        weighted = list(torch._foreach_mul(self._statistics, share)) if self._statistics else []
        self._exchange.expect(weighted, torch.stack([loss, correct.to(loss.dtype)]))

    def _add_up(self, exchange: Exchange, size: int, parts: int) -> tuple[Tensor, Tensor]:
        """Gradients, running statistics, loss and hits over all processes; the last two are given
        back. This process's share went through the model in so many parts."""
        loss, correct = exchange.finish()
        # BatchNorm counts parts: as many everywhere as the first process has, whose share is the
        # largest
        largest = -(-size // self.ranks.world)
        most = -(-largest // (self.micro_batch or largest))
        if self._counts and parts < most:
            torch._foreach_add_(self._counts, most - parts)
        return loss, correct.round().to(torch.int64)

    @torch.no_grad()
    def show_gradient(self) -> None:
        """Have the gradient of the batch in .grad also where the update takes those of parts."""
        for grads in zip(self._in_groups, *self._apart, strict=True) if self._apart else ():
            p, *own = grads
            p.grad = torch.stack(own).mean(dim=0)

    def update(self) -> None:
        if self.clip_norm is not None:
            self._norm = nn.utils.clip_grad_norm_(self._params, self.clip_norm)
        if not self._apart:
            self.optimizer.step()
            return
        noise, _ = self.optimizer.step_along_mean(self._apart)
        self.spread[: len(noise)].copy_(noise)
        self._apart = []

    @property
    def squared_norms(self) -> Tensor:
        """||g||^2, before it was clipped, and ||m_t||^2 of the last update in parts whose sum they
        are, [parts, 2]."""
        norms = self.optimizer.partial_norms
        assert norms is not None  # of the update just made
        if self._norm is None:
            return norms
        return torch.stack([self._norm.to(norms.dtype).square(), norms[:, 1].sum()]).unsqueeze(0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tested:
        """Means over all samples of `batches` in evaluation mode, each weighted the same; a batch
        is x [b, C, H, W] and y [b].

        With several processes, each gives its own batches, and the means are over those of all.
        """
        self.model.eval()
        loss_sum = torch.zeros((), dtype=wide_dtype(self.device), device=self.device)
        hits = (2,) if self.top5 else (1,)
        correct_sum = torch.zeros(hits, dtype=torch.int64, device=self.device)
        count = 0
        for x, y in batches:
            loss, correct = self._forward_for(x, y)(x, y, self.autocast, True)
            loss_sum += loss.to(loss_sum.dtype) * len(y)
            correct_sum += correct
            count += len(y)
        self.model.train()
        samples = torch.full_like(loss_sum, count)
        sums = torch.stack([loss_sum, samples, *correct_sum.to(loss_sum.dtype)])
        self.ranks.sum_([sums])
        all_loss, all_samples, *all_correct = sums.tolist()
        accuracy, *top5 = [number / all_samples for number in all_correct]
        return Tested(all_loss / all_samples, accuracy, top5[0] if top5 else None)

    def _plain_forward(
        self, x: Tensor, y: Tensor, autocast: bool, testing: bool = False
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
            logits = self.model(x)
        logits = logits.float()
        loss = self.objective.testing if testing else self.objective.training
        value = loss(logits, y)
        if value.ndim:  # a value a sample, of own code
            value = value.mean()
        correct = (logits.argmax(dim=1) == labels_of(y)).sum()
        if testing and self.top5:
            correct = torch.stack([correct, among_likeliest(logits, y, 5)])
        return value, correct

    def _forward_for(self, x: Tensor, y: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        """The compiled forward pass; a batch of one runs eagerly, since compilers treat size one as
        a constant."""
        if not self.compile or len(y) == 1:
            return self._plain_forward
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        for side in (2, 3):  # Inductor takes strides of one size for those of all (PyTorch 2.14)
            torch._dynamo.mark_static(x, side)
        return self._forward

    def _counting_backend(self, graph: Any, inputs: list[Any]) -> Any:
        # it takes long, and a run that compiles nothing needs none of it
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs)
        self.compiled_graphs += 1  # only now: Dynamo may call a backend again after it has failed
        return compiled


def casting(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Inside, the forward pass of a model computes in what --precision names."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def operands(precision: str) -> str:
    """What sample_norms, under --precision, makes its products of float32 of."""
    return "tf32" if precision == "tf32" else "tf32x3"


def never_guard_on_sizes() -> None:
    """Keep the compiler from specialising on ranges of the batch size, which would compile again as
    the batch grows.

    On the CPU, Inductor picks a summation by the size it first sees, and PyTorch's NNPACK asks for
    a batch of 16.
    """
    fx.backed_size_oblivious = True
    torch.backends.nnpack.set_flags(False)


def return_freed_memory() -> None:
    """Give the system back what glibc has kept: where memory is limited, others than malloc have
    none else, such as oneDNN for the code that it generates."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


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
