"""The processes of one run: those that torchrun started, or this one alone; and what they tell each
other.

Every process holds the whole model and its share of each batch. All sums go through flat tensors
whose layout depends on the model alone: so they are added in the same order at every update, which
a run that is taken up again in the same bits needs. The gradients of a batch travel in a few of
them while the backward pass still computes, and BatchNorm statistics and the loss with the last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# keys under which a process that fails says why
FIRST_WORDS, LAST_WORDS = "fastsmooth/first", "fastsmooth/ended"
BUCKETS = 4  # in which the gradients travel: the first goes when a quarter of them are there
ALIGNMENT = 128  # bytes: kernels read gradients 16 at a time, and a GPU's memory comes in lines


class RankLost(RuntimeError):
    """Another process of the run has ended; `words` is what it said of it: {"code", "state",
    "reason", "line"} or empty."""

    def __init__(self, words: dict[str, Any]):
        super().__init__(words.get("reason", "another process of the run was lost"))
        self.words = words


class Ranks:
    """This process's number among `world` processes; where it is alone, nothing is sent."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, local_world: int = 1):
        self.rank, self.world, self.local, self.local_world = rank, world, local, local_world
        self.leader = rank == 0
        self._vote: tuple[Tensor, dist.Work] | None = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """As torchrun's environment says; several processes meet here. CUDA tensors go over NCCL,
        others over gloo.

        Raises RankLost where the others do not come.
        """
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        ranks = cls(*(int(os.environ.get(name, otherwise)) for name, otherwise in names))
        if ranks.world > 1:
            on_gpu = device.type == "cuda"
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            with talking():
                dist.init_process_group(backend, device_id=device if on_gpu else None)
        return ranks

    def share(self, index: Tensor) -> Tensor:
        """This process's part of samples in order, int64 [B]: every `world`-th."""
        return index[self.rank :: self.world]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace the tensors, [...] of any shapes and one dtype, by their sums over the processes:
        the same bits everywhere. Raises RankLost."""
        if self.world > 1:
            bucket = Bucket(tensors)
            torch._foreach_copy_(bucket.parts, tensors)
            bucket.start()
            bucket.wait()
            torch._foreach_copy_(tensors, bucket.parts)

    def gather(self, value: Any) -> list[Any]:
        """The plain `value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with talking():
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Any) -> Any:
        """What the leader has, everywhere."""
        if self.world == 1:
            return value
        held = [value]
        with talking():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    @contextmanager
    def together(
        self, refusals: tuple[type[Exception], ...], raised: Callable[[str], Exception]
    ) -> Iterator[None]:
        """What one process refuses inside, all refuse, in the words of the first: raised(words)
        where it was another."""
        own = None
        try:
            yield
        except refusals as error:
            own = error
        said = [words for words in self.gather(str(own) if own else None) if words is not None]
        if own is not None and (self.world == 1 or said[0] == str(own)):
            raise own
        if said:
            raise raised(said[0])

    def vote(self, own: int) -> int:
        """The largest `own` that any process gave one call ago, the same everywhere at that call.

        One call late, so that nobody waits: the numbers travel beside the computation, and never
        through the device.
        """
        if self.world == 1:
            return own
        decided = 0
        with talking():
            if self._vote is not None:
                number, work = self._vote
                work.wait()
                decided = int(number)
            number = torch.tensor(own)
            self._vote = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        return decided

    def leave(self, words: dict[str, Any] | None = None) -> bool:
        """End the conversation; whether it is this process that tells the user how the run ended.

        Without `words` all leave together. With them this process leaves by itself, and the others,
        who wait for it, find its words (RankLost.words); of several that leave so, the first one's
        words stay, and it is the one to tell.
        """
        if self.world == 1:
            return True
        try:
            if words is None:
                if self._vote is not None:
                    self._vote[1].wait()
                dist.barrier()
                dist.destroy_process_group()
                return self.leader
            first = store().add(FIRST_WORDS, 1) == 1
            if first:
                store().set(LAST_WORDS, json.dumps(words))
            return first
        except Exception:  # whoever else was there is gone
            return words is not None or self.leader


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


@contextmanager
def talking() -> Iterator[None]:
    """A call that fails since a process is gone ends in RankLost."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if capturing:  # nothing was sent: it cannot be captured
            raise
        raise RankLost(last_words()) from error


def last_words() -> dict[str, Any]:
    """What the process that ended first said of it."""
    for _ in range(20):  # it may fail a moment before it speaks
        try:
            if store().check([LAST_WORDS]):
                return json.loads(store().get(LAST_WORDS))
        except Exception:  # no store, no words
            return {}
        time.sleep(0.05)
    return {}


class Bucket:
    """One flat tensor for tensors of the shapes and one dtype of `like`, with `extra` places at its
    end.

    `parts` lie in its memory, one for each tensor: with its strides, where it is dense, so that a
    copy is a plain one.
    """

    def __init__(self, like: Sequence[Tensor], extra: int = 0):
        unit = ALIGNMENT // like[0].element_size()
        starts = [0]
        for t in like:
            starts.append(starts[-1] + -(-t.numel() // unit) * unit)
        size = starts[-1] + extra
        self.flat = torch.zeros(size, dtype=like[0].dtype, device=like[0].device)
        self.parts = []
        for t, start in zip(like, starts, strict=False):
            strides = torch.empty_like(t, device="meta").stride()
            # .data: to autograd it is no view, since Dynamo fails to trace a parameter whose
            # gradient is one, where sizes are dynamic
            self.parts.append(self.flat.as_strided(t.shape, strides, start).data)
        self.extra = self.flat[starts[-1] :]
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Begin to replace what it holds by the sum over the processes. Raises RankLost."""
        with talking():
            self._work = dist.all_reduce(self.flat, async_op=True)

    def wait(self) -> None:
        """Until what was started is done: what the device is given from now on sees the sum.
        Raises RankLost."""
        if self._work is not None:
            with talking():
                self._work.wait()
            self._work = None


class Exchange:
    """Replaces the gradients of `params` by their sums over the processes, which begin while the
    backward pass still computes; the tensors `beside` and `extra` numbers travel with them.

    The gradients lie in buckets (in_buckets). One is started when all of its gradients are there
    and the one before it was started: so all processes start them in the same order, whatever the
    order in which their gradients come. The last one has what travels beside.

    Without `overlap` none is started before the backward pass is over, as it must be where that
    pass has exchanges of its own.
    """

    def __init__(self, params: Sequence[Tensor], beside: list[Tensor], extra: int, overlap: bool):
        self.groups, self.beside = in_buckets(params), beside
        *first, last = self.groups
        self.buckets = [*map(Bucket, first), Bucket([*last, *beside], extra)]
        self._parts_beside = self.buckets[-1].parts[len(last) :]
        self._missing = [0] * len(self.groups)  # gradients that are still to come
        self._started = len(self.groups)  # buckets; all of them, where none is expected
        for number, group in enumerate(self.groups if overlap else []):
            for p in group:
                p.register_post_accumulate_grad_hook(partial(self._came, number))

    @torch.no_grad()
    def expect(self, beside: list[Tensor], extra: Tensor) -> None:
        """Say that the next backward pass, if one comes before finish(), completes the gradients.

        `beside`, in the shapes of the tensors of that name, and the numbers `extra`, [extra], are
        what this process adds to the sums.
        """
        if self.beside:
            torch._foreach_copy_(self._parts_beside, beside)
        self.buckets[-1].extra.copy_(extra)
        self._missing = [len(group) for group in self.groups]
        self._started = 0

    def _came(self, number: int, _: Tensor) -> None:
        """The hook of every parameter: its gradient, in bucket `number`, is there."""
        self._missing[number] -= 1
        while self._started < len(self.groups) and self._missing[self._started] == 0:
            self._start()

    def _start(self) -> None:
        """Start the next bucket with the gradients that there are, and zeros for the others."""
        group, bucket = self.groups[self._started], self.buckets[self._started]
        found, grads = [], []
        for p, part in zip(group, bucket.parts, strict=False):
            if p.grad is None:
                part.zero_()
            else:
                found.append(part)
                grads.append(p.grad)
        if found:
            torch._foreach_copy_(found, grads)
        bucket.start()
        self._started += 1

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The sums, once all have come: the .grad of every parameter lies in its bucket, at the
        same address each time, in the shape, strides and dtype of the parameter; the tensors of
        `beside` hold theirs; the numbers are given back, [extra] in the dtype of the last bucket.

        What was not yet started is started first. Set every .grad to None before the next backward
        pass, or it is added to what lies there. Raises RankLost.
        """
        while self._started < len(self.groups):
            self._start()
        for group, bucket in zip(self.groups, self.buckets, strict=True):
            bucket.wait()
            for p, part in zip(group, bucket.parts, strict=False):
                p.grad = part
        if self.beside:
            torch._foreach_copy_(self.beside, self._parts_beside)
        return self.buckets[-1].extra.clone()


def in_buckets(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters, from the last to the first as their gradients come, in BUCKETS groups of
    about the same number of bytes, fewer where there are fewer parameters, more where there are
    several dtypes: each group has one.

    Their order, sizes and dtypes decide alone.
    """
    total = sum(p.nbytes for p in params)
    groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    before = 0
    for p in reversed(params):
        middle = before + p.nbytes / 2
        groups.setdefault((int(BUCKETS * middle / total), p.dtype), []).append(p)
        before += p.nbytes
    return list(groups.values())
